from typing import Any

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from law_cases import CONTEXTS, P
from oracles import attention_law, ccmc_law, context_law

import attnmarkov as am
from attnmarkov.model import (
    DecayContext,
    FullContext,
    LagContext,
    PositionContext,
    WindowContext,
    contexts,
)


def random_prompts(seed, num_tokens=3, lengths=(1, 2, 5, 8, 8)):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(num_tokens, size=n).tolist() for n in lengths]
    return rows, am.Prompts.from_tokens(rows, num_tokens)


@pytest.mark.parametrize(("context", "weighing"), CONTEXTS)
def test_weighted_counts_are_the_sums_of_position_weights(context, weighing):
    weight = weighing.get("weight", lambda i, length, query: 1.0)
    shift = weighing.get("shift", lambda j, length: 0.0)
    exponent = weighing.get("exponent", 1.0)
    for seed in range(4):
        rows, prompts = random_prompts(seed)
        got = context.weighted_counts(prompts)
        assert got.dtype == np.float32
        expected = np.zeros((len(rows), 3))
        for row, tokens in enumerate(rows):
            for j in range(3):
                for i, token in enumerate(tokens):
                    if token == j:
                        expected[row, j] += weight(i, len(tokens), tokens[-1])
                if expected[row, j] > 0:
                    expected[row, j] **= exponent
                    expected[row, j] *= np.exp(shift(j, len(tokens)))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("context", "weighing"), CONTEXTS)
def test_next_token_law_under_a_context(context, weighing):
    rows, prompts = random_prompts(7, lengths=(2, 5, 8))
    model = am.CCMC.from_transition_matrix(P)
    laws = model.next_token_probs(context.weighted_counts(prompts), prompts.last)
    for tokens, law in zip(rows, laws, strict=True):
        np.testing.assert_allclose(law, context_law(P, tokens, **weighing), atol=2e-6)


def test_counts_are_weighted_counts_of_the_full_context():
    rows, prompts = random_prompts(3)
    np.testing.assert_array_equal(FullContext().weighted_counts(prompts), prompts.counts)
    model = am.CCMC.from_transition_matrix(P)
    laws = model.next_token_probs(FullContext().weighted_counts(prompts), prompts.last)
    for tokens, law in zip(rows, laws, strict=True):
        np.testing.assert_allclose(law, ccmc_law(P, tokens), atol=1e-6)
    only = am.Prompts.from_counts(prompts.counts, prompts.last)
    np.testing.assert_allclose(
        FullContext(exponent=-1.0).weighted_counts(only)[3],
        [1 / n if n else 0 for n in np.asarray(prompts.counts)[3]],
    )


@pytest.mark.parametrize("exponent", [1.0, 0.3])
@pytest.mark.parametrize("query", [None, 3])
def test_from_attention_is_softmax_attention_with_positions(exponent, query):
    rng = np.random.default_rng(2)
    size, width, room = 4, 6, 9
    e, w = rng.normal(size=(size, width)) / 2, rng.normal(size=(width, width)) / 2
    u = rng.normal(size=(room, width)) / 2
    attention = am.SelfAttention.from_weights(e, w)
    context = PositionContext.from_attention(attention, u, exponent=exponent)
    context.check()
    model = attention.to_ccmc()
    rows = [rng.integers(size, size=n).tolist() for n in (1, 4, 9)]
    prompts = am.Prompts.from_tokens(rows, size, query=None if query is None else [query] * 3)
    laws = model.next_token_probs(context.weighted_counts(prompts), prompts.last)
    for tokens, law in zip(rows, laws, strict=True):
        x = e[tokens] + u[: len(tokens)]
        q = e[tokens[-1] if query is None else query] + u[len(tokens) - 1]
        if exponent == 1:
            weights = np.exp(x @ w @ q)
            expected = np.array([weights[np.array(tokens) == j].sum() for j in range(size)])
        else:  # n_j, the sum over positions of exp u_i W (x_L + u_L), is raised to the exponent
            weights = np.exp(u[: len(tokens)] @ w @ q)
            n = np.array([weights[np.array(tokens) == j].sum() for j in range(size)])
            expected = n**exponent * np.exp(e @ w @ q)
        np.testing.assert_allclose(law, expected / expected.sum(), atol=2e-6)


def test_from_attention_without_positions_is_attention():
    rng = np.random.default_rng(4)
    e, w = rng.normal(size=(3, 4)), rng.normal(size=(4, 4))
    attention = am.SelfAttention.from_weights(e, w)
    context = PositionContext.from_attention(attention, np.zeros((8, 4)))
    rows, prompts = random_prompts(5)
    laws = attention.to_ccmc().next_token_probs(context.weighted_counts(prompts), prompts.last)
    for tokens, law in zip(rows, laws, strict=True):
        np.testing.assert_allclose(law, attention_law(e, w, tokens), atol=2e-6)


