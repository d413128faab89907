"""Contrasts, connectivity, existence of the maximum, and how many prompts an error takes."""

from __future__ import annotations

import math

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.estimate import maximum_exists, prompts_needed
from attnmarkov.estimate.laplacian import eliminate, largest_variance, trace_against


def split_data(name, size=5, n=40, most=2):
    counts, last, y = oracle.random_data(oracle.generator(name), size, n, most)
    return am.Prompts.from_counts(counts, last), counts, last, y


@pytest.mark.parametrize("i", range(6))
def test_contrasts_are_an_orthonormal_basis_of_what_the_information_sees(i):
    prompts, counts, last, _ = split_data(f"contrasts {i}", size=2 + i)
    covered = am.coverage(prompts)
    size = prompts.num_tokens
    rows = np.asarray(covered.contrasts)
    information = oracle.hessian(np.zeros((size, size)), counts, last)
    number = 0
    for k in range(size):
        basis = rows[k][np.abs(rows[k]).sum(1) > 0]
        number += len(basis)
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-6)
        values, vectors = np.linalg.eigh(information[k])
        seen = vectors[:, values > 1e-9]
        np.testing.assert_allclose(basis.T @ basis, seen @ seen.T, atol=1e-6)
    assert number == covered.num_identifiable


def rare_information(rng, size, magnitudes):
    """Laplacians whose weights differ by many magnitudes, exact in float64."""
    weight = 10.0 ** -rng.uniform(0, magnitudes, (size, size, size))
    weight = np.triu(weight, 1)
    weight = weight + weight.transpose(0, 2, 1)
    eye = np.eye(size)
    return weight.sum(-1)[..., None] * eye - weight


def test_the_largest_variance_keeps_its_accuracy_over_magnitudes():
    information = rare_information(oracle.generator("magnitudes"), 5, 12)
    exact = np.linalg.eigvalsh(information.astype(np.longdouble).astype(float))[:, 1]
    with jax.enable_x64(True):
        joined = jnp.zeros((5, 5), jnp.int32)
        fine = 1 / np.asarray(largest_variance(eliminate(jnp.asarray(information)), joined))
    np.testing.assert_allclose(fine, exact, rtol=1e-3)  # eigvalsh itself is good to 1e-16 / 1e-12
    coarse = 1 / largest_variance(eliminate(jnp.asarray(information, jnp.float32)), joined)
    np.testing.assert_allclose(coarse, fine, rtol=1e-5)  # where eigvalsh in float32 has no digit
    tiny = 1 / largest_variance(eliminate(jnp.asarray(information * 1e-25, jnp.float32)), joined)
    np.testing.assert_allclose(tiny, fine * 1e-25, rtol=1e-4)


def test_the_largest_variance_of_no_contrast_and_of_a_lost_one():
    alone = jnp.arange(3)[None].repeat(3, 0)
    elimination = eliminate(jnp.zeros((3, 3, 3)))
    assert largest_variance(elimination, alone).tolist() == [0, 0, 0]
    assert largest_variance(elimination, jnp.zeros((3, 3), int)).tolist() == [np.inf] * 3


@pytest.mark.parametrize("i", range(8))
def test_existence_is_strong_connectivity(i):
    prompts, counts, last, y = split_data(f"existence {i}", size=2 + i % 4, n=12 + 8 * i, most=3)
    np.testing.assert_array_equal(
        maximum_exists(prompts, y), oracle.finite_maximum(counts, last, y)
    )
    kept = oracle.generator(f"kept {i}").integers(0, 2, len(y)) > 0
    np.testing.assert_array_equal(
        maximum_exists(prompts, y, weights=kept),
        oracle.finite_maximum(counts[kept], last[kept], y[kept]),
    )


def test_existence_under_a_context():
    """Token 0 is older than the window: only 1 and 2 compete, and each has won."""
    prompts = am.Prompts.from_tokens([[0, 1, 2], [0, 1, 2]], 3)
    assert not maximum_exists(prompts, [1, 2])[2].any()
    assert maximum_exists(prompts, [1, 2], context=am.WindowContext(2))[2].all()
    with pytest.raises(ValueError, match="within the context of prompt 0"):
        maximum_exists(prompts, [0, 2], context=am.WindowContext(2))


def test_existence_checks_its_labels():
    prompts = am.Prompts.from_tokens([[0, 1]], 3)
    with pytest.raises(ValueError, match="does not stand in prompt 0"):
        maximum_exists(prompts, [2])


def test_coverage_knows_weights_and_contexts():
    prompts = am.Prompts.from_tokens([[0, 1, 2], [0, 2, 2], [1, 2, 2]], 3)
    assert am.coverage(prompts).connected.tolist() == [False, False, True]
    part = am.coverage(prompts, weights=[0, 1, 0])
    assert part.components[2].tolist() == [0, 1, 0]
    window = am.coverage(prompts, context=am.WindowContext(2))
    assert window.components[2].tolist() == [0, 1, 1]
    doubled = am.coverage(prompts[np.array([0, 1, 1, 2])]).algebraic_connectivity
    weighted = am.coverage(prompts, weights=[1, 2, 1]).algebraic_connectivity
    np.testing.assert_allclose(weighted, doubled, rtol=1e-5)


