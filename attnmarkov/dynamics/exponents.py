"""Single-token winners of a generating CCMC, and how fast the losers grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from attnmarkov.model import CCMC


def winner_exponents(model: CCMC, winner: int) -> Float[Array, " token"]:
    """Growth exponents ``λ_j = P[w, j] / P[w, w]`` beside a single winner ``w``.

    Once ``w`` has nearly all of a long generation, the count of token ``j`` grows as
    ``t**λ_j`` and its share falls as ``t**(λ_j − 1)``.

    Args:
        model: The CCMC that generates.
        winner: Token id ``w``.

    Returns:
        (K,) exponents; 1 at the winner itself, infinite or NaN if ``P[w, w] = 0``.

    Raises:
        ValueError: If ``winner`` is no token id of the model.

    References:
        [CCMC], on winner-takes-all; Pemantle (1992), for reinforced walks.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.5, 0.5]])
    >>> print(winner_exponents(model, 0).round(3))
    [1.   0.25]
    """
    winner = _validate.integer(winner, "winner", minimum=0)
    if winner >= model.num_tokens:
        raise ValueError(f"winner: {winner} is outside 0..{model.num_tokens - 1}")
    row = model.logits[winner]
    return jnp.exp(row - row[winner])


def possible_winners(model: CCMC) -> Bool[Array, " token"]:
    """Which single tokens can take over a generation: ``P[w, j] < P[w, w]`` for all ``j ≠ w``.

    Returns:
        (K,) bool. Winner sets of two or more tokens are another matter.

    References:
        [CCMC], on winner-takes-all.

    >>> import attnmarkov as am
    >>> possible_winners(am.CCMC.from_transition_matrix([[0.8, 0.2], [0.6, 0.4]])).tolist()
    [True, False]
    """
    s = model.logits
    own = jnp.diagonal(s)[:, None]
    others = jnp.where(jnp.eye(model.num_tokens, dtype=bool), -jnp.inf, s)
    return (others < own).all(axis=1)
