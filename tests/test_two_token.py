"""Two tokens: every regime against its definition, by elimination and by brute force."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.patches import Wedge

import attnmarkov as am
from attnmarkov.dynamics import REGIMES, equilibria, two_token_phases
from attnmarkov.estimate.learnable import learnable_contrasts
from attnmarkov.plot.portraits import phase_portrait, two_token_diagram, two_token_wins


def turning_points(p, q, exponent, temperature):
    """Shares of token 0 where the drift changes its sign, and whether from + to -: by a scan."""
    s = np.linspace(-60, 60, 1_000_003)  # log m_1 / m_0
    away = np.log(p / (1 - p)) / temperature
    back = np.log(q / (1 - q)) / temperature
    y = s * exponent / temperature
    leave = y + away - np.logaddexp(0, y + away)  # log M01
    enter = -np.logaddexp(0, y - back)  # log M10
    speed = leave - enter - s
    at = np.flatnonzero(np.sign(speed[:-1]) * np.sign(speed[1:]) < 0)
    middle = (s[at] + s[at + 1]) / 2
    return sorted(
        (1 / (1 + np.exp(u)), bool(speed[i] > 0)) for u, i in zip(middle, at, strict=True)
    )


CASES = [(1.0, 1.0), (0.7, 1.0), (0.9, 1.0), (1.6, 1.6), (1.0, 1.3), (1.0, 0.5), (1.2, 1.0)]


@pytest.mark.parametrize(("exponent", "temperature"), CASES)
def test_equilibria_against_a_scan(exponent, temperature):
    rng = np.random.default_rng(int(10 * exponent + 100 * temperature))
    points = rng.uniform(0.08, 0.92, (25, 2))
    phases = two_token_phases(*points.T, exponent=exponent, temperature=temperature)
    for (p, q), shares, stable in zip(points, phases.shares, phases.stable, strict=True):
        known = ~np.isnan(shares)
        want = turning_points(p, q, exponent, temperature)
        assert known.sum() == len(want)
        if want:
            np.testing.assert_allclose(shares[known], [w[0] for w in want], atol=1e-4)
            assert stable[known].tolist() == [w[1] for w in want]
        assert not stable[~known].any()


@pytest.mark.parametrize(("exponent", "temperature"), CASES)
def test_the_same_as_equilibria(exponent, temperature):
    rng = np.random.default_rng(3)
    for p, q in rng.uniform(0.1, 0.9, (8, 2)):
        one = two_token_phases(p, q, exponent=exponent, temperature=temperature)
        model = am.CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])
        found = equilibria(model, exponent=exponent, temperature=temperature)
        assert [found.at(w)[0].stable for w in (0, 1)] == one.can_win.tolist()
        for w in (0, 1):
            np.testing.assert_allclose(
                one.growth[w], found.at(w)[0].growth_exponents[1 - w], rtol=1e-5
            )
        both = sorted((e.occupancy[0], e.stable) for e in found.at((0, 1)))
        known = ~np.isnan(one.shares)
        np.testing.assert_allclose(one.shares[known], [b[0] for b in both], atol=1e-5)
        assert one.stable[known].tolist() == [b[1] for b in both]


def test_regimes_of_plain_generation():
    grid = np.linspace(0.005, 0.995, 200)
    phases = two_token_phases(grid[:, None], grid)
    p, q = np.broadcast_arrays(grid[:, None], grid)
    want = np.select([(p < 0.5) & (q < 0.5), p < 0.5, q < 0.5], [2, 0, 1], 3)
    np.testing.assert_array_equal(phases.regime, want)
    assert phases.regime.shape == (200, 200)
    np.testing.assert_allclose(phases.growth[..., 0], p / (1 - p))
    np.testing.assert_allclose(phases.growth[..., 1], q / (1 - q))
    assert "token 0 wins: 10000, token 1 wins: 10000, either wins: 10000" in repr(phases)


def test_lines_between_the_regimes():
    """On a line the loser's drift vanishes to first order, and second order decides."""
    p, q = np.array([0.5, 0.5, 0.3, 0.7, 0.5]), np.array([0.7, 0.3, 0.5, 0.5, 0.5])
    phases = two_token_phases(p, q)
    assert [REGIMES[r] for r in phases.regime] == [
        "token 0 wins",
        "token 1 wins",
        "token 0 wins",
        "token 1 wins",
        "any share",
    ]
    for i in range(4):  # from any interior shares the drift goes to the winner
        model = am.CCMC.from_transition_matrix([[1 - p[i], p[i]], [q[i], 1 - q[i]]])
        moved = am.dynamics.drift(
            model, np.stack([np.linspace(0.05, 0.95, 7)] * 2, 1) * [1, -1] + [0, 1]
        )
        assert (np.asarray(moved[:, phases.regime[i]]) > 0).all()


