"""The experiment on positional weights, and its figures."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

import attnmarkov as am
from attnmarkov import sweep
from attnmarkov.experiments import positional_learning
from attnmarkov.experiments.positional_learning import PositionalLearning, log_weights

SMALL = PositionalLearning(
    num_tokens=2,
    length=3,
    prompts_per_parameter=(150, 300, 600),
    schemes=("alibi-0.5",),
    num_replicates=20,
)


@pytest.fixture(scope="module")
def learned():
    return sweep.run(SMALL, None, progress=False)


def ideal(dataset, replicates=400):
    """Errors that follow the theory, with the spread of chi-square laws."""
    rng = np.random.default_rng(0)
    reps = np.resize(np.arange(dataset.sizes["replicate"]), replicates)
    dataset = dataset.isel(replicate=reps).copy(deep=True)
    n = dataset["num_prompts"].values[:, None]
    shape = (dataset.sizes["config"], replicates)
    for name, number in (("excess_risk", 4), ("weight_error", 2)):
        noise = 0.2 * (rng.chisquare(number, shape) / number - 1)
        dataset[name] = (
            ("config", "replicate"),
            dataset[f"predicted_{name}"].values / n * (1 + noise),
        )
    floor = dataset["predicted_floor"].values * (1 + 0.05 * rng.normal(size=shape))
    dataset["flat_excess_risk"] = (("config", "replicate"), floor + 1 / n)
    dataset["status"][:] = 0
    return dataset


def verdicts(dataset, word):
    return {c.verdict for c in SMALL.claims(dataset) if word in c.claim}


def test_claims_on_what_theory_says(learned):
    assert len(SMALL.claims(learned)) == 8 + 2
    assert [c.verdict for c in SMALL.claims(learned)].count("fail") == 0
    assert verdicts(ideal(learned), "") == {"pass"}


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("excess_risk", lambda x, n: 1.3 * x, "excess risk of the joint fit"),
        ("excess_risk", lambda x, n: x * (n / n.min()) ** 0.3, "exponent of excess risk"),
        ("weight_error", lambda x, n: 1.3 * x, "squared error of β"),
        ("weight_error", lambda x, n: x * (n / n.min()) ** 0.3, "exponent of weight error"),
        ("flat_excess_risk", lambda x, n: 1.3 * x, "ignores positions"),
    ],
)
def test_claims_fail_when_the_theory_is_wrong(learned, name, change, word):
    wrong = ideal(learned)
    n = wrong["num_prompts"].values[:, None]
    wrong[name] = (("config", "replicate"), change(wrong[name].values, n))
    assert verdicts(wrong, word) == {"fail"}


def test_no_verdict_on_spoilt_data(learned):
    spoilt = ideal(learned)
    spoilt["status"][0, :60] = 2
    assert verdicts(spoilt, "of fits without a maximum") == {"inconclusive"}
    constant = ideal(learned)
    for name in ("excess_risk", "weight_error", "flat_excess_risk"):
        constant[name] = 0 * constant[name]  # no error bars
    assert verdicts(constant, "") == {"inconclusive"}


def test_replicates_do_not_depend_on_their_block():
    for config in (SMALL.configs()[0], SMALL.configs()[3]):
        key = SMALL.config_key(config)
        whole = SMALL.simulate(config, key, np.arange(6))
        parts = [SMALL.simulate(config, key, np.array(ids)) for ids in ([0, 1, 5], [2, 3, 4])]
        order = np.argsort([0, 1, 5, 2, 3, 4])
        for name, values in whole.items():
            found = np.concatenate([part[name] for part in parts])[order]
            np.testing.assert_allclose(values, found, rtol=1e-3, atol=1e-5)


def test_facts_against_loops():
    known = positional_learning._facts(SMALL, "alibi-0.5")
    p = np.asarray(SMALL.teacher("alibi-0.5").transition_matrix, float)
    flat = np.zeros((8, 2))
    for row, (tokens, law) in enumerate(zip(known.tokens, known.law, strict=True)):
        weights = np.zeros(2)
        for lag, token in enumerate(tokens[::-1]):
            weights[token] += np.exp(-0.5 * lag) * p[tokens[-1], token]
            flat[row, token] += 1
        np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-5)
    # The projection, of the row of last token 0, by a search along its one free number.
    at = known.tokens[:, -1] == 0
    law, best = known.law[at], np.inf
    for a in np.linspace(-1, 1, 2001):
        student = flat[at] * np.exp([0.0, a])
        student /= student.sum(1, keepdims=True)
        held = law > 0
        best = min(best, (law[held] * np.log(law[held] / student[held])).sum() / len(law))
    share = np.full(8, 1 / 8)
    nearest = positional_learning._projection(known.law, known.tokens, share)
    found = positional_learning._risk(law, known.tokens[at], nearest, np.zeros(3))
    assert found == pytest.approx(best, abs=1e-6)
    assert found > 1e-3
    assert known.risk["prompts"] == pytest.approx(SMALL.num_parameters / 2, rel=1e-6)
    assert known.risk["rollouts"] > known.risk["prompts"]


def test_figures(learned):
    figures = SMALL.figures(learned)
    assert set(figures) == {"log-weights", "learning-curves"}
    assert all(figure.get_label() for figure in figures.values())
    ax = figures["log-weights"].axes[0]
    true = np.asarray(ax.get_lines()[0].get_ydata())
    np.testing.assert_allclose(true, [0, -0.5, -1])
    mean = learned["log_weights"].values[0, :, 1:].mean(0)
    np.testing.assert_allclose(ax.containers[0][0].get_ydata(), mean)
    ax = figures["learning-curves"].axes[0]
    np.testing.assert_allclose(
        ax.containers[0][0].get_ydata(), learned["excess_risk"].values[:3].mean(1)
    )
    assert not plt.get_fignums()


def test_log_weights_and_teachers():
    assert log_weights("alibi-0", 3).tolist() == [0, 0, 0]
    assert log_weights("irregular", 6)[0] == 0
    assert isinstance(SMALL.teacher("alibi-0.5"), am.CCMC)


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_presets_and_specs(preset):
    experiment = PositionalLearning.preset(preset)
    assert PositionalLearning.from_spec(experiment.spec()) == experiment
    assert len(experiment.configs()) == 6 * len(experiment.prompts_per_parameter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 1}, "num_tokens: must be at least 2, got 1"),
        ({"length": 2}, "length: must be at least 3, got 2"),
        ({"length": 12}, r"length: all 3\*\*12 prompts are gone through"),
        ({"rollout_steps": 0}, "rollout_steps: must be at least 1, got 0"),
        ({"prompts_per_parameter": (8, 8)}, "prompts_per_parameter: expected three"),
        ({"concentration": 0.0}, "concentration: must be above 0, got 0.0"),
        ({"schemes": ()}, "schemes: expected at least one"),
        ({"schemes": ("alibi-x",)}, "schemes: expected 'irregular' or 'alibi-SLOPE'"),
        ({"schemes": ("alibi--1",)}, "schemes: expected 'irregular'"),
        ({"schemes": ("window",)}, "schemes: expected 'irregular'"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        PositionalLearning(**change)
