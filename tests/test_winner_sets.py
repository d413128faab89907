"""Winner sets and the longest rollouts of winner-takes-all, on made and on simulated data."""

from __future__ import annotations

import numpy as np
import pytest

from attnmarkov import dynamics, sweep
from attnmarkov.experiments.winner_takes_all import WinnerTakesAll
from attnmarkov.plot.winner_sets import winner_set_shares
from attnmarkov.rollout import Trajectory

SMALL = WinnerTakesAll(
    num_tokens=(3,),
    num_steps=2000,
    num_records=21,
    num_replicates=120,
    set_sizes=(2,),
    far_steps=100_000_000,
)
SET, FAR = SMALL.configs()[1:]


@pytest.fixture(scope="module")
def simulated():
    return sweep.run(SMALL, None, progress=False)


def made(dataset, bend=0.0, inside=0.0, set_share=0.5):
    """Winner sets and long rollouts exactly as predicted, or bent."""
    data, rng = dataset.copy(deep=True), np.random.default_rng(1)
    counts = data["counts"].values
    number = counts.shape[1]
    counts[1:] = 0
    for i, config, groups in ((1, SET, [(0, 1), (2,)]), (2, FAR, [(0,), (1,)])):
        model, steps, size = SMALL.model(config), SMALL.steps(config), config["num_tokens"]
        clock = (steps + SMALL._prompt_length(config)) / steps[0]
        for r in range(number):
            first = r < set_share * number if config is SET else r % 2 == 0
            winners = groups[0] if first else groups[1]
            growth = np.asarray(dynamics.winner_exponents(model, winners), float) + bend
            held = rng.uniform(80, 120, size) * clock[:, None] ** growth
            m = dynamics.equilibria(model).at(winners)[0].occupancy
            shares = m[list(winners)] + (inside * np.array([1, -1]) if len(winners) == 2 else 0)
            held[:, list(winners)] = 1e9 * shares
            counts[i, r, :, :size] = held
    return data


def verdicts(dataset, word):
    return [c.verdict for c in SMALL.claims(dataset) if word in c.claim]


def test_the_matrix_is_as_described():
    model = SMALL.model(SET)
    found = dynamics.equilibria(model)
    assert found.winner_sets == ((2,), (0, 1))
    assert np.asarray(dynamics.possible_winners(model)).tolist() == [False, False, True, False]
    three = WinnerTakesAll(set_sizes=(3,))
    config = next(c for c in three.configs() if c["kind"] == "set")
    assert (0, 1, 2) in dynamics.equilibria(three.model(config)).winner_sets
    low, high = SMALL.far_exponents
    beside = np.asarray(dynamics.winner_exponents(SMALL.model(FAR), 0))[1:]
    assert ((beside > low - 1e-3) & (beside < high + 1e-3)).all()


def test_claims_pass_on_what_theory_says(simulated):
    data = made(simulated)
    set_claims = verdicts(data, "with winner set {0, 1}")
    assert set_claims == ["pass"] * 5  # shares, collapse, winners, and two exponents
    assert verdicts(data, "to 1e+08 tokens") == ["pass"] * 4
    table = SMALL.slopes(data)
    assert set(table["winner"].values[table["config"].values == 1].tolist()) == {3, 4}
    winners = SMALL.winners(data)
    assert winners["won_by_sets"].values[1, -1] == 60
    assert winners["won"].values[1, -1].tolist() == [0, 0, 60, 0]


def test_claims_fail_when_the_theory_is_wrong(simulated):
    bent = made(simulated, bend=0.1)
    assert verdicts(bent, "set {0, 1}, winners {0, 1}: growth") == ["fail"]
    assert verdicts(bent, "to 1e+08 tokens") == ["fail"] * 4
    assert verdicts(made(simulated, inside=0.05), "median share of token 0") == ["fail"]
    alone = made(simulated)
    alone["counts"].values[1, :, :, 1] //= 40  # token 0 alone cannot win
    assert verdicts(alone, "set {0, 1}: share of winners") == ["fail"]
    assert verdicts(made(simulated, set_share=0.2), "median share") == []  # no group of 40


def test_a_small_run(simulated):
    """Counts add up, prompts decide the winner, and nothing contradicts the theory."""
    for i, config in enumerate(SMALL.configs()):
        total = simulated["counts"].isel(config=i).values.sum(axis=-1)
        want = SMALL.steps(config) + SMALL._prompt_length(config)
        np.testing.assert_array_equal(total, np.broadcast_to(want, total.shape))
    end = simulated["counts"].isel(config=2).values[:, -1]
    assert (end.argmax(axis=-1) == np.arange(120) % 2).all()  # escape is below 1e-8 a trajectory
    assert SMALL.steps(FAR)[-1] == 100_000_000
    assert verdicts(simulated, "to 1e+08 tokens") == ["pass"] * 4
    assert "fail" not in verdicts(simulated, "")
    figures = SMALL.figures(simulated)
    assert set(figures) == {"frequencies", "exponents", "winner-set-of-2"}


def test_figure_of_a_winner_set(simulated):
    data = made(simulated)
    counts = data["counts"].isel(config=1).values
    trajectory = Trajectory(4, "scan", counts, SMALL.steps(SET))
    model = SMALL.model(SET)
    ax = winner_set_shares(trajectory, model, {0, 1})
    dashed = [x for x in ax.get_lines() if x.get_linestyle() == "--" and np.size(x.get_xdata())]
    pair = dynamics.equilibria(model).at((0, 1))[0]
    for j in (0, 1):
        np.testing.assert_allclose(np.asarray(dashed[j].get_ydata()), pair.occupancy[j])
    line = np.asarray(dashed[2].get_ydata(), float)
    slope = np.diff(np.log(line)) / np.diff(np.log(SMALL.steps(SET)))
    np.testing.assert_allclose(slope, pair.growth_exponents[2] - 1)
    assert "60 of 120 trajectories, won by {0, 1} together" in ax.get_title()
    with pytest.raises(ValueError, match=r"winners: no trajectory ends with the tokens \[0, 1\]"):
        winner_set_shares(Trajectory(4, "scan", counts[60:], SMALL.steps(SET)), model, {0, 1})
    with pytest.raises(ValueError, match=r"winners: the tokens \[0, 3\] have no equilibrium"):
        winner_set_shares(trajectory, model, (0, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_sizes": (1,)}, r"set_sizes: expected sizes of at least 2, got \(1,\)"),
        ({"far_steps": 10}, "far_steps: expected 0, or 100000 to"),
        ({"far_steps": 2**31}, "far_steps: expected 0, or 100000 to"),
        ({"far_exponents": (0.0, 0.5)}, "far_exponents: expected 0 < low <= high < 1"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        WinnerTakesAll(**change)
