import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from oracles import FAILURE_RATE, assert_law
from scipy import stats

import attnmarkov as am
from attnmarkov.dynamics.basins import basins, compositions, count_grid
from attnmarkov.dynamics.frequencies import fit_constants, predicted_frequencies
from attnmarkov.dynamics.passage import predicted_time_to_share, time_to_share
from attnmarkov.dynamics.urn_law import urn_winners
from attnmarkov.dynamics.winner_probabilities import winner_probabilities
from attnmarkov.plot.basins import basins as plot_basins

TWO = np.array([[0.7, 0.3], [0.45, 0.55]])
PAIR = [[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]]  # {0, 1} can win, and 2 alone


def two_token_counts(p, counts, last, num_steps):
    """Exact law of the count of token 0, by dynamic programming on (count, last token)."""
    n0, n1 = counts
    mass = np.zeros((2, n0 + num_steps + 1))
    mass[last, n0] = 1
    for t in range(num_steps):
        a = np.arange(mass.shape[1])
        b = np.maximum(n0 + n1 + t - a, 0)
        to_0 = p[:, :1] * a / (p[:, :1] * a + p[:, 1:] * b)
        stay = mass * to_0
        mass = np.stack([np.roll(stay.sum(0), 1), (mass - stay).sum(0)])
    return mass.sum(0)


def decided(p, counts, last, num_steps, tolerance):
    """Probabilities that token 0, token 1, or none has at least ``1 - tolerance``."""
    law = two_token_counts(p, counts, last, num_steps)
    share = np.arange(law.size) / (sum(counts) + num_steps)
    first = law[share >= 1 - tolerance - 1e-12].sum()
    second = law[share <= tolerance + 1e-12].sum()
    return np.array([first, second, 1 - first - second])


def test_two_tokens_against_dynamic_programming(key):
    model = am.CCMC.from_transition_matrix(TWO)
    found = winner_probabilities(model, key, [0, 1, 1], 8000, 300, tolerance=0.15)
    exact = decided(TWO, (1, 2), 1, 300, 0.15)
    assert found.sets == ((0,), (1,))
    assert_law(found.decided[:, None], {(0,): exact[0], (1,): exact[1], (-1,): exact[2]})
    assert found.num_undecided == (found.decided < 0).sum() > 0
    low, high = found.intervals
    assert (low < exact[:2]).all()
    assert (exact[:2] + exact[2] < high).all()  # undecided ones may go to either
    assert found.probabilities.sum() == pytest.approx(1 - found.num_undecided / 8000)
    assert "undecided" in repr(found)
    again = winner_probabilities(model, key, [0, 1, 1], 5, 300, tolerance=0.15, first_replicate=7)
    np.testing.assert_array_equal(again.shares, found.shares[7:12])


def test_basins_against_dynamic_programming(key):
    counts = np.array([[1, 1], [5, 1], [1, 5], [3, 3], [4, 0]])
    found = basins(
        am.CCMC.from_transition_matrix(TWO), key, counts, [0, 1, 1, 0, 0], 2000, 300, tolerance=0.15
    )
    for i, (row, last) in enumerate(zip(counts, found.last, strict=True)):
        exact = decided(TWO, row, last, 300, 0.15) if row.all() else np.array([1, 0, 0])
        observed = np.append(found.hits[i], found.num_undecided[i])
        assert observed.sum() == 2000
        cells = exact * 2000 > 5
        assert observed[exact == 0].sum() == 0
        if cells.sum() > 1:
            expected = exact[cells] * observed[cells].sum() / exact[cells].sum()
            assert stats.chisquare(observed[cells], expected).pvalue > FAILURE_RATE / 5
        low, high = found.interval(0)[:, i]
        assert low <= found.probability({0})[i] <= high
    assert found.hits[4].tolist() == [2000, 0]  # token 1 is not there
    with pytest.raises(ValueError, match=r"winner: \(0, 1\) is no winner set"):
        found.probability([0, 1])
    ax = plot_basins(found)
    assert ax.get_xlabel() == "count of token 0"
    colours = ax.collections[0].get_array()
    assert colours is not None
    grid = np.ma.filled(colours, np.nan)
    assert grid.reshape(6, 5)[1, 4] == found.hits[1, 0] / 2000  # rows are counts of token 1


