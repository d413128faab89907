import dataclasses

import numpy as np
import pytest

from attnmarkov import sweep
from attnmarkov.experiments.finite_context_absorption import FiniteContextAbsorption
from attnmarkov.plot.absorption import absorption_times

SMALL = FiniteContextAbsorption(
    windows=(2, 4),
    windows_of_three=(2, 3),
    memories=(1.5, 3.0),
    exact_to=5,
    num_replicates=1000,
)


@pytest.fixture(scope="module")
def rolled():
    return sweep.run(SMALL, None, progress=False)


def verdicts(dataset, word="", experiment=SMALL):
    return [c.verdict for c in experiment.claims(dataset) if word in c.claim]


def test_rollouts_agree_with_the_exact_law(rolled):
    claims = SMALL.claims(rolled)
    assert len(claims) == 4 * 3 + 3
    assert {c.verdict for c in claims} == {"pass"}
    figures = SMALL.figures(rolled)
    assert set(figures) == {"absorption-times", "absorption-winners", "windows-and-decay"}
    left, right = figures["absorption-times"].axes
    assert left.get_title() == "K = 2"
    assert right.get_ylim() == left.get_ylim()
    table = SMALL.times(rolled)
    window = table.isel(config=np.flatnonzero(table["context"] == "window")[:4])
    ax = absorption_times(window.assign(regime=("config", ["one"] * 4)))
    np.testing.assert_allclose(
        np.asarray(ax.lines[0].get_ydata()), window.sortby("memory")["exact"]
    )


def test_claims_fail_when_the_law_is_wrong(rolled):
    wrong = rolled.copy(deep=True)
    two = wrong["num_tokens"].values == 2
    long = wrong["time"].values[two]
    wrong["time"].values[two] = np.where(long > 4, long * 2, long)
    assert verdicts(wrong, "K=2: mean steps") == ["fail"] * 2
    assert verdicts(wrong, "K=2: d log(mean time)") == ["fail"] * 2
    assert verdicts(wrong, "K=3: mean steps") == ["pass"] * 2
    swapped = rolled.copy(deep=True)
    swapped["winner"].values[two] = 1 - swapped["winner"].values[two]
    assert "fail" in verdicts(swapped, "K=2: probability")
    assert verdicts(swapped, "K=3: probability") == ["pass"] * 2
    still = rolled.copy(deep=True)
    decay = still["context"].values == "decay"
    regimes = still["regime"].values
    still["time"].values[decay & (regimes == "mixing")] = 5
    assert verdicts(still, "where the whole history mixes") == ["fail"]


def test_no_verdict_on_what_is_censored_or_scarce(rolled):
    censored = rolled.copy(deep=True)
    censored["time"].values[:, :1], censored["winner"].values[:, :1] = -1, -1
    short = dataclasses.replace(SMALL, max_steps=1000)  # the law allows one of 1000
    for word in ("mean steps", "d log(mean time)", "not collapsed"):
        assert set(verdicts(censored, word, short)) == {"inconclusive"}
    assert set(verdicts(censored, "mean steps")) == {"fail"}  # but not of 1,000,000 steps
    stuck = rolled.copy(deep=True)
    stuck["time"].values[:, ::10], stuck["winner"].values[:, ::10] = -1, -1
    assert set(verdicts(stuck, "mean steps")) == {"fail"}
    assert set(verdicts(stuck, "d log(mean time)")) == {"fail"}
    assert set(verdicts(stuck, "not collapsed")) == {"fail"}
    few = rolled.copy(deep=True)
    few["done"].values[:, 50:] = False
    assert set(verdicts(few, "mean steps")) == {"inconclusive"}
    none = rolled.copy(deep=True)
    none["done"].values[:] = False
    assert SMALL.claims(none) == []
    assert SMALL.figures(none) == {}


def test_replicates_do_not_depend_on_their_block():
    for config in (SMALL.configs()[0], SMALL.configs()[-1]):
        key = SMALL.config_key(config)
        whole = SMALL.simulate(config, key, np.arange(6))
        parts = [SMALL.simulate(config, key, np.arange(i, i + 3)) for i in (0, 3)]
        for name, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([p[name] for p in parts]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (4, 2)}, "windows: expected two or more increasing sizes from 2 on"),
        ({"windows_of_three": (1, 2)}, "windows_of_three: expected two or more"),
        ({"memories": (1.0, 2.0)}, "memories: expected two or more"),
        ({"stay_collapse": 0.5}, "stay_collapse: must lie between 0.5 and 0.95"),
        ({"stay_mixing": 0.5}, "stay_mixing: must lie between 0.05 and 0.3"),
        ({"return_probability": 0.0}, "return_probability: must lie between 0 and 1"),
        ({"max_steps": 10}, "max_steps: must lie in 1000"),
        ({"exact_to": 30}, "exact_to: must lie in 2..18, got 30"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
