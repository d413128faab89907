import dataclasses
import itertools

import numpy as np
import pytest
from oracles import assert_mean
from scipy import stats

from attnmarkov import dynamics, experiments, sweep
from attnmarkov.experiments import _statistics, sample_complexity
from attnmarkov.experiments.sample_complexity import SampleComplexity
from attnmarkov.experiments.winner_takes_all import WinnerTakesAll
from attnmarkov.model import CCMC

SMALL = SampleComplexity(
    num_tokens=(3,),
    lengths=(10,),
    distributions=("uniform",),
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
    np.testing.assert_allclose(learned["predicted_excess_risk"][-1], 3 / n)
    traces = learned["predicted_squared_error"].values[0]  # of two teachers, in turns
    assert traces[0] != traces[1]
    np.testing.assert_array_equal(traces, np.tile(traces[:2], 20))
    assert set(SMALL.figures(learned)) == {"learning-curves", "learning-ratios"}


def tight(dataset):
    """The same means with errors ten times smaller, as from a hundred times the replicates."""
    dataset = dataset.copy(deep=True)
    for name in ("excess_risk", "squared_error"):
        mean = dataset[name].mean("replicate")
        dataset[name] = mean + (dataset[name] - mean) / 10
    return dataset


def test_sample_complexity_fails_when_the_theory_is_wrong(learned):
    wrong = learned.copy(deep=True)
    wrong["excess_risk"] = wrong["excess_risk"] * 1.5
    wrong["squared_error"] = wrong["squared_error"] * wrong["num_prompts"] ** 0.6
    found = {c.claim: c.verdict for c in SMALL.claims(tight(wrong))}
    assert found["K=3: n × excess risk, in units of K(K-1)/2, as n grows"] == "fail"
    assert found["K=3: exponent of squared error in n (± 0.05, finite n)"] == "fail"


def test_sample_complexity_gives_no_verdict_on_spoilt_data(learned):
    spoilt = tight(learned)
    spoilt["status"][0, :20] = 2  # half of the fits of one grid point ran off to infinity
    assert {c.verdict for c in SMALL.claims(spoilt)} == {"inconclusive"}
    assert "16.7% of fits without a unique maximum" in SMALL.claims(spoilt)[0].claim
    constant = learned.copy(deep=True)
    constant["excess_risk"] = 0 * constant["excess_risk"]  # no error bars
    assert SMALL.claims(constant)[0].verdict == "inconclusive"
    hopeless = learned.copy(deep=True)
    hopeless["status"][0], hopeless["excess_risk"][0] = 2, np.nan  # no claim is dropped
    assert [c.verdict for c in SMALL.claims(hopeless)] == ["inconclusive"] * 4


def test_sample_complexity_makes_no_claim_of_what_was_not_run(learned):
    unfinished = learned.copy(deep=True)
    unfinished["status"][0] = -1
    assert SMALL.claims(unfinished) == []


def test_sample_complexity_varies_lengths_and_distributions():
    def groups(**change):
        experiment = dataclasses.replace(SMALL, num_tokens=(3, 4), lengths=(10, 5), **change)
        configs = experiment.configs()
        assert len(configs) == 3 * len({tuple(c.values())[:3] for c in configs})
        return [tuple(c.values())[:3] for c in configs[::3]]

    laws = ("uniform", "zipf")
    alone = [(3, 10, "uniform"), (4, 10, "uniform"), (3, 5, "uniform"), (3, 10, "zipf")]
    assert groups(distributions=laws) == alone
    every = set(itertools.product((3, 4), (10, 5), laws))
    assert set(groups(distributions=laws, crossed=True)) == every


@pytest.mark.parametrize("law", ["uniform", "zipf"])
def test_sizes_of_samples_follow_the_information(law):
    """For a teacher without preferences, by enumeration of all prompts of four tokens."""
    chances = np.ones(3) / 3 if law == "uniform" else np.array([6, 3, 2]) / 11
    information = np.zeros((3, 3, 3))
    for tokens in itertools.product(range(3), repeat=4):
        p = np.bincount(tokens, minlength=3) / 4
        information[tokens[-1]] += chances[list(tokens)].prod() * (np.diag(p) - np.outer(p, p))
    exact = np.trace(np.linalg.pinv(information, hermitian=True), axis1=1, axis2=2).sum()
    assert sample_complexity._indifferent_trace(chances, 4) == pytest.approx(exact)
    assert sample_complexity.effort(3, 10, "uniform") == 1
    reference = sample_complexity._indifferent_trace(np.ones(3) / 3, 10)
    assert sample_complexity.effort(3, 4, law) == pytest.approx(exact / reference, abs=0.0501)


def test_sample_complexity_names_what_varies(learned):
    experiment = dataclasses.replace(SMALL, lengths=(10, 4), distributions=("uniform", "zipf"))
    assert experiment.claims(learned)[0].claim.startswith("K=3, length 10, uniform: n × excess")


def test_replicates_do_not_depend_on_their_block():
    config = SMALL.configs()[0]
    key = SMALL.config_key(config)
    whole = SMALL.simulate(config, key, np.arange(6))
    parts = [SMALL.simulate(config, key, np.arange(i, i + 3)) for i in (0, 3)]
    for name, values in whole.items():  # the same draws; sums may differ in the last bits
        np.testing.assert_allclose(values, np.concatenate([p[name] for p in parts]), rtol=1e-3)


def test_winner_takes_all_runs_and_is_stable_in_blocks():
    whole = sweep.run(SHORT, None, progress=False)
    parts = sweep.run(SHORT, None, block_size=2, progress=False)
    np.testing.assert_array_equal(whole["counts"], parts["counts"])
    totals = whole["counts"].sum("token") - whole["num_tokens"]
    np.testing.assert_array_equal(totals, np.broadcast_to(whole["step"], totals.shape))
    assert "frequencies" in SHORT.figures(whole)
    assert all(c.verdict == "inconclusive" for c in SHORT.claims(whole))  # six trajectories


@pytest.fixture(scope="module")
def rolled():
    return sweep.run(MANY, None, progress=False)


MANY = dataclasses.replace(SHORT, num_replicates=200)


def power_laws(dataset, bend=0.0, spread=0.0):
    """The dataset with losers that grow exactly as predicted, or with bent exponents."""
    dataset = dataset.copy(deep=True)
    steps, rng = MANY.coords()["step"], np.random.default_rng(0)
    counts = dataset["counts"].values
    for i, config in enumerate(MANY.configs()):
        size = config["num_tokens"]
        exponents = np.asarray(dynamics.winner_exponents(MANY.model(config), 0))[1:] + bend
        exponents = exponents + spread * rng.normal(size=(counts.shape[1], 1, size - 1))
        constants = rng.gamma(5, 20, size=(counts.shape[1], 1, size - 1)) + 60
        counts[i, :, :, 1:size] = constants * (steps[:, None] + size) ** exponents
        counts[i, :, :, 0] = 1_000_000 * steps
    return dataset


def verdicts(dataset, word):
    return [c.verdict for c in MANY.claims(dataset) if word in c.claim]


def test_winner_takes_all_judges_exponents(rolled):
    assert verdicts(power_laws(rolled), "") == ["pass"] * 6
    assert verdicts(power_laws(rolled, bend=0.1), "exponent") == ["fail"] * 2
    assert verdicts(power_laws(rolled, spread=0.4), "exponent") == ["inconclusive"] * 2


def test_one_wrong_exponent_is_not_hidden_by_a_wide_one(rolled):
    data = power_laws(rolled)
    steps, rng = MANY.coords()["step"], np.random.default_rng(1)
    data["counts"].values[1, :, :, 1] = 100 * steps**0.8  # sure, and far from at most 0.65
    wide = rng.uniform(0.1, 0.9, size=(200, 1))
    data["counts"].values[1, :, :, 2] = 100 * steps**wide
    assert verdicts(data, "K=3, matrix 0, winner 0: growth exponent") == ["fail"]


def test_winner_takes_all_judges_winners(rolled):
    data = power_laws(rolled)
    data["counts"].values[0] = data["counts"].values[0][..., [1, 0, 2]]  # token 1 cannot win
    assert verdicts(data, "K=2, matrix 0: share of winners") == ["fail"]
    data = power_laws(rolled)
    data["counts"].values[0, :80, :, 1] = data["counts"].values[0, :80, :, 0]  # 80 of 200 stay even
    assert verdicts(data, "K=2, matrix 0: share without a winner") == ["fail"]
    assert MANY.winners(data)["won"].values[0, -1].tolist() == [120, 0, 0]


def test_mean_field_exponents_against_a_loop():
    rng = np.random.default_rng(3)
    p, counts = rng.dirichlet(np.ones(4), 4), rng.integers(1, 50, (3, 4))
    model = CCMC.from_transition_matrix(p)
    for row, got in zip(counts, dynamics.growth_exponents(model, counts), strict=True):
        m = row / row.sum()
        walk = m * p / (p @ m)[:, None]
        values, vectors = np.linalg.eig(walk.T)
        visits = np.real(vectors[:, np.argmax(np.real(values))])
        visits = visits / visits.sum()
        expected = [sum(visits[k] * p[k, j] / (p[k] @ m) for k in range(4)) for j in range(4)]
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_ensemble_is_as_described():
    for config in SHORT.configs():
        model = SHORT.model(config)
        possible = np.asarray(dynamics.possible_winners(model))
        assert possible.tolist() == [True] * (len(possible) - 1) + [False]
        for w in range(len(possible) - 1):
            losers = np.delete(np.asarray(dynamics.winner_exponents(model, w)), w)
            assert (losers > 0.449).all()
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
        (
            SampleComplexity,
            {"lengths": (10, 1)},
            r"lengths: one token teaches nothing; .* at least 2, got \(10, 1\)",
        ),
        (SampleComplexity, {"lengths": ()}, "lengths: .* at least 2"),
        (SampleComplexity, {"distributions": ()}, "distributions: expected at least one"),
        (
            SampleComplexity,
            {"distributions": ("uniform", "normal")},
            "distributions: unknown distributions 'normal'; known: uniform, zipf, markov",
        ),
        (SampleComplexity, {"num_replicates": -5}, "num_replicates: must be at least 1, got -5"),
        (WinnerTakesAll, {"num_tokens": ()}, "num_tokens: expected sizes of at least 2"),
        (
            WinnerTakesAll,
            {"num_steps": -10},
            "num_steps: slopes need .* got -10",
        ),
        (WinnerTakesAll, {"num_steps": 2**31}, "counts end at 2\\*\\*31; got 2147483648"),
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
        low, high = _statistics.quantile_interval(rng.exponential(size=60), 0.5, 0.05)
        missed += not low <= np.log(2) <= high
    assert stats.binom.sf(missed - 1, 2000, 0.05) > 1e-6


@pytest.mark.parametrize("hits", [0, 3, 17, 20])
def test_binomial_interval_covers(hits):
    low, high = _statistics.binomial_interval(hits, 20, 0.02)
    if hits:
        assert stats.binom.sf(hits - 1, 20, low) == pytest.approx(0.01)
    if hits < 20:
        assert stats.binom.cdf(hits, 20, high) == pytest.approx(0.01)
    assert (low == 0) == (hits == 0)
    assert (high == 1) == (hits == 20)


def test_weighted_line_against_lstsq():
    rng = np.random.default_rng(2)
    x, y, e = rng.normal(size=9), rng.normal(size=9), rng.uniform(0.5, 2, 9)
    values, _ = _statistics.weighted_line(x, y, e)
    np.testing.assert_allclose(values, np.polyfit(x, y, 1, w=1 / e)[::-1])
