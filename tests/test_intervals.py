"""Intervals for contrasts against SciPy in float64, and their coverage."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import attnmarkov as am
from attnmarkov.estimate import _contrasts
from attnmarkov.estimate.intervals import Intervals, intervals

CONTRASTS = np.array([(k, a, a - 1) for k in range(4) for a in (1, 2, 3)])  # one shape: one compile
QUANTILE = stats.norm.isf(0.025)


def arrays(prompts, y):
    return tuple(np.asarray(x) for x in (prompts.counts, prompts.last, y))


def of(counts, last, y, **options):
    prompts = am.Prompts.from_counts(counts, last)
    return intervals(am.fit(prompts, y), prompts, y, CONTRASTS, **options)


class Row:
    """The loss of one row by plain float64; tokens may run to ±40, which is infinity here."""

    def __init__(self, counts, last, y, row):
        own = last == row
        data = np.unique(np.c_[counts[own], y[own]], axis=0, return_counts=True)
        self.held, self.y, self.weight = data[0][:, :-1], data[0][:, -1], data[1]

    def loss(self, s):
        with np.errstate(divide="ignore"):
            z = np.log(self.held) + s
        top = z.max(1, keepdims=True)
        p = np.exp(z - top)
        total = p.sum(1, keepdims=True)
        gradient = self.weight @ (p / total - np.eye(s.size)[self.y])
        losses = top[:, 0] + np.log(total[:, 0]) - z[np.arange(self.y.size), self.y]
        return self.weight @ losses, gradient

    def least(self, a=0, b=0, contrast=0.0):
        """The least loss among ``s[a] = s[b] + contrast``."""
        size = self.held.shape[1]
        design = np.delete(np.eye(size), a, axis=1) if a != b else np.eye(size)
        if a != b:
            design[a, b - (b > a)] = 1
        offset = contrast * np.eye(size)[a]

        def value(x):
            loss, gradient = self.loss(design @ x + offset)
            return loss, design.T @ gradient

        start = np.zeros(design.shape[1])
        return optimize.minimize(
            value,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(-40, 40)] * start.size,
            options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000, "maxfun": 50000, "maxls": 50},
        ).fun

    def check(self, a, b, side, end, near, quantile=QUANTILE):
        """Twice the fall reaches ``quantile²`` within ``near`` of ``end``, or never."""
        at = side * 24 if np.isinf(end) else float(end)
        least = self.least() if self.y.size else 0.0

        def excess(c):
            return 2 * (self.least(a, b, c) - least) - quantile**2 if self.y.size else -1.0

        if np.isinf(end):
            assert np.sign(end) == side
            assert excess(at) < -(quantile**2) / 2  # nor does it rise any more
        else:
            assert excess(at - side * near) < 0 < excess(at + side * near), (a, b, side)


def check_ends(result, data, near):
    for i, (k, a, b) in enumerate(CONTRASTS):
        error = float(result.standard_error[i])
        scale = error if np.isfinite(error) else 1.0
        for side, end in ((-1, result.low[i]), (1, result.high[i])):
            Row(data[0], data[1], data[2], k).check(a, b, side, end, near * scale)


@pytest.mark.parametrize("seed", range(4))
def test_profile_against_constrained_minimisation(seed):
    """Small random data: finite, one-sided and undetermined contrasts side by side."""
    rng = oracle.generator(f"profile {seed}")
    data = oracle.random_data(rng, 4, 60, most=2 + seed % 3)
    check_ends(of(*data, method="profile"), data, 1e-4)


def test_the_random_data_above_hold_every_case():
    low, high = [], []
    for seed in range(4):
        rng = oracle.generator(f"profile {seed}")
        result = of(*oracle.random_data(rng, 4, 60, most=2 + seed % 3), method="profile")
        low += np.isfinite(result.low).tolist()
        high += np.isfinite(result.high).tolist()
    assert set(zip(low, high, strict=True)) == {
        (a, b) for a in (True, False) for b in (True, False)
    }


def test_profile_in_float64():
    rng = oracle.generator("profile 64")
    data = oracle.random_data(rng, 4, 60, most=4)
    with jax.enable_x64(True):
        result = of(*data, method="profile")
        assert result.low.dtype == jnp.float64
    check_ends(result, data, 1e-6)


def test_float32_loses_nothing_to_many_prompts():
    _, prompts, y = oracle.well_posed("many", 4, 8, 200_000)
    data = arrays(prompts, y)
    single = of(*data, method="profile")
    with jax.enable_x64(True):
        double = of(*data, method="profile")
    for name in ("estimate", "low", "high"):
        off = np.asarray(getattr(single, name), float) - np.asarray(getattr(double, name))
        assert (abs(off) < 1e-4 * np.asarray(double.standard_error)).all(), name


def test_the_level_sets_the_ends():
    _, prompts, y = oracle.well_posed("level", 4, 8, 60)
    data = arrays(prompts, y)
    for level in (0.5, 0.999):
        result = of(*data, method="profile", level=level)
        k, a, b = CONTRASTS[4]
        quantile = np.sqrt(stats.chi2.isf(1 - level, 1))
        for side, end in ((-1, result.low[4]), (1, result.high[4])):
            Row(data[0], data[1], data[2], k).check(a, b, side, end, 1e-4, quantile)
        result = of(*data, method="wald", level=level)
        np.testing.assert_allclose(
            result.high - result.estimate, quantile * result.standard_error, rtol=1e-5
        )


def sandwich(logits, counts, last, y, contrasts):
    """Variances of contrasts by pseudo-inverses: the inverse information, and the sandwich."""
    hessian, score = oracle.hessian(logits, counts, last), np.zeros((4, 4, 4))
    for c, k, j in zip(counts, last, y, strict=True):
        r = np.eye(4)[j] - oracle.law(logits, c, k)
        score[k] += np.outer(r, r)
    out = []
    for k, a, b in contrasts:
        pull = np.linalg.pinv(hessian[k], rcond=1e-12) @ (np.eye(4)[a] - np.eye(4)[b])
        out.append((pull @ hessian[k] @ pull, pull @ score[k] @ pull))
    return np.array(out).T


def test_wald_and_robust_against_pseudo_inverses():
    _, prompts, y = oracle.well_posed("wald", 4, 8, 200)
    data = arrays(prompts, y)
    exact = oracle.maximum(data[0], data[1], data[2])
    estimate = exact[CONTRASTS[:, 0], CONTRASTS[:, 1]] - exact[CONTRASTS[:, 0], CONTRASTS[:, 2]]
    for method, variance in zip(
        ("wald", "robust"), sandwich(exact, data[0], data[1], data[2], CONTRASTS), strict=True
    ):
        result = of(*data, method=method)
        np.testing.assert_allclose(result.estimate, estimate, atol=1e-5)
        np.testing.assert_allclose(result.standard_error, np.sqrt(variance), rtol=1e-4)
        half = QUANTILE * np.sqrt(variance)
        np.testing.assert_allclose(result.low, estimate - half, atol=1e-4)
        np.testing.assert_allclose(result.high, estimate + half, atol=1e-4)


def exact_resistance(weight, a, b):
    """1 over the weight between ``a`` and ``b`` once all others are eliminated, in fractions."""
    size = len(weight)
    w = [[Fraction(float(weight[i, j])) for j in range(size)] for i in range(size)]
    for m in set(range(size)) - {a, b}:
        total = sum(w[m][j] for j in range(size) if j != m)
        for i in range(size):
            for j in range(size):
                if m not in (i, j) and i != j:
                    w[i][j] += w[i][m] * w[m][j] / total
        for i in range(size):
            w[i][m] = w[m][i] = Fraction(0)
    return float(1 / w[a][b])


def test_variances_keep_their_accuracy_over_many_magnitudes():
    rng = oracle.generator("magnitudes")
    weight = np.float32(10.0 ** rng.uniform(-18, 2, (4, 4, 4)))
    weight = np.triu(weight, 1) + np.swapaxes(np.triu(weight, 1), 1, 2)
    information = np.eye(4, dtype=np.float32) * weight.sum(-1)[..., None] - weight
    contrasts = np.array(
        [(k, a, b) for k in range(4) for a in range(4) for b in range(4) if a != b]
    )
    found = _contrasts.variances(jnp.asarray(information), _contrasts.grouped(contrasts))
    exact = [exact_resistance(weight[k], a, b) for k, a, b in contrasts]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def separated_row():
    """Row 0: 1 and 2 beat each other and always beat 0 and 3, which never meet."""
    counts = [[1, 1, 1, 0]] * 6 + [[0, 1, 1, 1]] * 8
    y = [1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2]
    return np.array(counts), np.zeros(14, int), np.array(y)


@pytest.mark.parametrize("method", ["wald", "robust", "profile"])
def test_a_separated_row_by_hand(method):
    result = of(*separated_row(), method=method)
    own = np.asarray(result.estimate[:3])  # 1 - 0, 2 - 1, 3 - 2
    np.testing.assert_allclose(own, [np.inf, np.log(6 / 8), -np.inf], rtol=1e-5)
    error = np.sqrt(1 / 6 + 1 / 8)  # of a binomial log-odds: in the limit only 1 and 2 compete
    np.testing.assert_allclose(result.standard_error[:3], [np.nan, error, np.nan], rtol=1e-5)
    if method == "profile":
        assert result.high[0] == np.inf
        assert np.isfinite(result.low[0])
        assert result.low[2] == -np.inf
        assert np.isfinite(result.high[2])
    else:
        assert np.isnan(result.low[:3]).tolist() == [True, False, True]
        assert np.isnan(result.high[:3]).tolist() == [True, False, True]
    assert np.isfinite(result.low[1])
    assert np.isfinite(result.high[1])
    # The other rows have no data: nothing is known of them.
    assert np.isnan(result.estimate[3:]).all()
    assert np.isnan(result.standard_error[3:]).all()
    if method == "profile":
        assert (result.low[3:] == -np.inf).all()
        assert (result.high[3:] == np.inf).all()


def test_a_one_sided_profile_in_closed_form():
    """One of two tokens always wins: ``n log(1 + e^{−c})`` falls by half of χ²'s quantile."""
    n = 30
    prompts = am.Prompts.from_counts(np.tile([1, 1, 0, 0], (n, 1)), np.zeros(n, int))
    y = np.ones(n, int)
    result = intervals(am.fit(prompts, y), prompts, y, CONTRASTS, method="profile")
    exact = -np.log(np.expm1(QUANTILE**2 / 2 / n))
    np.testing.assert_allclose(result.low[0], exact, rtol=1e-5)
    assert result.high[0] == np.inf


