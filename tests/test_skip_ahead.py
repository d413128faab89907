import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FAILURE_RATE, assert_mean, assert_poisson
from scipy import special, stats

import attnmarkov as am
from attnmarkov import _wide
from attnmarkov._wide import Wide
from attnmarkov.model import Sampling, WindowContext
from attnmarkov.rollout import skip_ahead

COLLAPSING = [[0.6, 0.24, 0.16], [0.7, 0.2, 0.1], [0.65, 0.15, 0.2]]


def assert_uniform(values):
    p_value = stats.kstest(values, "uniform").pvalue
    assert p_value > FAILURE_RATE, f"Kolmogorov-Smirnov p-value {p_value:.3g}"


def log_rising(x, c):
    """log Γ(x + c) − log Γ(x) in float64; by Stirling for large x, with error c / x**2."""
    x = np.asarray(x, float)
    stirling = c * np.log(np.maximum(x, 1e6) + (c - 1) / 2)
    return np.where(x < 1e6, special.gammaln(x + c) - special.gammaln(x), stirling)


def log_survival(m, c, n):
    """log P(stays >= m) of the beta-geometric law."""
    return log_rising(n, c) - log_rising(n + m, c)


@pytest.mark.parametrize("c", [1e-3, 0.4, 1.0, 3.7, 60.0])
@pytest.mark.parametrize("n", [1.0, 7.0, 1e4, 3e9, 1e12])
def test_stays_are_beta_geometric(key, c, n):
    runs, own = 40_000, 0.3
    bits = jax.random.bits(key, (8, runs), jnp.uint32)
    full = jnp.ones(runs)
    stays, accepted = skip_ahead._stay(c * own * full, own * full, n * full, list(bits))
    accepted = np.asarray(accepted)
    assert accepted.mean() > 0.85
    m = stays.numpy()[accepted].astype(float)
    v = np.random.default_rng(0).random(m.size)
    shorter, longer = np.exp(log_survival(m + 1, c, n)), np.exp(log_survival(m, c, n))
    endless = m >= 2.0**62  # where lengths saturate
    rest = np.exp(log_survival(2.0**62, c, n))
    place = np.where(endless, rest * v, longer - v * (longer - shorter))
    assert_uniform(place)


@pytest.mark.parametrize("a", [1.0, 1.5, 20.0, 1e4, 1e9])
def test_log_gamma_has_the_law(key, a):
    bits = jax.random.bits(key, (2, 60_000), jnp.uint32)
    values, accepted = skip_ahead._log_gamma(jnp.full(60_000, a), bits[0], bits[1])
    x = np.asarray(values, float)[np.asarray(accepted)]
    if a < 1e6:
        assert_uniform(stats.gamma.cdf(np.exp(x), a))
    else:  # float32 logarithms keep the mean; their spread is below its precision
        np.testing.assert_allclose(x, np.log(a), atol=6 / np.sqrt(a) + 3e-6)


def test_wide_arithmetic_is_that_of_integers():
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**62, 500, dtype=np.int64) >> rng.integers(0, 62, 500) for _ in "ab")
    wide_a, wide_b = Wide.of(a), Wide.of(b)
    np.testing.assert_array_equal((wide_a + wide_b).numpy(), a + b)
    np.testing.assert_array_equal((wide_a + wide_b - wide_b).numpy(), a)
    np.testing.assert_array_equal(wide_a <= wide_b, a <= b)
    np.testing.assert_array_equal(
        _wide.where(wide_a <= wide_b, wide_a, wide_b).numpy(), np.minimum(a, b)
    )
    np.testing.assert_allclose(wide_a.to_float(), a.astype(float), rtol=2e-7)


def test_floats_become_integers_that_fill_their_interval(key):
    for exponent in (3.3, 23.9, 24.5, 40.2, 56.7, 61.5):
        x = np.float32(2.0**exponent)
        fill = jax.random.bits(key, (2, 4096), jnp.uint32)
        got = _wide.from_float(jnp.full(4096, x), fill).numpy()
        step = max(1, int(np.spacing(x)))
        assert got.min() >= int(x)
        assert got.max() < int(x) + step
        if step > 2**12:
            assert_uniform((got - int(x)) / step)
    assert _wide.from_float(jnp.array([jnp.inf, 0.0]), fill[:, :2]).numpy()[1] == 0


