import itertools

import jax
import numpy as np
import pytest
from oracles import (
    FAILURE_RATE,
    assert_law,
    assert_mean,
    context_law,
    greedy,
    hf_sampling,
    trajectory_law,
)
from scipy import stats

import attnmarkov as am
from attnmarkov import _intervals
from attnmarkov.dynamics import _absorb
from attnmarkov.dynamics.absorption import absorption
from attnmarkov.dynamics.absorption_sample import absorption_monte_carlo
from attnmarkov.dynamics.absorption_table import absorption_table

TWO = [[0.6, 0.4], [0.35, 0.65]]
THREE = [[0.2, 0.3, 0.5], [0.4, 0.2, 0.4], [0.1, 0.55, 0.35]]
CYCLE = [[0.2, 0.8, 0.0], [0.0, 0.3, 0.7], [0.6, 0.0, 0.4]]


def weigh(context):
    """Weight of position i of a history of L tokens."""
    if isinstance(context, am.LagContext):
        w = np.asarray(context.weights)
        return lambda i, length, _: w[length - 1 - i] if length - 1 - i < len(w) else 0.0
    return lambda i, length, _: float(length - 1 - i < context.size)


def oracle(p, prompt, context, decode=None, horizon=60):
    """Absorbed mass by time and token, from dictionaries of window tuples."""
    p = np.asarray(p, float)
    size = np.size(context.weights) if isinstance(context, am.LagContext) else context.size
    weight, exponent = weigh(context), float(context.exponent)
    mass, out = {tuple(prompt[-size:]): 1.0}, np.zeros((horizon + 1, len(p)))
    for t in range(horizon + 1):
        out[t] = out[t - 1] if t else 0
        going = {}
        for window, probability in mass.items():
            if len(set(window)) == 1:
                out[t, window[0]] += probability
                continue
            law = context_law(p, list(window), None, weight, exponent, decode)
            for j in np.flatnonzero(law > 0):
                after = (*window, int(j))[-size:]
                going[after] = going.get(after, 0.0) + probability * law[j]
        mass = going
    return out


CASES = [
    (TWO, [0, 1, 0], am.WindowContext(3), None, None),
    (THREE, [0, 1, 2, 0], am.WindowContext(4), None, None),
    (THREE, [2, 1], am.WindowContext(4), None, None),  # fills up first; token 0 never comes
    (THREE, [0, 1, 2], am.WindowContext(3, exponent=2.0), None, None),
    (THREE, [0, 1, 2], am.LagContext([0.25, 1.0, 0.5]), None, None),
    (THREE, [0, 1, 2], am.WindowContext(3), am.Sampling(temperature=0.5), hf_sampling(0.5)),
    (THREE, [0, 1, 2, 1], am.WindowContext(4), am.Sampling(top_k=2), hf_sampling(top_k=2)),
    (THREE, [0, 1, 2, 1], am.WindowContext(4), am.Sampling(top_p=0.8), hf_sampling(top_p=0.8)),
    (THREE, [0, 1, 2, 1], am.WindowContext(4), am.Greedy(), greedy),
    (CYCLE, [0, 1, 2], am.WindowContext(3), None, None),
]


