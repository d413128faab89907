"""Random transition matrices and named token laws."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


def random_transition_matrix(
    key: Key[Array, ""], num_tokens: int, concentration: float = 1.0
) -> Float[Array, "token token"]:
    """Draw a transition matrix with independent symmetric-Dirichlet rows.

    Args:
        key: A typed JAX key.
        num_tokens: Vocabulary size K, at least 1.
        concentration: Dirichlet parameter of every entry, above 0. 1 is uniform on the simplex;
            small values give nearly deterministic rows, large ones nearly uniform rows.

    Returns:
        (K, K) array; row ``k`` is the law of the token after ``k``.

    Raises:
        ValueError: If ``num_tokens`` or ``concentration`` is out of range, or ``key`` no key.

    >>> import jax
    >>> random_transition_matrix(jax.random.key(0), 3).shape
    (3, 3)
    """
    _validate.check_key(key)
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    if _validate.is_concrete(concentration):
        value = _validate.finite(concentration, "concentration")
        if value.ndim != 0 or not value > 0:
            raise ValueError(f"concentration: must be one number above 0, got {concentration}")
    alpha = jnp.broadcast_to(jnp.asarray(concentration, jnp.result_type(float)), (num_tokens,))
    return jax.random.dirichlet(key, alpha, (num_tokens,))


def zipf_law(num_tokens: int, exponent: float = 1.0) -> Float[Array, " token"]:
    """The Zipf law ``p_j ∝ (j + 1)**-exponent`` over tokens ``0..num_tokens-1``.

    Raises:
        ValueError: If ``num_tokens`` is below 1 or ``exponent`` is not finite.

    >>> [round(float(p), 3) for p in zipf_law(3)]
    [0.545, 0.273, 0.182]
    """
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    if _validate.is_concrete(exponent) and not math.isfinite(float(exponent)):
        raise ValueError(f"exponent: must be finite, got {exponent}")
    return jax.nn.softmax(-exponent * jnp.log(jnp.arange(1.0, num_tokens + 1)))
