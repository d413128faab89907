"""How a batch of vectors over tokens lies in memory, and how a token is drawn from each.

Small vocabularies lie token-major: a step is a few operations on vectors of lanes, fused into
one loop, with the K weights of a lane in registers. Larger ones lie lane-major, where the row
``P[last]`` of a lane is one contiguous read; sums are taken over a few wide slices of the row,
and the draw goes from a column of the slices to the token in it. Measured crossovers (CPU) are
in ``benchmarks/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp

from attnmarkov import _random

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    from jaxtyping import Array, Float, Int, Shaped, UInt32

_TOKEN_MAJOR = 40  # the largest vocabulary that lies token-major
_SELECT = 12  # the largest vocabulary whose tables are read by selection, not by gathers
_WIDTH = 16  # columns of the narrowest slices; the float32 lanes of the widest CPU vectors
_SLICES = 8  # slices of a row
_FEW = 64  # columns drawn from in one go


def layout(num_tokens: int) -> TokenMajor | LaneMajor:
    """The layout for a vocabulary of this size."""
    return TokenMajor(num_tokens) if num_tokens <= _TOKEN_MAJOR else LaneMajor(num_tokens)


@dataclass(frozen=True)
class TokenMajor:
    """Vectors as (token, lane)."""

    size: int
    axis: ClassVar[int] = 0

    def place(self, rows: Shaped[Array, "lane token"]) -> Shaped[Array, "token lane"]:
        """From one row a lane."""
        return rows.T

    def rows(self, x: Shaped[Array, "token lane"]) -> Shaped[Array, "lane token"]:
        """To one row a lane."""
        return x.T

    def table(self, p: Float[Array, "query token"]) -> Any:
        """What :meth:`draw_product` reads ``p[last]`` from."""
        return tuple(p[:, j] for j in range(self.size))

    def scores(self, s: Float[Array, "query token"]) -> Float[Array, "token query"]:
        """What :meth:`lookup` reads ``s[last]`` from."""
        return s.T

    def lookup(self, scores: jax.Array, last: Int[Array, " lane"]) -> Float[Array, "token lane"]:
        """``s[last]``."""
        return scores.at[:, last].get(mode="promise_in_bounds")

    def add(self, n: Shaped[Array, "token lane"], token: Int[Array, " lane"], by: int = 1):
        """``n`` with ``by`` added at each lane's token; -1 adds nothing."""
        return n + jnp.where(self.hit(token), by, 0).astype(n.dtype)

    def hit(self, token: Int[Array, " lane"]) -> Shaped[Array, "token lane"]:
        """Whether an entry is that of the lane's token."""
        return jnp.arange(self.size, dtype=token.dtype)[:, None] == token

    def pick(self, x: Shaped[Array, "token lane"], token: Int[Array, " lane"]):
        """The entry of each lane's token; 0 for -1."""
        return jnp.where(self.hit(token), x, 0).sum(0, dtype=x.dtype)

    def draw(
        self, weights: Float[Array, "token lane"], seeds: UInt32[Array, "2 lane"], step: jax.Array
    ) -> Int[Array, " lane"]:
        """A token with probability proportional to its weight; -1 where all are zero.

        Weights as :func:`attnmarkov._random.draw_few` wants them.
        """
        return self._draw([weights[j] for j in range(self.size)], seeds, step)

    def draw_product(
        self,
        n: Int[Array, "token lane"],
        table: Any,
        last: Int[Array, " lane"],
        seeds: UInt32[Array, "2 lane"],
        step: jax.Array,
    ) -> Int[Array, " lane"]:
        """:meth:`draw` with weights ``n * p[last]``."""
        few = self.size <= _SELECT
        p = [select(list(column), last) if few else _gather(column, last) for column in table]
        weights = [n[j].astype(jnp.float32) * x for j, x in enumerate(p)]
        return self._draw(weights, seeds, step)

    def _draw(self, weights: list, seeds: jax.Array, step: jax.Array) -> jax.Array:
        token = _random.draw_few(weights, _random.words(seeds, step))
        return jnp.where(token < self.size, token, -1)


def _gather(column: jax.Array, last: jax.Array) -> jax.Array:
    return column.at[last].get(mode="promise_in_bounds")