def test_tokens_that_never_compete_leave_the_whole_line():
    """0 and 3 both lose to 1 and 2 and never meet; and a chain of wins ties what never meets."""
    counts, last, y = separated_row()
    prompts = am.Prompts.from_counts(counts, last)
    result = intervals(am.fit(prompts, y), prompts, y, [(0, 0, 3)], method="profile")
    assert np.isnan(result.estimate[0])
    assert (float(result.low[0]), float(result.high[0])) == (-np.inf, np.inf)
    chain = am.Prompts.from_counts([[1, 1, 0]] * 9 + [[0, 1, 1]] * 9, np.zeros(18, int))
    y = np.array([0] * 9 + [1] * 9)  # 0 beats 1, which beats 2
    result = intervals(am.fit(chain, y), chain, y, [(0, 0, 2)], method="profile")
    assert result.estimate[0] == np.inf
    assert result.high[0] == np.inf
    # Symmetric: 0 and 2 stand c/2 from 1 each, and 18 log(1 + e^{−c/2}) falls by 1.92.
    exact = -2 * np.log(np.expm1(QUANTILE**2 / 2 / 18))
    np.testing.assert_allclose(result.low[0], exact, rtol=1e-5)


def test_turned_around_permuted_and_relabelled():
    rng = oracle.generator("turned")
    counts, last, y = oracle.random_data(rng, 4, 60, most=3)
    plain = of(counts, last, y, method="profile")
    shuffle = rng.permutation(60)
    other = of(counts[shuffle], last[shuffle], y[shuffle], method="profile")
    prompts = am.Prompts.from_counts(counts, last)
    turned = intervals(am.fit(prompts, y), prompts, y, CONTRASTS[:, [0, 2, 1]], method="profile")
    name = np.array([2, 0, 3, 1])  # the new name of every token
    relabelled = am.Prompts.from_counts(counts[:, np.argsort(name)], name[last])
    new = intervals(
        am.fit(relabelled, name[y]), relabelled, name[y], name[CONTRASTS], method="profile"
    )
    for low, high, sign in (
        (other.low, other.high, 1),
        (-turned.high, -turned.low, 1),
        (new.low, new.high, 1),
    ):
        np.testing.assert_allclose(low, sign * plain.low, atol=2e-4)
        np.testing.assert_allclose(high, sign * plain.high, atol=2e-4)


