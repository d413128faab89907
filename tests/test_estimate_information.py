"""Coverage, Fisher information and excess risk."""

from __future__ import annotations

from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate import information_trace, laplacian
from attnmarkov.estimate.fisher import observed_information, score_information


def model_of(rng, size, scale=1.0):
    return am.CCMC.from_logits(scale * rng.normal(size=(size, size)))


def test_coverage_against_the_loops():
    for i in range(12):
        rng = oracle.generator(f"coverage {i}")
        size = 1 + i % 5
        counts, last, _ = oracle.random_data(rng, size, 4 * size**2, most=1 + i % 4)
        prompts, model = am.Prompts.from_counts(counts, last), model_of(rng, size)
        labels = oracle.components(counts, last)
        for at, logits in ((None, np.zeros((size, size))), (model, model.logits)):
            covered = am.coverage(prompts, at)
            np.testing.assert_array_equal(covered.components, labels)
            np.testing.assert_array_equal(covered.connected, (labels == 0).all(1))
            number = sum(size - len(set(row)) for row in labels)
            assert covered.num_identifiable == number
            assert isinstance(covered.num_identifiable, int)
            if size == 1:
                assert covered.algebraic_connectivity.tolist() == [np.inf]
                continue
            information = oracle.hessian(np.asarray(logits, float), counts, last) / len(last)
            second = np.linalg.eigvalsh(information)[:, 1]
            expected = np.where((labels == 0).all(1), second, 0)
            np.testing.assert_allclose(covered.algebraic_connectivity, expected, atol=1e-6)
            assert (np.asarray(covered.algebraic_connectivity)[~(labels == 0).all(1)] == 0).all()


def test_connectivity_of_split_rows_is_zero_to_the_bit():
    rng = oracle.generator("split")
    counts = np.kron(np.eye(2, dtype=int), np.ones((1, 4), int)).repeat(30, 0)
    counts = counts * rng.integers(1, 9, counts.shape)
    covered = am.coverage(am.Prompts.from_counts(counts, np.arange(60) % 8))
    assert covered.connected.tolist() == [False] * 8
    assert covered.algebraic_connectivity.tolist() == [0.0] * 8


def test_coverage_does_not_depend_on_what_a_model_masks():
    prompts = am.Prompts.from_tokens([[0, 1, 2, 0], [0, 1, 1], [1, 0, 2]], 3)
    masked = am.CCMC.from_logits(np.array([[0, 0, -np.inf]] * 3))
    assert am.coverage(prompts, masked).connected.tolist() == [True, False, True]
    np.testing.assert_allclose(am.coverage(prompts, masked).algebraic_connectivity, 0, atol=1e-7)


def test_coverage_says_which_rows_and_tokens():
    prompts = am.Prompts.from_tokens([[0, 1], [2, 3, 1], [3, 0], [0, 1, 2, 3]], 5)
    text = repr(am.coverage(prompts))
    assert text.startswith("Coverage(7 of 20 contrasts identifiable, 5 of 5 rows not identifiable:")
    assert "row 0: tokens [0, 3] compare with each other; tokens [1, 2, 4] with nothing" in text
    assert "row 4: tokens [0, 1, 2, 3, 4] with nothing" in text
    whole = repr(am.coverage(am.Prompts.from_tokens([[0, 1], [1, 0]], 2)))
    assert whole == (
        "Coverage(2 of 2 contrasts identifiable, all 2 rows connected, "
        "weakest row 0 with connectivity 0.25)"
    )


def test_fisher_information_against_the_loops():
    for size, n in ((1, 3), (3, 50), (6, 400)):
        rng = oracle.generator(f"fisher {size}")
        counts, last, _ = oracle.random_data(rng, size, n, most=4)
        model = model_of(rng, size)
        information = am.fisher_information(model, am.Prompts.from_counts(counts, last))
        exact = oracle.hessian(np.asarray(model.logits, float), counts, last) / n
        np.testing.assert_allclose(information, exact, atol=1e-7)
        trace, rank = information_trace(information)
        pseudo = [np.linalg.pinv(h, rcond=1e-9, hermitian=True) for h in exact]
        np.testing.assert_allclose(trace, sum(np.trace(h) for h in pseudo), rtol=1e-5)
        assert int(rank) == am.coverage(am.Prompts.from_counts(counts, last)).num_identifiable