def test_bias_matters_up_to_a_constant_per_length():
    rng = np.random.default_rng(6)
    bias, shift = rng.normal(size=(8, 8)), rng.normal(size=8)
    _, prompts = random_prompts(6)
    model = am.CCMC.from_transition_matrix(P)

    def laws(bias):
        counts = PositionContext(bias, exponent=1.5).weighted_counts(prompts)
        return model.next_token_probs(counts, prompts.last)

    np.testing.assert_allclose(laws(bias), laws(bias + shift), atol=1e-6)
    assert np.abs(laws(bias) - laws(bias + shift[:, None])).max() > 0.01  # a row is no gauge


def test_decay_is_a_recursion():
    # n <- gamma n + e_x, the way that an engine keeps it.
    gamma, n = 0.83, np.zeros(3)
    tokens = np.random.default_rng(8).integers(3, size=60)
    for token in tokens:
        n = gamma * n + np.eye(3)[token]
    prompts = am.Prompts.from_tokens(tokens, 3)
    np.testing.assert_allclose(DecayContext(gamma).weighted_counts(prompts)[0], n, rtol=1e-5)


@given(st.floats(0.05, 1), st.integers(1, 30), st.integers(0, 2**31))
def test_lag_weights_generalise_decay_and_window(gamma, size, seed):
    lags = np.arange(40)
    _, prompts = random_prompts(seed, lengths=(1, 7, 40))
    for special, weights in (
        (DecayContext(gamma), gamma**lags),
        (WindowContext(size), lags < size),
        (WindowContext(size), np.ones(size)),  # zero beyond the end
        (FullContext(), np.ones(40)),
    ):
        np.testing.assert_allclose(
            special.weighted_counts(prompts),
            LagContext(weights).weighted_counts(prompts),
            rtol=2e-5,
            atol=1e-30,
        )


def test_a_token_far_behind_keeps_its_logarithm():
    tokens = jnp.array([1, 1] + 1998 * [0])
    logs = DecayContext(0.5, exponent=2.0).token_log_weights(tokens, 2000, 0, 3)
    lags = np.array([1999.0, 1998.0])
    expected = 2 * np.logaddexp(*(-lags * np.log(2)))  # about -2769; exp of it is no float
    np.testing.assert_allclose(logs[:2], [2 * np.log(2), expected], rtol=1e-6)
    assert logs[2] == -np.inf
    assert DecayContext(0.5).weighted_counts(am.Prompts.from_tokens(tokens, 3))[0, 1] == 0


@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_log_weights_beyond_the_range_of_float32(level):
    context = PositionContext(np.full((4, 4), level))
    logs = context.token_log_weights(jnp.array([0, 0, 2, 9]), 3, 0, 3)
    np.testing.assert_allclose(logs, [level + np.log(2), -np.inf, level], rtol=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 0.0, -2.0])
@pytest.mark.parametrize("num", [1, 3])
def test_absent_tokens_never_come_and_padding_is_not_seen(exponent, num):
    # The padding holds token 1 and ids out of range.
    tokens = jnp.array([0, 2, 0, 1, 1, 99, -5])
    for context in (
        FullContext(exponent=exponent),
        DecayContext(0.5, exponent=exponent),
        WindowContext(3, exponent=exponent),
        LagContext(np.ones(9), exponent=exponent),
        PositionContext(np.zeros((7, 7)), exponent=exponent),
    ):
        logs = np.asarray(context.token_log_weights(tokens, num, 0, 3))
        assert logs[1] == -np.inf
        assert np.isfinite(logs[[0, 2]]).tolist() == [True, num == 3]
        positions = np.asarray(context.position_log_weights(tokens, num, 0))
        assert np.isfinite(positions).tolist() == [i < num for i in range(7)]


def test_nothing_is_seen_past_the_positions():
    context = PositionContext(np.zeros((3, 3)), np.zeros((3, 2)), np.zeros((2, 3)))
    assert context.max_length == 3
    assert DecayContext(0.5).max_length is None
    logs = context.position_log_weights(
        jnp.zeros((2, 5), int), jnp.array([3, 4]), jnp.array([1, 1])
    )
    assert np.isfinite(logs).tolist() == [[True] * 3 + [False] * 2, [False] * 5]