ONE_PER_ROW = np.array([(0, 1, 2), (1, 3, 0), (2, 0, 1), (3, 2, 1)])


@partial(jax.jit, static_argnames=("method", "size"))
def covers(key, logits, prompts, draw, target, method, size):
    """Whether each interval holds the target, for ``size`` datasets drawn from ``draw``."""

    def one(key):
        y = draw.sample(key, prompts)
        result = intervals(am.fit(prompts, y), prompts, y, ONE_PER_ROW, method=method)
        return (result.low <= target) & (target <= result.high), result.standard_error

    return jax.vmap(one)(jax.random.split(key, size))


def contrasts_of(logits):
    row, a, b = ONE_PER_ROW.T
    return logits[row, a] - logits[row, b]


def binomial_bounds(trials, rate=0.95):
    """Where a count of hits lies, all but SMALL_RATE of the time, if ``rate`` is true."""
    tail = oracle.SMALL_RATE / 2
    return stats.binom.ppf([tail, 1 - tail], trials, rate) / trials


@pytest.mark.parametrize("method", ["wald", "profile", "robust"])
def test_coverage_is_nominal(method):
    """Rows are independent given the prompts: 4 x 2000 trials. Fails once in 1e6 if exact."""
    teacher, prompts, _ = oracle.well_posed("coverage", 4, 8, 1000, concentration=10.0)
    hits, _ = covers(
        oracle.key_of(f"coverage {method}"),
        None,
        prompts,
        teacher,
        contrasts_of(teacher.logits),
        method,
        2000,
    )
    low, high = binomial_bounds(hits.size)
    assert low <= float(hits.mean()) <= high


