"""Co-occurrence components and whether a maximum exists, cheaply where every row is connected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov.estimate._blocks import entries
from attnmarkov.estimate._lazy import unless
from attnmarkov.estimate.graphs import cooccurrence_components, has_finite_maximum

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

    from attnmarkov.estimate._blocks import Blocks


def components_and_finite(
    blocks: Blocks,
) -> tuple[Int[Array, "row token"], Bool[Array, "row token"]]:
    """:func:`cooccurrence_components` and :func:`has_finite_maximum` of labelled prompts.

    A row whose win graph is strongly connected on all tokens that stand in its prompts is one
    component, with a finite maximum. Where prompts are many and long it can be seen at a glance;
    the sweeps that decide every case are run only where it can't.
    """
    if blocks.counts is None or blocks.wins is None:
        return _by_sweeps(blocks)
    seen, strong = _at_a_glance(blocks, blocks.counts, blocks.wins)
    own = jnp.arange(blocks.num_tokens, dtype=jnp.int32)
    least = jnp.argmax(seen, axis=-1).astype(jnp.int32)[:, None]
    found = jnp.where(seen, least, own), jnp.ones_like(seen)
    return unless(~strong.all(), found, _by_sweeps, blocks)


def _by_sweeps(blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    components = cooccurrence_components(blocks)
    return components, has_finite_maximum(blocks, components)


def _at_a_glance(
    blocks: Blocks, counts: jax.Array, wins: jax.Array
) -> tuple[Bool[Array, "row token"], Bool[Array, " row"]]:
    """The tokens each row has seen, and whether paths from and to one of them join them all.

    That one is the row's own token, which stands in all prompts that end with it: so whoever
    won, won over it. What leads to it are the tokens that stand in prompts that it won, or that
    one of those won, and so on; mostly the first are all.
    """
    used = blocks.weight > 0
    own = jnp.broadcast_to(blocks.row[:, None], blocks.labels.shape)

    def held(hit: jax.Array) -> jax.Array:
        """The tokens that stand in some prompt of those that are ``hit``."""
        return blocks.sum_by_row(jnp.einsum("gca,gc->ga", counts, hit.astype(counts.dtype))) > 0

    sound = blocks.sum_by_row((used & ~(entries(counts, own) > 0)).sum(-1)) == 0
    seen = held(used)
    sound &= ((blocks.sum_by_row(wins) > 0) | ~seen).all(-1)

    def strong(backward: jax.Array) -> jax.Array:
        return sound & (backward | ~seen).all(-1)

    def grows(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        backward, grew = carry
        return grew & sound.all() & ~strong(backward).all()

    def sweep(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        backward, _ = carry
        leads = entries(backward[blocks.row], blocks.labels) & blocks.known
        more = backward | held(used & leads)
        return more, (more != backward).any()

    first = held(used & (blocks.labels == own))
    backward, _ = jax.lax.while_loop(grows, sweep, (first, jnp.array(True)))
    return seen, strong(backward)