def information(model, prompts):
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    return oracle.hessian(np.asarray(model.logits, float), counts, last)


def predicted(measure, rate, known, n):
    """The expected error by NumPy's pseudo-inverses, all rows connected."""
    covariance = np.linalg.pinv(known + n * rate, hermitian=True, rcond=1e-10)
    if measure == "squared_error":
        return np.trace(covariance, axis1=1, axis2=2).sum()
    if measure == "excess_risk":
        return np.einsum("kab,kba->", rate, covariance) / 2
    return np.sqrt(np.diagonal(covariance, axis1=1, axis2=2).max())


@pytest.mark.parametrize("with_collected", [False, True])
@pytest.mark.parametrize(
    ("measure", "target"),
    [("squared_error", 0.2), ("excess_risk", 0.002), ("standard_error", 0.05)],
)
def test_prompts_needed_is_where_the_predicted_error_meets_the_target(
    measure, target, with_collected
):
    model, sample, _ = oracle.well_posed("planning", 4, 8, 600)
    collected = None
    known = np.zeros((4, 4, 4))
    if with_collected:
        collected = am.prompts.iid(oracle.key_of("more"), 300, 6, [0.7, 0.1, 0.1, 0.1])
        known = information(model, collected)
    rate = information(model, sample) / 600
    n = prompts_needed(sample, target, model, measure=measure, collected=collected)
    assert isinstance(n, int)
    assert predicted(measure, rate, known, n * (1 + 1e-5) + 1) <= target
    assert predicted(measure, rate, known, n * (1 - 1e-5) - 2) > target


def test_the_plan_comes_true():
    """After as many prompts as the plan asks for, the mean error is the target."""
    teacher, sample, _ = oracle.well_posed("plan", 3, 8, 4096, concentration=8.0)
    target = 0.1
    n = int(prompts_needed(sample, target, teacher))
    assert 300 < n < 3000

    def error(key):
        prompt_key, label_key = jax.random.split(key)
        prompts = am.prompts.uniform(prompt_key, n, 8, 3)
        student = am.fit(prompts, teacher.sample(label_key, prompts))
        return ((student.model.logits - teacher.logits) ** 2).sum(), student.status.code

    errors, codes = jax.jit(jax.vmap(error))(jax.random.split(oracle.key_of("true"), 1000))
    assert (codes == 0).all()
    mean, spread = errors.mean(), errors.std() / 1000**0.5
    # 5 standard errors (failure rate 1e-6), 5 % for the next order in 1/n and 1.5 % for the sample
    assert abs(mean - target) < 5 * spread + 0.065 * target


def test_what_no_number_of_prompts_can_teach():
    half = am.prompts.from_supports(jax.random.key(0), 500, 6, [[0, 1], [2, 3]], 4)
    whole = am.prompts.uniform(jax.random.key(1), 500, 6, 4)
    assert prompts_needed(half, 0.1) == math.inf
    assert prompts_needed(half, 0.1, measure="standard_error") == math.inf
    # Its own risk needs only what it holds: 4 identifiable contrasts, r / 2n.
    assert prompts_needed(half, 0.01, measure="excess_risk") == pytest.approx(200, abs=1)
    assert prompts_needed(half, 0.1, collected=whole[:60]) == math.inf  # a floor stays
    assert prompts_needed(whole, 0.1, collected=half) < math.inf


def test_nothing_more_is_needed_where_enough_was_collected():
    whole = am.prompts.uniform(jax.random.key(1), 2000, 6, 3)
    alone = prompts_needed(whole, 1.0)
    assert 0 < alone < 2000
    assert prompts_needed(whole, 1.0, collected=whole) == 0
    assert prompts_needed(whole, 1.0, collected=whole[: alone // 2]) == pytest.approx(
        alone - alone // 2, rel=0.2
    )


def test_trace_against_itself_is_the_rank():
    information = jnp.asarray(rare_information(oracle.generator("rank"), 6, 8), jnp.float32)
    trace = trace_against(eliminate(information), jnp.zeros((6, 6), jnp.int32), information)
    np.testing.assert_allclose(trace, 6 * 5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": 0.0}, "target: must be positive and finite, got 0"),
        ({"target": math.nan}, "target"),
        ({"target": "small"}, "target: expected a number, got 'small'"),
        ({"measure": "variance"}, "measure: .*'variance'"),
        ({"model": am.CCMC.from_logits(np.zeros((2, 2)))}, "model: has logits"),
        ({"collected": am.Prompts.from_tokens([[0, 1]], 2)}, "collected: is over 2 tokens"),
        ({"collected": [[0, 1]]}, "prompts: expected Prompts"),
    ],
)
def test_bad_plans(kwargs, message):
    sample = am.prompts.uniform(jax.random.key(0), 10, 4, 3)
    with pytest.raises(ValueError, match=message):
        prompts_needed(sample, **{"target": 0.1, **kwargs})