def test_interior_shares_in_closed_form():
    phases = two_token_phases(0.8, 0.6)
    ratio = 0.6 * (0.8 - 0.2) / (0.8 * (0.6 - 0.4))
    np.testing.assert_allclose(phases.shares, [1 / (1 + ratio), np.nan, np.nan])
    assert phases.stable.tolist() == [True, False, False]


def test_learnability_is_the_rule_of_the_estimators():
    for p, q in [(0.3, 0.6), (0.4, 0.2), (0.2, 0.45)]:
        one = two_token_phases(p, q)
        model = am.CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])
        for w in np.flatnonzero(one.can_win):
            known = learnable_contrasts(model, int(w))
            loser = 1 - w
            np.testing.assert_allclose(
                one.information_exponents[w], known.exponents[loser, loser], rtol=1e-5
            )
            assert one.learnable[w] == known.learnable[loser, loser]
    threshold = two_token_phases([1 / 3, 0.33, 0.34], 0.9)  # λ = 1/2 at p = 1/3
    assert threshold.learnable[:, 0].tolist()[1:] == [False, True]
    assert np.isnan(threshold.information_exponents[:, 1]).all()


def test_other_powers():
    either = two_token_phases(0.9, 0.85, exponent=1.5)
    assert REGIMES[int(either.regime)] == "either wins, or both stay"
    assert either.stable.tolist() == [False, True, False]
    assert either.growth.tolist() == [0, 0]
    assert REGIMES[int(two_token_phases(0.3, 0.6, exponent=2.0).regime)] == "either wins"
    two = two_token_phases(0.1, 0.12, exponent=0.8)
    assert REGIMES[int(two.regime)] == "both stay, at either of two shares"
    assert two.stable.tolist() == [True, False, True]
    assert np.isinf(two.growth).all()
    small = two_token_phases(
        np.linspace(0.01, 0.99, 30)[:, None], np.linspace(0.01, 0.99, 30), exponent=0.5
    )
    assert set(np.unique(small.regime)) == {3}  # one share to come to, for every power up to 1/2
    cold = two_token_phases([0.01, 0.99], [0.01, 0.99], temperature=0.002)
    assert cold.regime.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("p", "q", "change", "message"),
    [
        (0.0, 0.5, {}, r"p: the value is 0, outside \(0, 1\)"),
        ([0.5, 0.5], [0.5, 1.0], {}, r"q: entry \[1\] is 1, outside \(0, 1\)"),
        ([0.5, 0.5], [0.5] * 3, {}, r"q: shape \(3,\) does not broadcast with \(2,\) of p"),
        (np.nan, 0.5, {}, r"p: entry \[\] is nan"),
        (0.5, 0.5, {"exponent": 0.0}, "exponent: must be above 0 for two-token phases, got 0"),
        (0.5, 0.5, {"temperature": 0.0}, "temperature: must be positive and finite"),
    ],
)
def test_bad_arguments(p, q, change, message):
    with pytest.raises(ValueError, match=message):
        two_token_phases(p, q, **change)


def size(line):
    return np.size(line.get_xdata())


def dots(ax):
    """Where equilibria are drawn, and whether filled."""
    found = []
    for line in ax.get_lines():
        if line.get_marker() == "o" and size(line) == 1:
            x, y = np.asarray(line.get_xdata())[0], np.asarray(line.get_ydata())[0]
            found.append((round(float(x), 3), round(float(y), 3), line.get_mfc() != "white"))
    return sorted(found)


