import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from oracles import assert_law, assert_poisson, attention_law, ccmc_law

import attnmarkov as am
from attnmarkov.model import centre_logits


def random_attention(rng, size, width, scale=1.0):
    e = rng.normal(size=(size, width)) / np.sqrt(width)
    return e, scale * rng.normal(size=(width, width))


@pytest.mark.parametrize(
    ("size", "width", "length"),
    [(1, 1, 1), (2, 3, 5), (7, 7, 40), (64, 80, 300), (1000, 1000, 900)],
)
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-12)])
def test_attention_is_the_ccmc(size, width, length, x64, tolerance):
    rng = np.random.default_rng(size + length)
    e, w = random_attention(rng, size, width)
    tokens = rng.integers(size, size=length)
    query = int(rng.integers(size))
    with jax.enable_x64(x64):
        attention = am.SelfAttention.from_weights(e, w)
        model = attention.to_ccmc()
        counts = am.Prompts.from_tokens(tokens, size).counts[0]
        for q in (None, query):
            law = model.next_token_probs(counts, tokens[-1] if q is None else q)
            np.testing.assert_allclose(attention(tokens, q), law, atol=tolerance, rtol=0)
            np.testing.assert_allclose(law, attention_law(e, w, tokens, q), atol=tolerance, rtol=0)
    assert law.dtype == (np.float64 if x64 else np.float32)


@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 2**31))
def test_maps_invert_each_other(size, extra, seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(size), size)
    e, _ = random_attention(rng, size, size + extra + size)
    with jax.enable_x64(True):
        model = am.CCMC.from_transition_matrix(p)
        attention = am.SelfAttention.from_ccmc(model, e)
        np.testing.assert_allclose(attention.to_ccmc().logits, model.logits, atol=1e-8)
        np.testing.assert_allclose(model.transition_matrix, p, atol=1e-12)
        np.testing.assert_allclose(model.logits.sum(1), 0, atol=1e-9)
        np.testing.assert_allclose(attention.head @ attention.embedding.T, np.eye(size), atol=1e-9)
        tokens = rng.integers(size, size=9)
        np.testing.assert_allclose(
            attention.head @ attention.attend(tokens), attention(tokens), atol=1e-9
        )
        np.testing.assert_allclose(attention(tokens), ccmc_law(p, tokens.tolist()), atol=1e-9)


def test_weight_is_the_one_in_the_span():
    # W lies in span{(e_i - e_j) e_k^T}, and adding what that span does not see changes nothing.
    rng = np.random.default_rng(5)
    size, width = 4, 6
    e, w_any = random_attention(rng, size, width)
    basis = np.stack(
        [np.outer(e[i] - e[0], e[k]).ravel() for i in range(1, size) for k in range(size)], axis=1
    )
    projection = basis @ np.linalg.lstsq(basis, w_any.ravel(), rcond=None)[0]
    with jax.enable_x64(True):
        model = am.SelfAttention.from_weights(e, w_any).to_ccmc()
        found = am.SelfAttention.from_ccmc(model, e).weight
    residual = basis @ np.linalg.lstsq(basis, np.ravel(found), rcond=None)[0] - np.ravel(found)
    np.testing.assert_allclose(residual, 0, atol=1e-10)
    np.testing.assert_allclose(np.ravel(found), projection, atol=1e-10)