def test_profile_covers_where_wald_does_not():
    """20 prompts a row, estimates often infinite: Wald then has no interval, or a poor one.

    The bounds are five standard errors of 4 x 1000 trials from what was measured.
    """
    teacher, prompts, _ = oracle.well_posed("coverage", 4, 8, 80, concentration=10.0)
    rates = {
        method: float(
            covers(
                oracle.key_of("few"),
                None,
                prompts,
                teacher,
                contrasts_of(teacher.logits),
                method,
                1000,
            )[0].mean()
        )
        for method in ("wald", "profile")
    }
    assert rates["wald"] < 0.90
    assert 0.92 < rates["profile"] < 0.97


def test_robust_intervals_cover_the_nearest_model_of_other_labels():
    """Labels that ignore the counts: 3 : 1 or 1 : 3 at random, and either token half the time.

    No CCMC says so; the nearest has contrast 0, by symmetry. Squared residuals are 0.31 in the
    mean, not the 0.19 that a CCMC would say. (With 9 : 1 a row of 250 prompts is far from the
    limit: a standard error is then half a nat.)
    """
    last = np.arange(1000) % 4
    other = (last + 1) % 4
    truth = am.CCMC.from_logits(np.zeros((4, 4)))
    contrasts = np.array([(k, (k + 1) % 4, k) for k in range(4)])
    held = (jax.nn.one_hot(last, 4) + jax.nn.one_hot(other, 4)).astype(int)

    @partial(jax.jit, static_argnames="method")
    def hits(key, held, method):
        def one(key):
            many = jnp.where(jax.random.bernoulli(key, shape=(1000,)), last, other)
            prompts = am.Prompts(held + 2 * jax.nn.one_hot(many, 4, dtype=int), jnp.asarray(last))
            y = truth.sample(key, am.Prompts(held, prompts.last))
            result = intervals(am.fit(prompts, y), prompts, y, contrasts, method=method)
            return (result.low <= 0) & (result.high >= 0)

        return jax.vmap(one)(jax.random.split(key, 1000)).mean()

    low, high = binomial_bounds(4000)
    assert low <= float(hits(oracle.key_of("robust"), held, "robust")) <= high
    assert float(hits(oracle.key_of("robust"), held, "wald")) < low


