"""Unsigned 64-bit integers as (high, low) pairs of uint32: JAX without x64 has no wider type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wide:
    """``high · 2**32 + low``, elementwise."""

    high: UInt32[Array, ...]
    low: UInt32[Array, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> Wide:
        """From a host array of integers in 0..2**64-1."""
        values = np.asarray(values).astype(np.uint64)
        return cls(
            jnp.asarray((values >> np.uint64(32)).astype(np.uint32)),
            jnp.asarray((values & np.uint64(2**32 - 1)).astype(np.uint32)),
        )

    @classmethod
    def one(cls) -> Wide:
        """The number 1."""
        return cls(jnp.uint32(0), jnp.uint32(1))

    def __add__(self, other: Wide) -> Wide:
        """The sum, wrapping at 2**64."""
        low = self.low + other.low
        return Wide(self.high + other.high + (low < other.low).astype(jnp.uint32), low)

    def __sub__(self, other: Wide) -> Wide:
        """The difference, wrapping at 2**64."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        return Wide(self.high - other.high - borrow, self.low - other.low)

    def __le__(self, other: Wide) -> Bool[Array, ...]:
        """Whether each value is at most the other."""
        less = self.high < other.high
        return less | ((self.high == other.high) & (self.low <= other.low))

    def to_float(self) -> Float[Array, ...]:
        """Nearest float32."""
        return self.high.astype(jnp.float32) * 2.0**32 + self.low.astype(jnp.float32)

    def numpy(self) -> np.ndarray:
        """As a host int64 array."""
        high = np.asarray(self.high).astype(np.int64)
        return (high << 32) | np.asarray(self.low).astype(np.int64)


def where(condition: Bool[Array, ...], a: Wide, b: Wide) -> Wide:
    """Choose elementwise."""
    return Wide(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def from_float(
    x: Float[Array, ...],
    fill: tuple[UInt32[Array, ...], UInt32[Array, ...]] | UInt32[Array, "2 ..."],
) -> Wide:
    """``floor(x)`` for 0 <= x, saturating at 2**62, with random bits below the float's precision.

    A float32 of 2**24 or more stands for the whole interval up to its successor: ``fill``
    chooses the integer in it.
    """
    x = jnp.minimum(x, 2.0**62)
    high = jnp.floor(x * 2.0**-32)
    low = jnp.minimum(x - high * 2.0**32, 4294967040.0)  # the largest float32 below 2**32
    value = Wide(high.astype(jnp.uint32), low.astype(jnp.uint32))
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127
    spare = jnp.clip(exponent - 23, 0, 39).astype(jnp.uint32)  # bits below the last of 24
    ones = jnp.uint32(2**32 - 1)
    low_mask = jnp.where(spare >= 32, ones, (jnp.uint32(1) << jnp.minimum(spare, 31)) - 1)
    high_bits = jnp.maximum(spare, 32) - 32
    high_mask = (jnp.uint32(1) << high_bits) - 1
    return Wide(value.high | (fill[0] & high_mask), value.low | (fill[1] & low_mask))
