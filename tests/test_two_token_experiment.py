"""The two-token phase diagram: its rules on made data, and a small run."""

from __future__ import annotations

import numpy as np
import pytest

from attnmarkov import sweep
from attnmarkov.experiments.two_token_phase_diagram import TwoTokenPhaseDiagram
from attnmarkov.plot.portraits import two_token_diagram

SMALL = TwoTokenPhaseDiagram(points=(0.2, 0.7), num_steps=2000, num_records=5, num_replicates=96)


@pytest.fixture(scope="module")
def simulated():
    return sweep.run(SMALL, None, progress=False)


def made(dataset, bend=0.0, spread=0.0, swapped=0, share=None, one_sided=False):
    """The dataset with outcomes exactly as predicted, or bent."""
    data, rng = dataset.copy(deep=True), np.random.default_rng(2)
    number = data.sizes["replicate"]
    for i, config in enumerate(SMALL.configs()):
        phases, steps = SMALL.phases(config), SMALL.steps(config)
        winners = np.flatnonzero(phases.can_win)
        counts = np.full((number, 2), 10)
        if winners.size:
            w = winners[np.arange(number) % winners.size]
            if one_sided:
                w = np.full(number, winners[0])
            if winners.size == 1:
                w[:swapped] = 1 - winners[0]
            counts[np.arange(number), w] = 10_000
            w = winners[np.arange(number) % winners.size]
            slope = phases.growth[w] + bend + spread * rng.normal(size=number)
            loser = 1e7 * (steps + 510.0) ** slope[:, None] / (steps[0] + 510.0) ** slope[:, None]
            rows = np.zeros((number, len(steps), 2))
            rows[np.arange(number), :, w] = 1e13
            rows[np.arange(number), :, 1 - w] = loser
            data["tilted"].values[i] = rows
        else:
            m = phases.shares[0] if share is None else share
            counts = np.tile(np.rint(1e6 * np.array([m, 1 - m])), (number, 1)).astype(int)
        data["counts"].values[i] = counts
    return data


def verdicts(dataset, word=""):
    return [c.verdict for c in SMALL.claims(dataset) if word in c.claim]


def many(dataset, times=5):
    import xarray as xr

    joined = xr.concat([dataset] * times, "replicate")
    return joined.assign_coords(replicate=np.arange(joined.sizes["replicate"]))


def test_claims_pass_on_what_theory_says(simulated):
    claims = SMALL.claims(made(many(simulated)))
    assert [c.verdict for c in claims] == ["pass"] * 8
    assert len({c.claim for c in claims}) == 8


def test_claims_fail_when_the_theory_is_wrong(simulated):
    data = many(simulated)
    assert verdicts(made(data, bend=0.05), "exponent") == ["fail"] * 2
    assert verdicts(made(data, bend=0.05), "λ of the loser") == ["fail"] * 2
    assert verdicts(made(data, bend=0.02), "λ of the loser") == ["pass"] * 2
    assert verdicts(made(data, spread=0.6), "exponent") == ["inconclusive"] * 2
    assert verdicts(made(data, swapped=60), "taken over") == ["fail"] * 2
    assert verdicts(made(data, swapped=1), "taken over") == ["pass"] * 2  # a lead may be transient
    assert verdicts(made(data, share=0.45), "both stay") == ["fail"]
    assert verdicts(made(many(data), one_sided=True), "either token") == ["fail"]


def test_no_verdict_on_few_trajectories(simulated):
    few = made(simulated).isel(replicate=slice(20))
    assert verdicts(few, "taken over") == ["inconclusive"] * 2
    assert verdicts(few, "exponent") == []  # no group of 40
    assert verdicts(few, "both stay") == ["inconclusive"]


def test_slow_models_are_not_judged(simulated):
    """At p = q = 0.55 shares relax as t**-0.1: the median is still off where the theory holds."""
    slow = TwoTokenPhaseDiagram(points=(0.55,), num_steps=100_000, num_records=5, num_replicates=96)
    data = simulated.isel(config=slice(3, 4), replicate=slice(96)).copy(deep=True)
    data["counts"].values[0] = np.rint(1e6 * np.array([0.53, 0.47]))
    (claim,) = slow.claims(data)
    assert claim.verdict == "inconclusive"
    assert "the worst of 0 models of 1" in claim.claim
    assert slow._left(0.55, 0.55) == pytest.approx(0.25 * 50_000**-0.1, rel=1e-4)


def test_a_small_run_agrees(simulated):
    claims = SMALL.claims(simulated)
    assert "fail" not in [c.verdict for c in claims]
    outcomes = SMALL.outcomes(simulated)
    assert outcomes["trajectories"].values.tolist() == [96] * 4
    either = outcomes["won"].values[0]
    assert (either > 0).all()  # of p = q: each misses with probability 2^-96
    slopes = SMALL.slopes(simulated)
    np.testing.assert_allclose(slopes["limit"], 0.25)
    np.testing.assert_allclose(slopes["predicted"], 0.25, atol=0.01)
    assert abs(slopes["median"] - 0.25).max() < 0.05
    figures = SMALL.figures(simulated)
    assert set(figures) == {"phases", "exponents"}
    legend = figures["phases"].axes[0].get_legend()
    assert legend is not None
    names = [t.get_text() for t in legend.get_texts()]
    assert names[:4] == ["token 0 wins", "token 1 wins", "either wins", "both stay"]
    assert names[-3:] == [f"measured: won by {w}" for w in ("token 0", "token 1")] + [
        "measured: by neither"
    ]


def test_replicates_do_not_depend_on_their_block(simulated):
    parts = sweep.run(SMALL, None, block_size=48, progress=False)
    for name in ("counts", "tilted"):
        np.testing.assert_array_equal(simulated[name], parts[name])


def test_horizons():
    """Two decades always, and no more draws than the budget."""
    for config in TwoTokenPhaseDiagram.preset("full").configs():
        steps, phases = SMALL.steps(config), SMALL.phases(config)
        np.testing.assert_allclose(steps[-1] / steps[0], 100, rtol=1e-3)
        assert steps[-1] <= 10**9
        if phases.can_win.any():
            assert (steps[-1] / 510) ** phases.growth[phases.can_win].max() < 301


def test_diagram_needs_a_grid():
    from attnmarkov.dynamics import two_token_phases

    with pytest.raises(ValueError, match=r"phases: expected a grid, .* got shape \(3,\)"):
        two_token_diagram(two_token_phases([0.1, 0.2, 0.3], 0.4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ()}, "points: expected numbers in"),
        ({"points": (0.3, 0.52)}, r"points: .* none within 0.05 of 1/2, got \(0.3, 0.52\)"),
        ({"num_steps": 10}, "num_steps: expected 1000 to 2\\*\\*30, got 10"),
        ({"num_records": 2}, "num_records: slopes need at least 3, got 2"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1, got 0"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        TwoTokenPhaseDiagram(**change)
