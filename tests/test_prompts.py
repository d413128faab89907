import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from oracles import assert_law, assert_mean, assert_poisson, markov_law

import attnmarkov as am


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=6),
    st.integers(-9, 99),
)
def test_from_tokens_counts_what_is_valid(rows, padding):
    expected = [[row.count(j) for j in range(5)] for row in rows]
    ragged = am.Prompts.from_tokens(rows, 5)
    padded = [row + [padding] * (8 - len(row)) for row in rows]
    given_lengths = am.Prompts.from_tokens(padded, 5, lengths=[len(row) for row in rows])
    for prompts in (ragged, given_lengths):
        np.testing.assert_array_equal(prompts.counts, expected)
        np.testing.assert_array_equal(prompts.last, [row[-1] for row in rows])
        assert prompts.counts.dtype == prompts.last.dtype == jnp.int32
        assert len(prompts) == prompts.num_prompts == len(rows)


def test_one_prompt_query_counts_and_slices():
    one = am.Prompts.from_tokens([3, 1, 1], 4)
    assert one.counts.tolist() == [[0, 2, 0, 1]]
    crossed = am.Prompts.from_tokens([[3, 1, 1]], 4, query=[0])
    assert crossed.last.tolist() == [0]
    assert crossed.counts.tolist() == one.counts.tolist()
    counted = am.Prompts.from_counts([[0, 2, 0, 1], [1, 0, 0, 0]], [1, 3])
    assert counted[1].counts.tolist() == [[1, 0, 0, 0]]
    assert counted[-1].last.tolist() == [3]
    assert counted[np.array([True, False])].last.tolist() == [1]
    assert repr(counted) == "Prompts(num_prompts=2, num_tokens=4, lengths 1 to 3)"


def test_prompts_can_be_iterated():
    prompts = am.Prompts.from_tokens([[0, 1], [1, 1], [1, 0]], 2)
    assert [p.last.tolist() for p in prompts] == [[1], [1], [0]]
    with pytest.raises(IndexError, match="prompt 3 of 3"):
        _ = prompts[3]


def test_from_tokens_inside_jit():
    tokens = jnp.array([[0, 2, 1], [1, 1, 1]])
    outside = am.Prompts.from_tokens(tokens, 3)
    inside = jax.jit(lambda t: am.Prompts.from_tokens(t, 3))(tokens)
    np.testing.assert_array_equal(inside.counts, outside.counts)
    np.testing.assert_array_equal(inside.last, outside.last)


N = 30_000


def test_uniform_and_iid(key):
    law = {(i, j): 1 / 9 for i in range(3) for j in range(3)}
    assert_law(am.prompts.uniform(key, N, 2, 3).tokens, law)
    p = [0.6, 0.0, 0.3, 0.1]
    law = {(i, j): p[i] * p[j] for i in (0, 2, 3) for j in (0, 2, 3)}
    prompts = am.prompts.iid(key, N, 2, p)
    assert_law(prompts.tokens, law)
    np.testing.assert_array_equal(prompts.counts.sum(1), 2)


def test_iid_hits_rare_tokens_at_their_rate(key):
    prompts = am.prompts.iid(key, 200_000, 100, [1 - 2e-6, 1e-6, 1e-6])
    assert_poisson(int(prompts.counts[:, 1].sum()), 20.0)
    assert_poisson(int(prompts.counts[:, 2].sum()), 20.0)


def test_zipf_prompts(key):
    law = np.asarray(am.zipf_law(300), float)
    counts = np.asarray(am.prompts.iid(key, 2000, 20, am.zipf_law(300)).counts)
    assert_mean(counts[:, 0], 20 * law[0])
    assert_mean(counts[:, 100:].sum(1), 20 * law[100:].sum())


def test_markov_prompts(key):
    p = [[0.8, 0.2], [0.5, 0.5]]
    chain = am.MarkovChain.from_transition_matrix(p)
    prompts = am.prompts.markov(key, N, 3, chain)
    assert_law(prompts.tokens, markov_law(p, [5 / 7, 2 / 7], 3))


def test_supports(key):
    prompts = am.prompts.from_supports(key, N, 2, [[0, 1], [1, 2], [3]], 4, probs=[0.5, 0.3, 0.2])
    law = {}
    for weight, support in ((0.5, [0, 1]), (0.3, [1, 2]), (0.2, [3])):
        for a in support:
            for b in support:
                law[a, b] = law.get((a, b), 0) + weight / len(support) ** 2
    assert_law(prompts.tokens, law)