def test_zeros_are_masked_attention():
    p = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.0, 0.8]])
    model = am.CCMC.from_transition_matrix(p)
    assert model.logits[0, 2] == -jnp.inf
    np.testing.assert_allclose(model.transition_matrix, p, atol=1e-7)
    attention = am.SelfAttention.from_ccmc(model, np.eye(3, 5))
    np.testing.assert_array_equal(attention.allowed, p > 0)
    for tokens in ([0, 1, 2, 2, 0], [1, 2, 2], [0, 1]):
        np.testing.assert_allclose(attention(tokens), ccmc_law(p, tokens), atol=1e-6)
    np.testing.assert_array_equal(jnp.isinf(attention.to_ccmc().logits), p == 0)
    assert jnp.isnan(model.next_token_probs([0, 0, 4], 0)).all()  # nothing to attend


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_relabelling_and_row_shifts(size, seed):
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(size, size))
    order = rng.permutation(size)
    counts = rng.integers(0, 5, size=(3, size)) + np.eye(size, dtype=int)[:3].sum(0)[None]
    last = rng.integers(size, size=3)
    with jax.enable_x64(True):
        law = am.CCMC.from_logits(s).next_token_probs(counts, last)
        shifted = am.CCMC.from_logits(s + rng.normal(size=(size, 1)) * 10)
        np.testing.assert_allclose(shifted.next_token_probs(counts, last), law, atol=1e-12)
        relabelled = am.CCMC.from_logits(s[np.ix_(order, order)])
        new_id = np.argsort(order)
        np.testing.assert_allclose(
            relabelled.next_token_probs(counts[:, order], new_id[last]), law[:, order], atol=1e-12
        )
        np.testing.assert_allclose(centre_logits(shifted.logits), shifted.logits, atol=1e-12)


def test_log_prob_and_large_logits():
    model = am.CCMC.from_logits([[0.0, 900.0], [-900.0, 0.0]])
    prompts = am.Prompts.from_tokens([[0, 1], [0, 0, 1], [0, 0, 0]], 2)
    # query 1 scores token 1 by 900 above token 0, of which there are two; and so on
    expected = [0.0, -900 + np.log(2), -np.inf]
    np.testing.assert_allclose(model.log_prob(prompts, [1, 0, 1]), expected, atol=1e-3)


def test_sample_has_the_law(key):
    p = [[0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25]]
    model = am.CCMC.from_transition_matrix(p)
    context = [1, 1, 0, 2, 2, 2, 1]
    prompts = am.Prompts.from_tokens(np.tile(context, (60_000, 1)), 3)
    law = ccmc_law(p, context)
    assert_law(model.sample(key, prompts)[:, None], {(j,): law[j] for j in range(3)})


def test_sample_hits_rare_tokens_at_their_rate(key):
    model = am.CCMC.from_transition_matrix([[1 - 1e-6, 1e-6], [0.5, 0.5]])
    n = 2**24
    prompts = am.Prompts(jnp.ones((n, 2), jnp.int32), jnp.zeros(n, jnp.int32))
    assert_poisson(int((model.sample(key, prompts) == 1).sum()), n * 1e-6)


def test_sample_is_stable_in_the_batch(key):
    model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, 4))
    prompts = am.prompts.uniform(key, 50, 6, 4)
    np.testing.assert_array_equal(model.sample(key, prompts)[:20], model.sample(key, prompts[:20]))


def test_model_maps_are_differentiable_and_traceable():
    p = jnp.array([[0.9, 0.1], [0.3, 0.7]])

    def loss(p):
        return am.CCMC.from_transition_matrix(p).next_token_probs(jnp.array([2, 1]), 0)[1]

    gradient = jax.jit(jax.grad(loss))(p)
    # d/dp01 of p01/(2 p00 + p01), with p00 and p01 free
    np.testing.assert_allclose(gradient[0, 1], 2 * 0.9 / (2 * 0.9 + 0.1) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda k, n: am.prompts.uniform(k, n, 3, 3),
        lambda k, n: am.prompts.markov(
            k, n, 3, am.MarkovChain.from_transition_matrix(np.full((3, 3), 1 / 3))
        ),
        lambda k, n: am.prompts.from_supports(k, n, 3, [[0, 1, 2]], 3),
        lambda k, n: am.prompts.every_token_once(k, n, 3),
    ],
)
def test_one_key_may_serve_prompts_and_labels(key, draw):
    # The labels' words are not the prompts' words, even if a user gives both the same key.
    model = am.CCMC.from_transition_matrix([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25]])
    n = 40_000
    prompts = draw(key, n)
    law = np.asarray(model.next_token_probs(prompts.counts, prompts.last), float)
    first = np.asarray(prompts.tokens)[:, 0]
    labels = np.asarray(model.sample(key, prompts))
    starts = np.asarray(am.rollout(model, key, prompts, 1, n).tokens)[:, 0]
    for drawn in (labels, starts):
        hit, chance = drawn == first, law[np.arange(n), first]
        z = (hit - chance).sum() / np.sqrt((chance * (1 - chance)).sum())
        assert abs(z) < 4.9  # two-sided normal tail 1e-6


