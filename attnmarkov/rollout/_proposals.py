"""Tables from which a token is proposed by ``P[query]`` itself, whatever the history.

Each token gets ``ceil(P g)`` cells of its query's row, with ``g`` such that the row has at least
one cell and less than two for each token of the vocabulary. The token of a uniform cell, accepted
with probability ``P g / ceil(P g)``, has the law ``P[query]``: exactly, whatever the rounding of
``g``. Rows of independent Dirichlet weights accept 6 proposals in 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout._remember import Remembered

if TYPE_CHECKING:
    from attnmarkov.prompts import Prompts

_BLOCK = 64  # tokens added up by one product of matrices


class Rows(NamedTuple):
    """Rows of ``P``, relative to the largest entry."""

    p: jax.Array  # (query, token) float32, at most 1
    scale: jax.Array  # (query,) ``g``
    weight: jax.Array  # (query,) of all its cells together: cells / ``g``

    def cells(self) -> jax.Array:
        """(query, token) cells of each token, as float32."""
        return jnp.ceil(self.p * self.scale[:, None])


class Tables(NamedTuple):
    """What the rejection engine proposes from."""

    rows: Rows
    cells: jax.Array | None  # (query, 2 * token) the token of each cell; None if not used


@jax.jit
def _rows(logits: jax.Array) -> Rows:
    size = logits.shape[1]
    p = jnp.exp(logits - logits.max(axis=1, keepdims=True)).astype(jnp.float32)
    p = jax.lax.optimization_barrier(p)  # tokens are accepted by the very numbers counted here
    scale = 0.99 * size / p.sum(axis=1)
    # Four bits of it, so that it does not depend on the order of the sum.
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) & np.uint32(0xFFF00000)
    scale = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(bits, jnp.float32))
    rows = Rows(p, scale, scale)
    cells = rows.cells().astype(jnp.int32).sum(axis=1, dtype=jnp.int32)
    return rows._replace(weight=cells / scale)


@jax.jit
def _cells(rows: Rows) -> jax.Array:
    """(query, 2 * token) the token of each cell; any token behind a row's last cell."""
    size = rows.p.shape[0]
    ends = _running(rows.cells())
    row = jnp.arange(size)[:, None]
    stops = jnp.zeros((size, 2 * size), jnp.float32).at[row, ends].add(1, mode="drop")
    return jnp.minimum(_running(stops), size - 1).astype(smallest_dtype(size))


def _running(x: jax.Array) -> jax.Array:
    """Running sums of whole numbers below 2**24 along a row, as int32."""
    rows, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    upper = jnp.triu(jnp.ones((_BLOCK, _BLOCK), x.dtype))
    within = jnp.matmul(x, upper, precision=jax.lax.Precision.HIGHEST)
    before = jnp.cumsum(within[..., -1], axis=1) - within[..., -1]
    return (within + before[..., None]).astype(jnp.int32).reshape(rows, -1)[:, :size]


find_rows = Remembered(_rows, 1)
_lightest = Remembered(lambda logits: np.asarray(find_rows(logits).weight).min(), 8)
_find_cells = Remembered(lambda logits: _cells(find_rows(logits)), 1)


def find_tables(logits: Any, prompts: Prompts) -> Tables:
    """The tables, without the cells where no prompt uses them.

    A prompt is drawn from by cells where their weight is below that of its positions: where
    ``weight`` times its largest count is less than its length.
    """
    if _validate.is_concrete(logits, prompts):
        top = np.asarray(prompts.counts).max(axis=1).astype(np.float32)
        length = np.asarray(prompts.lengths, np.float32)
        used = (top * _lightest(logits) < length).any()
        return Tables(find_rows(logits), _find_cells(logits) if used else None)
    if _validate.is_concrete(logits):
        return Tables(find_rows(logits), _find_cells(logits))
    rows = find_rows(logits)
    blank = jax.eval_shape(_cells, rows)
    top = prompts.counts.max(axis=1).astype(jnp.float32)
    used = (top * rows.weight.min() < jnp.asarray(prompts.lengths, jnp.float32)).any()
    make = jax.lax.cond(used, _cells, lambda _: jnp.zeros(blank.shape, blank.dtype), rows)
    return Tables(rows, make)