def test_winner_sets_are_those_of_the_tokens_in_the_prompt(key):
    model = am.CCMC.from_transition_matrix(PAIR)
    found = winner_probabilities(model, key, [0, 1, 2], 200, 20_000)
    assert found.sets == ((2,), (0, 1))
    near = found.decided == 1
    assert near.sum() > 100
    np.testing.assert_allclose(found.shares[near][:, :2].mean(0), 0.5, atol=0.1)
    one = winner_probabilities(model, key, [2, 2], 200, 20_000)
    assert one.sets == ((2,),)
    assert (one.decided == 0).all()
    both = winner_probabilities(model, key, [0, 2], 200, 20_000)
    assert set(both.sets) <= {(0,), (2,), (0, 2)}
    assert (both.shares[:, 1] == 0).all()
    grid = basins(model, key, compositions(4), 0, 50, 2000, tolerance=0.3)
    assert grid.sets == ((2,), (0, 1))
    figure = Figure()
    ax = plot_basins(grid, (0, 1), ax=figure.subplots())
    colours = ax.collections[0].get_array()
    assert colours is not None
    np.testing.assert_allclose(colours, grid.hits[:, 1] / 50)
    assert "tokens 0, 1 win" in figure.axes[1].get_ylabel()
    with pytest.raises(ValueError, match="winner"):
        plot_basins(grid, 0)


def test_urns_follow_their_exact_law(key):
    tied = am.CCMC.from_transition_matrix([[0.4, 0.4, 0.2]] * 3)
    found = winner_probabilities(tied, key, [0, 1, 1, 2, 2], 4000)
    assert found.num_steps == 10**9
    assert found.sets == ((0, 1),)
    assert (found.decided == 0).all()
    beta = found.shares[:, 0] / found.shares[:, :2].sum(axis=1)  # error below 1e-4
    assert stats.kstest(beta, stats.beta(1, 2).cdf).pvalue > FAILURE_RATE
    tokens, concentration = urn_winners(tied, [1, 2, 2])
    assert tokens.tolist() == [0, 1]
    assert concentration.tolist() == [1, 2]
    distinct = am.CCMC.from_transition_matrix([[0.6, 0.3, 0.1]] * 3)
    alone = winner_probabilities(distinct, key, [1, 2, 2], 500)
    assert alone.sets == ((1,),)  # token 0 is not there
    assert (alone.decided == 0).all()
    with pytest.raises(ValueError, match="model: rows 0 and 1 of P differ"):
        urn_winners(am.CCMC.from_transition_matrix(TWO), [1, 1])
    with pytest.raises(ValueError, match="counts: expected 3 numbers"):
        urn_winners(tied, [1, 1])
    masked = am.CCMC.from_transition_matrix([[1.0, 0.0]] * 2)
    with pytest.raises(ValueError, match="no token of the prompt can come"):
        urn_winners(masked, [0, 3])


@pytest.mark.parametrize("token", [0, None])
def test_time_to_share_against_dynamic_programming(token, key):
    """First passages of 80 % of the history, by dynamic programming that stops there."""
    mass, law, steps = {(1, 1): 1.0}, {}, 40  # (count of token 0, last), of 2 + t tokens
    for t in range(1, steps + 1):
        after = {}
        for (a, last), probability in mass.items():
            w = TWO[last] * [a, 1 + t - a]
            for j in (0, 1):
                n = a + (j == 0)
                top = n if token == 0 else max(n, 2 + t - n)
                where = law if 10 * top >= 8 * (2 + t) else after
                name = (t,) if where is law else (n, j)
                where[name] = where.get(name, 0) + probability * w[j] / w.sum()
        mass = after
    law[(-1,)] = sum(mass.values())
    model = am.CCMC.from_transition_matrix(TWO)
    found = time_to_share(model, key, [0, 1], 0.8, token, 8000, steps)
    assert_law(found.times[:, None], law)
    assert found.num_censored == (found.times < 0).sum() > 0
    value, low, high = found.quantile(0.25)
    assert low <= value <= high
    exact = np.cumsum([law.get((t,), 0) for t in range(steps + 1)])
    assert exact[int(low) - 1] < 0.25 <= exact[int(high)]
    if token == 0:
        at_once = time_to_share(model, key, [0, 0, 0, 0, 1], 0.8, 0, 8000, steps)
        assert (at_once.times == 0).all()


