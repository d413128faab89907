"""Temperature and repetition, and decoding remedies: small runs, and their rules on bent data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from attnmarkov import sweep
from attnmarkov.experiments._decoding import (
    likelihoods,
    poisson_binomial_test,
    random_winner_model,
)
from attnmarkov.experiments.decoding_remedies import DecodingRemedies
from attnmarkov.experiments.temperature_and_repetition import TemperatureAndRepetition
from attnmarkov.plot.decoding import decoding_costs, decoding_phases, losers_by_decade

GRID = TemperatureAndRepetition(
    num_tokens=(2, 3),
    temperatures=(0.5, 1.0, 2.0),
    penalties=(0.5, 1.0, 1.25),
    others=((0.5, 1.0, 1.0),),
    num_replicates=256,
)
REMEDIES = DecodingRemedies(num_tokens=3, num_steps=4000, num_replicates=128)


@pytest.fixture(scope="module")
def grid():
    return sweep.run(GRID, None, progress=False)


@pytest.fixture(scope="module")
def remedies():
    return sweep.run(REMEDIES, None, progress=False)


def verdicts(experiment, dataset, word=""):
    return [c.verdict for c in experiment.claims(dataset) if word in c.claim]


def at(experiment, **values):
    """Indices of the configs with these values."""
    configs = experiment.configs()
    return [i for i, c in enumerate(configs) if all(c[k] == v for k, v in values.items())]


def test_grid_agrees(grid):
    claims = GRID.claims(grid)
    assert len(claims) == 2 * 7
    assert "fail" not in [c.verdict for c in claims]
    assert [c.verdict for c in claims].count("pass") >= 12
    assert len({c.claim for c in claims}) == len(claims)
    figures = GRID.figures(grid)
    assert set(figures) == {"phases", "losers"}
    legend = figures["losers"].axes[-1].get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()][-1] == "predicted"


def test_grid_claims_fail_when_the_theory_is_wrong(grid):
    bent = grid.copy(deep=True)  # a share of 0.1 moved where all tokens keep one
    for i, config in enumerate(GRID.configs()):
        if GRID.prediction(config).power < 1:
            counts = bent["counts"].values[i]
            counts[:, -1, 0], counts[:, -1, 1] = counts[:, -1, 0] + 1000, counts[:, -1, 1] - 1000
    assert verdicts(GRID, bent, "mean share") == ["fail"] * 2
    assert "fail" not in verdicts(GRID, bent, "fixed on one token")

    back = grid.copy(deep=True)  # every trajectory of power above 1 draws a loser once more
    for i, config in enumerate(GRID.configs()):
        if GRID.prediction(config).power > 1:
            counts = back["counts"].values[i]
            loser = counts[:, -1, : config["num_tokens"]].argmin(axis=-1)
            counts[np.arange(len(counts)), -1, loser] += 1
    assert verdicts(GRID, back, "a > 1: share of trajectories in which") == ["fail"] * 2
    assert verdicts(GRID, back, "fixed on one token") == ["fail"] * 2
    assert "fail" not in verdicts(GRID, back, "a = 1: share of trajectories in which")

    other = grid.copy(deep=True)  # one setting has another law than its twin
    for k in (2, 3):
        (i,) = at(GRID, num_tokens=k, temperature=0.5, penalty=0.5)
        (j,) = at(GRID, num_tokens=k, temperature=2.0, penalty=1.0)
        other["counts"].values[i] = other["counts"].values[j]
    assert verdicts(GRID, other, "largest distance") == ["fail"] * 2

    slower = grid.copy(deep=True)
    for k in (2, 3):
        (i,) = at(GRID, num_tokens=k, temperature=1.0, penalty=1.25)
        (j,) = at(GRID, num_tokens=k, temperature=2.0, penalty=1.0)
        slower["counts"].values[i] = slower["counts"].values[j]
    assert verdicts(GRID, slower, "penalty of 1.25") == ["fail"] * 2


def test_grid_of_few_trajectories_has_no_verdict(grid):
    few = grid.copy(deep=True)
    few["done"].values[:, 30:] = False
    assert set(verdicts(GRID, few, "one token alone came")) == {"inconclusive"}
    assert set(verdicts(GRID, few, "largest distance")) == {"inconclusive"}
    few["done"].values[:] = False
    assert GRID.claims(few) == []
    assert GRID.figures(few) == {}


def test_grid_measures_what_it_says(grid):
    """Counts begin with the prompt, and the last tokens were drawn."""
    steps = GRID.coords()["step"]
    for i, config in enumerate(GRID.configs()):
        counts, last = grid["counts"].values[i], grid["last"].values[i]
        np.testing.assert_array_equal(
            counts.sum(axis=-1), np.broadcast_to(steps + config["num_tokens"], counts.shape[:2])
        )
        assert (np.take_along_axis(counts, last[..., None], axis=-1) > 1).all()
    outcomes = GRID.outcomes(grid)
    fixed = outcomes["alone"].values[outcomes["power"].values >= 2, -1]
    assert (fixed > 0.95).all()
    assert (outcomes["alone"].values[outcomes["power"].values < 1, -1] == 0).all()


def test_remedies_agree(remedies):
    claims = REMEDIES.claims(remedies)
    assert len(claims) == 12
    assert "fail" not in [c.verdict for c in claims]
    assert [c.verdict for c in claims].count("pass") >= 8
    figures = REMEDIES.figures(remedies)
    left, right = figures["costs"].axes
    names = [
        t.get_text()
        for ax in (left, right)
        if (legend := ax.get_legend()) is not None
        for t in legend.get_texts()
    ]
    assert set(names) == {*REMEDIES.settings(), "predicted limit"}
    table = REMEDIES.outcomes(remedies)
    flat = table["power"].values < 1
    assert (table["entropy"].values[flat] > table["entropy"].values[~flat].max()).all()
    assert float(table.sel(setting="window 16")["distinct"]) == 1


def test_remedies_claims_fail_when_the_theory_is_wrong(remedies):
    def bent(change):
        data = remedies.copy(deep=True)
        change(data)
        return data

    found = [REMEDIES.prediction(name) for name in REMEDIES.settings()]
    flat = [i for i, f in enumerate(found) if f is not None and f.power < 1]
    names = list(REMEDIES.settings())

    def cost(data):
        data["cost"].values[flat] += 0.05 * np.array([0, 1], np.float32)

    def rises(data):
        data["cost"].values[names.index("plain"), :, 1] += 1

    def comes_back(data):
        data["others"].values[names.index("top-p 0.9")] = 1

    def swap(data):
        a, b = names.index("α = 0.5"), names.index("T = 2")
        data["cost"].values[[a, b], :, 1] = data["cost"].values[[b, a], :, 1]

    def returns(data):  # a third token in the last decade alone
        i = names.index("window 16")
        data["counts"].values[i, :, -1] += 1

    def collapsed(data):
        data["counts"].values[flat] = data["counts"].values[names.index("window 16")]

    def faster(data):
        counts = data["counts"].values[names.index("plain")]
        counts[:, -1] += counts[:, -1] // 5

    assert verdicts(REMEDIES, bent(cost), "mean cost") == ["fail"]
    assert verdicts(REMEDIES, bent(rises), "the cost falls") == ["fail"]
    assert verdicts(REMEDIES, bent(rises), "plain sampling: cost less") == ["fail"]
    assert verdicts(REMEDIES, bent(comes_back), "other tokens drawn") == ["fail"]
    assert verdicts(REMEDIES, bent(swap), "saves against") == ["fail"]
    assert verdicts(REMEDIES, bent(returns), "window 16: share") == ["fail"]
    assert verdicts(REMEDIES, bent(collapsed), "keeps beyond plain") == ["fail"]
    assert verdicts(REMEDIES, bent(collapsed), "mean entropy") == ["fail"]
    assert "pass" not in verdicts(REMEDIES, bent(faster), "growth exponent")


def test_remedies_of_few_trajectories(remedies):
    few = remedies.copy(deep=True)
    few["done"].values[:, 20:] = False
    assert verdicts(REMEDIES, few, "mean cost") == ["inconclusive"]
    assert verdicts(REMEDIES, few, "growth exponent") == []
    few["done"].values[:] = False
    assert REMEDIES.claims(few) == []
    assert REMEDIES.figures(few) == {}


@pytest.mark.parametrize("experiment", [GRID, REMEDIES])
def test_replicates_do_not_depend_on_their_block(experiment, grid, remedies):
    data = grid if experiment is GRID else remedies
    config, key = experiment.configs()[0], experiment.config_key(experiment.configs()[0])
    part = experiment.simulate(config, key, np.arange(8, 14))
    for name, values in part.items():
        np.testing.assert_allclose(values, data[name].values[0, 8:14], rtol=1e-6)


def test_likelihoods_against_a_loop(key):
    """Cost, own entropy and absorption, token by token in float64."""
    model = random_winner_model(0, 3, (0.2, 0.5))
    p = np.asarray(model.transition_matrix, np.float64)
    tokens = np.asarray(
        jax.random.categorical(key, jnp.log(jnp.array([0.9, 0.06, 0.04])), shape=(4, 60))
    )
    cost, own, absorbed, others = likelihoods(
        model.logits, jnp.asarray(tokens, jnp.int8), jnp.array([5, 20]), jnp.float32(0.8)
    )
    for r, row in enumerate(tokens):
        counts, last, sums, since, came = np.ones(3), 2, np.zeros((2, 2)), -1, 0
        for t, token in enumerate(row):
            law = counts * p[last] / (counts @ p[last])
            if since < 0 and law[last] >= 0.8:
                since = t
            came += since >= 0 and token != last
            if t >= 5:
                sums[:, int(t >= 20)] += [-np.log(law[token]), stats.entropy(law)]
            counts[token], last = counts[token] + 1, token
        np.testing.assert_allclose([cost[r], own[r]], sums, rtol=1e-5)
        assert (int(absorbed[r]), int(others[r])) == (since, came)
    assert (np.asarray(absorbed) >= 0).any()


def test_poisson_binomial_is_binomial_for_equal_chances():
    for hits in (0, 3, 9):
        tails = stats.binom.cdf(hits, 9, 0.3), stats.binom.sf(hits - 1, 9, 0.3)
        found = poisson_binomial_test(hits, np.full(9, 0.3))
        assert found == pytest.approx(min(1.0, 2 * min(tails)))
    assert poisson_binomial_test(1, np.array([0.2, 0.5])) == pytest.approx(1.0)
    assert poisson_binomial_test(2, np.array([0.2, 0.5])) == pytest.approx(0.2)


def test_figures_on_axes_of_their_own(grid, remedies):
    points = GRID.outcomes(grid)
    two = points.isel(point=np.flatnonzero(points["num_tokens"] == 2))
    ax = decoding_phases(two)
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5", "1", "2"]
    assert len(losers_by_decade(two).lines) == 2 * 3 + 1
    with pytest.raises(ValueError, match="points: none has exponent 1"):
        decoding_phases(two.isel(point=two["exponent"].values != 1))
    with pytest.raises(ValueError, match="scale"):
        decoding_costs(REMEDIES.outcomes(remedies), scale="log")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": ()}, "num_tokens: expected sizes of 2 to 8"),
        ({"num_tokens": (2, 9)}, r"num_tokens: expected sizes of 2 to 8, got \(2, 9\)"),
        ({"temperatures": (0.01,)}, "temperatures: expected numbers from 0.1 to 10"),
        ({"penalties": ()}, "penalties: expected numbers from 0.1 to 10"),
        ({"others": ((1.0, 2.0),)}, "others: expected"),
        ({"relative_weights": (0.5, 1.0)}, "relative_weights: expected 0 < low <= high < 1"),
        ({"num_steps": 100}, "num_steps: expected 10000 to"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1, got 0"),
    ],
)
def test_bad_parameters_of_the_grid(change, message):
    with pytest.raises(ValueError, match=message):
        TemperatureAndRepetition(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 1}, "num_tokens: must lie in 2..8, got 1"),
        ({"relative_weights": (0.0, 0.5)}, "relative_weights: expected"),
        ({"temperatures": (1.0,)}, r"temperatures: .* not 1, got \(1.0,\)"),
        ({"exponents": (20.0,)}, "exponents: expected numbers from 0.1 to 10"),
        ({"top_k": 4}, "top_k: must lie in 2..3, got 4"),
        ({"top_p": 1.0}, r"top_p: must lie in \(0, 1\), got 1.0"),
        ({"gamma": 0.0}, r"gamma: must lie in \(0, 1\), got 0.0"),
        ({"window": 1}, "window: must lie in 2..128, got 1"),
        ({"num_steps": 10}, "num_steps: must lie in 1000..10"),
    ],
)
def test_bad_parameters_of_the_remedies(change, message):
    with pytest.raises(ValueError, match=message):
        DecodingRemedies(**change)