@pytest.mark.parametrize("horizon", [2**24 + 5, 2**31 + 5, 10**12, 10**15])
def test_totals_are_conserved_to_the_unit(key, horizon):
    model = am.CCMC.from_transition_matrix([[0.9, 0.1], [0.8, 0.2]])
    at = am.log_spaced(horizon, 12)
    traj = am.rollout(model, key, [0, 1, 1], horizon, 9, "skip_ahead", "counts", at)
    np.testing.assert_array_equal(traj.counts.sum(-1), np.broadcast_to(at + 3, (9, 12)))
    assert (np.diff(traj.counts, axis=1) >= 0).all()
    assert traj.frequencies.shape == (9, 12, 2)


def test_records_do_not_change_the_trajectory(key):
    model = am.CCMC.from_transition_matrix(COLLAPSING)
    some, all_ = [10, 1000], [0, 3, 10, 11, 400, 1000, 5000]
    first = am.rollout(model, key, [0, 1, 2], 1000, 20, "skip_ahead", "counts", some).counts
    second = am.rollout(model, key, [0, 1, 2], 5000, 20, "skip_ahead", "counts", all_).counts
    np.testing.assert_array_equal(first, second[:, [2, 5]])


def test_rare_tokens_leave_the_winner_at_their_rate(key):
    # From counts (1, 1) and last token 0, token 1 comes with chance p / (n_0 + p) at each step
    # and sends the chain back at once: rare events at a rate near p log(T).
    p, runs, horizon = 1e-7, 4096, 10**6
    model = am.CCMC.from_transition_matrix([[1 - p, p], [1.0, 0.0]])
    hits = 0
    for i in range(16):
        counts = am.rollout(
            model, jax.random.fold_in(key, i), [1, 0], horizon, runs, "skip_ahead", "counts"
        ).counts
        hits += int((counts[:, 0, 1] - 1).sum())
    harmonic = np.log(horizon) + 0.5772
    assert_poisson(hits, 16 * runs * p * harmonic)


def test_moments_agree_with_scan(key):
    model = am.CCMC.from_transition_matrix(COLLAPSING)
    skipped, stepped = (
        np.asarray(am.rollout(model, key, [0, 1, 2], 3000, 4000, e, "counts").counts[:, 0], float)
        for e in ("skip_ahead", "scan")
    )
    for token in (1, 2):
        for power in (1, 0.5):
            a, b = skipped[:, token] ** power, stepped[:, token] ** power
            z = (a.mean() - b.mean()) / np.hypot(a.std(), b.std()) * np.sqrt(a.size)
            assert abs(z) < stats.norm.isf(FAILURE_RATE / 4)


@pytest.mark.slow
def test_growth_exponents_to_a_billion_steps(key):
    # The losers' medians grow as t**lambda over three decades, lambda read off the model.
    model = am.CCMC.from_transition_matrix(COLLAPSING)
    at = [10**6, 10**9]
    counts = am.rollout(model, key, [0, 1, 2], 10**9, 512, "skip_ahead", "counts", at).counts
    slopes = np.median(np.log10(counts[:, 1] / counts[:, 0]), axis=0) / 3
    np.testing.assert_allclose(slopes, am.dynamics.winner_exponents(model, 0), atol=0.02)


def test_a_token_that_cannot_stay(key):
    model = am.CCMC.from_transition_matrix([[0.0, 1.0], [1.0, 0.0]])
    traj = am.rollout(model, key, [0, 1], 7, 3, "skip_ahead", "counts", [1, 2, 7])
    assert traj.counts[0].tolist() == [[2, 1], [2, 2], [5, 4]]


def test_traced_rollouts_give_int32(key):
    model = am.CCMC.from_transition_matrix(COLLAPSING)

    def run(m):
        return am.rollout(m, key, [0, 1, 2], 500, 3, "skip_ahead", "counts", [20, 500]).counts

    np.testing.assert_array_equal(jax.jit(run)(model), run(model))