def test_weights_and_contexts():
    """Copies for the one; for the other counts of 0.6 to the power of a token's age, in loops."""
    rng = oracle.generator("weights")
    tokens, weights = rng.integers(0, 3, (40, 5)), rng.integers(0, 4, 40)
    prompts, model = am.Prompts.from_tokens(tokens, 3), model_of(rng, 3)
    y, copies = tokens[:, 2], np.repeat(np.arange(40), weights)
    one = prompts[copies]
    for found, copied in (
        (am.fisher_information(model, prompts, weights=weights), am.fisher_information(model, one)),
        (
            score_information(model, prompts, y, weights=weights),
            score_information(model, one, y[copies]),
        ),
    ):
        np.testing.assert_allclose(found, copied, atol=1e-6)
    counts = np.array([np.bincount(t, 0.6 ** np.arange(5)[::-1], 3) for t in tokens])
    logits, context = np.asarray(model.logits, float), am.DecayContext(0.6)
    exact = oracle.hessian(logits, counts, tokens[:, -1]) / 40
    found = observed_information(model, prompts, y, context=context)
    np.testing.assert_allclose(found, exact, atol=1e-6)
    scores = np.zeros((3, 3, 3))
    for c, k, j in zip(counts, tokens[:, -1], y, strict=True):
        r = np.eye(3)[j] - oracle.law(logits, c, k)
        scores[k] += np.outer(r, r) / 40
    found = score_information(model, prompts, y, context=context)
    np.testing.assert_allclose(found, scores, atol=1e-6)