@pytest.mark.parametrize("method", ["wald", "profile"])
def test_jit_and_vmap(method):
    teacher, prompts, _ = oracle.well_posed("transforms", 4, 8, 60)
    labels = jax.vmap(teacher.sample, (0, None))(jax.random.split(jax.random.key(1), 3), prompts)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, None))
    def batch(prompts, y, level):
        return intervals(am.fit(prompts, y), prompts, y, CONTRASTS, method=method, level=level)

    together = batch(prompts, labels, 0.9)
    assert f"Intervals(method='{method}', level=0.9, batch=(3,), 12 contrasts)" == repr(together)
    for i, y in enumerate(labels):
        alone = of(*arrays(prompts, y), method=method, level=0.9)
        for name in ("estimate", "standard_error", "low", "high"):
            expected = np.asarray(getattr(alone, name))
            np.testing.assert_allclose(getattr(together, name)[i], expected, atol=1e-4, rtol=1e-4)


def test_one_token_and_no_contrast():
    prompts = am.Prompts.from_tokens([[0, 0], [0]], 1)
    fit = am.fit(prompts, [0, 0])
    for method in ("wald", "profile"):
        result = intervals(fit, prompts, [0, 0], method=method)
        assert result.low.shape == result.high.shape == result.estimate.shape == (0,)
        assert "0 contrasts" in repr(result)


@pytest.mark.parametrize("method", ["wald", "robust", "profile"])
def test_weights_count_as_copies(method):
    _, prompts, y = oracle.well_posed("copies", 4, 8, 200)
    weights = oracle.generator("copies").integers(0, 4, 200)
    copies = np.repeat(np.arange(200), weights)
    copied = of(*arrays(prompts[copies], y[copies]), method=method)
    fit = am.fit(prompts, y, weights=weights)
    found = intervals(fit, prompts, y, CONTRASTS, method=method, weights=weights)
    for name in ("estimate", "standard_error", "low", "high"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(copied, name), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match=r"fit: its nll is .* pass what it was fitted with"):
        intervals(fit, prompts, y, CONTRASTS, method=method)


def test_wald_under_a_context_against_pseudo_inverses():
    """Tokens are weighed by 0.6 to the power of their age."""
    _, prompts, y = oracle.well_posed("decay", 4, 8, 200)
    context = am.DecayContext(0.6)
    tokens = np.asarray(prompts.tokens)
    ages = 0.6 ** np.arange(tokens.shape[1])[::-1]
    counts = np.array([np.bincount(t, ages, 4) for t in tokens])
    exact = oracle.maximum(counts, tokens[:, -1], np.asarray(y))
    variance = sandwich(exact, counts, tokens[:, -1], np.asarray(y), CONTRASTS)[0]
    fit = am.fit(prompts, y, context=context)
    found = intervals(fit, prompts, y, CONTRASTS, context=context)
    own = exact[CONTRASTS[:, 0], CONTRASTS[:, 1]] - exact[CONTRASTS[:, 0], CONTRASTS[:, 2]]
    np.testing.assert_allclose(found.estimate, own, atol=1e-4)
    np.testing.assert_allclose(found.standard_error, np.sqrt(variance), rtol=1e-4)