def test_portraits_show_the_equilibria():
    line = phase_portrait(am.CCMC.from_transition_matrix([[0.8, 0.2], [0.4, 0.6]]))
    assert dots(line) == [(0.0, 0.0, True), (0.143, 0.0, False), (1.0, 0.0, True)]
    curve = next(x for x in line.get_lines() if size(x) == 401)
    speed = np.asarray(curve.get_ydata())
    share = np.asarray(curve.get_xdata())
    assert (speed[(share > 0.01) & (share < 0.14)] < 0).all()
    assert (speed[(share > 0.15) & (share < 0.99)] > 0).all()
    pair = am.CCMC.from_transition_matrix([[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]])
    simplex = phase_portrait(pair, log_time=30.0)
    assert (0.5, 0.0, True) in dots(simplex)
    assert (0.5, 0.866, True) in dots(simplex)
    assert len(dots(simplex)) == len(equilibria(pair))
    paths = [x for x in simplex.get_lines() if size(x) == 121]
    ends = np.array([[np.asarray(x.get_xdata())[-1], np.asarray(x.get_ydata())[-1]] for x in paths])
    gaps = abs(ends[:, None] - np.array([[0.5, 0], [0.5, np.sqrt(0.75)]])).max(axis=-1)
    assert (gaps.min(axis=1) < 1e-3).mean() > 0.9
    assert "5 equilibria, 2 stable" in simplex.get_title()
    with pytest.raises(ValueError, match="model: portraits show 2 or 3 tokens, got 4"):
        phase_portrait(am.CCMC.from_transition_matrix(np.full((4, 4), 0.25)))


def test_diagram_shows_the_regimes():
    grid = np.linspace(0.05, 0.95, 10)
    ax = two_token_diagram(two_token_phases(grid[:, None], grid))
    drawn = np.asarray(ax.collections[0].get_array()).reshape(10, 10)
    np.testing.assert_array_equal(drawn[1, 8], 1)  # row: q = 0.15; column: p = 0.85
    two_token_wins([0.3, 0.8], [0.3, 0.8], [[0.25, 0.5], [0.0, 0.0]], ax=ax)
    angles = [(round(w.theta1), round(w.theta2)) for w in ax.patches if isinstance(w, Wedge)]
    assert angles == [(90, 180), (180, 360), (360, 450), (90, 450)]
    legend = ax.get_legend()
    assert legend is not None
    labels = [t.get_text() for t in legend.get_texts()]
    assert labels[-1] == "measured: by neither"


def test_diagram_without_winners_and_cold_phases():
    """No warnings where no token can win, or ``Q`` overflows."""
    grid = np.linspace(0.55, 0.95, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_token_diagram(two_token_phases(grid[:, None], grid))
        cold = two_token_phases(
            [0.01, 0.3, 0.99], [0.02, 0.31, 0.98], exponent=1e-3, temperature=1e-3
        )
    # log m_1 / m_0 = |away| - |back| where both stay by themselves
    away, back = (np.log(x / (1 - x)) / 1e-3 for x in (np.array([0.3]), np.array([0.31])))
    np.testing.assert_allclose(np.log(cold.shares[1, 0]), away - back + 0, rtol=1e-6, atol=1e-6)
    assert np.isfinite(cold.shares[:, 0]).all()


def test_other_powers_against_rollouts(key):
    """Below power 1 shares come to the equilibrium; above it the loser stops coming."""
    p, q, at = 0.3, 0.4, [10_000, 20_000]
    model = am.CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])

    def counts(exponent):
        context = am.FullContext(exponent=exponent)
        out = am.rollout(model, key, [0, 1], at[-1], 64, record="counts", at=at, context=context)
        return np.sort(np.asarray(out.counts), axis=-1) if exponent > 1 else np.asarray(out.counts)

    share = np.sort(counts(0.5)[:, -1, 0] / (at[-1] + 2))
    predicted = two_token_phases(p, q, exponent=0.5).shares[0]
    assert share[12] < predicted < share[51]  # order statistics: 1e-6 of 64 fair coins are outside
    assert share[51] - share[12] < 0.1
    grown = np.diff(counts(2.0)[..., 0], axis=1)[:, 0]
    # A loser with n_j of 1e4 comes with probability of about n_j**2 / 1e8 a step.
    assert (grown == 0).mean() > 0.9