@pytest.mark.parametrize("horizon", [10, 10**4, 10**15])
def test_urn_of_equal_weights_is_polya(key, horizon):
    # n_0 = (1, 2) and equal weights: the first token's count is 1 + BetaBinomial(T, 1, 2).
    model = am.CCMC.from_transition_matrix(np.full((2, 2), 0.5))
    counts = am.rollout(model, key, [1, 0, 1], horizon, 3000, "urn", "counts").counts[:, 0]
    np.testing.assert_array_equal(counts.sum(-1), horizon + 3)
    if horizon <= 10:
        law = stats.betabinom.pmf(np.arange(horizon + 1), horizon, 1, 2)
        seen = np.bincount(np.asarray(counts[:, 0]) - 1, minlength=horizon + 1)
        assert stats.chisquare(seen[:9], law[:9] * seen[:9].sum() / law[:9].sum()).pvalue > 1e-6
    else:
        assert_uniform(stats.beta.cdf(np.asarray(counts[:, 0], float) / horizon, 1, 2))


def test_urn_moments_agree_with_scan(key):
    model = am.CCMC.from_transition_matrix(np.tile([0.2, 0.3, 0.5], (3, 1)))
    at = [3, 50, 400]
    drawn, stepped = (
        np.asarray(am.rollout(model, key, [0, 1, 2, 2], 400, 6000, e, "counts", at).counts, float)
        for e in ("urn", "scan")
    )
    z = (drawn.mean(0) - stepped.mean(0)) / np.sqrt((drawn.var(0) + stepped.var(0)) / 6000)
    assert abs(z).max() < stats.norm.isf(FAILURE_RATE / 18)


def test_urn_leaves_absent_and_masked_tokens_alone(key):
    model = am.CCMC.from_transition_matrix(np.tile([0.999, 0.001, 0.0], (3, 1)))
    counts = am.rollout(model, key, [1, 2], 10**9, 20, "urn", "counts").counts[:, 0]
    np.testing.assert_array_equal(counts, np.tile([0, 10**9 + 1, 1], (20, 1)))


def test_auto_skips_where_int32_ends(key):
    model = am.CCMC.from_transition_matrix([[0.9, 0.1], [0.8, 0.2]])
    assert am.rollout(model, key, [0, 1], 10**10, record="counts").engine == "skip_ahead"
    assert am.rollout(model, key, [0, 1], 100, record="counts").engine == "scan"


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        (
            "skip_ahead",
            {"record": "tokens"},
            r"engine: skip_ahead can't keep tokens.*; engines that can: reference, scan",
        ),
        ("urn", {"record": "tokens"}, r"engine: urn can't keep tokens.* that can: reference, scan"),
        (
            "skip_ahead",
            {"context": WindowContext(3)},
            "engine: skip_ahead can't take WindowContext, .* that can: reference, scan",
        ),
        (
            "skip_ahead",
            {"decoder": Sampling(0.5)},
            "engine: skip_ahead can't decode or reinforce.* that can: reference, scan",
        ),
        (
            "skip_ahead",
            {"model": am.CCMC.from_logits([[0.0, -61.0]] * 2), "prompt": [1]},
            "after token 0, .* has a logit 61 below .*'scan' can hold that",
        ),
        (
            "urn",
            {},
            "engine: urn can't take unequal rows of P: rows 0 and 2 differ; .* that can: ",
        ),
        ("skip_ahead", {"num_steps": 2**63}, "can't count a history of .* can: none"),
        ("scan", {"num_steps": 2**31}, "can't count a history .* can: skip_ahead$"),
    ],
)
def test_bad_input(key, engine, change, message):
    p = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]
    arguments = {
        "model": am.CCMC.from_transition_matrix(p),
        "prompt": [0, 1, 2],
        "num_steps": 10,
        "record": "counts",
        "engine": engine,
    }
    with pytest.raises(ValueError, match=message):
        am.rollout(key=key, **{**arguments, **change})


def test_shares_of_an_undecided_urn_have_their_mean(key):
    model = am.CCMC.from_transition_matrix(np.full((3, 3), 1 / 3))
    counts = am.rollout(model, key, [0, 1, 2], 20, 2000, "skip_ahead", "counts", [20]).counts
    assert_mean(counts[:, 0, 0] / 23, 1 / 3)
