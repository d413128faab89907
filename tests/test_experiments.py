import dataclasses

import numpy as np
import pytest
from oracles import assert_mean
from scipy import stats

from attnmarkov import dynamics, experiments, sweep
from attnmarkov.experiments import _statistics
from attnmarkov.experiments.sample_complexity import SampleComplexity
from attnmarkov.experiments.winner_takes_all import WinnerTakesAll

SMALL = SampleComplexity(
    num_tokens=(3,),
    prompts_per_parameter=(32, 64, 128),
    num_replicates=40,
    num_teachers=2,
    num_test_prompts=512,
)
SHORT = WinnerTakesAll(num_tokens=(2, 3), num_matrices=1, num_steps=1000, num_replicates=6)


@pytest.fixture(scope="module")
def learned():
    return sweep.run(SMALL, None, progress=False)


def test_sample_complexity_agrees_with_theory(learned):
    claims = SMALL.claims(learned)
    assert [c.verdict for c in claims].count("fail") == 0
    assert len(claims) == 4
    n = learned["num_prompts"].values[-1]
    assert_mean(n * learned["excess_risk"].values[-1], 3.0)  # K(K-1)/2
    assert set(SMALL.figures(learned)) == {"learning-curves"}


def test_sample_complexity_fails_when_the_theory_is_wrong(learned):
    wrong = learned.copy(deep=True)
    wrong["excess_risk"] = wrong["excess_risk"] * 2.0
    wrong["squared_error"] = wrong["squared_error"] * wrong["num_prompts"] ** 0.8
    more = SampleComplexity(**{**dataclasses.asdict(SMALL)})
    found = more.fitted(wrong, 3, "excess_risk")
    assert found["constant"] == pytest.approx(
        2 * SMALL.fitted(learned, 3, "excess_risk")["constant"]
    )
    tight = wrong.copy(deep=True)  # the same means with errors ten times smaller
    for name in ("excess_risk", "squared_error"):
        mean = tight[name].mean("replicate")
        tight[name] = mean + (tight[name] - mean) / 10
    verdicts = {c.claim: c.verdict for c in SMALL.claims(tight)}
    assert verdicts["K=3: n × excess risk, in units of K(K-1)/2, as n grows"] == "fail"
    assert verdicts["K=3: exponent of squared error in n (± 0.05, finite n)"] == "fail"


def test_replicates_do_not_depend_on_their_block():
    config = SMALL.configs()[0]
    key = SMALL.config_key(config)
    whole = SMALL.simulate(config, key, np.arange(6))
    parts = [SMALL.simulate(config, key, np.arange(i, i + 3)) for i in (0, 3)]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


def test_winner_takes_all_runs_and_is_stable_in_blocks():
    whole = sweep.run(SHORT, None, progress=False)
    parts = sweep.run(SHORT, None, block_size=2, progress=False)
    np.testing.assert_array_equal(whole["counts"], parts["counts"])
    totals = whole["counts"].sum("token") - whole["num_tokens"]
    np.testing.assert_array_equal(totals, np.broadcast_to(whole["step"], totals.shape))
    assert "frequencies" in SHORT.figures(whole)
    assert all(c.verdict == "inconclusive" for c in SHORT.claims(whole))  # six trajectories


def power_laws(experiment, bend=0.0):
    """A dataset whose losers grow exactly as predicted (or with exponents off by ``bend``)."""
    dataset = sweep.run(experiment, None, progress=False).copy(deep=True)
    steps, rng = experiment.coords()["step"], np.random.default_rng(0)
    counts = dataset["counts"].values
    for i, config in enumerate(experiment.configs()):
        size = config["num_tokens"]
        exponents = np.asarray(dynamics.winner_exponents(experiment.model(config), 0)) + bend
        constants = rng.gamma(5, 20, size=(counts.shape[1], 1, size - 1))
        losers = constants * (steps[:, None] + size) ** exponents[1:size]
        counts[i, :, :, 1:size] = losers
        counts[i, :, :, 0] = steps + size
        counts[i, :, -1, 0] = 1000 * counts[i, :, -1, 1:].sum(-1)
    return dataset


