"""Exact categorical draws, and the rule that says which random words a replicate uses.

``jax.random.categorical`` compares float32 Gumbel variables and never returns a token of
probability 1e-8; ``u < p`` with a float32 ``u`` returns it too often, since ``u = 0`` has mass
2**-23. Here thresholds are integers.

* :func:`draw`, for weights that change at every step: each weight becomes an integer number of
  units of about 2**-30, rounded up or down at random so that its *expectation* is exact. A token
  of probability 1e-9 (1.07 units) gets 1 or 2 units, 1.07 on average. One of the units is then
  chosen by a 40-bit fraction, so that no token has to take what the rounding leaves.
* :func:`fixed_table` and :func:`lookup`, for laws used many times: 64-bit thresholds kept as
  pairs of 32-bit words, found by bisection in O(log K).

Both consume two uint32 words per draw. The words of step ``t`` of replicate ``r`` are
``threefry2x32`` of the counter ``(t, stream)`` under the replicate's own key, which depends on
``(key, r)`` and the consumer's name alone: a batch may be split, and a run cut, anywhere. They
are computed where they are used, so that XLA fuses them into the step.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int, Key, UInt32

_UNITS = 2.0**30
_FEW = 256  # weights that may share one rounding
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

Words = tuple[jax.Array, jax.Array]


def replicate_keys(
    key: Key[Array, ""], ids: Int[Array, " replicate"], stream: str
) -> Key[Array, " replicate"]:
    """One key per replicate id, whatever batch the id stands in.

    ``stream`` names the consumer, so that a user who gives one key to two functions (prompts,
    then their labels) does not get the same random words in both.
    """
    own = jax.random.fold_in(key, zlib.crc32(stream.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(own, i))(ids)


@partial(jax.jit, static_argnames="stream")
def replicate_seeds(
    key: Key[Array, ""], ids: Int[Array, " replicate"], stream: str
) -> UInt32[Array, "2 replicate"]:
    """The two words that key each replicate's :func:`words`; arguments as above.

    Threefry of the id, so that different ids never share words, whatever kind of key is given.
    """
    own = jax.random.bits(jax.random.fold_in(key, zlib.crc32(stream.encode())), (2,), jnp.uint32)
    ids = ids.astype(jnp.uint32)
    return jnp.stack(threefry(own[0], own[1], ids, jnp.zeros_like(ids)))


def words(seeds: UInt32[Array, "2 lane"], step: ArrayLike, stream: int = 0) -> Words:
    """Two random words of every lane for a step; ``step`` broadcasts against the lanes."""
    shape = jnp.broadcast_shapes(jnp.shape(step), seeds.shape[1:])
    counter = jnp.broadcast_to(jnp.asarray(step).astype(jnp.uint32), shape)
    return threefry(seeds[0], seeds[1], counter, jnp.full(shape, stream, jnp.uint32))


def threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> Words:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), elementwise on uint32 arrays."""
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for by in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << np.uint32(by)) | (x1 >> np.uint32(32 - by)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def scan_steps(
    step: Callable[[Any, Words], tuple[Any, Any]],
    state: Any,
    seeds: UInt32[Array, "2 lane"],
    num_steps: int,
    start: ArrayLike = 0,
) -> tuple[Any, Any]:
    """``lax.scan`` of ``step(state, words)`` over the steps ``start .. start + num_steps - 1``."""
    steps = jnp.asarray(start, jnp.uint32) + jnp.arange(num_steps, dtype=jnp.uint32)
    return jax.lax.scan(lambda s, t: step(s, words(seeds, t)), state, steps)


def below(bits: Words | UInt32[Array, "2 ..."], n: UInt32[Array, ...]) -> Int[Array, ...]:
    """A uniform integer in 0..n-1, for 1 <= n < 2**31, as int32; 0 for n = 0.

    The 40 bits of the first word and of the lowest byte of the second are taken as a fraction
    of ``n``: each integer's share is right within 2**-40.
    """
    half = np.uint32(0xFFFF)
    a, low = bits[0], bits[0] * n
    a0, a1, b0, b1 = a & half, a >> 16, n & half, n >> 16
    middle = (a0 * b0 >> 16) + (a0 * b1 & half) + (a1 * b0 & half)
    high = a1 * b1 + (a0 * b1 >> 16) + (a1 * b0 >> 16) + (middle >> 16)
    rest = low + (bits[1] & np.uint32(0xFF)) * (n >> 8)
    return (high + (rest < low).astype(jnp.uint32)).astype(jnp.int32)


def draw(
    weights: Float[Array, ...], bits: Words | UInt32[Array, "2 ..."], *, axis: int = -1
) -> Int[Array, ...]:
    """Draw a token with probability proportional to ``weights`` along ``axis``.

    A token of weight zero is never drawn. A lane whose weights are all zero, or hold a NaN or
    an infinity, returns -1.
    """
    weights = jnp.moveaxis(weights, axis, 0)
    size = weights.shape[0]
    top = weights.max(0)
    weights = weights / jnp.where(top > 0, top, 1)  # else 2**30 / total may overflow
    total = weights.sum(0)
    ok = (total > 0) & jnp.isfinite(total)
    v = _rounding(bits[1])
    if size > _FEW:  # many equal weights would all be rounded up, or all down, together
        spread = np.arange(size) * 0.6180339887498949 % 1
        v = v + jnp.asarray(spread, weights.dtype).reshape(-1, *([1] * total.ndim))
        v = v - jnp.floor(v)
    scale = jnp.where(ok, _UNITS / total, 0)
    units = jnp.where(ok, weights, 0) * scale + v
    units = jnp.where(weights > 0, units, 0).astype(jnp.int32)  # v spread over many may reach 1
    cum = jnp.cumsum(units, axis=0)
    u = below((bits[0], bits[1]), cum[-1].astype(jnp.uint32))
    return jnp.where(ok, (cum <= u).sum(0, dtype=jnp.int32), -1)


def draw_few(weights: Sequence[Float[Array, " lane"]], bits: Words) -> Int[Array, " lane"]:
    """:func:`draw` for a few weights given as separate arrays, unrolled so that it fuses.

    A lane whose weights sum to zero, to less than float32 can invert (4e-30) or to no finite
    number returns ``len(weights)``.
    """
    total = weights[0]
    for w in weights[1:]:
        total = total + w
    ok = (total > 4e-30) & (total < jnp.inf)
    scale, v = jnp.where(ok, _UNITS / total, 0), _rounding(bits[1])
    cum = (weights[0] * scale + v).astype(jnp.int32)
    edges = [cum]
    for w in weights[1:]:
        cum = cum + (w * scale + v).astype(jnp.int32)
        edges.append(cum)
    u = below(bits, cum.astype(jnp.uint32))
    token = jnp.zeros_like(u)
    for edge in edges:
        token = token + (edge <= u).astype(jnp.int32)
    return token


def _rounding(word: UInt32[Array, ...]) -> Float[Array, ...]:
    """A uniform variable in [0, 1 - 2**-24], which turns floor into random rounding."""
    return (word >> 8).astype(jnp.float32) * 2.0**-24


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
    table: FixedTable,
    bits: Words | UInt32[Array, "2 ..."],
    row: Int[Array, ...] | None = None,
) -> Int[Array, ...]:
    """Draw from ``table`` (from its law number ``row`` if it holds several) by bisection."""
    size = table.order.shape[-1]

    def at(x: jax.Array, slot: jax.Array) -> jax.Array:
        return x[slot] if row is None else x[row, slot]

    lower = jnp.zeros(bits[0].shape, jnp.int32)
    upper = jnp.full(bits[0].shape, size - 1, jnp.int32)
    for _ in range((size - 1).bit_length()):
        middle = (lower + upper) // 2
        high, low = at(table.high, middle), at(table.low, middle)
        passed = (high < bits[0]) | ((high == bits[0]) & (low <= bits[1]))
        lower = jnp.where(passed & (lower < upper), middle + 1, lower)
        upper = jnp.where(passed, upper, middle)
    return at(table.order, jnp.minimum(lower, size - 1))
