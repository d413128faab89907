"""Batches of datasets that go through the caches in groups."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable

_ELEMENTS = 2**20  # numbers that a group holds: few enough for the caches of a core


def by_groups(function: Callable[..., Any], elements: int) -> Callable[..., Any]:
    """``function`` of pytrees of arrays, whose vmap on a CPU takes a group at a time.

    A pass over all datasets of a large batch fetches each from memory, again and again; a group
    stays in the caches from its first pass to its last. It also ends by itself: loops turn as
    often as the slowest of the group needs, not of the batch. Elsewhere, as with any vmap, all
    go together.

    Args:
        function: Takes and returns pytrees of arrays.
        elements: How many numbers one dataset holds.
    """
    together = max(1, _ELEMENTS // max(elements, 1))
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def batched(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        tree = jax.tree.structure(args)
        axes = [0 if b else None for b in jax.tree.leaves(in_batched)]

        def flat(*leaves: jax.Array) -> Any:
            return function(*jax.tree.unflatten(tree, leaves))

        every = jax.vmap(flat, in_axes=axes, axis_size=axis_size)
        leaves = jax.tree.leaves(args)
        if axis_size <= together:
            out = every(*leaves)
        else:
            grouped = partial(_grouped, flat, axes, axis_size, together)
            out = jax.lax.platform_dependent(*leaves, cpu=grouped, default=every)
        return out, jax.tree.map(lambda _: True, out)

    return run


def _grouped(
    function: Callable[..., Any],
    axes: list[int | None],
    number: int,
    together: int,
    *args: jax.Array,
) -> Any:
    """All datasets, group by group; the last group is filled up with copies of the last one."""
    size = _group_size(number, together)
    groups = -(-number // size)
    order = jnp.minimum(jnp.arange(groups * size), number - 1)

    def cut(x: jax.Array) -> jax.Array:
        x = x if groups * size == number else x[order]
        return x.reshape(groups, size, *x.shape[1:])

    def one_group(own: list[jax.Array]) -> Any:
        rest = iter(own)
        every = [x if axis is None else next(rest) for x, axis in zip(args, axes, strict=True)]
        return jax.vmap(function, in_axes=axes, axis_size=size)(*every)

    batched = [cut(x) for x, axis in zip(args, axes, strict=True) if axis == 0]
    out = jax.lax.map(one_group, batched)
    return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:])[:number], out)


def _group_size(number: int, together: int) -> int:
    """At most ``together``: one that divides the batch if it is not much less, or even shares."""
    for size in range(together, together // 2, -1):
        if number % size == 0:
            return size
    return -(-number // -(-number // together))
