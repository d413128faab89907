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
_PARTS = 32  # of a long sum
_TURN = 32  # prompts that are sorted one after the other, all turns side by side
_ELEMENTS = 2**20  # curvature entries of the blocks that are multiplied at once


class Blocks(NamedTuple):
    """``n`` prompts over K tokens in G blocks of C slots; slots without a prompt weigh nothing."""

    log_counts: Float[Array, "block slot token"]  # minus infinity where the token is absent
    labels: Int[Array, "block slot"]
    weight: Float[Array, "block slot"]  # of a prompt, 1 unless given; 0 for an empty slot
    row: Int[Array, " block"]  # the last token of the block's prompts
    counts: Float[Array, "block slot token"] | None = None  # where they are whole numbers
    wins: Float[Array, "block token"] | None = None  # summed weights of the prompts by label

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.log_counts.shape[-1]

    @property
    def support(self) -> Bool[Array, "block slot token"]:
        """The tokens that stand in each prompt; none in an empty slot."""
        held = jnp.isfinite(self.log_counts) if self.counts is None else self.counts > 0
        return held & (self.weight > 0)[..., None]

    @property
    def emitted(self) -> Bool[Array, "block slot token"]:
        """One-hot labels; none in an empty slot."""
        return self.is_label & (self.weight > 0)[..., None]

    @property
    def is_label(self) -> Bool[Array, "block slot token"]:
        """One-hot labels, empty slots included."""
        return self.labels[..., None] == jnp.arange(self.num_tokens)

    @property
    def known(self) -> Bool[Array, "block slot"]:
        """Whether a label is a token."""
        return (self.labels >= 0) & (self.labels < self.num_tokens)

    def sum_by_row(self, x: jax.Array) -> jax.Array:
        """Sum of per-block arrays (G, ...) over the blocks of each row, (K, ...).

        What is one number a block, such as its loss, is summed in two stages: one after the other,
        thousands of alike blocks would each round the same way.
        """
        if x.ndim > 1:
            return jax.ops.segment_sum(x, self.row, self.num_tokens, indices_are_sorted=True)
        part = jnp.arange(x.shape[0], dtype=self.row.dtype) % _PARTS
        cells = self.num_tokens * _PARTS
        parts = jax.ops.segment_sum(x, self.row * _PARTS + part, cells)
        return parts.reshape(-1, _PARTS).sum(-1)

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
    size = min(max(-(-n // (64 * num_tokens)) * 8, _SMALLEST), _LARGEST)
    number = (n + min(n, num_tokens) * (size - 1)) // size
    parts = parts_of(number, num_tokens)
    number = -(-number // parts) * parts

    slot, ends = _slots(last, num_tokens, size)
    prompt = jnp.full(number * size, n, jnp.int32)
    prompt = prompt.at[slot].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
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
    own = jnp.zeros_like(taken) if labels is None else labels[taken].astype(jnp.int32)
    row = jnp.searchsorted(ends, jnp.arange(number), side="right").astype(jnp.int32)
    return Blocks(
        log_counts=logs,
        labels=own,
        weight=weight,
        row=jnp.minimum(row, num_tokens - 1),
        counts=slots,
        wins=_wins(own, weight, num_tokens),
    )


def entries(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """``x[g, c, tokens[g, c]]`` or ``x[g, tokens[g, c]]``; what is no token is clipped."""
    return x.ravel()[_places(tokens, x.shape[-1], whole=x.ndim == 3)]


def _places(tokens: jax.Array, num_tokens: int, *, whole: bool) -> jax.Array:
    """Where the entries of tokens stand in a flat array: single indices go fastest."""
    first = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    if whole:
        first = first * tokens.shape[1] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return first * num_tokens + jnp.clip(tokens, 0, num_tokens - 1)


def _wins(labels: jax.Array, weight: jax.Array, num_tokens: int) -> Float[Array, "block token"]:
    """Summed weights of each block's prompts by label; labels that are no token are left out."""
    known = (labels >= 0) & (labels < num_tokens)
    place = _places(labels, num_tokens, whole=False).ravel()
    summed = jnp.zeros(labels.shape[0] * num_tokens, weight.dtype)
    return summed.at[place].add((weight * known).ravel()).reshape(-1, num_tokens)


def _slots(last: jax.Array, num_tokens: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where each prompt goes, (n,), and where the blocks of each row end, (K,).

    Sorts by counting: the prompts are dealt out in turns of ``_TURN``, which are counted through
    side by side, and each turn's places begin where those before it end. Prompts of equal
    ``last`` stay in order.
    """
    n = last.shape[0]
    turns = -(-n // _TURN)
    dealt = jnp.pad(last.astype(jnp.int32), (0, turns * _TURN - n), constant_values=num_tokens)
    dealt = dealt.reshape(turns, _TURN).T
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]

    def deal(before: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = own == tokens
        return before + mine, jnp.where(mine, before, 0).sum(0)

    each, rank = jax.lax.scan(deal, jnp.zeros((num_tokens, turns), jnp.int32), dealt)
    upto = jnp.cumsum(each, axis=1)
    ends = jnp.cumsum(-(-upto[:, -1] // size))
    first = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    begin = (size * first[:, None] + upto - each).ravel()
    slot = begin[jnp.minimum(dealt, num_tokens - 1) * turns + jnp.arange(turns)] + rank
    return slot.T.reshape(-1)[:n], ends


def parts_of(blocks: int, num_tokens: int) -> int:
    """In how many equal parts blocks are taken, so that one's (K, K) curvatures can be held."""
    together = max(1, _ELEMENTS // num_tokens**2)
    return -(-blocks // together)
