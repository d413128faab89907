"""How many more prompts a target error takes."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal, trace_against
from attnmarkov.estimate.likelihood import curvature, laws
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from attnmarkov.model.ccmc import CCMC
    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts

Measure = Literal["squared_error", "excess_risk", "standard_error"]
_MEASURES = ("squared_error", "excess_risk", "standard_error")
_MOST = 2**53  # whole numbers beyond it are not exact in float64


def prompts_needed(
    sample: Prompts,
    target: float,
    model: CCMC | None = None,
    *,
    measure: Measure = "squared_error",
    collected: Prompts | None = None,
    context: Context | None = None,
) -> float:
    """How many more prompts of a distribution bring the error of a fit down to a target.

    By the first order of the asymptotic theory: with ``I`` the information of one prompt of the
    distribution and ``C`` the information of those collected so far, ``n`` more leave a
    covariance of ``(C + n I)⁺``. Small answers (a few times the number of parameters) are too
    optimistic.

    Args:
        sample: A large sample of the distribution; its mean information stands for the
            distribution's. A few thousand prompts per token do.
        target: The error wanted, positive.
        model: Where the information is evaluated, for example a first fit; uniform attention if
            None.
        measure: ``"squared_error"``: expected ``‖Ŝ − S‖²_F``, in nats squared, all K(K−1)
            contrasts together; ``"standard_error"``: the largest of any logit, in nats;
            ``"excess_risk"``: expected mean KL on further prompts of the distribution, in nats.
        collected: Prompts whose labels are known already.
        context: How positions are weighed, as in :func:`attnmarkov.fit`.

    Returns:
        A whole number of prompts, 0 if those collected suffice; ``math.inf`` if no number does,
        since neither the distribution nor what was collected identifies what is measured.

    Raises:
        ValueError: If there is no prompt, the vocabularies differ, ``target`` is not positive, or
            ``measure`` is unknown.

    References:
        [CCMC], sample complexity: the ``K²/n`` rate. van der Vaart, Asymptotic Statistics (1998),
        5.3, for its constants.

    >>> import jax, attnmarkov as am
    >>> sample = am.prompts.uniform(jax.random.key(0), 4096, 10, 4)
    >>> round(prompts_needed(sample, 0.001, measure="excess_risk"), -1)  # K(K-1)/2 / 0.001
    6000
    >>> prompts_needed(sample[:1], 0.1)  # one prompt of ten tokens speaks of one row only
    inf
    """
    _check.prompts(sample)
    if model is not None:
        _check.vocabulary(sample, model, "model")
    _validate.choice(measure, "measure", _MEASURES)
    _leaves.positive(target, "target")
    logits = jnp.zeros((sample.num_tokens, sample.num_tokens)) if model is None else model.logits
    rate = _information(logits, sample, _check.offsets(sample, context)) / sample.num_prompts
    known = jnp.zeros_like(rate)
    if collected is not None:
        _check.prompts(collected)
        if collected.num_tokens != sample.num_tokens:
            raise ValueError(
                f"collected: is over {collected.num_tokens} tokens, but sample over "
                f"{sample.num_tokens}"
            )
        known = _information(logits, collected, _check.offsets(collected, context))

    def enough(n: float) -> bool:
        return float(_error(rate, known, n, measure=measure)) <= target

    if enough(0.0):
        return 0
    most = 1
    while not enough(float(most)):
        most *= 4
        if most > _MOST:
            return math.inf
    least = most // 4  # not enough, while most is
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(float(middle)) else (middle, most)
    return most


@jax.jit
def _information(logits: jax.Array, prompts: Prompts, log_counts: jax.Array | None) -> jax.Array:
    blocks = blocks_of(prompts.counts, prompts.last, None, None, log_counts)
    return curvature(blocks, laws(blocks, logits)[0])


@partial(jax.jit, static_argnames="measure")
def _error(rate: jax.Array, known: jax.Array, n: jax.Array, *, measure: Measure) -> jax.Array:
    """What is expected after ``n`` more prompts."""
    elimination = eliminate(known + n * rate)
    components = elimination.components
    if measure == "excess_risk":
        apart = components[:, :, None] != components[:, None, :]
        lost = (apart & (rate != 0)).any()
        return jnp.where(lost, jnp.inf, trace_against(elimination, components, rate) / 2)
    variance = pseudo_inverse_diagonal(elimination, components)
    error = variance.sum() if measure == "squared_error" else jnp.sqrt(variance.max())
    return jnp.where((components == 0).all(), error, jnp.inf)