GOOD = np.eye(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: am.CCMC.from_logits([[0, np.nan], [0, 0]]), r"logits: entry \[0, 1\] is nan"),
        (lambda: am.CCMC.from_logits([[0, np.inf], [0, 0]]), r"logits: entry \[0, 1\] is inf"),
        (lambda: am.CCMC.from_logits([[0, 0], [-np.inf, -np.inf]]), "logits: row 1 is minus inf"),
        (lambda: am.CCMC.from_logits([0.0, 1.0]), r"logits: expected a square \(K, K\) array"),
        (
            lambda: am.SelfAttention.from_weights([[1.0, 0], [2, 0]], np.eye(2)),
            r"embedding: needs full row rank 2, but has rank 1",
        ),
        (
            lambda: am.SelfAttention.from_weights(  # rank 2 but for float32 rounding
                np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
                @ np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32),
                np.eye(5),
            ),
            "embedding: needs full row rank 4, but has rank 2",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).next_token_probs(np.ones((3, 2)), [0, 1]),
            r"last: shape \(2,\) disagrees with contexts \(3,\)",
        ),
        (
            lambda: am.SelfAttention.from_weights(
                GOOD,
                np.eye(3),
                allowed=[[1], [0, 0]],  # pyright: ignore[reportArgumentType]
            ),
            "allowed: rows have different lengths",
        ),
        (
            lambda: am.SelfAttention.from_weights(np.ones((3, 2)), np.eye(2)),
            r"embedding: needs full row rank 3, but has rank 1 \(shape \(3, 2\)\)",
        ),
        (
            lambda: am.SelfAttention.from_weights(GOOD, np.eye(2)),
            r"weight: expected shape \(3, 3\)",
        ),
        (
            lambda: am.SelfAttention.from_weights(GOOD, np.eye(3), head=2 * GOOD),
            "head: head @ embedding.T must be the identity, but is off by 1",
        ),
        (
            lambda: am.SelfAttention.from_weights(GOOD, np.eye(3), allowed=[[1, 1], [0, 0]]),
            "allowed: query 1 may attend nothing",
        ),
        (
            lambda: am.SelfAttention.from_ccmc(am.CCMC.from_logits(np.eye(3)), GOOD),
            "embedding: has 2 rows, but the model has 3 tokens",
        ),
        (lambda: am.SelfAttention.from_weights(GOOD, np.eye(3))([]), "tokens: the prompt is empty"),
        (
            lambda: am.SelfAttention.from_weights(GOOD, np.eye(3))([0, 5]),
            r"tokens: entry \[1\] is token id 5, outside 0..1",
        ),
        (
            lambda: am.SelfAttention.from_weights(GOOD, np.eye(3))([0], -1),
            "query: the value is token id -1, outside 0..1",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).next_token_probs([1, 2, 3], 0),
            r"counts: expected 2 entries on the last axis",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).next_token_probs([[1, 2], [-1, 2]], [0, 0]),
            r"counts: context \[1\] has a negative entry",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).next_token_probs([0, 0], 0),
            "counts: the context has no token",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).next_token_probs([1, 1], 2),
            "last: the value is token id 2",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).log_prob(am.Prompts.from_tokens([[0]], 3), [0]),
            "prompts: over 3 tokens, but the model has 2",
        ),
        (
            lambda: am.CCMC.from_logits(np.eye(2)).log_prob(
                am.Prompts.from_tokens([[0]], 2), [0, 1]
            ),
            r"y: expected shape \(1,\), got \(2,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_printing():
    model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
    assert repr(model) == "CCMC(num_tokens=2, transition_matrix=\n[[0.5  0.5 ]\n [0.25 0.75]])"
    attention = am.SelfAttention.from_ccmc(model, GOOD)
    assert repr(attention) == "SelfAttention(num_tokens=2, d=3)"
    assert "CCMC" in repr(jax.tree.map(lambda x: None, model))
