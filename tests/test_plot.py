import jax
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt

import attnmarkov as am
from attnmarkov import plot
from attnmarkov.plot.learning import learning_ratios


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ydata(line):
    return np.asarray(line.get_ydata())


@pytest.fixture
def trajectory(key: jax.Array):
    model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.6, 0.4]])
    at = am.log_spaced(500, 8)
    return model, am.rollout(model, key, [0, 1], 500, 20, record="counts", at=at)


def test_frequencies_shows_medians_and_predictions(trajectory):
    model, traj = trajectory
    ax = plot.frequencies(traj, predicted=model)
    labels = legend(ax)
    assert labels == ["token 0 (on top)", "token 1", "predicted slope"]
    shares = np.asarray(traj.frequencies)
    won = shares[:, -1].argmax(-1) == 0
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(
        ydata(lines["token 1"]), np.median(shares[won, :, 1], axis=0), rtol=1e-6
    )
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--" and len(ydata(line))]
    slope = np.diff(np.log(ydata(dashed[0])))[-1] / np.diff(np.log(traj.at))[-1]
    assert slope == pytest.approx(0.3 / 0.7 - 1, abs=1e-4)
    assert ax.get_xlabel()
    assert not plt.get_fignums()  # nothing is left with pyplot


def test_frequencies_on_given_axes_and_bad_input(trajectory, key):
    model, traj = trajectory
    _, ax = plt.subplots()
    assert plot.frequencies(traj, ax=ax) is ax
    plt.close("all")
    with pytest.raises(ValueError, match="winner: no trajectory ends with token 7 on top"):
        plot.frequencies(traj, winner=7)
    mixing = am.CCMC.from_transition_matrix([[0.4, 0.6], [0.6, 0.4]])
    ax = plot.frequencies(traj, predicted=mixing, winner=0)
    assert legend(ax)[-1] == "no prediction: token 0 cannot win alone"
    assert all(line.get_linestyle() != "--" for line in ax.get_lines())
    with pytest.raises(ValueError, match="this rollout recorded tokens"):
        plot.frequencies(am.rollout(model, key, [0, 1], 5))
    with pytest.raises(ValueError, match="two or more positive steps"):
        plot.frequencies(am.rollout(model, key, [0, 1], 5, record="counts"))


def test_learning_curves():
    n = np.array([10, 100, 1000])
    values = 3 / n[:, None] * np.array([0.9, 1.0, np.nan, 1.1])
    data = {
        "excess_risk": (("config", "replicate"), values),
        "predicted_excess_risk": (("config", "replicate"), 3 / n[:, None] * np.ones(4)),
    }
    coords = {"num_tokens": ("config", [3] * 3), "num_prompts": ("config", n)}
    ax = plot.learning_curves(xr.Dataset(data, coords))
    dashed = next(line for line in ax.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(ydata(dashed), 3 / n)
    np.testing.assert_allclose(ydata(ax.containers[0][0]), 3 / n)
    parts = [xr.Dataset(data, coords | {"length": ("config", [x] * 3)}) for x in (5, 7)]
    both = xr.concat(parts, "config")
    names = ["K = 3, L = 5", "K = 3, L = 7"]
    assert legend(plot.learning_curves(both)) == ["predicted $r/2n$", *names]
    ratios = learning_ratios(both)
    assert [t.get_text() for t in ratios.get_yticklabels()] == names
    points = [line for line in ratios.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose([np.asarray(p.get_xdata())[0] for p in points], np.ones(6))
    heights = [np.asarray(p.get_ydata())[0] for p in points]
    np.testing.assert_allclose(np.round(heights), [0, 0, 0, 1, 1, 1])
    assert len(set(heights)) == 6
    with pytest.raises(ValueError, match="variable: unknown 'loss'; known: excess_risk"):
        plot.learning_curves(xr.Dataset(data, coords), "loss")
    with pytest.raises(ValueError, match="variable: unknown 'loss'; known: excess_risk"):
        learning_ratios(xr.Dataset(data, coords), "loss")


def test_growth_exponents():
    columns = {
        "limit": [0.3, 0.5],
        "predicted": [0.3, 0.5],
        "median": [0.31, 0.52],
        "lower": [0.2, 0.4],
        "upper": [0.4, 0.6],
    }
    slopes = xr.Dataset({k: ("group", v) for k, v in columns.items()})
    ax = plot.growth_exponents(slopes.assign_coords(num_tokens=("group", [2, 3])))
    assert legend(ax) == ["prediction", "K = 2", "K = 3"]