@pytest.mark.parametrize(("p", "prompt", "context", "decoder", "decode"), CASES)
def test_absorption_is_that_of_the_windows_followed_by_hand(p, prompt, context, decoder, decode):
    model = am.CCMC.from_transition_matrix(p)
    found = absorption(model, prompt, context, decoder, horizon=60)
    assert found.cumulative is not None
    by_hand = oracle(p, prompt, context, decode)
    np.testing.assert_allclose(found.cumulative, by_hand, atol=2e-7)  # logits are float32
    long = oracle(p, prompt, context, decode, 600)
    np.testing.assert_allclose(found.winner_probabilities, long[-1], atol=2e-6)
    times, step = np.arange(601), np.diff(long, axis=0, prepend=0 * long[:1])
    if long[-1].sum() > 1 - 1e-9:
        mean = times @ step.sum(axis=1)
        assert found.mean_time == pytest.approx(mean, rel=1e-5)
        variance = times**2 @ step.sum(axis=1) - mean**2
        assert found.variance == pytest.approx(variance, rel=1e-4, abs=1e-6)
        won = step[-1] + long[-1] > 0
        np.testing.assert_allclose(
            found.mean_times[won], (times @ step)[won] / long[-1][won], rtol=1e-5
        )
        assert np.isnan(found.mean_times[~won]).all()
        assert found.dead_end == found.endless == 0
    else:
        assert found.winner_probabilities.sum() + found.endless == pytest.approx(1, abs=1e-9)


def test_absorption_by_enumeration_of_all_trajectories():
    cumulative = np.zeros((9, 2))
    context = am.WindowContext(3)
    for tokens, probability in trajectory_law(TWO, [0, 1], 8, weigh(context)).items():
        history = [0, 1, *tokens]
        for t in range(9):
            window = history[: t + 2][-3:]
            if len(window) == 3 and len(set(window)) == 1:
                cumulative[t:, window[0]] += probability
                break
    found = absorption(am.CCMC.from_transition_matrix(TWO), [0, 1], 3, horizon=8)
    assert found.cumulative is not None
    np.testing.assert_allclose(found.cumulative, cumulative, atol=1e-7)


def test_large_blocks_are_iterated_to_what_elimination_gives(monkeypatch):
    model = am.CCMC.from_transition_matrix(THREE)
    direct = absorption(model, [0, 1, 2], 5)
    monkeypatch.setattr(_absorb, "_DIRECT", 5)
    iterated = absorption(model, [0, 1, 2], 5)
    for name in ("winner_probabilities", "mean_time", "variance", "mean_times"):
        np.testing.assert_allclose(getattr(iterated, name), getattr(direct, name), rtol=1e-9)
    monkeypatch.setattr(_absorb, "_MOST", 1)
    with pytest.raises(RuntimeError, match="have not converged in 1 iterations"):
        absorption(model, [0, 1, 2], 5)


def test_times_that_are_exponentially_long_keep_their_precision():
    """With a window of two, P[j, j] = e: a return to (0, 1) or (1, 0) has probability 1 - e."""
    e = 2.0**-40
    p = np.array([[e, 1 - e], [1 - e, e]])
    model = am.CCMC.from_logits(np.log(p))
    found = absorption(model, [0, 1], 2)
    assert found.mean_time == pytest.approx(1 / e, rel=1e-5)  # logits are float32
    assert found.winner_probabilities.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.winner_probabilities, [0.5, 0.5], atol=1e-6)
    mixing = am.CCMC.from_transition_matrix([[0.1, 0.9], [0.9, 0.1]])
    table = absorption_table(mixing, 12)
    window = [0, 1] * 6
    expected = table.mean_times[table.row(window)]
    assert absorption(mixing, window, 12).mean_time == pytest.approx(expected, rel=1e-8)
    assert expected > 1e6


def test_table_agrees_with_every_start():
    model = am.CCMC.from_transition_matrix(THREE)
    table = absorption_table(model, am.WindowContext(3, exponent=1.5))
    assert table.windows.shape == (27, 3)
    for window in itertools.product(range(3), repeat=3):
        row = table.row(window)
        assert tuple(table.windows[row]) == window
        one = absorption(model, list(window), am.WindowContext(3, exponent=1.5))
        np.testing.assert_allclose(table.winner_probabilities[row], one.winner_probabilities)
        assert table.mean_times[row] == pytest.approx(one.mean_time)
    assert "27 windows of 3 tokens" in repr(table)
    with pytest.raises(ValueError, match="window: expected 3 tokens, got 2"):
        table.row([0, 1])
    swap = absorption_table(am.CCMC.from_transition_matrix([[0.0, 1.0], [1.0, 0.0]]), 2)
    assert np.isnan(swap.mean_times[swap.row([0, 1])])  # for ever
    with pytest.raises(ValueError, match=r"3\*\*10 = 5.9e\+04 states, more than max_states = 20"):
        absorption_table(model, 10)


