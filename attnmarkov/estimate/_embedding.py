"""Coordinates of the logits that an embedding can express."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Coordinates(NamedTuple):
    """Orthonormal coordinates ``B`` (a, b) of ``S = query Bᵀ attendedᵀ``, centred by rows.

    With ``Ē`` the embedding less its mean row, ``a`` the rank of ``Ē`` and ``b`` that of ``E``:
    ``W = to_key B to_queryᵀ`` is the one in ``span{(e_i − e_j) e_kᵀ}`` with these logits. Singular
    directions of a traced embedding are masked (columns of zeros) rather than cut.
    """

    attended: Float[Array, "token a"]  # left singular vectors of Ē
    query: Float[Array, "token b"]  # left singular vectors of E
    to_key: Float[Array, "d a"]  # right ones over the singular values
    to_query: Float[Array, "d b"]

    def logits(self, b: jax.Array) -> jax.Array:
        """``S`` (K, K) at ``B`` (a, b)."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.linalg.multi_dot([self.query, b.T, self.attended.T], precision=highest)

    def weight(self, b: jax.Array) -> jax.Array:
        """``W`` (d, d) at ``B`` (a, b)."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.linalg.multi_dot([self.to_key, b, self.to_query.T], precision=highest)


def check_embedding(embedding: Any, num_tokens: int) -> None:
    """Raise unless the embedding is (K, d), d >= 1, and finite where it is concrete."""
    shape = np.shape(embedding)
    if len(shape) != 2 or shape[0] != num_tokens or shape[1] < 1:
        raise ValueError(
            f"embedding: expected shape ({num_tokens}, d), one row per token, got {shape}"
        )
    if _validate.is_concrete(embedding):
        _validate.finite(embedding, "embedding")


def singular_parts(embedding: Any) -> list[tuple[Any, Any, Any]]:
    """``(U, σ, V)`` of ``Ē`` and of ``E`` without their null directions: float64 if concrete."""
    if _validate.is_concrete(embedding):
        given = np.asarray(embedding)
        eps = np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps
        e = given.astype(np.float64)
        parts = []
        # One scale for both: what is left of equal rows when their mean is off is rounding.
        least = np.linalg.norm(e, 2) * max(e.shape) * eps
        for matrix in (e - e.mean(0), e):
            u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
            kept = max(1, int((sigma > least).sum()))  # one direction of zeros rather than none
            good = sigma[:kept] > least
            parts.append((u[:, :kept] * good, sigma[:kept] * good, vt[:kept].T * good))
        return parts
    e = jnp.asarray(embedding, jnp.result_type(float))
    # One batched call: two LAPACK calls at once can wait for each other for ever.
    u, sigma, vt = jnp.linalg.svd(jnp.stack([e - e.mean(0), e]), full_matrices=False)
    good = sigma > sigma[1, 0] * max(e.shape) * jnp.finfo(e.dtype).eps
    u, sigma, v = u * good[:, None], sigma * good, jnp.swapaxes(vt, 1, 2) * good[:, None]
    return [(u[i], sigma[i], v[i]) for i in range(2)]


def coordinates_of(embedding: Any) -> Coordinates:
    """Coordinates of a checked embedding (K, d)."""
    (ua, sa, va), (ub, sb, vb) = singular_parts(embedding)
    xp = np if isinstance(sa, np.ndarray) else jnp
    inverse_a = xp.where(sa > 0, 1 / xp.where(sa > 0, sa, 1), 0)
    inverse_b = xp.where(sb > 0, 1 / xp.where(sb > 0, sb, 1), 0)
    return Coordinates(ua, ub, va * inverse_a, vb * inverse_b)


def width(basis: Any) -> Any:
    """How many columns of a basis are directions; the others are zero."""
    return (basis != 0).any(0).sum()


def num_identified(
    components: Any, coordinates: Coordinates, rank: int | None, xp: Any
) -> tuple[Any, Any]:
    """Parameters of the family that prompts identify, and how many it has.

    The family is all ``B``, or those of rank ``rank``. The information about ``B`` is zero
    exactly in the directions that move no contrast within a component of any row, so its rank is
    that of a design without data; for a rank-r family it is the rank on the tangent space at a
    generic ``B``. Ranks are taken from eigenvalues, in the precision of the coordinates.

    Args:
        components: (K, K) of the co-occurrence graphs.
        coordinates: Of the embedding.
        rank: r, or None for all ``B``.
        xp: ``numpy`` or, inside jit, ``jax.numpy``.
    """
    size = components.shape[-1]
    attended, query = coordinates.attended, coordinates.query
    a, b = width(attended), width(query)
    if rank is None:
        largest = a * b
    else:
        r = xp.minimum(rank, xp.minimum(a, b))
        largest = r * (a + b - r)

    def count() -> Any:
        same = components[:, :, None] == components[:, None, :]
        contrast = (xp.eye(size) - same / same.sum(-1, keepdims=True)).astype(query.dtype)
        moved = xp.einsum("ji,kjl,lp->kip", attended, contrast, attended, optimize=True)
        full = xp.einsum("kip,kj,kq->ijpq", moved, query, query, optimize=True)
        p, q = attended.shape[1], query.shape[1]
        gram = full.reshape(p * q, p * q)
        if rank is not None:
            tangent = xp.asarray(_generic_tangent(p, q, rank), query.dtype)
            gram = tangent.T @ gram @ tangent
        values = xp.linalg.eigvalsh(gram)
        # Squares of singular values of at most about 1.
        least = 10 * gram.shape[0] * np.finfo(query.dtype).eps
        return (values > least).sum().astype(np.int32)

    covered = (components == 0).all()
    if xp is np:
        return (largest if covered else count()), largest
    largest = largest.astype(np.int32)
    return jax.lax.cond(covered, lambda: largest, count), largest


def _generic_tangent(p: int, q: int, rank: int) -> np.ndarray:
    """(pq, rank (p + q)): how ``F Hᵀ`` moves with its factors at a generic point."""
    rng = np.random.default_rng(0)
    f, h = (np.linalg.qr(rng.normal(size=(m, max(m, rank))))[0] for m in (p, q))
    f, h = (np.resize(x, (len(x), rank)) if rank > len(x) else x[:, :rank] for x in (f, h))
    by_f = np.einsum("ip,jc->ijpc", np.eye(p), h).reshape(p * q, -1)
    by_h = np.einsum("ic,jq->ijqc", f, np.eye(q)).reshape(p * q, -1)
    return np.concatenate([by_f, by_h], axis=1)
