"""Winners of a generating CCMC, and how fast the losers grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import _supports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Array, Bool, Float

    from attnmarkov.model import CCMC


def winner_exponents(model: CCMC, winner: int | Iterable[int]) -> Float[Array, " token"]:
    """Growth exponents ``λ_j`` of all tokens beside a winner, or a set of winners.

    Once ``w`` has nearly all of a long generation, the count of token ``j`` grows as
    ``t**λ_j`` and its share falls as ``t**(λ_j − 1)``, with ``λ_j = P[w, j] / P[w, w]``. Once
    the tokens of a set share it at their equilibrium ``m``, ``λ_j = Σ_k m_k P[k, j] /
    Σ_i m_i P[k, i]``. That they can win is not checked: they can if ``λ_j < 1`` for all others
    (:func:`possible_winners`) and, for a set, if the equilibrium is stable within it too
    (:func:`equilibria`).

    Args:
        model: The CCMC that generates.
        winner: Token id ``w``, or several.

    Returns:
        (K,) exponents; 1 at the winners themselves. Of a single one infinite or NaN if
        ``P[w, w] = 0``.

    Raises:
        ValueError: If ``winner`` is no token id of the model, an empty set or one with a token
            twice, or if the tokens of the set have no equilibrium, or a continuum of them.

    References:
        [CCMC], on winner-takes-all; Pemantle (1992), for reinforced walks.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.5, 0.5]])
    >>> print(winner_exponents(model, 0).round(3))
    [1.   0.25]
    >>> pair = am.CCMC.from_transition_matrix([[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]])
    >>> print(winner_exponents(pair, {0, 1}).round(3))
    [1.  1.  0.5]
    """
    if isinstance(winner, set | frozenset | tuple | list | range | np.ndarray) and np.ndim(
        winner if isinstance(winner, np.ndarray) else list(winner)
    ):
        return _set_exponents(model, sorted(winner))
    winner = _validate.integer(winner, "winner", minimum=0)
    if winner >= model.num_tokens:
        raise ValueError(f"winner: {winner} is outside 0..{model.num_tokens - 1}")
    row = model.logits[winner]
    return jnp.exp(row - row[winner])


def _set_exponents(model: CCMC, winners: list[int]) -> Float[Array, " token"]:
    ids = _validate.integer_array(winners, "winner", ndim=(1,))
    if ids.size == 0:
        raise ValueError("winner: the set is empty")
    _validate.token_range(ids, "winner", model.num_tokens)
    if (np.diff(ids) == 0).any():
        raise ValueError(f"winner: token {ids[:-1][np.diff(ids) == 0][0]} is given twice")
    if len(ids) == 1:
        return winner_exponents(model, int(ids[0]))
    q = _supports.weights(model)
    found = _supports.solve_linear(q, ids[None])
    if len(found.supports) == 0:
        raise ValueError(f"winner: the tokens {ids.tolist()} have no equilibrium of their own")
    if found.freedom[0]:
        raise ValueError(
            f"winner: the tokens {ids.tolist()} have a continuum of equilibria, and the exponents "
            "depend on where a generation comes to"
        )
    return jnp.asarray(_supports.growth(q, found, 1.0)[0], model.logits.dtype)


def possible_winners(model: CCMC) -> Bool[Array, " token"]:
    """Which single tokens can take over a generation: ``P[w, j] < P[w, w]`` for all ``j ≠ w``.

    Returns:
        (K,) bool. For winner sets of two or more tokens see :func:`equilibria`.

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