@pytest.mark.parametrize(("context", "weighing"), CONTEXTS)
def test_leading_axes(context, weighing):
    rng = np.random.default_rng(9)
    tokens = jnp.asarray(rng.integers(3, size=(2, 4, 8)))
    length, query = (
        jnp.array([[1, 8, 5, 4], [2, 3, 7, 8]]),
        jnp.asarray(rng.integers(3, size=(2, 4))),
    )
    together = context.token_log_weights(tokens, length, query, 3)
    assert together.shape == (2, 4, 3)
    for i, j in np.ndindex(2, 4):
        one = context.token_log_weights(tokens[i, j], length[i, j], query[i, j], 3)
        np.testing.assert_allclose(together[i, j], one, rtol=1e-6)


@pytest.mark.parametrize(("context", "weighing"), CONTEXTS)
def test_contexts_are_pytrees_of_valid_values(context, weighing):
    context.check()
    leaves, structure = jax.tree.flatten(context)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert repr(rebuilt) == repr(context)
    _, prompts = random_prompts(1)
    outside = context.weighted_counts(prompts)
    inside = jax.jit(lambda c, p: c.weighted_counts(p))(context, prompts)
    np.testing.assert_allclose(inside, outside, rtol=1e-6)


def test_parameters_are_traced():
    _, prompts = random_prompts(1)
    cached: Any = contexts._log_weighted_counts
    cached.clear_cache()
    for gamma in (0.2, 0.5, 0.9):
        DecayContext(gamma, exponent=2 * gamma).weighted_counts(prompts)
    assert cached._cache_size() == 1
    gammas = jnp.array([0.2, 0.5, 0.9])
    maps = jax.vmap(lambda gamma: DecayContext(gamma).weighted_counts(prompts))(gammas)
    lags = jax.jit(jax.vmap(lambda w: LagContext(w).weighted_counts(prompts)))(
        gammas[:, None] ** jnp.arange(8)
    )
    for i, gamma in enumerate(gammas):
        np.testing.assert_allclose(maps[i], DecayContext(gamma).weighted_counts(prompts), rtol=1e-6)
        np.testing.assert_allclose(maps[i], lags[i], rtol=1e-5)
    chex.assert_tree_all_finite(
        jax.grad(lambda c: c.weighted_counts(prompts).sum())(DecayContext(0.5, exponent=1.5))
    )


def test_double_precision_where_it_is_on():
    with jax.enable_x64(True):
        _, prompts = random_prompts(1)
        got = DecayContext(0.7).weighted_counts(prompts)
        assert got.dtype == np.float64


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (FullContext(), "FullContext()"),
        (DecayContext(0.9, exponent=2.0), "DecayContext(gamma=0.9, exponent=2.0)"),
        (DecayContext(jnp.float32(0.9)), "DecayContext(gamma=0.9)"),
        (WindowContext(16), "WindowContext(size=16)"),
        (LagContext([1.0, 0.5]), "LagContext(weights=float64[2])"),
        (
            PositionContext(np.zeros((5, 5)), token_bias=jnp.zeros((3, 5))),
            "PositionContext(bias=float64[5,5], token_bias=float32[3,5])",
        ),
    ],
)
def test_contexts_print_on_one_line(context, text):
    assert repr(context) == text
    assert repr(jax.tree.map(lambda leaf: None, context)).startswith(type(context).__name__)


def test_a_traced_context_prints():
    seen = []
    jax.jit(lambda c: seen.append(repr(c)))(DecayContext(0.5))
    assert seen == ["DecayContext(gamma=float32[], exponent=float32[])"]


