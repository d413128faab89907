"""Checks of the arguments of :func:`attnmarkov.estimate.fit`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnmarkov.model.ccmc import CCMC


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


def labels(batch: Prompts, y: Any) -> jax.Array:
    """``y`` as (n,) int32, one token of each prompt."""
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
    _validate.token_range(ids, "y", batch.num_tokens)
    if _validate.is_concrete(batch):
        impossible = np.asarray(batch.counts)[np.arange(n), ids] == 0
        if impossible.any():
            row = int(impossible.argmax())
            raise ValueError(
                f"y: entry [{row}] is token {ids[row]}, which does not stand in prompt {row}; "
                "a CCMC emits only tokens of the prompt"
            )
    return jnp.asarray(ids, jnp.int32)


def limits(prior: Any, tolerance: Any, max_iterations: Any) -> None:
    """Raise unless prior >= 0, tolerance > 0 and max_iterations >= 1, where concrete."""
    if prior is not None and _validate.is_concrete(prior):
        number = _number(prior, "prior")
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"prior: must be a finite precision of at least 0, got {number}")
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
