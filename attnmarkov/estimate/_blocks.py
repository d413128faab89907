"""Prompts sorted by last token and cut into blocks: every block belongs to one row of ``S``.

The likelihood splits into one problem per last token. Scattering each prompt's (K, K) piece of
curvature into its row would hold or touch (n, K, K) numbers; here each row's prompts stand
together, a block's curvature is one matrix product, and only blocks are summed by row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

_SMALLEST, _LARGEST = 8, 256  # prompts in a block
_ELEMENTS = 2**20  # curvature entries of the blocks that are multiplied at once


class Blocks(NamedTuple):
    """``n`` prompts over K tokens in G blocks of C slots; slots without a prompt weigh nothing."""

    log_counts: Float[Array, "block slot token"]  # minus infinity where the token is absent
    labels: Int[Array, "block slot"]
    weight: Float[Array, "block slot"]  # of a prompt, 1 unless given; 0 for an empty slot
    row: Int[Array, " block"]  # the last token of the block's prompts
    counts: Float[Array, "block slot token"] | None = None  # where they are whole numbers

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.log_counts.shape[-1]

    @property
    def support(self) -> Bool[Array, "block slot token"]:
        """The tokens that stand in each prompt; none in an empty slot."""
        return jnp.isfinite(self.log_counts) & (self.weight > 0)[..., None]

    @property
    def emitted(self) -> Bool[Array, "block slot token"]:
        """One-hot labels; none in an empty slot."""
        return self.is_label & (self.weight > 0)[..., None]

    @property
    def is_label(self) -> Bool[Array, "block slot token"]:
        """One-hot labels, empty slots included."""
        return self.labels[..., None] == jnp.arange(self.num_tokens)

    def sum_by_row(self, x: jax.Array) -> jax.Array:
        """Sum of per-block arrays (G, ...) over the blocks of each row, (K, ...)."""
        return jax.ops.segment_sum(x, self.row, self.num_tokens, indices_are_sorted=True)

    def labels_per_row(self) -> Float[Array, " token"]:
        """How many prompts end in each token: the sum of their weights."""
        return self.sum_by_row(self.weight.sum(-1))


def blocks_of(
    counts: jax.Array,
    last: jax.Array,
    labels: jax.Array | None = None,
    weights: jax.Array | None = None,
    log_counts: jax.Array | None = None,
) -> Blocks:
    """Sort prompts by last token into blocks. O(nK) time and memory, shapes from (n, K) alone.

    Args:
        counts: (n, K) token counts.
        last: (n,) last tokens.
        labels: (n,) next tokens, or None where only the prompts matter.
        weights: (n,) how often each prompt counts; None for once. One of weight 0 may hold
            anything and changes nothing.
        log_counts: (n, K) logarithms of position-weighted counts, in place of ``log(counts)``.
    """
    n, num_tokens = counts.shape
    size = min(max(n // (8 * num_tokens), _SMALLEST), _LARGEST)
    number = (n + min(n, num_tokens) * (size - 1)) // size
    together = min(number, blocks_together(num_tokens))
    number = -(-number // together) * together

    per_row = jnp.zeros(num_tokens, jnp.int32).at[last].add(1)
    blocks_per_row = -(-per_row // size)
    ends = jnp.cumsum(blocks_per_row)
    sorted_last, order = _sorted(last, num_tokens)
    rank = jnp.arange(n) - (jnp.cumsum(per_row) - per_row)[sorted_last]
    slot = size * (ends - blocks_per_row)[sorted_last] + rank
    prompt = jnp.full(number * size, n, jnp.int32).at[slot].set(order.astype(jnp.int32))
    prompt = prompt.reshape(number, size)

    filled = prompt < n
    taken = jnp.minimum(prompt, n - 1)
    dtype = jnp.result_type(float)
    weight = filled.astype(dtype)
    if weights is not None:
        weight = weight * weights[taken].astype(dtype)
    held = (weight > 0)[..., None]
    if log_counts is None:
        slots = jnp.where(held, counts[taken].astype(dtype), 1)
        logs = jnp.log(slots)
    else:
        slots, logs = None, jnp.where(held, log_counts[taken].astype(dtype), 0)
    row = jnp.searchsorted(ends, jnp.arange(number), side="right").astype(jnp.int32)
    return Blocks(
        log_counts=logs,
        labels=jnp.zeros_like(taken) if labels is None else labels[taken].astype(jnp.int32),
        weight=weight,
        row=jnp.minimum(row, num_tokens - 1),
        counts=slots,
    )


def _sorted(last: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """``last`` in order, and the prompts in that order, those of equal ``last`` as they come."""
    n = last.shape[0]
    if n * num_tokens >= 2**31:
        order = jnp.argsort(last, stable=True)
        return last[order], order
    key = jnp.sort(last * n + jnp.arange(n, dtype=last.dtype))  # one array sorts fastest
    return key // n, key % n


def blocks_together(num_tokens: int) -> int:
    """How many blocks' (K, K) curvatures may be held at once."""
    return max(1, _ELEMENTS // num_tokens**2)