def test_table_of_more_tokens_than_an_integer_has_bits():
    p = np.random.default_rng(0).dirichlet(np.ones(70), 70)
    model = am.CCMC.from_transition_matrix(p)
    table = absorption_table(model, 2)
    for i, j in [(64, 63), (0, 69), (66, 2)]:
        a, b = (p[x, y] / (p[x, i] + p[x, j]) for x, y in ((j, i), (i, j)))
        # After (i, j): j again ends it; else (j, i), where i again does.
        mean = (1 + a) / (1 - a * b)
        assert table.mean_times[table.row([i, j])] == pytest.approx(mean, rel=1e-5)
        assert table.winner_probabilities[table.row([i, j]), j] == pytest.approx(
            (1 - a) / (1 - a * b), rel=1e-5
        )
    alone = table.windows[:, 0] == table.windows[:, 1]
    assert ((table.mean_times == 0) == alone).all()


@pytest.mark.parametrize(
    "context", [am.WindowContext(4), am.LagContext([0.25, 1.0, 0.5])], ids=["window", "lag"]
)
def test_exact_law_and_rollouts_agree(context, key):
    model, prompt = am.CCMC.from_transition_matrix(THREE), [0, 1, 2]
    exact = absorption(model, prompt, context, horizon=400)
    sample = absorption_monte_carlo(model, key, prompt, context, 20_000, 400)
    assert exact.cumulative is not None
    law = np.diff(exact.cumulative, axis=0, prepend=0)
    cells = {(t, j): law[t, j] for t, j in np.argwhere(law > 0)}
    assert sample.num_censored == 0
    assert_law(np.stack([sample.times, sample.winners], axis=1), cells)
    assert_mean(sample.times, exact.mean_time)
    low, high = sample.intervals
    assert (low <= sample.winner_probabilities).all()
    assert (sample.winner_probabilities <= high).all()


def test_times_are_those_of_the_rollout_summary(key):
    model, context = am.CCMC.from_transition_matrix(THREE), am.WindowContext(4)
    prompts = [[0, 1, 2], [1, 1, 1], [2, 0, 0, 0, 0], [0, 2]]  # the second and third: at once
    sample = absorption_monte_carlo(model, key, prompts, context, 4, 50)
    traj = am.rollout(model, key, prompts, 50, 4, record="summary", context=context)
    np.testing.assert_array_equal(sample.times, traj.summary.absorption_time)
    assert sample.times[1] == sample.times[2] == 0
    assert sample.winners[1:3].tolist() == [1, 0]


def test_what_is_censored_is_counted(key):
    model = am.CCMC.from_transition_matrix([[0.3, 0.7], [0.7, 0.3]])
    sample = absorption_monte_carlo(model, key, [0, 1], am.WindowContext(4), 400, 10)
    exact = absorption(model, [0, 1], 4, horizon=10)
    cumulative = exact.cumulative
    assert cumulative is not None
    missing = 1 - cumulative[-1].sum()
    tail = stats.binom.cdf(sample.num_censored, 400, missing)
    assert FAILURE_RATE < tail < 1 - FAILURE_RATE
    assert sample.winner_probabilities.sum() == pytest.approx(1 - sample.num_censored / 400)
    low, high = sample.intervals
    assert (low < exact.winner_probabilities).all()
    assert (exact.winner_probabilities < high).all()
    assert high.sum() > 1 + sample.num_censored / 400
    assert sample.quantile(0.99).value == np.inf
    assert sample.mean.upper == np.inf
    assert sample.mean.value < exact.mean_time
    assert f"{sample.num_censored} not seen in 10 steps" in repr(sample)
    with pytest.raises(ValueError, match="q: must lie strictly between 0 and 1, got 1"):
        sample.quantile(1)