def test_predicted_time_to_share():
    """An urn's flow: n_1 = b (n_0 / a) ** (1 / 4), so a share of 0.9 comes at n_0 = 9 n_1."""
    model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.8, 0.2]])
    n = 3 * (9 * 5 / 3) ** (4 / 3)
    exact = n * 10 / 9 - 8
    assert predicted_time_to_share(model, [3, 5], 0.9) == pytest.approx(exact, rel=1e-2)
    assert predicted_time_to_share(model, [3, 5], 0.9, token=1) == np.inf
    assert predicted_time_to_share(model, [95, 5], 0.9, token=0) == 0
    with pytest.raises(ValueError, match=r"token: 2 is outside 0\.\.1"):
        predicted_time_to_share(model, [3, 5], token=2)


def test_predicted_frequencies_are_power_laws():
    model = am.CCMC.from_transition_matrix([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    steps = np.array([10.0, 1000.0, 100_000.0])
    shares = predicted_frequencies(model, 0, steps, [[9.0, 0.5, 0.2], [9.0, 0.1, 0.0]])
    np.testing.assert_allclose(shares[0, :, 1], 0.5 * steps ** (0.8 - 1), rtol=1e-6)
    np.testing.assert_allclose(shares[0, :, 2], 0.2 * steps ** (0.2 - 1), rtol=1e-6)
    np.testing.assert_allclose(shares.sum(-1), 1)
    fitted = fit_constants(model, 0, steps, shares)
    np.testing.assert_allclose(fitted, [[1, 0.5, 0.2], [1, 0.1, 0]], rtol=1e-6)
    early = predicted_frequencies(model, 0, [1e-3], [1.0, 1.0, 1.0])
    assert early[0, 0] == 0  # before the law holds
    pair = am.CCMC.from_transition_matrix(PAIR)
    both = predicted_frequencies(pair, {0, 1}, [16.0], [0, 0, 0.4])
    np.testing.assert_allclose(both, [[0.45, 0.45, 0.1]], rtol=1e-6)  # lambda_2 = 1/2
    for bad, message in (([0.0], "steps: must be positive"), ([], "steps: expected a non-empty")):
        with pytest.raises(ValueError, match=message):
            predicted_frequencies(model, 0, bad, [1, 1, 1])
    with pytest.raises(ValueError, match="constants: expected 3 entries"):
        predicted_frequencies(model, 0, [1.0], [1, 1])
    with pytest.raises(ValueError, match="shares: expected 1 steps of 3 tokens"):
        fit_constants(model, 0, [1.0], [1, 1, 1])


def test_continua_win(key):
    """Tokens 0 and 1 have equal rows, so that they share what they win as in an urn."""
    twins = am.CCMC.from_transition_matrix([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6]])
    found = winner_probabilities(twins, key, [0, 1, 2], 200, 20_000)
    assert found.sets == ((2,), (0, 1))
    assert found.num_undecided < 30
    pair = found.shares[found.decided == 1, :2]
    assert (pair.sum(axis=1) >= 0.9 - 1e-9).all()
    assert pair[:, 0].std() > 0.15  # any shares remain
    alone = winner_probabilities(twins, key, [0, 1], 50, 300)
    assert alone.sets == ((0, 1),)
    assert (alone.decided == 0).all()


@pytest.mark.parametrize(("exponent", "temperature"), [(2.0, 1.0), (1.0, 0.5)])
def test_powers_against_enumeration(exponent, temperature, key):
    """By dynamic programming on (count of token 0, last), 40 steps."""
    q, a, steps = TWO ** (1 / temperature), exponent / temperature, 40
    mass = {(1, 1): 1.0}
    for t in range(steps):
        after = {}
        for (n, last), probability in mass.items():
            w = q[last] * np.array([n, 2 + t - n], float) ** a
            for j in (0, 1):
                name = (n + (j == 0), j)
                after[name] = after.get(name, 0) + probability * w[j] / w.sum()
        mass = after
    law = np.zeros(steps + 3)
    for (n, _), probability in mass.items():
        law[n] += probability
    model = am.CCMC.from_transition_matrix(TWO)
    options = {"exponent": exponent, "temperature": temperature}
    found = winner_probabilities(model, key, [0, 1], 4000, steps, **options)
    assert found.sets == ((0,), (1,))
    counts = np.rint(found.shares[:, :1] * (steps + 2)).astype(int)
    assert_law(counts, {(n,): p for n, p in enumerate(law) if p > 0})
    some = basins(model, key, [[1, 1]], 1, 4000, steps, **options)
    np.testing.assert_array_equal(some.hits[0], found.hits)


def test_weak_reinforcement_mixes(key):
    model = am.CCMC.from_transition_matrix(TWO)
    found = winner_probabilities(model, key, [0, 1], 50, 20_000, exponent=0.5)
    assert found.sets == ((0, 1),)
    assert (found.decided == 0).all()
    with pytest.raises(ValueError, match="temperature"):
        winner_probabilities(model, key, [0, 1], temperature=0)
    with pytest.raises(ValueError, match="exponent"):
        basins(model, key, [[1, 1]], exponent=np.nan)


def test_what_cannot_win_has_no_power_laws():
    model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.7, 0.3]])
    with pytest.raises(ValueError, match=r"winner: \[1\] cannot win beside token 0, .* 2.33333"):
        predicted_frequencies(model, 1, [1, 1e6], [0.5, 0.5])
    np.testing.assert_allclose(predicted_frequencies(model, 1, [9.0], [0, 1]), [[0, 1]])  # alone
    for winner in (np.array(0), {0: "a"}.keys(), [0]):
        shares = predicted_frequencies(model, winner, [16.0], [0, 0.4])
        np.testing.assert_allclose(shares[0, 1], 0.4 * 16**-0.75, rtol=1e-6)


