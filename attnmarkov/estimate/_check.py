"""Checks of the arguments of :func:`attnmarkov.estimate.fit`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model.contexts import Context
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnmarkov.model.ccmc import CCMC

_SHORT, _SMALL, _LONG = 16, 2**12, 2**16  # prompts: the least, to powers of 2, and to no more


def solver(value: Any, known: Iterable[str]) -> None:
    """Raise unless ``value`` is a known name or has optax's ``init`` and ``update``."""
    if isinstance(value, str) or not (hasattr(value, "init") and hasattr(value, "update")):
        if isinstance(value, str) and value in known:
            return
        raise ValueError(
            f"solver: unknown solver {value!r}; known: {', '.join(known)}, "
            "or any optax.GradientTransformation"
        )


def prompts(batch: Any) -> None:
    """Raise unless ``batch`` is one batch of at least one prompt."""
    if not isinstance(batch, Prompts):
        raise ValueError(
            f"prompts: expected Prompts, got {type(batch).__name__}; "
            "build them with am.Prompts.from_tokens(tokens, num_tokens)"
        )
    if len(batch.counts.shape) != 2:
        raise ValueError(
            f"prompts: expected one batch, counts of shape (n, K), got {batch.counts.shape}; "
            "use jax.vmap over several"
        )
    if batch.num_prompts == 0:
        raise ValueError("prompts: there is no prompt")


def vocabulary(batch: Prompts, model: CCMC, name: str) -> None:
    """Raise unless the model is one model with as many tokens as the prompts."""
    if model.logits.shape != (batch.num_tokens, batch.num_tokens):
        raise ValueError(
            f"{name}: has logits of shape {model.logits.shape}, "
            f"but prompts has {batch.num_tokens} tokens"
        )


def labels(batch: Prompts, y: Any, weights: Any = None, log_counts: Any = None) -> jax.Array:
    """``y`` as (n,) int32, one token of each prompt that has a weight."""
    n = batch.num_prompts
    if not _validate.is_concrete(y):
        y = jnp.asarray(y)
        if y.shape != (n,):
            raise ValueError(f"y: expected shape ({n},), one label per prompt, got {y.shape}")
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"y: expected integers, got dtype {y.dtype}")
        return y.astype(jnp.int32)
    ids = _validate.integer_array(y, "y", ndim=(1,))
    if ids.shape != (n,):
        raise ValueError(f"y: expected shape ({n},), one label per prompt, got {ids.shape}")
    if not _validate.is_concrete(weights):
        return jnp.asarray(ids, jnp.int32)
    counted = np.ones(n, bool) if weights is None else np.asarray(weights) > 0
    _validate.token_range(np.where(counted, ids, 0), "y", batch.num_tokens)
    if _validate.is_concrete(batch, log_counts):
        held = np.asarray(batch.counts) > 0
        if log_counts is not None:
            held &= np.isfinite(np.asarray(log_counts))
        impossible = counted & ~held[np.arange(n), np.where(counted, ids, 0)]
        if impossible.any():
            row = int(impossible.argmax())
            where = "stand in" if log_counts is None else "stand within the context of"
            raise ValueError(
                f"y: entry [{row}] is token {ids[row]}, which does not {where} prompt {row}; "
                "a CCMC emits only tokens of the prompt"
            )
    return jnp.asarray(ids, jnp.int32)


def offsets(batch: Prompts, context: Any) -> jax.Array | None:
    """Logarithms of the prompts' position-weighted counts, (n, K); None if they are the counts."""
    if context is None:
        return None
    if not isinstance(context, Context):
        raise ValueError(f"context: expected a Context such as FullContext(), got {context!r:.80}")
    return context.log_weighted_counts(batch)


def sample_weights(batch: Prompts, weights: Any) -> jax.Array | None:
    """``weights`` as (n,) finite numbers of at least 0, not all 0; or None."""
    if weights is None:
        return None
    if np.shape(weights) != (batch.num_prompts,):
        raise ValueError(
            f"weights: expected shape ({batch.num_prompts},), one per prompt, "
            f"got {np.shape(weights)}"
        )
    if _validate.is_concrete(weights):
        values = np.asarray(weights, np.float64)
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"weights: must be finite and at least 0, got {values[row]} at [{row}]"
            )
        if not (values > 0).any():
            raise ValueError("weights: all are 0, so no prompt counts")
    return jnp.asarray(weights, jnp.result_type(float))


def shared_shape(
    counts: Any, last: Any, labels: Any, weights: Any, log_counts: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """The same data filled up with prompts of weight 0 to a length that others share.

    What was compiled for one number of prompts then serves many. Data that are traced or very
    long stay as they are.

    Args:
        counts: (n, K).
        last: (n,).
        labels: (n,) or None.
        weights: (n,) or None.
        log_counts: (n, K) or None.
    """
    n = len(counts)
    if n > _LONG or not _validate.is_concrete(counts, last, labels, weights, log_counts):
        return counts, last, labels, weights, log_counts
    bits = (n - 1).bit_length()
    more = -n % max(_SHORT, 1 << (bits if n <= _SMALL else bits - 3))
    weights = np.ones(n, jnp.result_type(float)) if weights is None else weights

    def filled(x: Any, value: int | None = None) -> Any:
        if x is None:
            return None
        x = np.asarray(x)
        first = x[:1] if value is None else np.asarray(value, x.dtype)
        rest = np.broadcast_to(first, (more, *x.shape[1:]))
        return np.concatenate([x, rest])

    return filled(counts), filled(last), filled(labels), filled(weights, 0), filled(log_counts)


def row_groups(batch: Prompts, groups: Any) -> jax.Array | None:
    """``groups`` as (K,) int32, the group of every row, ids in 0..K-1; or None."""
    if groups is None:
        return None
    size = batch.num_tokens
    if not _validate.is_concrete(groups):
        return jnp.asarray(groups, jnp.int32)
    ids = _validate.integer_array(groups, "row_groups", ndim=(1,))
    if ids.shape != (size,):
        raise ValueError(f"row_groups: expected shape ({size},), one per row, got {ids.shape}")
    if ids.min() < 0 or ids.max() >= size:
        raise ValueError(f"row_groups: expected ids in 0..{size - 1}, got {ids.tolist()}")
    return jnp.asarray(ids, jnp.int32)


def minibatch(solver: Any, batch_size: Any, key: Any) -> int | None:
    """``batch_size`` as an int of at least 1, for a solver that can use it; or None."""
    if batch_size is None:
        return None
    if solver in ("newton", "lbfgs"):
        raise ValueError(
            f"batch_size: {solver} needs all prompts at once; use adam or another first-order "
            "solver for minibatches"
        )
    if key is None:
        raise ValueError("key: minibatches are drawn, so a key such as jax.random.key(0) is needed")
    _validate.check_key(key)
    return _validate.integer(batch_size, "batch_size", minimum=1)


def limits(tolerance: Any, max_iterations: Any) -> None:
    """Raise unless tolerance > 0 and max_iterations >= 1, where concrete."""
    if _validate.is_concrete(tolerance):
        number = _number(tolerance, "tolerance")
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"tolerance: must be positive and finite, got {number}")
    if _validate.is_concrete(max_iterations):
        _validate.integer(max_iterations, "max_iterations", minimum=1)


def _number(value: Any, name: str) -> float:
    if np.ndim(value) == 0 and not isinstance(value, str | bytes | bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name}: expected a number, got {value!r:.80}")
