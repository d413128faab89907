"""Pseudo-inverses of weighted Laplacians whose weights differ by any number of magnitudes.

The information about a row is the Laplacian of a graph whose weights can be ``1`` and ``1e-30``
side by side. Subtracting such numbers, as eigenvalue and Cholesky routines do, leaves nothing of
the small ones; here tokens are eliminated one by one with sums, products and quotients of
non-negative numbers alone, so that every result keeps its relative accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate.graphs import component_projector

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_ELEMENTS = 2**16  # weights that are worked on at once: what a processor's cache holds


class Elimination(NamedTuple):
    """Factors of every row: ``V D⁺ Vᵀ`` is a generalised inverse of ``H + prior · 1``.

    Attributes:
        visits: ``V``; ``[k, a, j]`` is the chance that ``j`` is among the falling records of a
            walk along the weights that starts at ``a``.
        pivot: The diagonal of ``D``; ``[k, j]`` is the weight that ties ``j`` to lesser tokens
            and to the prior once all greater ones are eliminated. Without a prior it is exactly
            0 for the least token of every component.
    """

    visits: Float[Array, "row token token"]
    pivot: Float[Array, "row token"]

    @property
    def components(self) -> Int[Array, "row token"]:
        """The least token of each token's component, read off the weights that are not zero."""
        reached = jnp.where((self.pivot == 0)[..., None, :], self.visits, 0)
        return jnp.argmax(reached, axis=-1).astype(jnp.int32)


def eliminate(information: jax.Array, prior: float | jax.Array = 0.0) -> Elimination:
    """Eliminate the tokens of every row, the greatest first. O(K³) per row.

    Reads the entries off the diagonal only; the diagonal follows from them and from ``prior``.

    References:
        Grassmann, Taksar and Heyman, Operations Research 33 (1985); O'Cinneide, Numerische
        Mathematik 65 (1993), on the accuracy.
    """
    size = information.shape[-1]
    tokens = jnp.arange(size)
    identity = jnp.eye(size, dtype=information.dtype)

    def one_row(weights: jax.Array) -> Elimination:
        def step(i: jax.Array, carry):
            weights, leak, pivot = carry
            j = size - 1 - i
            tied = jnp.where(tokens < j, weights[j], 0)
            total = tied.sum() + leak[j]
            share = jnp.where(total > 0, tied / jnp.where(total > 0, total, 1), 0)
            weights = (weights + tied[:, None] * share).at[j].set(share)
            return weights, leak + share * leak[j], pivot.at[j].set(total)

        leak = jnp.full(size, prior, weights.dtype)
        carry = (weights, leak, jnp.zeros_like(leak))
        shares, _, pivot = jax.lax.fori_loop(0, size, step, carry)
        shares = jnp.tril(shares, -1)

        # visits = (1 - shares)⁻¹ by forward substitution. Not by LAPACK: two of its batched calls
        # at once (lax.map's rest beside its loop) wait for each other on XLA's threads for ever.
        def visit(j: jax.Array, visits: jax.Array) -> jax.Array:
            past = jnp.matmul(shares[j], visits, precision=jax.lax.Precision.HIGHEST)
            return visits.at[j].add(past)

        return Elimination(jax.lax.fori_loop(1, size, visit, identity), pivot)

    together = max(1, min(_ELEMENTS // size**2, information.shape[0]))
    return jax.lax.map(one_row, -information, batch_size=together)


def pseudo_inverse_diagonal(
    elimination: Elimination, components: Int[Array, "row token"]
) -> Float[Array, "row token"]:
    """Diagonal of the pseudo-inverse on what has mean zero over every component.

    Infinite over a component that the weights do not hold together.
    """
    factor, tied = _factors(elimination, components)
    squared = factor**2
    return jnp.where(squared > 0, squared / tied[:, None, :], 0).sum(-1)


def largest_variance(
    elimination: Elimination, components: Int[Array, "row token"]
) -> Float[Array, " row"]:
    """Largest eigenvalue of the pseudo-inverse of every row: its worst contrast's variance.

    One over the algebraic connectivity where the row is one component. 0 if there is no
    contrast, infinite if the weights do not hold a component together.
    """
    factor, tied = _factors(elimination, components)
    least = jnp.where((factor != 0).any(1), tied, jnp.inf).min(-1)  # so that no 1/tied overflows
    sound = (least > 0) & (least < jnp.inf)
    root = factor * jnp.sqrt(jnp.where(sound, least, 1)[:, None] / tied)[:, None, :]
    root = jnp.where(sound[:, None, None], root, 0)
    gram = jnp.einsum("kaj,kal->kjl", root, root, precision=jax.lax.Precision.HIGHEST)
    top = jnp.maximum(jnp.linalg.eigvalsh(gram)[:, -1], 0)
    return jnp.where(least > 0, top / least, jnp.inf)


def trace_against(
    elimination: Elimination, components: Int[Array, "row token"], other: jax.Array
) -> Float[Array, ""]:
    """``tr(L H⁺)`` summed over rows, for Laplacians ``L`` (K, K, K) within the components."""
    factor, tied = _factors(elimination, components)
    product = jnp.einsum("kab,kbj->kaj", other, factor, precision=jax.lax.Precision.HIGHEST)
    form = jnp.maximum((factor * product).sum(1), 0)
    return jnp.where(form > 0, form / tied, 0).sum()


def _factors(
    elimination: Elimination, components: Int[Array, "row token"]
) -> tuple[jax.Array, jax.Array]:
    """``F`` (K, K, K) and ``d`` (K, K) with the pseudo-inverse ``F diag(1/d) Fᵀ`` of each row."""
    visits, pivot = elimination
    projector = component_projector(components).astype(visits.dtype)
    mean = jnp.einsum("kab,kbj->kaj", projector, visits, precision=jax.lax.Precision.HIGHEST)
    least = components == jnp.arange(pivot.shape[-1])
    return visits - mean, jnp.where(pivot > 0, pivot, jnp.where(least, jnp.inf, 0))
