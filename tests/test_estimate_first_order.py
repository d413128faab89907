"""First-order solvers: any objective on all data, and the CCMC's in minibatches."""

from __future__ import annotations

import functools

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.first_order import minimise, minimise_minibatch, named
from attnmarkov.estimate.prior import Prior

SGD, MOMENTUM = optax.sgd(1.0), optax.sgd(0.5, momentum=0.9, nesterov=True)
TRANSFORMS = {"sgd": SGD, "momentum": MOMENTUM, "adam": named("adam"), "lbfgs": named("lbfgs")}
# Both terms, and entries that differ by row and token.
ALPHA = np.arange(1.0, 17).reshape(4, 4) / 8
PRIOR = Prior(precision=0.7, pseudo_counts=ALPHA)

run_minibatch = jax.jit(minimise_minibatch, static_argnums=(0, 4))


def bowl(params, centre, curvature):
    a, b = params["a"] - centre["a"], params["b"] - centre["b"]
    return jnp.sqrt(1 + curvature * (a**2).sum()) + 0.3 * (b**2).sum()


@functools.partial(jax.jit, static_argnums=0)
def run_bowl(transform, start, tolerance, max_iterations, centre, curvature):
    return minimise(transform, bowl, start, tolerance, max_iterations, centre, curvature)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_pytree_from_any_start(name):
    rng = oracle.generator("bowl")
    centre, start = ({"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))} for _ in range(2))
    found = run_bowl(TRANSFORMS[name], start, 1e-5, 4000, centre, 1.5)
    assert bool(found.converged)
    assert 1 < int(found.iterations) < 4000
    for leaf in "ab":
        np.testing.assert_allclose(found.params[leaf], centre[leaf], atol=3e-5)
    cut = run_bowl(TRANSFORMS[name], start, 1e-5, 1, centre, 1.5)
    assert not bool(cut.converged)
    assert int(cut.iterations) == 1
    assert np.abs(cut.params["b"] - start["b"]).max() > 1e-3
    stay = run_bowl(TRANSFORMS[name], centre, 1e-5, 100, centre, 1.5)
    assert bool(stay.converged)
    assert int(stay.iterations) == 0
    np.testing.assert_array_equal(stay.params["a"], np.float32(centre["a"]))


def problem(name="minibatch", n=800):
    _, prompts, y = oracle.well_posed(name, 4, 8, n)
    counts, last, y = (np.asarray(x) for x in (prompts.counts, prompts.last, y))
    return counts, last, y


def blocks_from(counts, last, y, weights=None):
    return blocks_of(jnp.asarray(counts), jnp.asarray(last), jnp.asarray(y), weights)


def over(prior, size):
    return None if prior is None else prior.over(size, jnp.result_type(float))


def centred(logits):
    out = np.asarray(logits, np.float64)
    return out - out.mean(-1, keepdims=True)


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["plain", "prior"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_minibatches_reach_the_optimum_of_newton(name, prior):
    counts, last, y = problem()
    exact = am.fit(am.Prompts.from_counts(counts, last), y, prior=prior)
    found = run_minibatch(
        TRANSFORMS[name], blocks_from(counts, last, y), over(prior, 4), oracle.key_of(name), 32,
        1e-6, 20_000,
    )  # fmt: skip
    assert bool(found.converged)
    assert 0 < int(found.iterations) < 20_000
    np.testing.assert_allclose(centred(found.logits), exact.model.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_minibatches_in_float64(name):
    counts, last, y = problem()
    with jax.enable_x64(True):
        exact = am.fit(am.Prompts.from_counts(counts, last), y)
        found = run_minibatch(
            TRANSFORMS[name], blocks_from(counts, last, y), None, oracle.key_of(name), 32,
            1e-10, 20_000,
        )  # fmt: skip
    assert bool(found.converged)
    np.testing.assert_allclose(centred(found.logits), exact.model.logits, atol=1e-8)
    slope = oracle.gradient(np.asarray(found.logits), counts, last, y)
    assert np.abs(slope / np.bincount(last)[:, None]).max() < 1.001e-10


def test_weights_and_a_rare_row_do_not_slow_minibatches():
    counts, last, y = problem()
    rare = np.flatnonzero(last == 2)[60:]  # 60 of about 650 stay
    kept = np.setdiff1d(np.arange(len(y)), rare)
    counts, last, y = counts[kept], last[kept], y[kept]
    times = oracle.generator("times").integers(0, 4, len(y))
    exact = am.fit(am.Prompts.from_counts(counts, last), y, weights=times, prior=0.3)
    blocks = blocks_from(counts, last, y, jnp.asarray(times, jnp.float32))
    prior = over(Prior(precision=0.3), 4)
    found = run_minibatch(SGD, blocks, prior, jax.random.key(0), 32, 1e-7, 2000)
    assert bool(found.converged)
    np.testing.assert_allclose(centred(found.logits), exact.model.logits, atol=1e-5)


def test_a_batch_step_is_the_full_step_on_average():
    """The second step is the first that draws. False alarms: 1e-6 over 16 entries."""
    counts, last, y = problem(n=60)
    times = oracle.generator("uneven").integers(0, 3, 60)
    blocks = blocks_from(counts, last, y, jnp.asarray(times, jnp.float32))
    prior, rate, many = over(PRIOR, 4), 2.0, 20_000
    slope = jax.jit(lambda s: _gradient(s, counts, last, y, times))
    first = -rate * np.asarray(slope(np.zeros((4, 4))))
    second = first - rate * np.asarray(slope(first))

    def one(key):
        return minimise_minibatch(optax.sgd(rate), blocks, prior, key, 3, 1e-9, 2).logits

    keys = jax.random.split(jax.random.key(3), many)
    drawn = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    error = drawn.std(0, ddof=1) / np.sqrt(many)
    assert (error > 1e-4).all()  # the batches do differ
    bound = stats.norm.isf(oracle.SMALL_RATE / 2 / 16)
    assert (np.abs(drawn.mean(0) - second) < bound * error + 1e-6).all()


def _gradient(logits, counts, last, y, times):
    """Of the sum over rows of the penalised loss per label, written out."""

    def total(s):
        law = jax.nn.log_softmax(s[last] + jnp.log(jnp.asarray(counts)))
        each = -times * jnp.where(jnp.arange(4) == y[:, None], law, 0).sum(-1)
        penalty = 0.35 * (s**2).sum(-1) - (ALPHA * jax.nn.log_softmax(s)).sum(-1)
        rows = jnp.zeros(4).at[last].add(each) + penalty
        return (rows / jnp.zeros(4).at[last].add(times)).sum()

    return jax.grad(total)(jnp.asarray(logits, jnp.float32))


@pytest.mark.parametrize("limit", [1, 7, 30])
def test_the_limit_counts_steps(limit):
    counts, last, y = problem()
    blocks = blocks_from(counts, last, y)
    seen = []
    for most in (limit, limit + 1):
        found = run_minibatch(SGD, blocks, None, jax.random.key(0), 32, 1e-9, most)
        assert int(found.iterations) == most
        assert not bool(found.converged)
        seen.append(found.logits)
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


def test_keys_decide_and_only_keys():
    counts, last, y = problem()
    blocks = blocks_from(counts, last, y)

    def one(key):
        return run_minibatch(SGD, blocks, None, key, 32, 1e-9, 12).logits

    keys = jax.random.split(jax.random.key(5), 2)
    a, b = one(keys[0]), one(keys[1])
    np.testing.assert_array_equal(a, one(keys[0]))
    assert np.abs(a - b).max() > 1e-4
    together = jax.vmap(one)(keys)
    np.testing.assert_allclose(together, [a, b], atol=2e-6)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_small_data_in_batches(batch_size):
    one_token = blocks_from([[2], [3]], [0, 0], [0, 0])
    found = run_minibatch(SGD, one_token, None, jax.random.key(0), batch_size, 1e-6, 10)
    assert found.logits.tolist() == [[0.0]]
    assert bool(found.converged)
    one_prompt = blocks_from([[1, 1, 0]], [0], [1])  # separated: runs on
    found = run_minibatch(SGD, one_prompt, None, jax.random.key(0), batch_size, 1e-6, 10)
    assert not bool(found.converged)
    s = np.asarray(found.logits)
    assert s[0, 1] > 1
    np.testing.assert_allclose(s[0, 0], -s[0, 1], rtol=1e-5)
    assert not s[1:].any()
    assert not s[0, 2]


def test_a_rate_too_large_shows():
    counts, last, y = problem()
    found = run_minibatch(
        optax.sgd(-1e38), blocks_from(counts, last, y), None, jax.random.key(0), 32, 1e-6, 30
    )
    assert not bool(found.converged)
    assert not np.isfinite(found.logits).all()
