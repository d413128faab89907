"""Contrasts ``S[k, a] − S[k, b]``: their checks, and their variances without cancellation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate.laplacian import Elimination, eliminate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def default(components: Any) -> np.ndarray:
    """Every token against the least of its component, (m, 3) in order of rows.

    Raises:
        ValueError: If the components are traced, or of a batch of fits.
    """
    if not _validate.is_concrete(components) or np.ndim(components) != 2:
        raise ValueError(
            "contrasts: must be given under jit and vmap and for batches of fits, "
            "where the identified ones are not known"
        )
    labels = np.asarray(components)
    row, token = np.nonzero(labels != np.arange(labels.shape[-1]))
    return np.stack([row, token, labels[row, token]], axis=1).astype(np.int32)


def check(contrasts: Any, num_tokens: int) -> np.ndarray:
    """``contrasts`` as (m, 3) int32: a row and two different tokens each.

    Raises:
        ValueError: If they are traced, have another shape, hold no token ids, or compare a
            token with itself.
    """
    if not _validate.is_concrete(contrasts):
        raise ValueError("contrasts: must be concrete integers, also under jit and vmap")
    if np.size(contrasts) == 0:
        return np.zeros((0, 3), np.int32)
    ids = _validate.integer_array(contrasts, "contrasts", ndim=(1, 2))
    ids = np.atleast_2d(ids)
    if ids.shape[1] != 3:
        raise ValueError(
            f"contrasts: expected shape (m, 3), a row and two tokens each, got {ids.shape}"
        )
    _validate.token_range(ids, "contrasts", num_tokens)
    same = ids[:, 1] == ids[:, 2]
    if same.any():
        where = int(same.argmax())
        raise ValueError(f"contrasts: entry {where} compares token {ids[where, 1]} with itself")
    return ids.astype(np.int32)


def in_groups(contrasts: np.ndarray, groups: Any) -> np.ndarray:
    """The same with the group of every row for the row; ``groups`` (K,) concrete, or None.

    Raises:
        ValueError: If the groups are traced.
    """
    if groups is None:
        return contrasts
    if not _validate.is_concrete(groups):
        raise ValueError("row_groups: must be concrete, also under jit and vmap")
    return np.c_[np.asarray(groups, np.int32)[contrasts[:, 0]], contrasts[:, 1:]]


def order_with(first: jax.Array, second: jax.Array, size: int) -> Int[Array, "row token"]:
    """The tokens of every row with ``first`` moved to the front and ``second`` behind it."""
    rows = jnp.arange(first.shape[0])
    rank = jnp.broadcast_to(jnp.arange(2, size + 2), (first.shape[0], size))
    rank = rank.at[rows, second].set(1).at[rows, first].set(0)
    return jnp.argsort(rank, axis=-1)


def eliminate_in(information: jax.Array, order: Int[Array, "row token"]) -> Elimination:
    """Eliminate the tokens of every row, the last of its ``order`` first."""
    sorted_rows = jnp.take_along_axis(information, order[:, :, None], axis=1)
    return eliminate(jnp.take_along_axis(sorted_rows, order[:, None, :], axis=2))


class Grouped(NamedTuple):
    """Contrasts sorted by row and second token, so that each pair is worked on once."""

    contrasts: Int[Array, "contrast 3"]
    row: Int[Array, " pair"]
    against: Int[Array, " pair"]
    pair: Int[Array, " contrast"]


def grouped(contrasts: np.ndarray) -> Grouped:
    """The groups of contrasts that share a row and their second token."""
    pairs, which = np.unique(contrasts[:, [0, 2]], axis=0, return_inverse=True)
    columns = (contrasts, pairs[:, 0], pairs[:, 1], which.reshape(-1))
    return Grouped(*(jnp.asarray(x, jnp.int32) for x in columns))


def variances(
    information: Float[Array, "row token token"],
    groups: Grouped,
    score: Float[Array, "row token token"] | None = None,
) -> Float[Array, " contrast"]:
    """``(e_a − e_b)ᵀ H⁺ (e_a − e_b)`` of every contrast, for Laplacians ``H``.

    It is the resistance between ``a`` and ``b``. With ``b`` eliminated last it is a sum of
    non-negative terms, so that it keeps its relative accuracy whatever the magnitudes in ``H``.
    With ``score`` the sandwich ``(e_a − e_b)ᵀ H⁺ J H⁺ (e_a − e_b)`` instead.

    Infinite where ``H`` does not tie ``a`` to ``b``. O(K³) per pair of a row and a ``b``.
    """
    row, token, _ = groups.contrasts.T
    if not row.size:
        return jnp.zeros(0, information.dtype)
    order = order_with(groups.against, groups.against, information.shape[-1])
    visits, pivot = eliminate_in(information[groups.row], order)
    visits, pivot, order = visits[groups.pair], pivot[groups.pair], order[groups.pair]

    place = jnp.argmax(order == token[:, None], axis=-1)
    own = jnp.take_along_axis(visits, place[:, None, None], axis=1)[:, 0]
    is_tied = own[:, 0] > 0
    own = own.at[:, 0].set(0)
    share = jnp.where(own > 0, own / pivot, 0)
    if score is None:
        variance = (own * share).sum(-1)
    else:
        pull = jnp.einsum("maj,mj->ma", visits, share, precision=_HIGHEST)
        pull = jnp.take_along_axis(pull, jnp.argsort(order, axis=-1), axis=-1)
        variance = jnp.einsum("ma,mab,mb->m", pull, score[row], pull, precision=_HIGHEST)
    return jnp.where(is_tied, variance, jnp.inf)


_HIGHEST = jax.lax.Precision.HIGHEST
