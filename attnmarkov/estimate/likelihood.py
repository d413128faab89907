"""The log-likelihood of every row, its gradient, and its curvature."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate._blocks import entries, parts_of
from attnmarkov.estimate._lazy import unless

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate.prior import Prior


_UNCERTAIN = 0.1  # nats a label, on the mean: then float32 holds a loss from logarithms to 1e-6
_EXACT = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


class Evaluation(NamedTuple):
    """Row losses at one ``S``, per label of the row."""

    loss: Float[Array, " row"]
    gradient: Float[Array, "row token"]
    probs: Float[Array, "block slot token"]


def laws(blocks: Blocks, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token laws (G, C, K) and their log normalisers (G, C, 1).

    From products of counts and ``e^S``, one exponential a logit, unless a prompt holds nothing
    but tokens too far below their row's largest for that; then by logarithms.
    """
    if blocks.counts is None:
        return _laws_by_logs(blocks, logits)
    weights, top = _weights(blocks, logits)
    total = jnp.einsum("gca,ga->gc", blocks.counts, weights, precision=_EXACT)[..., None]
    probs = blocks.counts * weights[:, None, :] * (1 / total)
    normaliser = top[blocks.row][:, None, :] + jnp.log(total)
    lost = ~(total >= _least(total.dtype))
    return unless(lost.any(), (probs, normaliser), _laws_by_logs, blocks, logits)


