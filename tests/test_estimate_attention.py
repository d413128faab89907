"""The attention parametrisation: its optimum, its dimension, its status."""

from __future__ import annotations

import functools
from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import attnmarkov as am
from attnmarkov.estimate import Status
from attnmarkov.estimate.attention import fit_attention
from attnmarkov.model.maps import attention_weight

KEY = jax.random.key(0)


def data(num_tokens=4, n=800):
    _, prompts, y = oracle.well_posed("attention", num_tokens, 8, n)
    return tuple(np.asarray(x) for x in (prompts.counts, prompts.last, y))


def embedding_of(num_tokens, d):
    return oracle.generator(f"embedding {num_tokens} {d}").normal(size=(num_tokens, d))


def learn(counts, last, y, embedding, solver="adam", **options):
    """Adam unless said otherwise: it compiles in a fraction of the time of a line search."""
    prompts = am.Prompts.from_counts(counts, last)
    return fit_attention(prompts, y, embedding, solver=solver, **options)


def slope_in_w(weight, embedding, counts, last, y):
    """Gradient in W of the summed loss: ``Σ_k,j G[k, j] e_j e_kᵀ``."""
    logits = embedding @ weight.T @ embedding.T
    return embedding.T @ oracle.gradient(logits, counts, last, y).T @ embedding


def centred(logits):
    return logits - logits.mean(-1, keepdims=True)


@pytest.mark.parametrize(("d", "x64"), [(4, False), (7, True)])
def test_a_wide_embedding_gives_the_fit_of_all_logits(d, x64):
    counts, last, y = data()
    e = embedding_of(4, d)
    with jax.enable_x64(x64):
        plain = am.fit(am.Prompts.from_counts(counts, last), y)
        result = learn(counts, last, y, e, "lbfgs")
        assert result.status.name == "converged"
        assert result.num_parameters == 12
        tight = 1e-7 if x64 else 1e-5
        np.testing.assert_allclose(result.model.logits, plain.model.logits, atol=tight)
        np.testing.assert_allclose(result.nll, plain.nll, rtol=1e-6)
        expected = attention_weight(np.asarray(plain.model.logits), e)
        np.testing.assert_allclose(result.weight, expected, atol=20 * tight)
        attention = result.attention
        assert attention is not None
        # The entries of W and the products with them are rounded: half a unit each, both ways.
        size = np.abs(e) @ np.abs(np.asarray(result.weight)).T @ np.abs(e).T
        rounding = np.finfo(result.weight.dtype).eps * size.max()
        np.testing.assert_allclose(
            attention.to_ccmc().logits, plain.model.logits, atol=tight + rounding
        )
        np.testing.assert_allclose(attention.head @ e.T, np.eye(4), atol=1e-5)
        law = result.model.next_token_probs(jnp.array([1, 2, 0, 1]), 3)
        np.testing.assert_allclose(attention([0, 1, 1, 3]), law, atol=1e-5)
    assert result.key_weight is None
    assert result.query_weight is None
    assert result.losses.shape == (1,)
    np.testing.assert_allclose(result.losses[0], result.nll, rtol=1e-5)


def test_a_narrow_embedding_is_fitted_jointly():
    """Rows share W, so that the rows' own means must be weighted by their labels."""
    counts, last, y = data()
    kept = np.concatenate([np.flatnonzero(last != 1), np.flatnonzero(last == 1)[:30]])
    counts, last, y = counts[kept], last[kept], y[kept]
    e = embedding_of(4, 2)
    with jax.enable_x64(True):
        result = learn(counts, last, y, e)
        assert result.status.name == "converged"
    weight = np.asarray(result.weight)
    assert np.abs(slope_in_w(weight, e, counts, last, y)).max() < 1e-6
    logits = e @ weight.T @ e.T
    np.testing.assert_allclose(result.model.logits, centred(logits), atol=1e-12)
    nll = oracle.negative_log_likelihood(logits, counts, last, y) / len(y)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-10)
    assert result.attention is None
    assert result.num_parameters == 4
    single = learn(counts, last, y, e)
    np.testing.assert_allclose(single.model.logits, result.model.logits, atol=1e-5)


