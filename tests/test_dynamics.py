from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am

PAIR = am.CCMC.from_transition_matrix([[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]])


def test_exponents_and_possible_winners():
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.3, 0.6]])
    model = am.CCMC.from_transition_matrix(p)
    for w in range(3):
        np.testing.assert_allclose(
            am.dynamics.winner_exponents(model, w), p[w] / p[w, w], rtol=1e-5
        )
    assert am.dynamics.possible_winners(model).tolist() == [True, False, True]


def test_exponents_of_a_large_head_take_one_row():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(40_000, 8)), rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    head = am.CCMC.from_attention_head(*weights)
    e, q, k = weights
    row = e[7] @ q @ (e @ k).T / 2  # 1 / sqrt(r)
    found = am.dynamics.winner_exponents(head, 7)
    np.testing.assert_allclose(np.log(found), row - row[7], atol=1e-4 * abs(row).max())
    with pytest.raises(ValueError, match="GiB"):
        am.dynamics.winner_exponents(head, {1, 7})


def test_ties_and_zeros():
    model = am.CCMC.from_transition_matrix([[0.5, 0.5], [1.0, 0.0]])
    assert am.dynamics.possible_winners(model).tolist() == [False, False]
    assert am.dynamics.winner_exponents(model, 1)[0] == np.inf


def test_bad_winner():
    model = am.CCMC.from_transition_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"winner: 2 is outside 0..1"):
        am.dynamics.winner_exponents(model, 2)


@pytest.mark.parametrize(
    "winner",
    [
        {0, 1},
        (1, 0),
        np.array([0, 1]),
        frozenset({0, 1}),
        jnp.array([1, 0]),
        {0: 1.0, 1: 2.0}.keys(),
        iter([0, 1]),
    ],
)
def test_exponents_beside_a_set(winner):
    """Halves for tokens 0 and 1: λ_2 = Σ_k m_k P[k, 2] / Σ_i m_i P[k, i] = 0.2 / 0.4."""
    got = am.dynamics.winner_exponents(PAIR, winner)
    np.testing.assert_allclose(got, [1, 1, 0.5], rtol=1e-6)


def test_exponents_beside_a_set_of_one():
    winners: list[Any] = [{2}, [2], np.int32(2), np.array(2), jnp.array(2)]
    for winner in winners:
        np.testing.assert_allclose(am.dynamics.winner_exponents(PAIR, winner), [0.75, 0.75, 1])


@pytest.mark.parametrize(
    ("winner", "message"),
    [
        (set(), "winner: the set is empty"),
        ([0, 3], r"winner: entry \[1\] is token id 3, outside 0..2"),
        ([0, 0], "winner: token 0 is given twice"),
        ([0, 2], r"winner: the tokens \[0, 2\] have no equilibrium of their own"),
        ([0.5, 1], "winner: expected integers"),
        ([[0, 1]], r"winner: expected 1 dimension\(s\), got shape \(1, 2\)"),
        (1.5, "winner: expected an integer, got 1.5"),
    ],
)
def test_bad_winner_sets(winner, message):
    model = am.CCMC.from_transition_matrix([[0.5, 0.1, 0.4], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2]])
    with pytest.raises(ValueError, match=message):
        am.dynamics.winner_exponents(model, winner)


def test_winner_sets_of_an_urn():
    urn = am.CCMC.from_transition_matrix(np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"winner: the tokens \[0, 1\] have a continuum"):
        am.dynamics.winner_exponents(urn, {0, 1})
