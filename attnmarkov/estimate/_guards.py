"""What inference on a fit needs: that it is a fit, without a prior, of these very data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.graphs import cooccurrence_components
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal
from attnmarkov.estimate.likelihood import curvature, laws
from attnmarkov.estimate.result import Fit

if TYPE_CHECKING:
    from attnmarkov.model.ccmc import CCMC
    from attnmarkov.prompts.batch import Prompts

_ELEMENTS = 2**22  # laws that are held in float64 at once
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5  # float32 rounding of a mean loss, per unit of what it sums
_ERRORS = 1e-3  # rounding of a standard error, relative


def is_fit(value: Any, name: str = "fit") -> None:
    """Raise unless ``value`` is a fit."""
    if not isinstance(value, Fit):
        raise ValueError(f"{name}: expected a Fit, as am.fit returns, got {type(value).__name__}")


def no_prior(fit: Fit, name: str = "fit") -> None:
    """Raise if a concrete fit was penalised."""
    nll, loss = float(fit.nll), float(fit.loss)
    if loss > nll:
        raise ValueError(
            f"{name}: was made with a prior (its loss {loss:.6g} exceeds its nll {nll:.6g}), so "
            "it is not a maximum likelihood fit"
        )


def same_data(
    fit: Fit,
    name: str,
    prompts: Prompts,
    y: np.ndarray,
    weights: Any = None,
    log_counts: Any = None,
) -> None:
    """Raise unless these concrete data give a fit's mean loss, but for float32 rounding."""
    logs, weight, log_n = log_probs(fit.model, prompts, y, weights, log_counts)
    exact = -float(weight @ logs / weight.sum())
    summed = 1 + float(weight @ abs(log_n) / weight.sum())
    own = float(fit.nll)
    if not abs(own - exact) <= _RELATIVE * abs(exact) + _ABSOLUTE * summed:
        raise ValueError(
            f"{name}: its nll is {own:.6g}, but these prompts, labels, weights and context give "
            f"{exact:.6g}: pass what it was fitted with"
        )


def log_probs(
    model: CCMC, prompts: Prompts, y: np.ndarray, weights: Any = None, log_counts: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``log P(y_i | X_i)`` in float64 on the host, weights, and logarithms of the labels' counts.

    Of the prompts with a weight alone: the others may hold anything.
    """
    logits = np.asarray(model.logits, np.float64)
    weight = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    counted = np.flatnonzero(weight > 0)
    last = np.asarray(prompts.last)
    held = np.asarray(prompts.counts if log_counts is None else log_counts)
    step = max(1, _ELEMENTS // held.shape[1])
    logs, log_n = np.empty(counted.size), np.empty(counted.size)
    for start in range(0, counted.size, step):
        part = counted[start : start + step]
        own = np.arange(part.size), y[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            offset = held[part].astype(np.float64)
            offset = np.log(offset) if log_counts is None else offset
            scores = offset + logits[last[part]]
            top = scores.max(axis=1)
            total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
            chosen = scores[own]
            found = np.where(chosen == -np.inf, -np.inf, chosen - total)
        logs[start : start + step], log_n[start : start + step] = found, offset[own]
    return logs, weight[counted], log_n


def same_prompts(fit: Fit, prompts: Prompts, weights: Any, log_counts: Any, groups: Any) -> None:
    """Raise unless these concrete prompts give a fit's components and standard errors.

    It is what is known of the data of a fit where the labels are not: both are a matter of the
    prompts alone, given the logits.
    """
    components, errors = _errors(
        fit.model.logits, prompts.counts, prompts.last, weights, log_counts, groups
    )
    own = np.asarray(fit.standard_errors)
    told = np.isfinite(own) & (float(fit.loss) <= float(fit.nll))  # else they hold a prior's
    far = told & ~(abs(own - np.asarray(errors)) <= _ERRORS * own)
    if far.any() or (np.asarray(components) != np.asarray(fit.components)).any():
        raise ValueError(
            "fit: these prompts, weights, context and row groups do not give its components and "
            "standard errors: pass what it was fitted with"
        )


@jax.jit
def _errors(
    logits: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
    groups: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Components and standard errors by token, (K, K), as a fit without a prior has them."""
    if groups is not None:
        logits, last = logits.at[groups].set(logits), groups[last]
    blocks = blocks_of(counts, last, None, weights, log_counts)
    components = cooccurrence_components(blocks)
    information = curvature(blocks, laws(blocks, logits)[0])
    errors = jnp.sqrt(pseudo_inverse_diagonal(eliminate(information), components))
    return (components, errors) if groups is None else (components[groups], errors[groups])