def test_a_share_of_one_takes_for_ever():
    model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.8, 0.2]])
    for token in (None, 0):
        assert predicted_time_to_share(model, [5, 5], 1.0, token) == np.inf
        assert predicted_time_to_share(model, [5, 0], 1.0, token) == 0
    exact = 5 * 999_999 ** (4 / 3) * 1e6 / 999_999  # n_1 = 5 (n_0 / 5) ** (1 / 4)
    assert predicted_time_to_share(model, [5, 5], 1 - 1e-6) == pytest.approx(exact, rel=2e-2)
    assert predicted_time_to_share(model, [55, 45], 0.55) == 0


def test_basins_take_a_query_that_the_prompt_holds(key):
    model = am.CCMC.from_transition_matrix(PAIR)
    counts = [[0, 2, 1], [3, 0, 0], [0, 0, 2]]
    found = basins(model, key, counts, num_trajectories=4, num_steps=50)
    assert found.last.tolist() == [1, 0, 2]
    given = basins(model, key, counts, found.last, num_trajectories=4, num_steps=50)
    np.testing.assert_array_equal(found.hits, given.hits)
    place = found.index(2)
    for winner in (np.int64(2), np.array(2), {2}, np.array([2])):
        assert found.index(winner) == place
    ax = plot_basins(found, np.flatnonzero([0, 0, 1])[0], ax=Figure().subplots())
    assert ax.figure is not None
    assert "token 2 wins" in ax.figure.axes[1].get_ylabel()


def test_grids_of_counts():
    assert len(count_grid(4, 0)) == 24  # no empty prompt
    grid = compositions(6, 3, 0)
    assert len({tuple(row) for row in grid}) == len(grid) == 28
    assert (grid.sum(axis=1) == 6).all()
    assert compositions(3).tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match="total: 3 tokens of at least 1 need 3, got 2"):
        compositions(2)
    with pytest.raises(ValueError, match="least: must be at most most = 2, got 3"):
        count_grid(2, 3)


def test_bad_arguments(key):
    model = am.CCMC.from_transition_matrix(TWO)
    with pytest.raises(ValueError, match="prompt: expected one prompt, got 2; see basins"):
        winner_probabilities(model, key, [[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="tolerance: must lie strictly between 0 and 1, got 1"):
        winner_probabilities(model, key, [0, 1], tolerance=1)
    with pytest.raises(ValueError, match="level: must lie strictly between 0 and 1, got 0"):
        basins(model, key, [[1, 1]], level=0)
    with pytest.raises(ValueError, match="counts: over 3 tokens, but the model has 2"):
        basins(model, key, [[1, 1, 1]])
    with pytest.raises(ValueError, match=r"last: expected shape \(1,\), got \(2,\)"):
        basins(model, key, [[1, 1]], [0, 1])
    with pytest.raises(ValueError, match="num_steps: must be at least 1, got 0"):
        winner_probabilities(model, key, [0, 1], num_steps=0)
    with pytest.raises(ValueError, match=r"share: must lie in \(0, 1\], got 1.5"):
        time_to_share(model, key, [0, 1], 1.5)
    with pytest.raises(ValueError, match=r"token: 2 is outside 0\.\.1"):
        time_to_share(model, key, [0, 1], token=2)
    four = am.CCMC.from_transition_matrix(np.full((4, 4), 0.25))
    grid = basins(four, jax.random.key(0), [[1, 1, 1, 1]], 0, 2)
    with pytest.raises(ValueError, match="basins: expected two or three tokens, got 4"):
        plot_basins(grid)
