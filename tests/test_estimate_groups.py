"""Large batches of fits that go group by group, and what is computed only where it is needed."""

from __future__ import annotations

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.estimate import _blocks, _groups, _joined
from attnmarkov.estimate._lazy import unless


@pytest.mark.parametrize(
    ("number", "together", "size"),
    [(200, 16, 10), (200, 25, 25), (7, 3, 3), (8, 3, 2), (9, 100, 9), (13, 12, 7), (5, 1, 1)],
)
def test_group_sizes(number, together, size):
    found = _groups._group_size(number, together)
    assert found == size
    assert found <= max(together, 1)


@pytest.mark.parametrize("number", [2, 5, 6])
def test_groups_are_the_same_as_all_together(monkeypatch, number):
    """A function of batched and shared trees, of keys and of None, in groups of at most two."""
    monkeypatch.setattr(_groups, "_ELEMENTS", 20)

    def function(x, shared, key, nothing):
        assert nothing is None
        noise = jax.random.normal(key, ())
        return {"sum": x["a"].sum() + shared + noise, "kept": x["b"], "shared": 2 * shared}

    run = _groups.by_groups(function, 10)
    x = {"a": jnp.arange(number * 3.0).reshape(number, 3), "b": jnp.arange(number)}
    keys = jax.random.split(oracle.key_of("groups"), number)
    axes = ({"a": 0, "b": 0}, None, 0, None)
    together = jax.vmap(function, in_axes=axes)(x, 1.5, keys, None)
    grouped = jax.jit(jax.vmap(run, in_axes=axes))(x, 1.5, keys, None)
    for name in together:
        np.testing.assert_array_equal(grouped[name], together[name])
    alone = run(jax.tree.map(lambda leaf: leaf[0], x), 1.5, keys[0], None)
    np.testing.assert_array_equal(alone["sum"], together["sum"][0])


def test_fits_in_groups_equal_a_loop(monkeypatch):
    """Groups of two, in which one dataset is separated and another is not."""
    monkeypatch.setattr(_groups, "_ELEMENTS", 2 * 90 * 3)
    rng = oracle.generator("groups")
    batch = [oracle.random_data(rng, 3, 90, most=m) for m in (3, 1, 2, 3, 3)]
    counts, last, y = (np.stack(x) for x in zip(*batch, strict=True))
    y[0] = last[0]  # every token wins where it stands last, and nowhere else
    prompts = am.Prompts(jnp.asarray(counts, jnp.int32), jnp.asarray(last, jnp.int32))
    together = jax.jit(jax.vmap(am.fit))(prompts, jnp.asarray(y))
    assert together.status.name[0] == "separated"
    assert len(set(together.status.name)) > 1
    for i in range(5):
        alone = am.fit(am.Prompts.from_counts(counts[i], last[i]), y[i])
        assert together.status.name[i] == alone.status.name
        np.testing.assert_array_equal(together.components[i], alone.components)
        if alone.status.name != "separated":
            np.testing.assert_allclose(together.model.logits[i], alone.model.logits, atol=1e-5)
        np.testing.assert_allclose(together.nll[i], alone.nll, rtol=1e-5)
        np.testing.assert_allclose(together.standard_errors[i], alone.standard_errors, rtol=1e-4)


def test_unless_runs_only_where_needed():
    def otherwise(x):
        return 10 * x

    run = jax.jit(lambda needed, x: unless(needed, x, otherwise, x))
    assert run(jnp.array(False), jnp.array(3.0)) == 3
    assert run(jnp.array(True), jnp.array(3.0)) == 30
    mapped = jax.vmap(run)(jnp.array([True, False]), jnp.array([1.0, 2.0]))
    assert mapped.tolist() == [10, 2]


@pytest.mark.parametrize("n", [20, 300, 2000])
def test_a_glance_says_what_the_sweeps_say(n):
    """Whatever the last tokens are: some prompts here don't hold theirs."""
    rng = oracle.generator(f"glance {n}")
    seen = 0

    @jax.jit
    def both(counts, last, y):
        blocks = _blocks.blocks_of(counts, last, y)
        assert blocks.counts is not None
        assert blocks.wins is not None
        strong = _joined._at_a_glance(blocks, blocks.counts, blocks.wins)[1]
        return _joined.components_and_finite(blocks), _joined._by_sweeps(blocks), strong

    for case in range(8):
        counts, last, y = oracle.random_data(rng, 4, n, most=4)
        if case % 2:  # else some last tokens do not stand in their prompts
            counts[np.arange(n), last] += 1
        found, expected, strong = both(counts, last, y)
        seen += int(strong.sum())
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert seen > 0 or n < 100


@pytest.mark.parametrize(
    ("counts", "y"),
    [
        # The row's own token is not in the prompts that the others win.
        ([[1, 1, 0, 0]] * 2 + [[0, 1, 1, 0]] * 2, [0, 0, 1, 2]),
        # Labels that are no tokens or do not stand in their prompts, as under jit they may.
        ([[1, 1, 1, 0]] * 3 + [[1, 0, 0, 1]] * 2, [0, 1, 2, 3, -1]),
        ([[1, 1, 1, 0]] * 3 + [[1, 0, 0, 1]] * 2, [0, 1, 2, 3, 4]),
        ([[1, 1, 1, 0]] * 3 + [[1, 0, 0, 1]] * 2, [3, 1, 2, 1, 0]),
    ],
)
def test_what_looks_joined_at_a_glance_but_is_not(counts, y):
    counts, y = np.array(counts), np.array(y)
    blocks = _blocks.blocks_of(jnp.asarray(counts), jnp.zeros(len(y), int), jnp.asarray(y))
    found, expected = _joined.components_and_finite(blocks), _joined._by_sweeps(blocks)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