def select(values: list[jax.Array], last: jax.Array) -> jax.Array:
    """``values[last]`` by a tree of selections on the bits of ``last``: no memory is read."""
    bit = 0
    while len(values) > 1:
        odd = (last >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [jnp.where(odd, b, a) for a, b in pairs] + values[len(values) // 2 * 2 :]
        bit += 1
    return jnp.broadcast_to(values[0], last.shape)


@dataclass(frozen=True)
class LaneMajor:
    """Vectors as (lane, token), padded to whole slices.

    A row is cut into at most 8 slices of ``width`` columns. A draw sums the slices, draws one of
    the columns (by the same method if there are many), then one of its tokens.
    """

    size: int
    axis: ClassVar[int] = 1

    @property
    def width(self) -> int:
        """Columns of a slice, a power of two."""
        return max(_WIDTH, 1 << (-(-self.size // _SLICES) - 1).bit_length())

    @property
    def padded(self) -> int:
        """Length of a row."""
        return -(-self.size // self.width) * self.width

    def place(self, rows: Shaped[Array, "lane token"]) -> Shaped[Array, "lane padded"]:
        """From one row a lane."""
        return jnp.pad(rows, ((0, 0), (0, self.padded - self.size)))

    def rows(self, x: Shaped[Array, "lane padded"]) -> Shaped[Array, "lane token"]:
        """To one row a lane."""
        return x[:, : self.size]

    def table(self, p: Float[Array, "query token"]) -> Any:
        """What :meth:`draw_product` reads ``p[last]`` from."""
        return self._slices(self.place(p))

    def scores(self, s: Float[Array, "query token"]) -> Float[Array, "query padded"]:
        """What :meth:`lookup` reads ``s[last]`` from; minus infinity in the padding."""
        wide = ((0, 0), (0, self.padded - self.size))
        return jnp.pad(s, wide, constant_values=-jnp.inf)

    def lookup(self, scores: jax.Array, last: Int[Array, " lane"]) -> Float[Array, "lane padded"]:
        """``s[last]``."""
        return scores.at[last].get(mode="promise_in_bounds")

    def add(self, n: Shaped[Array, "lane padded"], token: Int[Array, " lane"], by: int = 1):
        """``n`` with ``by`` added at each lane's token; -1 adds nothing."""
        amount = jnp.where(token >= 0, by, 0).astype(n.dtype)
        flat = n.reshape(-1).at[self._places(token)]
        return flat.add(
            amount, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        ).reshape(n.shape)

    def hit(self, token: Int[Array, " lane"]) -> Shaped[Array, "lane padded"]:
        """Whether an entry is that of the lane's token."""
        return jnp.arange(self.padded, dtype=token.dtype) == token[:, None]

    def pick(self, x: Shaped[Array, "lane padded"], token: Int[Array, " lane"]):
        """The entry of each lane's token; 0 for -1."""
        at = x.reshape(-1).at[self._places(token)].get(mode="promise_in_bounds")
        return jnp.where(token >= 0, at, 0)

    def draw(
        self,
        weights: Float[Array, "lane padded"],
        seeds: UInt32[Array, "2 lane"],
        step: jax.Array,
        stream: int = 0,
    ) -> Int[Array, " lane"]:
        """As :meth:`TokenMajor.draw`; level after level of columns uses the next stream."""
        flat = weights.reshape(-1)

        def weight(column: jax.Array, part: int) -> jax.Array:
            place = self._places(part * self.width + column)
            return flat.at[place].get(mode="promise_in_bounds")

        return self._draw(list(self._slices(weights)), weight, seeds, step, stream)

    def draw_product(
        self,
        n: Int[Array, "lane padded"],
        table: Any,
        last: Int[Array, " lane"],
        seeds: UInt32[Array, "2 lane"],
        step: jax.Array,
    ) -> Int[Array, " lane"]:
        """:meth:`draw` with weights ``n * p[last]``, which are never written to memory."""
        slices = [
            part.astype(jnp.float32) * _gather(p, last)
            for part, p in zip(self._slices(n), table, strict=True)
        ]
        flat = n.reshape(-1)

        def weight(column: jax.Array, part: int) -> jax.Array:
            own = flat.at[self._places(part * self.width + column)].get(mode="promise_in_bounds")
            p = table[part].reshape(-1).at[last * self.width + column]
            return own.astype(jnp.float32) * p.get(mode="promise_in_bounds")

        return self._draw(slices, weight, seeds, step, 0)

    def _draw(
        self,
        slices: list[jax.Array],
        weight: Callable[..., jax.Array],
        seeds: jax.Array,
        step: jax.Array,
        stream: int,
    ) -> jax.Array:
        """Draw a column, then one of its tokens, whose weights are ``weight(column, slice)``."""
        columns = slices[0]
        for part in slices[1:]:
            columns = columns + part
        if self.width > _FEW:
            column = LaneMajor(self.width).draw(columns, seeds, step, stream + 1)
        else:
            each = [columns[:, c] for c in range(self.width)]
            column = _random.draw_few(each, _random.words(seeds, step, stream + 1))
            column = jnp.where(column < self.width, column, -1)
        inside = jnp.maximum(column, 0)
        part = _random.draw_few(
            [weight(inside, g) for g in range(len(slices))], _random.words(seeds, step, stream)
        )
        found = (column >= 0) & (part < len(slices))
        return jnp.where(found, part * self.width + column, -1)

    def _slices(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(x[:, i : i + self.width] for i in range(0, self.padded, self.width))

    def _places(self, token: jax.Array) -> jax.Array:
        """Places of the lanes' tokens in the flattened batch."""
        lanes = jnp.arange(token.shape[0], dtype=jnp.int32)
        return lanes * self.padded + jnp.maximum(token, 0)
