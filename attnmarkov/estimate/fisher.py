"""Fisher information of prompts, and what it predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal
from attnmarkov.estimate.likelihood import curvature, laws

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.model.ccmc import CCMC
    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts


def fisher_information(
    model: CCMC,
    prompts: Prompts,
    *,
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> Float[Array, "row token token"]:
    """Expected Fisher information of one sample about ``S``, averaged over the prompts.

    Entry ``[k]`` is ``(1/n) Σ_{i: last = k} (diag p_i − p_i p_iᵀ)`` with the model's next-token
    laws ``p_i``; information between different rows is zero. Works under jit and vmap. Time
    O(nK²), memory O(nK + K³).

    Args:
        model: Where the information is evaluated.
        prompts: n prompts over the model's K tokens.
        weights: (n,) how often each prompt counts, as in :func:`attnmarkov.fit`; the average is
            weighted.
        context: How positions are weighed, as in :func:`attnmarkov.fit`.

    Returns:
        (K, K, K), in nats per squared logit.

    Raises:
        ValueError: If there is no prompt, the vocabularies differ, or the weights or the context
            do not fit the prompts.

    >>> from attnmarkov.model.ccmc import CCMC
    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[1, 0], [0, 1]], 2)
    >>> fisher_information(CCMC.from_logits([[0.0, 0.0], [0.0, 0.0]]), prompts)[0].tolist()
    [[0.125, -0.125], [-0.125, 0.125]]
    """
    _check.prompts(prompts)
    _check.vocabulary(prompts, model, "model")
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    data = prompts.counts, prompts.last, None, weights, log_counts
    return _information(model.logits, *_check.shared_shape(*data))


def observed_information(
    model: CCMC,
    prompts: Prompts,
    y: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> Float[Array, "row token token"]:
    """Observed information of one sample about ``S``: the Hessian of the mean loss.

    Given the prompts a CCMC is an exponential family with natural parameter ``S``, whose
    log-normaliser alone bends: the Hessian does not depend on the labels, and this equals
    :func:`fisher_information` at the same model. At a fit it is what its standard errors are
    made of.

    Args:
        model: Where the information is evaluated.
        prompts: n prompts over the model's K tokens.
        y: (n,) labels.
        weights: (n,) how often each prompt counts, as in :func:`attnmarkov.fit`; the average is
            weighted.
        context: How positions are weighed, as in :func:`attnmarkov.fit`.

    Returns:
        (K, K, K), in nats per squared logit; information between different rows is zero.

    Raises:
        ValueError: As :func:`fisher_information`, or if a label does not stand in its prompt.
    """
    _check.prompts(prompts)
    _check.vocabulary(prompts, model, "model")
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    _check.labels(prompts, y, weights, log_counts)
    data = prompts.counts, prompts.last, None, weights, log_counts
    return _information(model.logits, *_check.shared_shape(*data))


def score_information(
    model: CCMC,
    prompts: Prompts,
    y: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> Float[Array, "row token token"]:
    """Mean outer product of the scores, ``(1/n) Σ_{i: last = k} r_i r_iᵀ`` with ``r = 1_y − p``.

    Where the labels follow the model it estimates the Fisher information (its expectation over
    them is :func:`fisher_information`). Where they do not, it still is the variance of the score
    of one sample, the middle of the sandwich in :func:`attnmarkov.estimate.intervals` with
    ``method="robust"``.

    Args:
        model: Where the information is evaluated.
        prompts: n prompts over the model's K tokens.
        y: (n,) labels.
        weights: (n,) how often each prompt counts, as in :func:`attnmarkov.fit`; the average is
            weighted.
        context: How positions are weighed, as in :func:`attnmarkov.fit`.

    Returns:
        (K, K, K), in nats per squared logit; every row sums to zero.

    Raises:
        ValueError: As :func:`observed_information`.

    >>> from attnmarkov.model.ccmc import CCMC
    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[1, 0], [1, 0]], 2)
    >>> score_information(CCMC.from_logits([[0.0, 0.0], [0.0, 0.0]]), prompts, [0, 1])[0].tolist()
    [[0.25, -0.25], [-0.25, 0.25]]
    """
    _check.prompts(prompts)
    _check.vocabulary(prompts, model, "model")
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    labels = _check.labels(prompts, y, weights, log_counts)
    data = prompts.counts, prompts.last, labels, weights, log_counts
    return _scores(model.logits, *_check.shared_shape(*data))


@jax.jit
def _scores(
    logits: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
) -> jax.Array:
    blocks = blocks_of(counts, last, y, weights, log_counts)
    products = score_products(blocks, laws(blocks, logits)[0])
    return products / _total(counts, weights)


def score_products(blocks: Blocks, probs: jax.Array) -> Float[Array, "row token token"]:
    """Outer products of the scores summed by row, for laws ``probs`` (G, C, K)."""
    # A prompt's residuals sum to 0: the Laplacian with weights r_a r_b is minus their product.
    return -curvature(blocks, probs - blocks.is_label)


@jax.jit
def _information(
    logits: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    y: None,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
) -> jax.Array:
    blocks = blocks_of(counts, last, y, weights, log_counts)
    return curvature(blocks, laws(blocks, logits)[0]) / _total(counts, weights)


def _total(counts: jax.Array, weights: jax.Array | None) -> int | jax.Array:
    return counts.shape[0] if weights is None else weights.sum()


class InformationTrace(NamedTuple):
    """What an information matrix predicts for ``n`` samples.

    ``E‖Ŝ − S*‖²_F ≈ trace / n`` and excess risk ``≈ rank / (2n)``.
    """

    trace: Float[Array, ""]
    rank: Int[Array, ""]


@jax.jit
def information_trace(
    information: Float[Array, "row token token"],
    components: Int[Array, "row token"] | None = None,
) -> InformationTrace:
    """``tr(I⁺)`` and the number of identifiable parameters ``r``.

    Accurate to a few roundings of the entries of ``information``, however many magnitudes these
    span. An entry that underflowed (below 1e-38 in float32) is lost: a token that only such
    entries tie to others counts as alone if ``components`` is None. With the components given
    the rank is right all the same, and the trace is infinite.

    Args:
        information: (K, K, K) from :func:`fisher_information`.
        components: (K, K) of :class:`Coverage` or :class:`Fit`. By default tokens are joined
            where ``information[k, a, b]`` is not zero.

    >>> import jax.numpy as jnp
    >>> trace, rank = information_trace(jnp.array([[[0.125, -0.125], [-0.125, 0.125]]] * 2))
    >>> float(trace), int(rank)
    (8.0, 2)
    """
    elimination = eliminate(information)
    if components is None:
        components = elimination.components
    rank = (components != jnp.arange(information.shape[-1])).sum()
    return InformationTrace(pseudo_inverse_diagonal(elimination, components).sum(), rank)