def test_without_replacement_and_every_token_once(key):
    prompts = am.prompts.without_replacement(key, N, 2, 3)
    assert_law(prompts.tokens, {(i, j): 1 / 6 for i in range(3) for j in range(3) if i != j})
    whole = am.prompts.every_token_once(key, 100, 7)
    assert (np.asarray(whole.counts) == 1).all()
    assert len(set(np.asarray(whole.last).tolist())) == 7


@pytest.mark.parametrize(
    "draw",
    [
        lambda key, n: am.prompts.uniform(key, n, 5, 4),
        lambda key, n: am.prompts.markov(
            key, n, 5, am.MarkovChain.from_transition_matrix([[0.5, 0.5], [0.1, 0.9]])
        ),
        lambda key, n: am.prompts.from_supports(key, n, 5, [[0, 1], [2]], 3),
        lambda key, n: am.prompts.every_token_once(key, n, 4),
    ],
)
def test_prompts_are_stable_in_the_batch(key, draw):
    np.testing.assert_array_equal(draw(key, 12).tokens[:5], draw(key, 5).tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: am.Prompts.from_tokens([], 3), "tokens: "),
        (lambda k: am.Prompts.from_tokens([[]], 3), "tokens: prompt 0 is empty"),
        (lambda k: am.Prompts.from_tokens([[1], []], 3), "tokens: prompt 1 is empty"),
        (lambda k: am.Prompts.from_tokens([[0, 3]], 3), r"entry \[0, 1\] is token id 3, outside"),
        (lambda k: am.Prompts.from_tokens([[0, -1]], 3), r"entry \[0, 1\] is token id -1"),
        (lambda k: am.Prompts.from_tokens([[0, 0.5]], 3), "tokens: expected integers, got float64"),
        (lambda k: am.Prompts.from_tokens([["a"]], 3), "tokens: expected integers, got dtype"),
        (
            lambda k: am.Prompts.from_tokens([[True]], 3),
            "tokens: expected integers, got dtype bool",
        ),
        (lambda k: am.Prompts.from_tokens([[[0]]], 3), "tokens: expected 1 or 2 dimension"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 0), "num_tokens: must be at least 1, got 0"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 2, lengths=[3]), "prompt 0 has length 3"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 2, lengths=[0]), "lengths: prompt 0 is empty"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 2, lengths=[-1]), "prompt 0 has length -1"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 2, lengths=[1, 1]), r"lengths: expected shape"),
        (lambda k: am.Prompts.from_tokens([[0, 1]], 2, query=[2]), "query: .* token id 2"),
        (lambda k: am.Prompts.from_counts([[0, 0]], [0]), "counts: prompt 0 is empty"),
        (lambda k: am.Prompts.from_counts([[1, -1]], [0]), "counts: row 0 has a count outside"),
        (lambda k: am.Prompts.from_counts([[1, 1]], [2]), "last: .* token id 2, outside 0..1"),
        (lambda k: am.Prompts.from_counts([[1, 1]], [0, 1]), r"last: expected shape \(1,\)"),
        (lambda k: am.prompts.uniform(k, 0, 3, 2), "num_prompts: must be at least 1, got 0"),
        (lambda k: am.prompts.uniform(k, 3, -1, 2), "length: must be at least 1, got -1"),
        (lambda k: am.prompts.iid(k, 3, 2, [0.5, 0.6]), "law: sums to 1.1, not 1"),
        (lambda k: am.prompts.iid(k, 3, 2, [1.5, -0.5]), r"law: entry \[1\] is negative"),
        (lambda k: am.prompts.from_supports(k, 3, 2, [], 4), "supports: expected at least one"),
        (lambda k: am.prompts.from_supports(k, 3, 2, [[0], []], 4), r"supports\[1\]: is empty"),
        (lambda k: am.prompts.from_supports(k, 3, 2, [[0, 9]], 4), r"supports\[0\]: .* id 9"),
        (lambda k: am.prompts.from_supports(k, 3, 2, [[0, 0]], 4), "a token is repeated"),
        (lambda k: am.prompts.without_replacement(k, 3, 5, 4), "length: 5 distinct tokens cannot"),
    ],
)
def test_bad_input(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
