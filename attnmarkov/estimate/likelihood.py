"""The log-likelihood of every row, its gradient, and its curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate._blocks import blocks_together

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate.prior import Prior


_EXACT = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


class Evaluation(NamedTuple):
    """Row losses at one ``S``, per label of the row."""

    loss: Float[Array, " row"]
    gradient: Float[Array, "row token"]
    probs: Float[Array, "block slot token"]


def laws(blocks: Blocks, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token laws (G, C, K) and their log normalisers (G, C, 1).

    From products of counts and ``e^S``, one exponential a logit, unless a prompt holds nothing
    but tokens too far below their row's largest for that; then by logarithms, in a loop of one
    turn, which is not run where no dataset of a vmapped batch needs it.
    """
    if blocks.counts is None:
        return _laws_by_logs(blocks, logits)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)[blocks.row]
    total = jnp.einsum("gca,ga->gc", blocks.counts, weights, precision=_EXACT)[..., None]
    probs = blocks.counts * weights[:, None, :] * (1 / total)
    lost = ~(total >= jnp.finfo(total.dtype).tiny * 2.0**40)
    normaliser = top[blocks.row][:, None, :] + jnp.log(total)
    _, found = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda _: (jnp.array(False), _laws_by_logs(blocks, logits)),
        (lost.any(), (probs, normaliser)),
    )
    return found


def _laws_by_logs(blocks: Blocks, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores = blocks.log_counts + logits[blocks.row][:, None, :]
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total, top + jnp.log(total)


def evaluate(blocks: Blocks, logits: jax.Array, prior: Prior | None) -> Evaluation:
    """The objective ``(Σ_i w_i ℓ_i(S[k]) + penalty(S[k])) / n_k`` of every row ``k``.

    ``ℓ = −S[k, y] + log Σ_j n_j e^{S[k, j]}``: the constant ``−log n_y`` is left out. Dividing by
    the row's number of labels ``n_k = Σ_i w_i`` (1 if none) leaves the optimum where it is and
    puts all rows on one scale. The gradient sums the residuals ``p − 1_y``, so that nothing
    cancels.
    """
    probs, normaliser = laws(blocks, logits)
    label_score = jnp.take_along_axis(logits[blocks.row], blocks.labels, axis=-1, mode="clip")
    loss = ((normaliser[..., 0] - label_score) * blocks.weight).sum(-1)
    loss = blocks.sum_by_row(loss)
    residual = probs - blocks.is_label
    residual = jnp.einsum("gca,gc->ga", residual, blocks.weight, precision=_EXACT)
    gradient = blocks.sum_by_row(residual)
    if prior is not None:
        loss, gradient = loss + prior.penalty(logits), gradient + prior.gradient(logits)
    scale = scale_of_rows(blocks.labels_per_row())
    return Evaluation(scale * loss, scale[:, None] * gradient, probs)


def losses(
    blocks: Blocks, logits: jax.Array, probs: jax.Array, normaliser: jax.Array
) -> Float[Array, "block slot"]:
    """``−log P_S(y | X)`` of every slot, from its :func:`laws`; never negative.

    From the probability of the other tokens where that is the smaller: a label that was all but
    certain costs next to nothing, which a difference of logarithms could not hold.
    """
    others = jnp.where(blocks.is_label, 0, probs).sum(-1)
    own = jnp.take_along_axis(logits[blocks.row], blocks.labels, axis=-1, mode="clip")
    own += jnp.take_along_axis(blocks.log_counts, blocks.labels[..., None], -1, mode="clip")[..., 0]
    rare = normaliser[..., 0] - own
    small = others < 0.5
    held = jnp.take_along_axis(probs, blocks.labels[..., None], -1, mode="clip")[..., 0] > 0
    return jnp.where(small & held, -jnp.log1p(-jnp.where(small, others, 0)), rare)


def scale_of_rows(labels_per_row: jax.Array) -> jax.Array:
    """What each row's summed loss is multiplied by, (K,): one over its labels, 1 if none."""
    return jnp.where(labels_per_row > 0, 1 / jnp.where(labels_per_row > 0, labels_per_row, 1), 1)


@jax.custom_vjp
def total_objective(logits: jax.Array, blocks: Blocks, prior: Prior | None) -> jax.Array:
    """The sum of the row objectives of :func:`evaluate`: one scalar for first-order solvers."""
    return evaluate(blocks, logits, prior).loss.sum()


def _forward(logits: jax.Array, blocks: Blocks, prior: Prior | None):
    at = evaluate(blocks, logits, prior)
    return at.loss.sum(), at.gradient


def _backward(gradient: jax.Array, cotangent: jax.Array):
    return cotangent * gradient, None, None


total_objective.defvjp(_forward, _backward)


def curvature(blocks: Blocks, probs: jax.Array) -> Float[Array, "row token token"]:
    """``H_k = Σ_{i: last = k} (diag p_i − p_i p_iᵀ)``, the Hessian of each row's summed loss.

    Each ``H_k`` is a weighted Laplacian of the co-occurrence graph and is assembled as one: the
    diagonal is minus the sum of the off-diagonal entries, also where ``p`` rounds to 1.

    Time O(nK²), memory O(nK + K³).
    """
    size = blocks.num_tokens
    step = min(blocks.row.shape[0], blocks_together(size))
    weighted = probs * jnp.sqrt(blocks.weight)[..., None]

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]):
        p, row = part
        products = jnp.einsum("gca,gcb->gab", p, p, precision=_EXACT)
        return total.at[row].add(products, indices_are_sorted=True), None

    cut = (weighted.reshape(-1, step, *probs.shape[1:]), blocks.row.reshape(-1, step))
    summed = jax.lax.scan(add, jnp.zeros((size, size, size), probs.dtype), cut)[0]
    off_diagonal = summed * (1 - jnp.eye(size, dtype=probs.dtype))
    return off_diagonal.sum(-1)[..., None] * jnp.eye(size, dtype=probs.dtype) - off_diagonal
