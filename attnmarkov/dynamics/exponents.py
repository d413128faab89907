"""Winners of a generating CCMC, and how fast the losers grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import _supports
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.model import AttentionHead

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC, SelfAttention


def winner_exponents(
    model: CCMC | SelfAttention | AttentionHead, winner: int | Iterable[int] | ArrayLike
) -> Float[Array, " token"]:
    """Growth exponents ``λ_j`` of all tokens beside a winner, or a set of winners.

    Once ``w`` has nearly all of a long generation, the count of token ``j`` grows as
    ``t**λ_j`` and its share falls as ``t**(λ_j − 1)``, with ``λ_j = P[w, j] / P[w, w]``. Once
    the tokens of a set share it at their equilibrium ``m``, ``λ_j = Σ_k m_k P[k, j] /
    Σ_i m_i P[k, i]``. That they can win is not checked: they can if ``λ_j < 1`` for all others
    (:func:`possible_winners`) and, for a set, if the equilibrium is stable within it too
    (:func:`equilibria`).

    Args:
        model: The CCMC, self-attention or attention head that generates. Of a head a single
            winner takes one row of logits only, a set all of them.
        winner: Token id ``w``, or several: a set, a list, a vector, keys of a dict.

    Returns:
        (K,) exponents; 1 at the winners themselves. Of a single one infinite or NaN if
        ``P[w, w] = 0``.

    Raises:
        ValueError: If ``winner`` is no token id of the model, an empty set, one with a token
            twice or an array of two or more dimensions, or if the tokens of the set have no
            equilibrium, or a continuum of them.

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
    if not isinstance(model, AttentionHead):
        model = as_ccmc(model)
    ids = as_winners(winner, model.num_tokens)
    if len(ids) == 1:
        head = isinstance(model, AttentionHead)
        row = model.logits_of(ids[0]) if head else model.logits[ids[0]]
        return jnp.exp(row - row[ids[0]])
    model = as_ccmc(model)
    log_q = _supports.log_weights(model)
    found = _supports.solve_linear(log_q, ids[None])
    if len(found.supports) == 0:
        raise ValueError(f"winner: the tokens {ids.tolist()} have no equilibrium of their own")
    if found.freedom[0]:
        raise ValueError(
            f"winner: the tokens {ids.tolist()} have a continuum of equilibria, and the exponents "
            "depend on where a generation comes to"
        )
    return jnp.asarray(_supports.growth(log_q, found, 1.0)[0], model.logits.dtype)


def as_winners(winner: Any, num_tokens: int, name: str = "winner") -> Int[np.ndarray, " winner"]:
    """Increasing token ids, from one of them, any iterable, or an array of none or one dimension.

    Raises:
        ValueError: If it is not that, is empty, or has a token twice or outside 0..K-1.
    """
    if not hasattr(winner, "ndim") and isinstance(winner, Iterable):
        winner = list(winner)
    if np.ndim(winner) == 0:
        one = _validate.integer(winner, name, minimum=0)
        if one >= num_tokens:
            raise ValueError(f"{name}: {one} is outside 0..{num_tokens - 1}")
        return np.array([one])
    ids = _validate.integer_array(winner, name, ndim=(1,))
    if ids.size == 0:
        raise ValueError(f"{name}: the set is empty")
    ids = np.sort(ids)
    _validate.token_range(ids, name, num_tokens)
    if (np.diff(ids) == 0).any():
        raise ValueError(f"{name}: token {ids[:-1][np.diff(ids) == 0][0]} is given twice")
    return ids


def possible_winners(model: CCMC | SelfAttention) -> Bool[Array, " token"]:
    """Which single tokens can take over a generation: ``P[w, j] < P[w, w]`` for all ``j ≠ w``.

    Returns:
        (K,) bool. For winner sets of two or more tokens see :func:`equilibria`.

    References:
        [CCMC], on winner-takes-all.

    >>> import attnmarkov as am
    >>> possible_winners(am.CCMC.from_transition_matrix([[0.8, 0.2], [0.6, 0.4]])).tolist()
    [True, False]
    """
    s = as_ccmc(model).logits
    own = jnp.diagonal(s)[:, None]
    others = jnp.where(jnp.eye(model.num_tokens, dtype=bool), -jnp.inf, s)
    return (others < own).all(axis=1)