def test_winner_takes_all_judges_exponents_and_winners():
    experiment = dataclasses.replace(SHORT, num_replicates=200)
    good = {c.claim: c.verdict for c in experiment.claims(power_laws(experiment))}
    assert len(good) == 4
    assert set(good.values()) == {"pass"}
    bent = [c for c in experiment.claims(power_laws(experiment, 0.1)) if "exponent" in c.claim]
    assert {c.verdict for c in bent} == {"fail"}
    swapped = power_laws(experiment)
    swapped["counts"][0] = swapped["counts"][0].values[..., [1, 0, 2]]  # token 1 cannot win
    verdicts = {c.claim: c.verdict for c in experiment.claims(swapped)}
    assert verdicts["K=2, matrix 0: share of winners with some P[w,j] >= P[w,w]"] == "fail"


def test_ensemble_is_as_described():
    for config in SHORT.configs():
        model = SHORT.model(config)
        possible = np.asarray(dynamics.possible_winners(model))
        assert possible.tolist() == [True] * (len(possible) - 1) + [False]
        for w in range(len(possible) - 1):
            losers = np.delete(np.asarray(dynamics.winner_exponents(model, w)), w)
            assert (losers > 0.349).all()
            assert (losers < 0.651).all()


@pytest.mark.parametrize("name", experiments.names())
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_presets_and_specs(name, preset):
    cls = experiments.get(name)
    experiment = cls.preset(preset)
    assert cls.from_spec(experiment.spec()) == experiment
    assert experiment.configs()
    assert set(experiment.layout()) & set(experiment.coords()) == set()


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (SampleComplexity, {"num_tokens": (1,)}, "num_tokens: expected sizes of at least 2"),
        (
            SampleComplexity,
            {"prompts_per_parameter": (8, 8)},
            "prompts_per_parameter: expected three",
        ),
        (SampleComplexity, {"concentration": 0.0}, "concentration: must be above 0, got 0.0"),
        (SampleComplexity, {"length": 0}, "length: must be at least 1, got 0"),
        (SampleComplexity, {"num_replicates": -5}, "num_replicates: must be at least 1, got -5"),
        (WinnerTakesAll, {"num_tokens": ()}, "num_tokens: expected sizes of at least 2"),
        (WinnerTakesAll, {"num_steps": -10}, "num_steps: slopes need at least 1000 steps, got -10"),
        (WinnerTakesAll, {"exponents": (0.5, 1.0)}, "exponents: expected 0 < low <= high < 1"),
        (WinnerTakesAll, {"num_records": 3}, "num_records: slopes need at least 8, got 3"),
        (WinnerTakesAll, {"num_matrices": 0}, "num_matrices: must be at least 1, got 0"),
    ],
)
def test_bad_parameters(cls, change, message):
    with pytest.raises(ValueError, match=message):
        cls(**change)


def test_median_interval_covers():
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(2000):
        low, high = _statistics.median_interval(rng.exponential(size=60), 0.05)
        missed += not low <= np.log(2) <= high
    assert stats.binom.sf(missed - 1, 2000, 0.05) > 1e-6


def test_binomial_upper_covers():
    for hits in (0, 3, 20):
        bound = _statistics.binomial_upper(hits, 20, 0.01)
        assert bound == 1 if hits == 20 else stats.binom.cdf(hits, 20, bound) == pytest.approx(0.01)


def test_weighted_line_against_lstsq():
    rng = np.random.default_rng(2)
    x, y, e = rng.normal(size=9), rng.normal(size=9), rng.uniform(0.5, 2, 9)
    values, _ = _statistics.weighted_line(x, y, e)
    np.testing.assert_allclose(values, np.polyfit(x, y, 1, w=1 / e)[::-1])
