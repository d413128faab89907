"""What the data hold: co-occurrence components, and whether a finite maximum exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

    from attnmarkov.estimate._blocks import Blocks


def cooccurrence_components(blocks: Blocks) -> Int[Array, "row token"]:
    """Connected components of every co-occurrence graph ``G_k``.

    Tokens ``a`` and ``b`` are joined in ``G_k`` if some prompt that ends in ``k`` holds both.
    ``S[k]`` is identifiable up to one constant per component ([CCMC], consistency).

    Each sweep gives every token the least label seen in a prompt with it, in O(nK); the number
    of sweeps is at most the diameter of a component plus one.

    Returns:
        (K, K) int32; entry ``[k, a]`` is the least token in the component of ``a`` in ``G_k``.
    """
    size = blocks.num_tokens
    support = blocks.support

    def sweep(labels: jax.Array) -> jax.Array:
        seen = jnp.where(support, labels[blocks.row][:, None, :], size).min(-1, keepdims=True)
        offered = jnp.where(support, seen, size).min(1)
        least = jax.ops.segment_min(offered, blocks.row, size, indices_are_sorted=True)
        labels = jnp.minimum(labels, least)
        return jnp.take_along_axis(labels, labels, axis=1)  # a label's own label is as good

    start = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (size, size))
    return _to_fixed_point(sweep, start)


def has_finite_maximum(
    blocks: Blocks, components: Int[Array, "row token"]
) -> Bool[Array, "row token"]:
    """Whether the likelihood has a finite maximum on the component that holds each token.

    It has one if and only if the win graph, ``a → b`` when ``b`` was emitted after a prompt that
    holds ``a``, is strongly connected on the component. Decided by reachability from and to the
    component's least token, in sweeps of O(nK).

    References:
        Ford, American Mathematical Monthly 64 (1957); Hunter, Annals of Statistics 32 (2004),
        assumption 1.

    Returns:
        (K, K) bool; a token alone in its component counts as True.
    """
    support, emitted = blocks.support, blocks.emitted

    def by_row(hit: jax.Array) -> jax.Array:
        return blocks.sum_by_row(hit.any(1).astype(jnp.int32)) > 0

    def sweep(reached: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        forward, backward = reached
        from_root = (support & forward[blocks.row][:, None, :]).any(-1, keepdims=True)
        to_root = (emitted & backward[blocks.row][:, None, :]).any(-1, keepdims=True)
        return forward | by_row(emitted & from_root), backward | by_row(support & to_root)

    root = components == jnp.arange(blocks.num_tokens)
    forward, backward = _to_fixed_point(sweep, (root, root))
    missed = (~(forward & backward)).astype(jnp.int32)
    rows = jnp.arange(blocks.num_tokens)[:, None]
    misses = jnp.zeros_like(components).at[rows, components].add(missed)
    return jnp.take_along_axis(misses, components, axis=1) == 0


def component_projector(components: Int[Array, "row token"]) -> jax.Array:
    """(K, K, K): the projector onto the component indicators of each row, its null space."""
    same = components[:, :, None] == components[:, None, :]
    return same / same.sum(-1, keepdims=True)


def contrast_basis(components: Int[Array, "row token"]) -> jax.Array:
    """(K, K, K): orthonormal contrasts within the components of each row.

    ``[k, a]`` is 0 if ``a`` is the least token of its component, and else Helmert's contrast of
    ``a`` with the lesser tokens of its component.
    """
    size = components.shape[-1]
    lesser = components[:, :, None] == components[:, None, :]
    lesser &= jnp.arange(size)[:, None] > jnp.arange(size)
    m = lesser.sum(-1, keepdims=True)
    return (m * jnp.eye(size) - lesser) / jnp.sqrt(jnp.maximum(m * (m + 1), 1))


def _to_fixed_point(sweep, start):
    """Apply ``sweep`` until nothing changes."""

    def changed(carry):
        return carry[1]

    def step(carry):
        new = sweep(carry[0])
        pairs = zip(jax.tree.leaves(carry[0]), jax.tree.leaves(new), strict=True)
        return new, jnp.stack([(a != b).any() for a, b in pairs]).any()

    return jax.lax.while_loop(changed, step, (start, jnp.array(True)))[0]