def test_small_eigenvalues_are_not_taken_for_none():
    weak = 1e-6 * jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    strong = jnp.array([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
    trace, rank = information_trace((weak + strong)[None])
    exact = oracle.pseudo_inverse_diagonal(np.asarray(weak + strong)[None]).sum()
    assert int(rank) == 2
    np.testing.assert_allclose(trace, exact, rtol=1e-6)


def rare_token(score, place):
    """Three tokens, the one at ``place`` with logit ``score``, and prompts that hold all."""
    logits = np.zeros((3, 3))
    logits[:, place] = score
    prompts = am.Prompts.from_tokens([[0, 1, 2], [2, 0, 1, 1], [1, 2, 0]], 3)
    return am.CCMC.from_logits(logits), prompts


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("score", "dtype", "rtol"),
    [
        (-20, "float32", 2e-6),
        (-60, "float32", 1e-5),  # 60 in float32 is off by 4e-6, which the exponential passes on
        (-20, "float64", 1e-13),
        (-60, "float64", 1e-13),
        (-110, "float64", 1e-13),
    ],
)
def test_trace_with_a_rare_token(score, dtype, rtol, place):
    with jax.enable_x64(dtype == "float64"):
        model, prompts = rare_token(score, place)
        information = am.fisher_information(model, prompts)
        assert information.dtype == dtype
        exact = oracle.hessian(np.asarray(model.logits, float), prompts.counts, prompts.last) / 3
        exact = oracle.pseudo_inverse_diagonal(exact).sum()
        for components in (None, am.coverage(prompts).components):
            trace, rank = information_trace(information, components)
            assert int(rank) == 6
            np.testing.assert_allclose(trace, exact, rtol=rtol)


def test_trace_where_the_information_underflows():
    model, prompts = rare_token(-110, 2)
    information = am.fisher_information(model, prompts)
    trace, rank = information_trace(information, am.coverage(prompts).components)
    assert (float(trace), int(rank)) == (np.inf, 6)
    trace, rank = information_trace(information)
    assert int(rank) == 3
    assert np.isfinite(trace)


@pytest.mark.parametrize("prior", [0.0, 1e-3, 2.0])
def test_pseudo_inverse_of_weights_of_all_magnitudes(prior):
    rng = oracle.generator("magnitudes")
    size = 7
    weights = 10.0 ** rng.uniform(-25, 3, (size, size, size)).astype(np.float32)
    weights = np.triu(weights, 1) + np.triu(weights, 1).swapaxes(1, 2)
    information = -weights + np.eye(size) * weights.sum(-1)[:, :, None]
    elimination = laplacian.eliminate(jnp.asarray(information, jnp.float32), prior)
    joined = jnp.zeros((size, size), jnp.int32)
    diagonal = laplacian.pseudo_inverse_diagonal(elimination, joined)
    exact = oracle.pseudo_inverse_diagonal(information.astype(np.float32), float(np.float32(prior)))
    np.testing.assert_allclose(diagonal, exact, rtol=2e-6)


def test_components_read_off_the_information_are_those_of_the_prompts():
    for i in range(12):
        rng = oracle.generator(f"read off {i}")
        counts, last, _ = oracle.random_data(rng, 6, 40, most=1 + i % 3)
        information = am.fisher_information(
            model_of(rng, 6, 4.0), am.Prompts.from_counts(counts, last)
        )
        read = laplacian.eliminate(information).components
        np.testing.assert_array_equal(read, oracle.components(counts, last))


def as_float(model):
    return np.asarray(model.logits, np.float64)


def kl(teacher, student, counts, last):
    total = 0.0
    for c, k in zip(counts, last, strict=True):
        p, q = oracle.law(teacher, c, k), oracle.law(student, c, k)
        held = p > 0
        with np.errstate(divide="ignore"):
            total += (p[held] * (np.log(p[held]) - np.log(q[held]))).sum()
    return total / len(last)


@pytest.mark.parametrize("distance", [30.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("gauge", [0.0, 3.0])
def test_excess_risk_is_accurate_at_every_scale(distance, gauge):
    rng = oracle.generator("risk")
    counts, last, _ = oracle.random_data(rng, 5, 200, most=4)
    teacher = np.asarray(rng.normal(size=(5, 5)), np.float32)
    student = teacher + np.asarray(distance * rng.normal(size=(5, 5)) + gauge, np.float32)
    prompts = am.Prompts.from_counts(counts, last)
    risk = am.excess_risk(am.CCMC(jnp.asarray(teacher)), am.CCMC(jnp.asarray(student)), prompts)
    exact = kl(teacher.astype(float), student.astype(float), counts, last)
    # Logits of different gauge have lost digits before the risk is asked for.
    np.testing.assert_allclose(risk, exact, rtol=1e-5 + gauge * 1e-7 / distance)


def test_excess_risk_of_the_same_model_is_zero():
    _, prompts, _ = oracle.well_posed("same", 4, 6, 100)
    model = model_of(oracle.generator("same"), 4)
    assert float(am.excess_risk(model, model, prompts)) == 0


def test_excess_risk_with_masks():
    prompts = am.Prompts.from_tokens([[1, 2, 0], [0, 0], [2, 1, 0]], 3)
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    full = am.CCMC.from_logits(np.array([[0.5, 0.1, -0.6]] * 3))
    masked = am.CCMC.from_logits(np.array([[0.3, -0.3, -np.inf]] * 3))
    for teacher, student in ((masked, full), (masked, masked), (full, masked)):
        risk = am.excess_risk(teacher, student, prompts)
        exact = kl(as_float(teacher), as_float(student), counts, last)
        np.testing.assert_allclose(risk, exact, rtol=1e-5, atol=1e-9)
    assert float(am.excess_risk(full, masked, prompts)) == np.inf
    other = am.CCMC.from_logits(np.array([[0.301, -0.301, -np.inf]] * 3))
    exact = kl(as_float(masked), as_float(other), counts, last)
    np.testing.assert_allclose(am.excess_risk(masked, other, prompts), exact, rtol=1e-3)


def test_all_work_under_jit_and_vmap():
    teacher, prompts, _ = oracle.well_posed("transforms", 3, 5, 40)
    halves = jax.tree.map(lambda x: x.reshape(2, 20, *x.shape[1:]), prompts)
    student = model_of(oracle.generator("transforms"), 3)
    covered = jax.jit(jax.vmap(am.coverage))(halves)
    information = jax.vmap(am.fisher_information, (None, 0))(teacher, halves)
    risks = jax.jit(jax.vmap(am.excess_risk, (None, None, 0)))(teacher, student, halves)
    for i in range(2):
        half = prompts[slice(20 * i, 20 * i + 20)]
        np.testing.assert_array_equal(covered.components[i], am.coverage(half).components)
        assert covered.num_identifiable[i] == am.coverage(half).num_identifiable
        np.testing.assert_allclose(information[i], am.fisher_information(teacher, half), atol=1e-7)
        np.testing.assert_allclose(risks[i], am.excess_risk(teacher, student, half), rtol=1e-5)
    assert "Coverage(" in repr(covered)


def test_bad_input():
    prompts = am.Prompts.from_tokens([[0, 1]], 2)
    small, large = am.CCMC.from_logits(np.zeros((2, 2))), am.CCMC.from_logits(np.zeros((3, 3)))
    none = am.Prompts(jnp.zeros((0, 2), jnp.int32), jnp.zeros(0, jnp.int32))
    for call in (
        lambda p: am.coverage(p),
        lambda p: am.fisher_information(small, p),
        lambda p: am.excess_risk(small, small, p),
    ):
        with pytest.raises(ValueError, match="prompts: there is no prompt"):
            call(none)
    for name, call in {
        "model": lambda: am.coverage(prompts, large),
        "model:": lambda: am.fisher_information(large, prompts),
        "teacher": lambda: am.excess_risk(large, small, prompts),
        "student": lambda: am.excess_risk(small, large, prompts),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}.*\(3, 3\).*2 tokens"):
            call()


@pytest.mark.parametrize("tokens", [[[0, 1]], np.array([[0, 1]]), None])
def test_what_is_not_prompts_is_refused_in_a_sentence(tokens):
    model = am.CCMC.from_logits(np.zeros((2, 2)))
    calls = (
        lambda: am.fit(tokens, [1]),
        lambda: am.coverage(tokens),
        lambda: am.fisher_information(model, tokens),
        lambda: am.excess_risk(model, model, tokens),
    )
    kind = type(tokens).__name__
    for call in calls:
        with pytest.raises(ValueError, match=rf"^prompts: .*got {kind}; .*Prompts\.from_tokens"):
            call()


def test_observed_information_is_the_hessian_of_the_loss():
    """By jax.hessian of a loss of its own, by differences of the gradient, and as the expected."""
    rng = oracle.generator("observed")
    counts, last, y = oracle.random_data(rng, 3, 40, most=3)
    with jax.enable_x64(True):
        model = model_of(rng, 3)
        prompts = am.Prompts.from_counts(counts, last)
        information = np.asarray(observed_information(model, prompts, y))
        assert information.dtype == np.float64

        def loss(logits):
            scores = logits[last] + jnp.log(jnp.asarray(counts, float))
            return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], 1).mean()

        whole = np.asarray(jax.hessian(loss)(model.logits))
        np.testing.assert_allclose(information, am.fisher_information(model, prompts), atol=1e-15)
        s = np.asarray(model.logits)
    step = 1e-5
    for k in range(3):
        for j in range(3):
            other = np.arange(3) != k
            np.testing.assert_allclose(whole[k, :, k], information[k], atol=1e-14)
            np.testing.assert_array_equal(whole[k][:, other], 0)
            nudge = step * np.eye(9)[3 * k + j].reshape(3, 3)
            up, down = (oracle.gradient(s + e, counts, last, y) for e in (nudge, -nudge))
            slope = (up - down)[k] / (2 * step * len(y))
            np.testing.assert_allclose(information[k, j], slope, atol=1e-9)


def test_score_information_against_the_loop():
    for size, n in ((1, 3), (3, 50), (6, 400)):
        rng = oracle.generator(f"score {size}")
        counts, last, y = oracle.random_data(rng, size, n, most=4)
        model = model_of(rng, size)
        exact = np.zeros((size, size, size))
        for c, k, j in zip(counts, last, y, strict=True):
            r = np.eye(size)[j] - oracle.law(as_float(model), c, k)
            exact[k] += np.outer(r, r) / n
        prompts = am.Prompts.from_counts(counts, last)
        found = score_information(model, prompts, y)
        np.testing.assert_allclose(found, exact, atol=1e-7)
        jitted = jax.jit(score_information)(model, prompts, jnp.asarray(y))
        np.testing.assert_allclose(jitted, exact, atol=1e-7)


def test_score_information_estimates_the_fisher_information():
    """Entries are means of n products below 1: bounds at five standard errors of 0.5/√n."""
    n = 40_000
    teacher, prompts, y = oracle.well_posed("score", 4, 8, n)
    off = score_information(teacher, prompts, y) - am.fisher_information(teacher, prompts)
    assert float(jnp.abs(off).max()) < 5 * 0.5 / np.sqrt(n)


def test_information_of_labels_refuses_bad_input():
    model, prompts = am.CCMC.from_logits(np.zeros((2, 2))), am.Prompts.from_tokens([[0, 1]], 2)
    large = am.CCMC.from_logits(np.zeros((3, 3)))
    functions: tuple[Any, ...] = (observed_information, score_information)
    for function in functions:
        with pytest.raises(ValueError, match="prompts: expected Prompts"):
            function(model, [[0, 1]], [0])
        with pytest.raises(ValueError, match="model: has logits"):
            function(large, prompts, [0])
        with pytest.raises(ValueError, match=r"y: expected shape \(1,\)"):
            function(model, prompts, [0, 1])
        with pytest.raises(ValueError, match="does not stand in prompt 0"):
            function(model, am.Prompts.from_tokens([[0, 0]], 2), [1])


REPLICATES = 400


@pytest.mark.parametrize("size", [2, 3, 4])
def test_excess_risk_and_squared_error_have_their_asymptotic_constants(size):
    """Twice ``n`` times the risk is χ² with ``r`` degrees; the error, ``tr(I⁺)`` in the mean.

    Bounds hold all but SMALL_RATE of the time for the asymptotic law, widened by the 1 % that
    terms of order 1/n may shift a mean at this n.
    """
    n = 2500 * size
    teacher, prompts, _ = oracle.well_posed(f"asymptotic {size}", size, 8, n, concentration=10.0)

    @jax.jit
    @jax.vmap
    def replicate(key):
        student = am.fit(prompts, teacher.sample(key, prompts))
        error = ((student.model.logits - teacher.logits) ** 2).sum()
        return n * am.excess_risk(teacher, student.model, prompts), n * error, student.status

    keys = jax.random.split(oracle.key_of(f"labels {size}"), REPLICATES)
    risks, errors, statuses = replicate(keys)
    assert (statuses == 0).all()
    rank = size * (size - 1)
    shape = REPLICATES * rank / 2
    tail = oracle.SMALL_RATE / 2
    low, high = stats.gamma.ppf([tail, 1 - tail], shape) / REPLICATES
    assert 0.99 * low < float(risks.mean()) < 1.01 * high
    information = am.fisher_information(teacher, prompts)
    trace, counted = information_trace(information)
    assert int(counted) == rank
    eigenvalues = np.linalg.eigvalsh(np.asarray(information, np.float64))[:, 1:]
    spread = np.sqrt(2 * (eigenvalues**-2.0).sum() / REPLICATES)
    off = abs(float(errors.mean()) - float(trace))
    assert off < stats.norm.isf(tail) * spread + 0.01 * float(trace)
    # The reported standard errors are those of the estimates.
    student = am.fit(prompts, teacher.sample(keys[0], prompts))
    claimed = n * float((student.standard_errors**2).sum())
    np.testing.assert_allclose(claimed, float(trace), rtol=0.1)
