"""The experiment on single trajectories: its rules, on made and on simulated data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xarray as xr

from attnmarkov import sweep
from attnmarkov.estimate.information_growth import InformationGrowth
from attnmarkov.experiments import single_trajectory
from attnmarkov.experiments.single_trajectory import SingleTrajectory
from attnmarkov.plot.information import information

SMALL = SingleTrajectory(
    exponents=(0.3, 0.6), num_steps=10_000, num_records=41, fit_steps=256, num_replicates=48
)


@pytest.fixture(scope="module")
def simulated():
    return sweep.run(SMALL, None, progress=False)


def made(dataset, bend=0.0, spread=0.0, error=1.0, error_bend=0.0, budgets=10.0) -> xr.Dataset:
    """The dataset with exact power laws in place of what was simulated."""
    data, rng = dataset.copy(deep=True), np.random.default_rng(5)
    number, steps = data.sizes["replicate"], data["step"].values.astype(float)
    exponents = np.nan_to_num(np.asarray(SMALL.contrasts({"matrix": 0}).exponents, float))
    e = exponents + bend + spread * rng.normal(size=(number, 1, 3, 3))
    e = np.where(abs(e) < 1e-6, 1e-6, e)
    edges = np.append(0.5, steps)[None, :, None, None]
    gain = np.diff(edges**e / e, axis=1)
    gain[..., 0] = 0
    data["gain"][0] = gain
    growth = np.array([1, 0.3, 0.6])
    counts = 1e9 * steps[:, None] ** growth  # shares that change as they should ...
    counts[:, 1:] *= 1e-4  # ... and are too small to bend the exponents
    data["counts"][0] = np.broadcast_to(counts, (number, *counts.shape))
    horizon = data["horizon"].values[:, None]
    data["effective"][0] = np.broadcast_to(9 * horizon ** growth[None], (number, 2, 3))
    z = error * rng.normal(size=(number, 2, 3))
    data["error"][0] = z / np.sqrt(data["effective"].values[0]) * horizon**error_bend
    noise = np.exp(0.1 * rng.normal(size=(number, 3, 3)))
    data["squared_error"][0] = noise * np.array([budgets, 1, 1])[:, None]
    data["excess_risk"][0] = data["squared_error"].values[0].sum(-1)
    return data


def verdicts(dataset, word=""):
    return [c.verdict for c in SMALL.claims(dataset) if word in c.claim]


def many(dataset, times=20) -> xr.Dataset:
    """As many replicates again, copies of the first: for claims that need many."""
    joined: xr.Dataset = xr.concat([dataset] * times, "replicate")  # type: ignore[assignment]
    return joined


def test_claims_pass_on_what_theory_says(simulated):
    claims = SMALL.claims(made(many(simulated)))
    assert [c.verdict for c in claims] == ["pass"] * 11
    assert claims[3].predicted == claims[3].measured == 6
    assert claims[0].measured == pytest.approx(claims[0].predicted, abs=0.01)


def test_claims_fail_where_theory_is_wrong(simulated):
    data = many(simulated)
    bent = made(data, bend=0.15)  # the one of 0.3 + 0.6 − 1 = −0.1 now grows
    assert verdicts(bent, "exponent of the information") == ["fail"] * 3
    assert verdicts(bent, "rises or falls") == ["fail"]
    assert verdicts(made(data, error=1.5), "share of maximum") == ["fail"]
    assert verdicts(made(data, error_bend=0.3), "exponent of the squared error") == ["fail"] * 2
    assert verdicts(made(data, budgets=0.5), "one trajectory of") == ["fail"] * 4


def test_no_verdict_on_what_is_not_sure(simulated):
    data = many(simulated)
    noisy = made(data, spread=2.0)
    assert set(verdicts(noisy, "exponent of the information")) == {"inconclusive"}
    assert verdicts(noisy, "rises or falls") == ["inconclusive"]
    assert verdicts(made(data, budgets=1.0), "one trajectory of") == ["inconclusive"] * 4
    few = made(simulated.isel(replicate=slice(0, 45)))
    assert verdicts(few, "share of maximum") == ["inconclusive"]
    assert verdicts(few, "exponent of the squared error") == ["inconclusive"] * 2
    none = made(simulated.isel(replicate=slice(0, 20)))
    assert verdicts(none, "information on") == []


def test_estimates_that_ran_away_do_not_pass(simulated):
    data = made(many(simulated))
    data["error"].values[0, : data.sizes["replicate"] // 4] = np.inf
    assert verdicts(data, "share of maximum") == ["fail"]


def test_trajectories_without_the_winner_are_left_out(simulated):
    data = made(many(simulated))
    data["counts"].values[0, :600, -1, 1] = data["counts"].values[0, :600, -1, 0]
    data["gain"].values[0, :600] = 1e6  # of 960
    assert verdicts(data, "exponent of the information") == ["pass"] * 3


def test_simulation(simulated):
    gain, counts = simulated["gain"].values[0], simulated["counts"].values[0]
    totals = simulated["step"].values + 3 * SMALL.copies
    np.testing.assert_array_equal(counts.sum(-1), np.broadcast_to(totals, counts.shape[:2]))
    assert (gain >= 0).all()
    assert (gain[..., 0] == 0).all()
    assert np.isfinite(simulated["squared_error"]).all()
    assert np.isposinf(simulated["effective"].values[..., 0]).all()
    assert (simulated["effective"].values[0, :, 1] >= simulated["effective"].values[0, :, 0]).all()
    assert (simulated["error"].values[..., 0] == 0)[np.isfinite(simulated["error"][..., 0])].all()
    assert len(SMALL.claims(simulated)) >= 7  # slopes need 40 trajectories that are won
    config, key = SMALL.configs()[0], SMALL.config_key(SMALL.configs()[0])
    part = SMALL.simulate(config, key, np.arange(16, 48))
    np.testing.assert_array_equal(part["counts"], counts[16:])
    np.testing.assert_allclose(part["gain"], gain[16:], rtol=1e-4, atol=1e-7)
    for name in ("error", "squared_error", "excess_risk"):
        want = simulated[name].values[0, 16:]
        np.testing.assert_allclose(part[name], want, rtol=5e-3, atol=1e-4)


def test_mean_field_exponents_against_a_loop():
    rng = np.random.default_rng(3)
    p, counts = rng.dirichlet(np.ones(3), 3), rng.integers(1, 50, (4, 3)).astype(float)

    def rate(m):
        law = m * p / (p @ m)[:, None]
        values, vectors = np.linalg.eig(law.T)
        visits = np.real(vectors[:, np.argmax(np.real(values))])
        visits = visits / visits.sum()
        return visits, visits[:, None] * law[:, [0]] * law

    for row, got in zip(counts, single_trajectory._mean_field_exponents(p, counts), strict=True):
        m = row / row.sum()
        flow, h = rate(m)[0] - m, 1e-4
        change = np.log(rate(m + h * flow)[1]) - np.log(rate(m - h * flow)[1])
        np.testing.assert_allclose(got, 1 + change / (2 * h), atol=1e-3)
    tiny = np.array([[1e12, 1.0, 1.0]])  # the limit of the winner's row, and of the others
    p = np.asarray(SMALL.model({"matrix": 0}).transition_matrix, float)
    limit = np.asarray(SMALL.contrasts({"matrix": 0}).exponents)[:, 1:]
    np.testing.assert_allclose(
        single_trajectory._mean_field_exponents(p, tiny)[0, :, 1:], limit, atol=1e-3
    )


def test_prediction_on_the_way_is_the_slope_of_the_mean_field():
    """Gains along the flow ``dm/dτ = ν(m) − m`` itself to 1e6 steps, by Heun steps."""
    config = SMALL.configs()[0]
    p = np.asarray(SMALL.model(config).transition_matrix, float)
    at, steps = np.geomspace(10, 1e6, 101), 10
    h = np.log(1e5) / 100 / steps
    m, shares, gains = np.array([0.5, 0.2, 0.3]), [], []
    for i in range(101):
        gain = np.zeros((3, 3))
        for k in range(steps if i else 0):
            visits, before = single_trajectory._log_rate(p, m)
            ahead = single_trajectory._log_rate(p, m + h * (visits - m))[0]
            m = m + h * ((visits + ahead) / 2 - m - h * (visits - m) / 2)
            after = single_trajectory._log_rate(p, m)[1]
            t = at[i - 1] * np.exp(h * np.array([k, k + 1]))
            gain += h * (t[0] * np.exp(before) + t[1] * np.exp(after)) / 2
        gain[:, 0] = 0
        shares.append(m)
        gains.append(gain)
    growth = single_trajectory._growth(at, np.array(gains)[None])
    predicted = SMALL._on_the_way(config, growth, np.array(shares)[None])[0, :, 1:]
    measured = growth.exponents(0)[0, :, 1:]
    limit = np.asarray(SMALL.contrasts(config).exponents)[:, 1:]
    np.testing.assert_allclose(predicted, measured, atol=1e-3)
    assert abs(measured - limit).min() > 4e-3


def test_ensemble_is_as_described():
    experiment = dataclasses.replace(SMALL, num_matrices=2)
    first, second = (experiment.contrasts(c) for c in experiment.configs())
    np.testing.assert_allclose(first.growth, [1, 0.3, 0.6], rtol=1e-5)
    np.testing.assert_allclose(second.growth, [1, 0.3, 0.6], rtol=1e-5)
    p, q = (np.asarray(experiment.model(c).transition_matrix) for c in experiment.configs())
    assert abs(p - q).max() > 0.01
    assert (p.argmax(1) == 0).all()


def test_figures(simulated):
    figures = SMALL.figures(simulated)
    assert set(figures) == {"information", "budget"}
    for figure in figures.values():
        assert figure.get_label()
        figure.canvas.draw()
    left, right = figures["budget"].axes
    medians = np.median(simulated["squared_error"].values[0], axis=0)
    for scheme in range(3):
        drawn = left.containers[scheme][0].get_ydata()
        np.testing.assert_allclose(drawn, medians[scheme])
    risks = [c[0].get_ydata()[0] for c in right.containers]
    np.testing.assert_allclose(risks, np.median(simulated["excess_risk"].values[0], axis=0))


def test_information_figure_goes_on_as_predicted(simulated):
    data = made(simulated)
    growth = single_trajectory._growth(data["step"].values, data["gain"].values[0])
    contrasts = SMALL.contrasts({"matrix": 0})
    for row in range(3):
        ax = information(growth, contrasts, row)
        lines = ax.get_lines()
        for solid, dashed in ((lines[0], lines[1]), (lines[2], lines[3])):
            end = np.asarray(solid.get_ydata())[-len(np.asarray(dashed.get_ydata())) :]
            np.testing.assert_allclose(np.asarray(dashed.get_ydata()), end, rtol=1e-3)
    legend = information(growth, contrasts, 1).get_legend()
    texts = [t.get_text() for t in legend.get_texts()] if legend else []
    assert texts[:2] == [
        "(0, 1): exponent -0.40, not learnable",
        "(0, 2): exponent -0.10, not learnable",
    ]
    with pytest.raises(ValueError, match=r"row: 3 is outside 0..2"):
        information(growth, contrasts, 3)
    short = InformationGrowth(np.array([5, 6]), np.ones((1, 2, 3, 3, 3)), np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="can't be cut"):
        information(short, contrasts, 0)


def test_presets_and_spec():
    for name in ("quick", "full"):
        experiment = SingleTrajectory.preset(name)
        assert SingleTrajectory.from_spec(experiment.spec()) == experiment
        assert set(experiment.layout()) & set(experiment.coords()) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exponents": ()}, r"exponents: expected numbers inside \(0, 1\), got \(\)"),
        ({"exponents": (0.5, 1.0)}, "exponents: expected numbers inside"),
        ({"num_steps": 9999}, "num_steps: slopes need at least 10000 steps"),
        ({"num_steps": 2**61}, "num_steps: slopes need .* got 2305843009213693952"),
        ({"num_records": 19}, "num_records: slopes need at least 20, got 19"),
        ({"num_matrices": 0}, "num_matrices: must be at least 1, got 0"),
        ({"copies": 0}, "copies: must be at least 1, got 0"),
        ({"num_segments": 0}, "num_segments: must be at least 1, got 0"),
        ({"fit_steps": 300}, "fit_steps: expected a multiple of 16 num_segments = 256"),
        ({"fit_steps": 128, "num_segments": 8}, "from 256 on, got 128"),
        ({"prior": 0.0}, "prior: must be above 0, got 0.0"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1, got 0"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        SingleTrajectory(**change)
