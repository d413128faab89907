"""The exact maps P ↔ S ↔ W between a CCMC and the self-attention that samples it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def centre_logits(logits: Float[Array, "*row token"]) -> Float[Array, "*row token"]:
    """Shift every row so that its finite entries sum to zero: the canonical gauge of ``S``.

    Minus infinities (masked tokens) stay. Adding a constant to a row of ``S`` changes no law
    ([CCMC]), so this picks one representative.

    >>> import jax.numpy as jnp
    >>> centre_logits(jnp.array([[0.0, 2.0], [-jnp.inf, 5.0]])).tolist()
    [[-1.0, 1.0], [-inf, 0.0]]
    """
    finite = jnp.isfinite(logits)
    total = jnp.where(finite, logits, 0).sum(-1, keepdims=True)
    return logits - total / jnp.maximum(finite.sum(-1, keepdims=True), 1)


def logits_from_transition_matrix(p: Float[Array, "*row token"]) -> Float[Array, "*row token"]:
    """``S = log P``, rows centred; zeros of ``P`` become minus infinity."""
    return centre_logits(jnp.log(p))


def scores(
    logits: Float[Array, "token token"],
    counts: Float[Array, "*context token"],
    last: Int[Array, "*context"],
) -> Float[Array, "*context token"]:
    """Unnormalised log-weights ``S[k, j] + log n_j`` of the next token, (..., K).

    Minus infinity where ``n_j = 0`` or ``j`` is masked. No checks: for use inside jit.
    """
    return logits[last] + jnp.log(counts.astype(logits.dtype))


def attention_weight(logits: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """The unique ``W`` in ``S_E = span{(e_i − e_j) e_kᵀ}`` with ``e_jᵀ W e_k = S[k, j] + c_k``.

    With ``G = E Eᵀ`` and ``c = −(1ᵀ G⁻¹ Sᵀ) / (1ᵀ G⁻¹ 1)``, ``A = G⁻¹ (Sᵀ + 1c) G⁻¹`` has
    ``1ᵀA = 0``, and ``W = Eᵀ A E`` ([CCMC]). Computed on the host in float64 through
    ``Eᵀ G⁻¹ = pinv(E)``, which does not square the condition number of ``E``.

    Args:
        logits: (K, K) finite ``S``.
        embedding: (K, d) of rank K.

    Returns:
        (d, d) float64.
    """
    s, e = np.asarray(logits, np.float64), np.asarray(embedding, np.float64)
    inverse = np.linalg.pinv(e)  # (d, K) = Eᵀ G⁻¹, so that 1ᵀG⁻¹ = (pinv(E) 1)ᵀ pinv(E)
    ones_g = inverse.sum(axis=1) @ inverse
    shift = -(ones_g @ s.T) / ones_g.sum()
    return inverse @ (s.T + shift) @ inverse.T