def test_tied_rows_are_one_row():
    """All rows tied: the same as prompts that all end in one token."""
    _, prompts, y = oracle.well_posed("tied", 4, 8, 200)
    fit = am.fit(prompts, y, row_groups=[1] * 4)
    one = am.Prompts(prompts.counts, jnp.full(200, 1))
    for method in ("wald", "profile"):
        tied = intervals(fit, prompts, y, [(0, 1, 2), (3, 1, 2)], method=method, row_groups=[1] * 4)
        alone = intervals(am.fit(one, y), one, y, [(1, 1, 2)], method=method)
        assert tied.contrasts.tolist() == [[0, 1, 2], [3, 1, 2]]
        for name in ("estimate", "standard_error", "low", "high"):
            same = np.repeat(getattr(alone, name), 2)
            np.testing.assert_allclose(getattr(tied, name), same, rtol=1e-4, atol=1e-4)


def test_default_contrasts_are_those_identified():
    prompts = am.Prompts.from_tokens([[0, 1, 0], [2, 3, 0], [3, 1]], 4)
    y = [0, 2, 3]
    result = intervals(am.fit(prompts, y), prompts, y)
    assert result.contrasts.tolist() == [[0, 1, 0], [0, 2, 0], [0, 3, 0], [1, 3, 1]]


def test_the_table():
    _, prompts, y = oracle.well_posed("table", 4, 8, 60)
    lines = repr(of(*arrays(prompts, y))).splitlines()
    assert lines[0] == "Intervals(method='wald', level=0.95, 12 contrasts"
    assert lines[1].split() == ["row", "contrast", "estimate", "std.", "error", "low", "high"]
    assert lines[2].split()[:4] == ["0", "1", "-", "0"]
    assert lines[-1] == "  ... 2 more)"
    assert len(lines) == 13


def test_bad_input():
    _, prompts, y = oracle.well_posed("bad", 4, 8, 200)
    fit = am.fit(prompts, y)
    small = am.Prompts.from_tokens([[0, 1]], 2)
    run: Any = partial(intervals, fit, prompts, y)
    wrong: Any = intervals
    for match, call in {
        "method: unknown method 'score'": lambda: run(method="score"),
        r"level: must lie in \(0, 1\), got 95": lambda: run(level=95),
        "level: expected a number, got 'high'": lambda: run(level="high"),
        r"contrasts: expected shape \(m, 3\).*got \(1, 2\)": lambda: run([(0, 1)]),
        r"contrasts: entry \[0, 2\] is token id 4": lambda: run([(0, 1, 4)]),
        "contrasts: entry 1 compares token 2 with itself": lambda: run([(0, 1, 0), (1, 2, 2)]),
        "contrasts: expected integers": lambda: run([(0.5, 1, 2)]),
        "key: the bootstrap needs a key": lambda: run(method="bootstrap"),
        "prompts: expected Prompts": lambda: wrong(fit, [[0, 1]], y),
        r"fit has logits|fit: has logits of shape \(4, 4\)": lambda: intervals(fit, small, [0]),
        r"y: expected shape \(200,\)": lambda: intervals(fit, prompts, y[:5]),
        "fit: did not converge": lambda: intervals(
            am.fit(prompts, y, max_iterations=1), prompts, y
        ),
        "fit: was made with a prior": lambda: intervals(am.fit(prompts, y, prior=5.0), prompts, y),
        "fit: expected a Fit.* got CCMC": lambda: wrong(fit.model, prompts, y),
        "fit: its contrast .* row groups": lambda: run(row_groups=[0] * 4),
        "fit: its nll is .* context": lambda: run(context=am.DecayContext(0.9)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(ValueError, match="contrasts: must be given under jit and vmap"):
        jax.jit(lambda y: intervals(am.fit(prompts, y), prompts, y).low)(y)
    with pytest.raises(ValueError, match="contrasts: must be concrete"):
        jax.jit(lambda c: intervals(fit, prompts, y, c).low)(jnp.asarray(CONTRASTS))
    assert isinstance(run(), Intervals)
