"""Components and the existence of the maximum against networkx on random supports."""

from __future__ import annotations

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmarkov.estimate import graphs
from attnmarkov.estimate._blocks import blocks_of


@jax.jit
def decide(counts, last, y):
    blocks = blocks_of(counts, last, y)
    components = graphs.cooccurrence_components(blocks)
    return components, graphs.has_finite_maximum(blocks, components)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 2), (2, 6), (3, 12), (6, 40), (9, 90), (4, 200)]),
    most=st.integers(1, 4),
)
def test_random_supports(seed, shape, most):
    counts, last, y = oracle.random_data(np.random.default_rng(seed), *shape, most=most)
    components, finite = decide(counts, last, y)
    np.testing.assert_array_equal(components, oracle.components(counts, last))
    np.testing.assert_array_equal(finite, oracle.finite_maximum(counts, last, y))


def test_random_supports_hold_every_case():
    """The property above meets connected, split, finite and separated rows."""
    seen = set()
    for seed in range(40):
        shape = (3, 12) if seed % 2 else (4, 200)
        counts, last, y = oracle.random_data(np.random.default_rng(seed), *shape, most=2)
        split = (oracle.components(counts, last) != 0).any(1)
        separated = (oracle.finite_maximum(counts, last, y).astype(int) == 0).any(axis=1)
        seen |= set(zip(split.tolist(), separated.tolist(), strict=True))
    assert len(seen) == 4


@pytest.mark.parametrize("ring", [True, False])
def test_long_chain_of_wins(ring):
    """Token a + 1 beats token a and nothing else; a ring closes when the first beats the last."""
    size = 40
    order = oracle.generator("chain").permutation(size)
    pairs = [(order[i], order[(i + 1) % size]) for i in range(size if ring else size - 1)]
    counts = np.zeros((len(pairs), size), np.int64)
    for row, pair in zip(counts, pairs, strict=True):
        row[list(pair)] = 1
    last = np.zeros(len(pairs), np.int64)
    components, finite = decide(counts, last, np.array([b for _, b in pairs]))
    assert (np.asarray(components[0]) == 0).all()
    assert np.asarray(finite[0]).all() == ring
    np.testing.assert_array_equal(components[1:], np.tile(np.arange(size), (size - 1, 1)))
    assert np.asarray(finite[1:]).all()


def test_projector_averages_over_components():
    components = jnp.array([[0, 1, 0], [0, 0, 0]])
    projector = graphs.component_projector(components)
    expected = [[[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]], np.full((3, 3), 1 / 3)]
    np.testing.assert_allclose(projector, expected, rtol=1e-6)