NAN, INF = float("nan"), float("inf")
Full: Any = FullContext  # to give them what their types forbid
Decay: Any = DecayContext
Window: Any = WindowContext


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (FullContext(exponent=INF), "exponent: must lie between -1e6 and 1e6, got inf"),
        (Full(exponent="2"), "exponent: expected a number, got '2'"),
        (Full(exponent=[1.0, 2.0]), "exponent: expected a number, got array"),
        (DecayContext(1.5), r"gamma: must lie in \(0, 1\], got 1.5"),
        (DecayContext(0), r"gamma: must lie in \(0, 1\], got 0"),
        (DecayContext(NAN), r"gamma: must lie in \(0, 1\], got nan"),
        (Decay(None), "gamma: expected a number, got None"),
        (DecayContext(0.5, exponent=NAN), "exponent: must lie between -1e6 and 1e6, got nan"),
        (WindowContext(0), "size: must be at least 1, got 0"),
        (Window(2.5), "size: expected an integer, got 2.5"),
        (LagContext([]), r"weights: expected a non-empty \(M,\) vector, got shape \(0,\)"),
        (LagContext(0.5), r"weights: expected a non-empty \(M,\) vector, got shape \(\)"),
        (LagContext([[1.0]]), r"weights: expected a non-empty .*, got shape \(1, 1\)"),
        (LagContext([1.0, -2.0]), "weights: lag 1 has weight -2"),
        (LagContext([1.0, INF]), r"weights: entry \[1\] is inf"),
        (LagContext([0.0, 0.0]), "weights: every lag has weight 0"),
        (PositionContext(np.zeros((2, 3))), r"bias: expected a square .* shape \(2, 3\)"),
        (PositionContext([[0.0, NAN], [0, 0]]), r"bias: entry \[0, 1\] is nan"),
        (PositionContext([[0.0, INF], [0, 0]]), r"bias: entry \[0, 1\] is inf"),
        (
            PositionContext([[0.0, -INF], [0, -INF]]),
            "bias: masks every position of a history of 2 tokens",
        ),
        (
            PositionContext([[-INF, 0.0], [0, 0]]),
            "bias: masks every position of a history of 1 tokens",
        ),
        (
            PositionContext(np.zeros((2, 2)), np.zeros((3, 2))),
            r"query_bias: expected shape \(N, K\) with N = 2, got \(3, 2\)",
        ),
        (
            PositionContext(np.zeros((2, 2)), token_bias=np.zeros((2, 3))),
            r"token_bias: expected shape \(K, N\) with N = 2, got \(2, 3\)",
        ),
        (
            PositionContext(np.zeros((2, 2)), np.full((2, 1), -INF)),
            r"query_bias: entry \[0, 0\] is -inf",
        ),
        (
            PositionContext(np.zeros((2, 2)), np.zeros((2, 4)), np.zeros((3, 2))),
            "token_bias: is for 3 tokens, but query_bias is for 4",
        ),
    ],
)
def test_bad_parameters(context, message):
    with pytest.raises(ValueError, match=message):
        context.check()
    with pytest.raises(ValueError, match=message):
        context.weighted_counts(am.Prompts.from_tokens([[0, 1]], 3))


@pytest.mark.parametrize("weights", [[[1.0], [1.0, 2.0]], ["a"]])
def test_what_is_no_array(weights):
    with pytest.raises(ValueError, match="weights: expected"):
        LagContext(weights).check()


def test_traced_values_are_not_checked():
    _, prompts = random_prompts(0)
    jax.jit(lambda g: DecayContext(g).weighted_counts(prompts))(1.5)
    jax.jit(lambda w: LagContext(w).weighted_counts(prompts))(-jnp.ones(3))
    jax.jit(lambda b: PositionContext(b).weighted_counts(prompts))(jnp.full((8, 8), NAN))
    with pytest.raises(ValueError, match="weights: expected a non-empty"):  # shapes are known
        jax.jit(lambda w: LagContext(w).weighted_counts(prompts))(jnp.ones((3, 3)))


@pytest.mark.parametrize(
    ("context", "prompts", "message"),
    [
        (
            DecayContext(0.5),
            am.Prompts.from_counts([[1, 1]], [0]),
            "context: DecayContext weighs positions, so it needs token ids, but only the counts",
        ),
        (
            PositionContext(np.zeros((2, 2))),
            am.Prompts.from_tokens([[0, 1], [0, 1, 1]], 2),
            "context: holds 2 positions, but the last draw is made from 3 tokens",
        ),
        (
            PositionContext(np.zeros((2, 2)), np.zeros((2, 3))),
            am.Prompts.from_tokens([[0, 1]], 2),
            "query_bias: is for 3 tokens, but the prompts are over 2",
        ),
        (
            PositionContext(np.zeros((2, 2)), token_bias=np.zeros((3, 2))),
            am.Prompts.from_tokens([[0, 1]], 2),
            "token_bias: is for 3 tokens, but the prompts are over 2",
        ),
    ],
)
def test_bad_prompts(context, prompts, message):
    with pytest.raises(ValueError, match=message):
        context.weighted_counts(prompts)


ATTENTION = am.SelfAttention.from_weights(np.eye(2, 3), np.eye(3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PositionContext.from_embeddings(np.ones((4, 3)), np.eye(2)),
            r"weight: expected shape \(3, 3\), got \(2, 2\)",
        ),
        (
            lambda: PositionContext.from_embeddings(np.ones(4), np.eye(2)),
            r"positions: expected a matrix, got shape \(4,\)",
        ),
        (
            lambda: PositionContext.from_embeddings([[NAN]], [[1.0]]),
            r"positions: entry \[0, 0\] is nan",
        ),
        (
            lambda: PositionContext.from_attention(ATTENTION, np.ones((4, 2))),
            "positions: have width 2, but the attention has 3",
        ),
    ],
)
def test_bad_position_vectors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
