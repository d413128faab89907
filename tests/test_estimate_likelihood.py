"""Loss, gradient and curvature of the rows against loops in float64."""

from __future__ import annotations

import chex
import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnmarkov.estimate import Prior, _blocks, likelihood

SHAPES = [(1, 3), (2, 1), (3, 40), (5, 300), (6, 7)]  # K, n


@pytest.fixture(params=SHAPES, ids=str)
def data(request):
    size, n = request.param
    rng = oracle.generator(f"likelihood {request.param}")
    return rng.normal(size=(size, size)), *oracle.random_data(rng, size, n, most=4)


def test_blocks_hold_every_prompt_once_under_its_own_row(data):
    _, counts, last, y = data
    blocks = _blocks.blocks_of(jnp.asarray(counts), jnp.asarray(last), jnp.asarray(y))
    filled = np.asarray(blocks.weight) > 0
    rows = np.broadcast_to(np.asarray(blocks.row)[:, None], filled.shape)
    held = np.exp(np.asarray(blocks.log_counts, np.float64))[filled].round().astype(int)
    stored = np.column_stack([held, rows[filled], np.asarray(blocks.labels)[filled]])
    given = np.column_stack([counts, last, y])
    assert sorted(map(tuple, stored.tolist())) == sorted(map(tuple, given.tolist()))
    chex.assert_trees_all_equal(
        np.asarray(blocks.labels_per_row()), np.bincount(last, minlength=len(counts[0])) * 1.0
    )


def evaluated(logits, counts, last, y, prior):
    @jax.jit
    def run(logits, counts, last, y, prior):
        blocks = _blocks.blocks_of(counts, last, y)
        at = likelihood.evaluate(blocks, logits, prior)
        return blocks, at, likelihood.curvature(blocks, at.probs)

    return run(logits, counts, last, y, prior)


@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_float64_evaluation_equals_the_loops(data, prior):
    logits, counts, last, y = data
    per_row = np.maximum(np.bincount(last, minlength=len(logits)), 1)
    with jax.enable_x64(True):
        _, at, curvature = evaluated(logits, counts, last, y, Prior(precision=prior))
    loss = np.zeros(len(logits))
    for i, k in enumerate(last):  # the library leaves out the constant −log n_y
        one = slice(i, i + 1)
        loss[k] += oracle.negative_log_likelihood(logits, counts[one], last[one], y[one])
        loss[k] += np.log(counts[i, y[i]])
    loss = (loss + prior / 2 * (logits**2).sum(1)) / per_row
    slope = (oracle.gradient(logits, counts, last, y) + prior * logits) / per_row[:, None]
    assert at.loss.dtype == jnp.float64
    np.testing.assert_allclose(at.loss, loss, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(at.gradient, slope, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(curvature, oracle.hessian(logits, counts, last), atol=1e-11)


def test_float32_evaluation_equals_the_loops(data):
    logits, counts, last, y = data
    logits = logits.astype(np.float32)
    _, at, curvature = evaluated(logits, counts, last, y, None)
    per_row = np.maximum(np.bincount(last, minlength=len(logits)), 1)[:, None]
    exact = oracle.gradient(logits.astype(float), counts, last, y) / per_row
    np.testing.assert_allclose(at.gradient, exact, atol=1e-6)
    hessian = oracle.hessian(logits.astype(float), counts, last)
    np.testing.assert_allclose(curvature, hessian, atol=1e-6 * max(1, hessian.max()))


def test_gradient_and_curvature_are_derivatives_of_the_loss(data):
    logits, counts, last, y = data
    per_row = np.maximum(np.bincount(last, minlength=len(logits)), 1)[:, None]
    direction = oracle.generator("direction").normal(size=logits.shape)
    step, prior = 1e-5, Prior(precision=0.3)
    with jax.enable_x64(True):
        blocks, at, curvature = evaluated(logits, counts, last, y, prior)
        _, ahead, _ = evaluated(logits + step * direction, counts, last, y, prior)
        _, back, _ = evaluated(logits - step * direction, counts, last, y, prior)
        total = jax.grad(likelihood.total_objective)(jnp.asarray(logits), blocks, prior)
    slope = (np.asarray(ahead.loss) - np.asarray(back.loss)) / (2 * step)
    np.testing.assert_allclose((np.asarray(at.gradient) * direction).sum(1), slope, atol=1e-8)
    bend = (np.asarray(ahead.gradient) - np.asarray(back.gradient)) / (2 * step)
    product = np.einsum("kab,kb->ka", np.asarray(curvature), direction) + 0.3 * direction
    np.testing.assert_allclose(product / per_row, bend, atol=1e-8)
    np.testing.assert_allclose(total, at.gradient, rtol=1e-14)


def test_extreme_logits_do_not_overflow():
    counts, last, y = np.array([[1, 1, 0], [1, 0, 3]]), np.array([0, 0]), np.array([1, 0])
    logits = np.array([[300.0, -300.0, 0.0]] * 3, np.float32)
    _, at, curvature = evaluated(logits, counts, last, y, None)
    np.testing.assert_allclose(at.loss[0], 300.0, rtol=1e-6)  # (600 + 0) / 2
    chex.assert_tree_all_finite((at, curvature))


def test_curvature_cut_into_parts_is_the_same(data, monkeypatch):
    logits, counts, last, y = data
    whole = oracle.hessian(logits, counts, last)
    monkeypatch.setattr(_blocks, "_ELEMENTS", 2 * len(logits) ** 2)
    cut = evaluated(logits, counts, last, y, None)[2]
    np.testing.assert_allclose(cut, whole, atol=1e-6 * max(1, whole.max()))


def test_curvature_rows_sum_to_zero_where_probabilities_round_to_one():
    counts, last, y = np.array([[1, 1]]), np.array([0]), np.array([0])
    logits = np.array([[9.0, -9.0], [0.0, 0.0]], np.float32)
    curvature = evaluated(logits, counts, last, y, None)[2]
    exact = oracle.hessian(logits.astype(float), counts, last)
    np.testing.assert_allclose(curvature[0], exact[0], rtol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 60.0], ids=["products", "logarithms"])
def test_derivatives_hold_where_products_of_counts_underflow(gap):
    """Neighbours in a chain of tokens, each far below the one before."""
    counts = np.repeat(np.eye(6, dtype=int)[:-1] + 2 * np.eye(6, dtype=int)[1:], 3, axis=0)
    last, y = np.zeros(15, int), np.repeat(np.arange(5), 3)
    logits = np.zeros((6, 6))
    logits[0] = -gap * np.arange(6)

    @jax.jit
    def run(counts, last, y, logits):
        blocks = _blocks.blocks_of(counts, last, y)
        found = likelihood.derivatives(blocks, logits, products=True)
        return found, likelihood.curvature_at(blocks, logits), likelihood.losses(blocks, logits)

    found, curvature, losses = run(counts, last, y, jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found.gradient, oracle.gradient(logits, counts, last, y), atol=2e-6)
    np.testing.assert_allclose(curvature, oracle.hessian(logits, counts, last), atol=2e-6)
    exact = oracle.negative_log_likelihood(logits, counts, last, y)  # no label stands twice
    np.testing.assert_allclose(found.loss[0], exact, rtol=1e-5, atol=1e-5)
    assert np.isfinite(np.asarray(losses)).all()
