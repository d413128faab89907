"""Exact categorical draws, and the rule that says which random words a replicate uses.

``jax.random.categorical`` compares float32 Gumbel variables and never returns a token of
probability 1e-8; ``u < p`` with a float32 ``u`` returns it too often, since ``u = 0`` has mass
2**-23. Here thresholds are integers.

* :func:`draw`, for weights that change at every step: each weight becomes an integer number of
  units of 2**-31, rounded up or down at random so that its *expectation* is exact. A token of
  probability 1e-9 (2.1 units) gets 2 or 3 units, 2.147 on average. The largest weight takes
  what the others leave.
* :func:`fixed_table` and :func:`lookup`, for laws used many times: 64-bit thresholds kept as
  pairs of 32-bit words, found by bisection in O(log K).

Both consume two uint32 words per draw. The words of step ``t`` of replicate ``r`` depend on
``(key, r, t)`` and the consumer's name alone, so a batch may be split and a run may be cut
anywhere. (The first ``m`` words of a shorter array of bits are those of a longer one because
JAX's threefry is partitionable, its default.)
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int, Key, UInt32

BLOCK = 128  # steps whose random words are made at once; part of the definition of the stream
_UNITS = 2.0**31
_FEW = 256  # weights that may share one rounding


def replicate_keys(
    key: Key[Array, ""], ids: Int[Array, " replicate"], stream: str
) -> Key[Array, " replicate"]:
    """One key per replicate id, whatever batch the id stands in.

    ``stream`` names the consumer, so that a user who gives one key to two functions (prompts,
    then their labels) does not get the same random words in both.
    """
    own = jax.random.fold_in(key, zlib.crc32(stream.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(own, i))(ids)


def words(key: Key[Array, ""], num: int, block: ArrayLike = 0) -> UInt32[Array, "num 2"]:
    """The first ``num`` of the ``BLOCK`` pairs of random words of a block of steps."""
    return jax.random.bits(jax.random.fold_in(key, block), (num, 2), jnp.uint32)


def lane_words(
    keys: Key[Array, " lane"], num: int, block: ArrayLike = 0
) -> UInt32[Array, "num 2 lane"]:
    """:func:`words` of every lane, lanes last."""
    return jax.vmap(lambda key: words(key, num, block), out_axes=-1)(keys)


def scan_steps(
    step: Callable[[Any, UInt32[Array, "2 lane"]], tuple[Any, Any]],
    state: Any,
    keys: Key[Array, " lane"],
    num_steps: int,
) -> tuple[Any, Any]:
    """``lax.scan`` of ``step(state, words)`` over steps, words made a block at a time."""

    def block(state: Any, index: ArrayLike, num: int) -> tuple[Any, Any]:
        return jax.lax.scan(step, state, lane_words(keys, num, index))

    full, rest = divmod(num_steps, BLOCK)
    if num_steps == 0:
        out = jax.eval_shape(step, state, lane_words(keys, 1)[0])[1]
        return state, jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), out)
    outputs = []
    if full:
        state, out = jax.lax.scan(lambda s, i: block(s, i, BLOCK), state, jnp.arange(full))
        outputs.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out))
    if rest:
        state, out = block(state, full, rest)
        outputs.append(out)
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def advance(
    step: Callable[[Any, UInt32[Array, "2 lane"]], Any],
    state: Any,
    keys: Key[Array, " lane"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
) -> Any:
    """Run ``state = step(state, words)`` for steps ``start`` to ``stop - 1`` (both traced)."""

    def block(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        t, state = carry
        index = t // BLOCK
        bits = lane_words(keys, BLOCK, index)
        first, last = t - index * BLOCK, jnp.minimum(stop - index * BLOCK, BLOCK)
        state = jax.lax.fori_loop(first, last, lambda i, s: step(s, bits[i]), state)
        return index * BLOCK + last, state

    return jax.lax.while_loop(lambda carry: carry[0] < stop, block, (start, state))[1]


def draw(
    weights: Float[Array, ...], bits: UInt32[Array, "2 ..."], *, axis: int = -1
) -> Int[Array, ...]:
    """Draw a token with probability proportional to ``weights`` along ``axis``.

    A token of weight zero is never drawn. A lane whose weights are all zero, or hold a NaN or
    an infinity, returns -1.
    """
    weights = jnp.moveaxis(weights, axis, 0)
    size = weights.shape[0]
    top = weights.max(0)
    weights = weights / jnp.where(top > 0, top, 1)  # else 2**31 / total may overflow
    total = weights.sum(0)
    u = bits[0] >> 1
    v = (bits[1] >> 8).astype(weights.dtype) * 2.0**-24
    if size > _FEW:  # many equal weights would all be rounded up, or all down, together
        spread = np.arange(size) * 0.6180339887498949 % 1
        v = v + jnp.asarray(spread, weights.dtype).reshape(-1, *([1] * total.ndim))
        v = v - jnp.floor(v)
    units = (weights * (_UNITS / total) + v).astype(jnp.int32).astype(jnp.uint32)
    tokens = jnp.arange(size, dtype=jnp.int32).reshape(-1, *([1] * total.ndim))
    largest = jnp.argmax(weights, axis=0).astype(jnp.int32)
    # The largest weight is left out of the running sum and takes the rest of the interval, so
    # each addend is at most 2**30, and the sum at most 2**31 plus one unit of rounding a token.
    units = jnp.where((tokens == largest) | (weights <= 0), 0, units)
    below = (jnp.cumsum(units, axis=0) <= u).sum(0, dtype=jnp.int32)
    ok = (total > 0) & jnp.isfinite(total)
    return jnp.where(ok, jnp.where(below == size, largest, below), -1)


class FixedTable(NamedTuple):
    """64-bit cumulative thresholds of one or more laws; the most likely token stands last."""

    high: UInt32[Array, "*law token"]
    low: UInt32[Array, "*law token"]
    order: Int[Array, "*law token"]


def _add_pairs(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]):
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]).astype(jnp.uint32), low


def fixed_table(probs: Float[Array, "*law token"]) -> FixedTable:
    """Thresholds for :func:`lookup`; each probability keeps its own float precision."""
    size = probs.shape[-1]
    largest = jnp.argmax(probs, axis=-1, keepdims=True)
    slots = jnp.arange(size)
    order = jnp.where(slots == largest, size - 1, slots)
    order = jnp.where(slots == size - 1, largest, order)
    p = jnp.take_along_axis(probs / probs.sum(-1, keepdims=True), order, axis=-1)
    scaled = jnp.where(slots < size - 1, p, 0) * 2.0**32  # the last one takes the rest
    whole = jnp.floor(scaled)
    part = (scaled - whole) * 2.0**32
    high, low = jax.lax.associative_scan(
        _add_pairs, (whole.astype(jnp.uint32), part.astype(jnp.uint32)), axis=-1
    )
    return FixedTable(high, low, order.astype(jnp.int32))


def lookup(
    table: FixedTable, bits: UInt32[Array, "2 ..."], row: Int[Array, ...] | None = None
) -> Int[Array, ...]:
    """Draw from ``table`` (from its law number ``row`` if it holds several) by bisection."""
    size = table.order.shape[-1]

    def at(x: jax.Array, slot: jax.Array) -> jax.Array:
        return x[slot] if row is None else x[row, slot]

    lower = jnp.zeros(bits.shape[1:], jnp.int32)
    upper = jnp.full(bits.shape[1:], size - 1, jnp.int32)
    for _ in range((size - 1).bit_length()):
        middle = (lower + upper) // 2
        high, low = at(table.high, middle), at(table.low, middle)
        passed = (high < bits[0]) | ((high == bits[0]) & (low <= bits[1]))
        lower = jnp.where(passed & (lower < upper), middle + 1, lower)
        upper = jnp.where(passed, upper, middle)
    return at(table.order, jnp.minimum(lower, size - 1))