def test_weight_decay_is_a_gaussian_on_w():
    counts, last, y = data()
    for rank in (None, 2):
        e, decay = embedding_of(4, 2 if rank is None else 4), 3.0
        with jax.enable_x64(True):
            result = learn(counts, last, y, e, rank=rank, weight_decay=decay, key=KEY)
        assert result.status.name == "converged"
        weight = np.asarray(result.weight)
        slope = slope_in_w(weight, e, counts, last, y)
        if rank is None:
            balance, squares = slope + decay * weight, (weight**2).sum()
        else:
            keys, queries = np.asarray(result.key_weight), np.asarray(result.query_weight)
            balance = np.concatenate(
                [slope @ queries + decay * keys, slope.T @ keys + decay * queries]
            )
            squares = (keys**2).sum() + (queries**2).sum()
        assert np.abs(balance).max() < 1e-6
        loss = float(result.nll) + decay / 2 * squares / len(y)
        np.testing.assert_allclose(np.asarray(result.losses).min(), loss, rtol=1e-9)


def test_low_rank_is_the_best_of_its_rank():
    counts, last, y = data()
    e, losses = embedding_of(4, 4), []
    for rank in (1, 3):
        with jax.enable_x64(True):
            result = learn(counts, last, y, e, rank=rank, key=KEY, num_restarts=4)
            assert result.attention is not None
            alike = np.asarray(result.attention.to_ccmc().logits)
        np.testing.assert_allclose(alike, result.model.logits, atol=1e-10)
        assert result.status.name == "converged"
        keys, queries = np.asarray(result.key_weight), np.asarray(result.query_weight)
        assert keys.shape == queries.shape == (4, rank)
        np.testing.assert_allclose(result.weight, keys @ queries.T, atol=1e-12)
        slope = slope_in_w(np.asarray(result.weight), e, counts, last, y)
        assert np.abs(slope @ queries).max() < 1e-5
        assert np.abs(slope.T @ keys).max() < 1e-5
        assert result.losses.shape == (4,)
        np.testing.assert_allclose(result.nll, np.asarray(result.losses).min(), rtol=1e-9)
        losses.append(float(result.nll))
        assert result.num_parameters == rank * (3 + 4 - rank)
    plain = am.fit(am.Prompts.from_counts(counts, last), y)
    np.testing.assert_allclose(losses[1], plain.nll, rtol=1e-6)  # rank 3 is all of it
    assert losses[0] > losses[1] + 1e-3

    def value(x):
        s = np.outer(x[:4], x[4:])
        g = oracle.gradient(s, counts, last, y)
        nll = oracle.negative_log_likelihood(s, counts, last, y)
        return nll / len(y), np.concatenate([g @ x[4:], g.T @ x[:4]]) / len(y)

    rng = oracle.generator("starts")
    best = min(
        optimize.minimize(value, rng.normal(size=8), jac=True, method="L-BFGS-B").fun
        for _ in range(3)
    )
    np.testing.assert_allclose(losses[0], best, rtol=1e-6)


def test_restarts_differ_by_key_and_the_best_is_kept():
    counts, last, y = data()
    e = embedding_of(4, 4)
    options: Any = {"rank": 1, "num_restarts": 4, "max_iterations": 2}
    runs = [learn(counts, last, y, e, key=jax.random.key(i), **options) for i in (0, 0, 1)]
    assert np.ptp(np.asarray(runs[0].losses)) > 1e-4
    np.testing.assert_allclose(runs[0].nll, runs[0].losses.min(), rtol=1e-5)
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    assert np.abs(runs[0].losses - runs[2].losses).min() > 1e-6
    assert runs[0].status == Status.ITERATION_LIMIT


def identified(embedding, counts, last, rank):
    """Rank of the Fisher information at a random point of the family, by finite differences."""
    k, d = embedding.shape
    rng = oracle.generator("point")
    x = rng.normal(size=d * d if rank is None else 2 * d * rank)

    def logits(x):
        if rank is None:
            w = x.reshape(d, d)
        else:
            w = x[: d * rank].reshape(d, rank) @ x[d * rank :].reshape(rank, d)
        return (embedding @ w.T @ embedding.T).reshape(k * k)

    step = 1e-6
    jacobian = np.stack(
        [(logits(x + step * u) - logits(x - step * u)) / (2 * step) for u in np.eye(x.size)]
    ).reshape(x.size, k, k)
    curvature = oracle.hessian(np.zeros((k, k)), counts, last)
    information = np.einsum("pki,kij,qkj->pq", jacobian, curvature, jacobian)
    values = np.linalg.eigvalsh(information)
    return int((values > 1e-8 * values.max(initial=1e-300)).sum())