def test_dead_ends_and_endless_rounds_as_rollouts_have_them(key):
    """Query 0 attends token 2 alone; once 2 has left the window there is nothing for it."""
    p = [[0.0, 0.0, 1.0], [0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]
    model, context = am.CCMC.from_transition_matrix(p), am.WindowContext(3)
    exact = absorption(model, [2, 0, 1], context)
    assert 0.1 < exact.dead_end < 0.9
    assert exact.winner_probabilities.sum() + exact.dead_end == pytest.approx(1)
    assert "dead_end" in repr(exact)
    sample = absorption_monte_carlo(model, key, [2, 0, 1], context, 2000, 256)
    hits = sample.num_censored
    tail = stats.binom.cdf(hits, 2000, exact.dead_end)
    assert FAILURE_RATE < tail < 1 - FAILURE_RATE
    swap = am.CCMC.from_transition_matrix([[0.0, 1.0], [1.0, 0.0]])
    never = absorption(swap, [0, 1], 3, horizon=5)
    assert never.endless == 1
    assert never.dead_end == never.winner_probabilities.sum() == 0
    assert np.isnan(never.mean_time)
    assert absorption(am.CCMC.from_transition_matrix(p), [2, 1, 0], 2).endless == 0
    nothing = absorption(am.CCMC.from_transition_matrix(p), [2, 1, 0], 2)
    assert nothing.dead_end == 1


def test_query_given_apart_and_prompts_absorbed_at_once():
    model = am.CCMC.from_transition_matrix(THREE)
    prompts = am.Prompts.from_tokens([[0, 1]], 3, query=[2])
    found = absorption(model, prompts, 2, horizon=3)
    first = context_law(THREE, [0, 1], 2)
    after = absorption(model, [1, 0], 2).winner_probabilities
    expected = first[0] * after + first[1] * np.eye(3)[1]
    np.testing.assert_allclose(found.winner_probabilities, expected, atol=1e-6)
    cumulative = found.cumulative
    assert cumulative is not None
    np.testing.assert_allclose(cumulative[1], [0, first[1], 0], atol=1e-6)
    for prompt in ([1], [1, 1], [0, 2, 1, 1, 1]):
        at_once = absorption(model, prompt, 3, horizon=2)
        assert at_once.mean_time == at_once.variance == 0
        assert at_once.winner_probabilities.tolist() == [0, 1, 0]
        assert at_once.cumulative is not None
        np.testing.assert_array_equal(at_once.cumulative, np.tile([0, 1, 0], (3, 1)))


def test_bad_arguments():
    model = am.CCMC.from_transition_matrix(THREE)
    for context in (am.FullContext(), am.DecayContext(0.5), True, 2.5):
        with pytest.raises(ValueError, match="context: expected a window size"):
            absorption(model, [0, 1], context)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="size: must be at least 1, got 0"):
        absorption(model, [0, 1], 0)
    with pytest.raises(ValueError, match=r"3.49e\+09 states, more than max_states = 1000; draw"):
        absorption(model, [0, 1, 2], 20, max_states=1000)
    with pytest.raises(ValueError, match=r"1e300 states.*absorption_monte_carlo"):
        absorption(model, [0, 1, 2], 2000)
    with pytest.raises(ValueError, match="prompt: expected one prompt, got 2"):
        absorption(model, [[0, 1], [1, 2]], 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prompt: over 2 tokens, but the model has 3"):
        absorption(model, am.Prompts.from_tokens([0, 1], 2), 2)
    with pytest.raises(ValueError, match="needs token ids"):
        absorption(model, am.Prompts.from_counts([[1, 1, 0]], [0]), 2)
    with pytest.raises(ValueError, match="decoder: expected a Decoder"):
        absorption(model, [0, 1], 2, "greedy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="horizon: must be at least 0, got -1"):
        absorption(model, [0, 1], 2, horizon=-1)
    stuck = am.CCMC.from_transition_matrix([[0, 0, 1.0], [0, 1, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match="token 0 can be reached from the prompt, but attends"):
        absorption(stuck, [1, 0], 2)


def test_decay_has_collapsed_when_a_return_is_as_rare_as_asked(key):
    model, gamma, chance = am.CCMC.from_transition_matrix(TWO), 0.7, 0.1
    context = am.DecayContext(gamma)
    sample = absorption_monte_carlo(
        model, key, [0, 1], context, 4000, 300, return_probability=chance
    )
    assert sample.num_censored == 0
    # The longest run that is short of the bound Σ_i λ γ^(L+i) / (1 - γ^L), by hand.
    for w, ratio in enumerate([0.4 / 0.6, 0.35 / 0.65]):
        runs = np.arange(1, 60)
        bound = ratio * gamma**runs / (1 - gamma**runs) / (1 - gamma)
        assert sample.run[w] == runs[bound <= chance][0]
    traj = am.rollout(model, key, [0, 1], 400, 4000, context=context)
    tokens = np.asarray(traj.tokens)
    later = np.arange(400) >= sample.times[:, None]
    returns = int(((tokens != sample.winners[:, None]) & later).any(axis=1).sum())
    assert returns > 0
    assert stats.binom.sf(returns - 1, 4000, chance) > FAILURE_RATE
    ends = tokens[np.arange(4000), sample.times - 1]
    np.testing.assert_array_equal(ends, sample.winners)


def test_bad_arguments_of_decay(key):
    model = am.CCMC.from_transition_matrix(TWO)

    def collapse(context, decoder=None, **options):
        return absorption_monte_carlo(model, key, [0, 1], context, 4, 8, decoder, **options)

    with pytest.raises(ValueError, match="for the whole history see winner_probabilities"):
        collapse(am.FullContext())
    with pytest.raises(ValueError, match="gamma 1 forgets nothing"):
        collapse(am.DecayContext(1.0))
    with pytest.raises(ValueError, match="with exponent 0 rare tokens always come back"):
        collapse(am.DecayContext(0.5, exponent=0.0))
    with pytest.raises(ValueError, match="with a DecayContext expected Sampling, got Greedy"):
        collapse(am.DecayContext(0.5), am.Greedy())
    with pytest.raises(ValueError, match="return_probability: must lie strictly between"):
        collapse(am.DecayContext(0.5), return_probability=0)
    with pytest.raises(ValueError, match="level: must lie strictly between 0 and 1, got 1"):
        collapse(2, level=1)
    never = am.CCMC.from_transition_matrix([[0.0, 1.0], [0.5, 0.5]])
    run = absorption_monte_carlo(never, jax.random.key(0), [0, 1], am.DecayContext(0.5), 4, 8).run
    assert run[0] > 2**40  # token 0 never follows itself


def test_intervals_miss_as_seldom_as_they_say():
    for n, level, alpha in ((20, 0.5, 0.05), (60, 0.9, 0.01)):
        ordered = np.arange(1.0, n + 1)
        low, high = _intervals.quantile_interval(ordered, level, alpha)
        below = stats.binom(n, level)  # how many of n fall below the quantile
        if np.isfinite(low):
            assert below.cdf(low - 1) <= alpha / 2 < below.cdf(low)
        assert np.isinf(high) or below.sf(high - 1) <= alpha / 2
    low, high = _intervals.share_intervals(np.array([30, 60]), 10, 100, 0.1)
    assert low.tolist() == [_intervals.binomial_interval(n, 100, 0.05)[0] for n in (30, 60)]
    assert high.tolist() == [_intervals.binomial_interval(n, 100, 0.05)[1] for n in (40, 70)]