def _laws_by_logs(blocks: Blocks, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    blocks = blocks if blocks.counts is None else _with_logs(blocks)
    scores = blocks.log_counts + logits[blocks.row][:, None, :]
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total, top + jnp.log(total)


def _weights(blocks: Blocks, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``e^(S − top)`` of each block's row, (G, K), and the largest logits ``top``, (K, 1)."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    own = (blocks.row[:, None] == jnp.arange(blocks.num_tokens)).astype(logits.dtype)
    # A product copies rows faster than a gather, into which the exponential would be drawn.
    return jnp.matmul(own, jnp.exp(logits - top), precision=_EXACT), top


def _least(dtype: Any) -> Any:
    """The least sum of products that has all its digits."""
    return jnp.finfo(dtype).tiny * 2.0**40


def _with_logs(blocks: Blocks) -> Blocks:
    """The same prompts by logarithms of their counts, taken here and not where all wait for it."""
    assert blocks.counts is not None
    return blocks._replace(log_counts=jnp.log(blocks.counts), counts=None)


class Derivatives(NamedTuple):
    """Sums over the prompts of every row, before any prior and not divided by anything."""

    loss: Float[Array, " row"]
    gradient: Float[Array, "row token"]
    products: Float[Array, "row token token"]  # Σ w p_a p_b, or zeros where they are not asked for


def derivatives(blocks: Blocks, logits: jax.Array, *, products: bool) -> Derivatives:
    """Loss, gradient and, if asked for, the ``products`` that :func:`laplacian` takes.

    As :func:`laws`, from products of counts and ``e^S`` where these hold every prompt, and by
    logarithms where not; but the probabilities of all prompts are never held, and no pass over
    the prompts is spent on them where the products are not wanted.

    Time O(nK), and O(nK²) for the products; memory O(nK + K³).
    """
    if blocks.counts is None:
        return _derivatives_by_logs(blocks, logits, products=products)
    size = blocks.num_tokens
    weights, top = _weights(blocks, logits)
    total = jnp.einsum("gca,ga->gc", blocks.counts, weights, precision=_EXACT)
    share = blocks.weight / total
    wins = wins_of(blocks)
    expected = weights * jnp.einsum("gca,gc->ga", blocks.counts, share, precision=_EXACT)
    normalisers = jnp.einsum("gc,gc->g", blocks.weight, jnp.log(total), precision=_EXACT)
    found = Derivatives(
        blocks.sum_by_row(normalisers) + ((top - logits) * blocks.sum_by_row(wins)).sum(-1),
        blocks.sum_by_row(expected - wins),  # by block, so that little is left to cancel
        _products(blocks, jnp.sqrt(blocks.weight) / total, weights)
        if products
        else jnp.zeros((size, 1, 1), total.dtype),
    )
    lost = ~(total >= _least(total.dtype))
    by_logs = partial(_derivatives_by_logs, products=products)
    return unless(lost.any(), found, by_logs, blocks, logits)


def _derivatives_by_logs(blocks: Blocks, logits: jax.Array, *, products: bool) -> Derivatives:
    probs, normaliser = _laws_by_logs(blocks, logits)
    score = jnp.take_along_axis(logits[blocks.row], blocks.labels, axis=-1, mode="clip")
    residual = probs - blocks.is_label
    residual = jnp.einsum("gca,gc->ga", residual, blocks.weight, precision=_EXACT)
    return Derivatives(
        blocks.sum_by_row(((normaliser[..., 0] - score) * blocks.weight).sum(-1)),
        blocks.sum_by_row(residual),
        _summed_products(blocks, probs)
        if products
        else jnp.zeros((blocks.num_tokens, 1, 1), probs.dtype),
    )


def wins_of(blocks: Blocks) -> Float[Array, "block token"]:
    """Summed weights of each block's prompts by label."""
    if blocks.wins is not None:
        return blocks.wins
    emitted = blocks.is_label.astype(blocks.weight.dtype)
    return jnp.einsum("gca,gc->ga", emitted, blocks.weight, precision=_EXACT)


def evaluate(blocks: Blocks, logits: jax.Array, prior: Prior | None) -> Evaluation:
    """The objective ``(Σ_i w_i ℓ_i(S[k]) + penalty(S[k])) / n_k`` of every row ``k``.

    ``ℓ = −S[k, y] + log Σ_j n_j e^{S[k, j]}``: the constant ``−log n_y`` is left out. Dividing by
    the row's number of labels ``n_k = Σ_i w_i`` (1 if none) leaves the optimum where it is and
    puts all rows on one scale. The gradient sums the residuals ``p − 1_y``, so that nothing
    cancels.
    """
    found = derivatives(blocks, logits, products=False)
    loss, gradient = found.loss, found.gradient
    if prior is not None:
        loss, gradient = loss + prior.penalty(logits), gradient + prior.gradient(logits)
    scale = scale_of_rows(blocks.labels_per_row())
    return Evaluation(scale * loss, scale[:, None] * gradient, laws(blocks, logits)[0])


def losses(blocks: Blocks, logits: jax.Array) -> Float[Array, "block slot"]:
    """``−log P_S(y | X)`` of every slot; never negative, infinite where the label can't be.

    Where labels are all but certain on the mean, from the probability of the other tokens: they
    cost next to nothing, which a difference of logarithms could not hold.
    """
    if blocks.counts is None:
        return _losses_by_logs(blocks, logits)
    weights, _ = _weights(blocks, logits)
    total = jnp.einsum("gca,ga->gc", blocks.counts, weights, precision=_EXACT)
    own = entries(blocks.counts, blocks.labels) * entries(weights, blocks.labels)
    used, least = blocks.weight > 0, _least(own.dtype)
    held = own >= least
    found = jnp.maximum(jnp.log(total / jnp.where(held, own, 1)), 0)
    found = jnp.where(held & used, found, 0)
    mean = (found * blocks.weight).sum() / jnp.where(used, blocks.weight, 0).sum()
    lost = ~(held | ~used).all() | ~(mean > _UNCERTAIN)
    return unless(lost, found, _losses_by_logs, blocks, logits)


def _losses_by_logs(blocks: Blocks, logits: jax.Array) -> jax.Array:
    blocks = blocks if blocks.counts is None else _with_logs(blocks)
    probs, normaliser = _laws_by_logs(blocks, logits)
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

    Time O(nK²), memory O(nK + K³).
    """
    return laplacian(_summed_products(blocks, probs))


def curvature_at(blocks: Blocks, logits: jax.Array) -> Float[Array, "row token token"]:
    """:func:`curvature` at ``logits``, without the laws of all prompts at once."""
    return laplacian(derivatives(blocks, logits, products=True).products)


def laplacian(products: Float[Array, "row token token"]) -> Float[Array, "row token token"]:
    """Every ``H_k`` of :func:`curvature` from ``Σ_i p_i p_iᵀ``.

    It is a weighted Laplacian of the co-occurrence graph and is assembled as one: the diagonal is
    minus the sum of the off-diagonal entries, also where ``p`` rounds to 1.
    """
    identity = jnp.eye(products.shape[-1], dtype=products.dtype)
    off_diagonal = products * (1 - identity)
    return off_diagonal.sum(-1)[..., None] * identity - off_diagonal


def _summed_products(blocks: Blocks, probs: jax.Array) -> jax.Array:
    """``Σ w p_a p_b`` of every row, (K, K, K), from the laws."""
    ones = jnp.ones((blocks.row.shape[0], blocks.num_tokens), probs.dtype)
    return _products(blocks, jnp.sqrt(blocks.weight), ones, probs)


def _products(
    blocks: Blocks, share: jax.Array, weights: jax.Array, values: jax.Array | None = None
) -> jax.Array:
    """``Σ x_a x_b`` of every row, ``x = values · share · weights``, as many blocks as fit at once.

    ``values`` (G, C, K), the counts unless given; ``share`` (G, C); ``weights`` (G, K).
    """
    values = blocks.counts if values is None else values
    assert values is not None
    size = blocks.num_tokens
    number = parts_of(blocks.row.shape[0], size)

    def add(total: jax.Array, part: tuple[jax.Array, ...]):
        value, share, weights, row = part
        x = value * share[..., None] * weights[:, None, :]
        products = jnp.einsum("gca,gcb->gab", x, x, precision=_EXACT)
        return total.at[row].add(products, indices_are_sorted=True), None

    parts = [x.reshape(number, -1, *x.shape[1:]) for x in (values, share, weights, blocks.row)]
    return jax.lax.scan(add, jnp.zeros((size, size, size), values.dtype), tuple(parts))[0]