def win_program(embedding, counts, last, y):
    """Whether some W in a box has no negative margin and a positive one."""
    triples = {
        (k, j, i)
        for c, k, j in zip(counts, last, y, strict=True)
        for i in np.flatnonzero(c)
        if i != j
    }
    if not triples:
        return False
    rows = np.array([np.outer(embedding[j] - embedding[i], embedding[k]).ravel()
                     for k, j, i in sorted(triples)])  # fmt: skip
    found = optimize.linprog(
        -rows.sum(0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=[(-1, 1)] * rows.shape[1]
    )
    assert found.success
    return -found.fun > 1e-7


@functools.partial(jax.jit, static_argnums=3)
def _traced(prompts, y, e, rank):
    options = {"max_iterations": 1, "num_restarts": 2, "solver": "adam"}
    return fit_attention(prompts, y, e, rank=rank, key=KEY, **options).num_parameters


@pytest.mark.parametrize(("d", "rank"), [(2, None), (3, None), (4, None), (3, 1), (4, 2)])
def test_dimension_and_status_follow_from_the_data(d, rank):
    """Random supports; both worked out apart. Padded to one size, so that it compiles once."""
    seen = set()
    e = embedding_of(4, d)
    for seed, (different, most) in enumerate([(3, 2), (8, 2), (30, 3), (60, 4), (6, 3), (12, 2)]):
        rng = np.random.default_rng(seed + 10)
        repeated = rng.integers(0, different, 60)
        counts, last, y = (x[repeated] for x in oracle.random_data(rng, 4, different, most=most))
        result = learn(counts, last, y, e, rank=rank, key=KEY, num_restarts=2)
        number = identified(e, counts, last, rank)
        assert result.num_parameters == number
        family = min(3, d) * d
        if rank is not None:
            r = min(rank, d, 3)
            family = r * (min(3, d) + d - r)
        separated = win_program(e, counts, last, y)
        name = result.status.name
        seen.add(name)
        assert (name == "separated") == separated
        if not separated and number < family:
            assert name in ("not_identified", "iteration_limit")
        if not separated and number == family:
            assert name in ("converged", "iteration_limit")
        if rank is None and not separated:
            assert name != "iteration_limit"
        if seed < 2:  # with few prompts the rank inside jit is worked out, not read off
            traced = _traced(am.Prompts.from_counts(counts, last), jnp.asarray(y), e, rank)
            assert traced == number
    assert "separated" in seen
    assert len(seen) > 1


def test_vmap_over_prompts_and_embeddings():
    rng = oracle.generator("vmap attention")
    batch = [oracle.random_data(rng, 4, 60, most=m) for m in (4, 3)]
    counts, last, y = (np.stack(x) for x in zip(*batch, strict=True))
    prompts = am.Prompts(jnp.asarray(counts, jnp.int32), jnp.asarray(last, jnp.int32))
    narrow = np.stack([embedding_of(4, 2), embedding_of(4, 2) + np.eye(4, 2)])

    def run(prompts, y, e):
        return fit_attention(prompts, y, e, solver="adam", weight_decay=0.1)

    together = jax.jit(jax.vmap(run))(prompts, jnp.asarray(y), jnp.asarray(narrow, jnp.float32))
    assert repr(together) == "AttentionFit(batch=(2,), Of 2 fits: 2 converged.)"
    for i, (c, k, labels) in enumerate(batch):
        alone = learn(c, k, labels, narrow[i], weight_decay=0.1)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        np.testing.assert_allclose(one.model.logits, alone.model.logits, atol=2e-5)
        np.testing.assert_allclose(one.weight, alone.weight, atol=2e-4)
        np.testing.assert_allclose(one.nll, alone.nll, rtol=1e-5)
        assert one.num_parameters == alone.num_parameters == 4


def test_one_token_one_prompt_and_equal_embeddings():
    one = learn(np.array([[2]]), [0], [0], np.array([[1.5]]))
    assert one.status.name == "converged"
    assert one.model.logits.tolist() == [[0.0]]
    assert one.num_parameters == 0
    prompt = learn(np.array([[1, 1, 1]]), [2], [1], np.eye(3))
    assert prompt.status.name == "separated"
    assert prompt.num_parameters == 2
    decayed = learn(np.array([[1, 1, 1]]), [2], [1], np.eye(3), weight_decay=1.0)
    assert decayed.status.name == "converged"
    # Equal rows: nothing can be told apart, and the uniform law is the maximum.
    alike = learn(np.array([[1, 1, 1]]), [2], [1], np.full((3, 2), 0.1, np.float32))
    assert alike.num_parameters == 0
    assert alike.status.name == "converged"
    np.testing.assert_allclose(alike.model.logits, 0, atol=1e-6)
    assert alike.attention is None


def risks(teacher, prompts, embedding, many, **options):
    def one(i):
        y = teacher.sample(jax.random.fold_in(KEY, i), prompts)
        result = fit_attention(
            prompts, y, embedding, solver="adam", tolerance=1e-6, key=KEY, **options
        )
        risk = am.excess_risk(teacher, result.model, prompts)
        return risk, result.num_parameters, result.status.code

    return [np.asarray(x) for x in jax.jit(jax.vmap(one))(jnp.arange(many))]


@pytest.mark.parametrize(("d", "rank"), [(2, None), (4, 1)])
def test_excess_risk_is_half_a_parameter_per_prompt(d, rank):
    """Twice the excess risk times n is chi-squared: fails by chance at a rate of 1e-6."""
    n, many = 1500, 120
    e = embedding_of(4, d)
    rng = oracle.generator(f"teacher {d}")
    weight = (
        rng.normal(size=(d, d)) / 4 if rank is None else 0.4 * np.outer(*rng.normal(size=(2, d)))
    )
    teacher = am.CCMC.from_logits(e @ weight.T @ e.T)
    tokens = jax.random.randint(jax.random.key(7), (n, 8), 0, 4)
    prompts = am.Prompts.from_tokens(tokens, 4)
    options = {} if rank is None else {"rank": rank, "num_restarts": 1}
    risk, number, code = risks(teacher, prompts, e, many, **options)
    assert set(code) == {Status.CONVERGED}
    assert set(number) == {4 if rank is None else 6}
    parameters = number[0]
    interval = stats.chi2.interval(1 - oracle.SMALL_RATE, many * parameters)
    total = 2 * n * risk.sum()
    assert interval[0] < total < interval[1] * (1 + 5 / np.sqrt(n))


def test_concrete_data_keep_their_verdicts_where_a_number_is_traced():
    """On a line, token 1 beats 0; and 2 is never seen."""
    prompts, y = am.Prompts.from_tokens([[0, 1]] * 3, 3), jnp.array([1, 1, 1], jnp.int32)
    e = np.array([[0.0], [1.0], [3.0]])

    def run(decay):
        return fit_attention(prompts, y, e, weight_decay=decay, solver="adam", max_iterations=50)

    traced = jax.jit(run)(0.0)
    assert traced.status == run(0.0).status == Status.SEPARATED
    assert traced.num_parameters == 1
    assert jax.jit(lambda y: fit_attention(prompts, y, e, solver="adam", max_iterations=50))(
        y
    ).status in (Status.CONVERGED, Status.ITERATION_LIMIT)  # no program inside jit


def test_impossible_labels_inside_jit_are_reported():
    prompts = am.Prompts.from_tokens([[0, 1], [1, 0], [0, 0]], 2)
    run = jax.jit(lambda p, y: fit_attention(p, y, jnp.eye(2), solver="adam"))
    for label in (1, -1, 5):
        assert run(prompts, jnp.array([0, 1, label])).status == Status.NON_FINITE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": np.eye(3)}, r"embedding: expected shape \(2, d\).*got \(3, 3\)"),
        ({"embedding": np.ones(2)}, r"embedding: expected shape \(2, d\).*got \(2,\)"),
        ({"embedding": np.zeros((2, 0))}, r"embedding: expected shape \(2, d\)"),
        ({"embedding": [[1.0, np.nan], [0, 1]]}, r"embedding: entry \[0, 1\] is nan"),
        ({"rank": 1}, "key: rank=1 starts from random matrices"),
        ({"rank": 0, "key": KEY}, "rank: must be at least 1, got 0"),
        ({"rank": 1.5, "key": KEY}, "rank: expected an integer, got 1.5"),
        ({"rank": 1, "key": KEY, "num_restarts": 0}, "num_restarts: must be at least 1"),
        ({"rank": 1, "key": 3}, "key: expected a typed key"),
        ({"weight_decay": -1}, "weight_decay: must be finite and at least 0, got -1"),
        ({"weight_decay": float("inf")}, "weight_decay: must be finite"),
        ({"solver": "newton"}, "unknown solver 'newton'; known: lbfgs, adam"),
        ({"tolerance": 0}, "tolerance: must be positive"),
        ({"max_iterations": 0}, "max_iterations: must be at least 1"),
        ({"y": [2]}, r"y: entry \[0\] is token id 2"),
    ],
)
def test_bad_input(options, message):
    arguments = {"y": [0], "embedding": np.eye(2), **options}
    with pytest.raises(ValueError, match=message):
        fit_attention(am.Prompts.from_tokens([[0, 1]], 2), **arguments)


def test_prints_something_worth_reading():
    text = repr(learn(np.array([[1, 1, 1]]), [2], [1], np.eye(3)))
    assert "separated after" in text
    assert "2 parameters identified" in text
    seen = []
    result = learn(np.array([[2]]), [0], [0], np.array([[1.5]]))
    jax.jit(lambda r: seen.append(repr(r)) or r)(result)
    assert seen[0].startswith("AttentionFit(model=")
