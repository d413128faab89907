"""Shares of tokens along a generation that its winners have taken over: large times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics.equilibria import equilibria
from attnmarkov.dynamics.exponents import as_winners, winner_exponents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC


def predicted_frequencies(
    model: CCMC, winner: int | Iterable[int], steps: ArrayLike, constants: ArrayLike
) -> Float[np.ndarray, "... step token"]:
    """Predicted shares ``m_j(t) = C_j t**(λ_j − 1)`` of the losers, and the rest for the winners.

    The constants ``C_j`` are random: each trajectory has its own (see :func:`fit_constants`).

    Args:
        model: The CCMC that generates.
        winner: Token id, or the tokens of a winner set, which share the rest as at their
            equilibrium.
        steps: (T,) positive numbers of steps ``t``.
        constants: (..., K) the ``C_j``; those of winners are not looked at.

    Returns:
        (..., T, K) shares. Winners get no less than 0 where ``t`` is too small for the law.

    Raises:
        ValueError: As :func:`attnmarkov.dynamics.winner_exponents`; if ``λ_j >= 1`` for a token
            whose constant is not 0, beside which the winners cannot win; if a step is not
            positive; or if shapes disagree.

    References:
        [CCMC], on winner-takes-all.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.5, 0.5]])
    >>> print(predicted_frequencies(model, 0, [1, 16], [0.0, 0.4]).round(4))
    [[0.6  0.4 ]
     [0.95 0.05]]
    """
    exponents, winners = _exponents(model, winner)
    t = _positive(steps)
    c = np.asarray(constants, np.float64)
    if c.shape[-1:] != (model.num_tokens,):
        raise ValueError(
            f"constants: expected {model.num_tokens} entries on the last axis, got shape {c.shape}"
        )
    losers = np.isin(np.arange(model.num_tokens), winners, invert=True)
    grows = losers & (exponents >= 1) & (c != 0).reshape(-1, losers.size).any(axis=0)
    if grows.any():
        j = int(grows.argmax())
        raise ValueError(
            f"winner: {winners} cannot win beside token {j}, whose exponent is {exponents[j]:.6g}, "
            "not below 1"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        shares = np.where(c[..., None, :] == 0, 0, c[..., None, :] * t[:, None] ** (exponents - 1))
    shares[..., winners] = 0
    rest = np.maximum(1 - np.nansum(shares, axis=-1, keepdims=True), 0)
    among = np.ones(1)
    if len(winners) > 1:
        (at,) = equilibria(model).at(winners)
        among = at.occupancy[winners]
    shares[..., winners] = rest * among
    return shares


def fit_constants(
    model: CCMC, winner: int | Iterable[int], steps: ArrayLike, shares: ArrayLike
) -> Float[np.ndarray, "... token"]:
    """The constants ``C_j`` of measured shares, one set for each trajectory.

    ``n_j(t) / t**λ_j`` tends to a random limit, and what it still does after a record does not
    depend on how it got there. So the last record tells all there is to know: the curve is made
    to pass through it.

    Args:
        model: The CCMC that generates.
        winner: As :func:`predicted_frequencies`.
        steps: (T,) positive numbers of steps, increasing.
        shares: (..., T, K) shares of all tokens, or medians of them.

    Returns:
        (..., K) constants; 0 for tokens with share 0 in the last record, 1 for winners.

    Raises:
        ValueError: As :func:`predicted_frequencies`.

    References:
        As there.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.5, 0.5]])
    >>> print(fit_constants(model, 0, [1, 16], [[0.6, 0.4], [0.95, 0.05]]).round(4))
    [1.  0.4]
    """
    exponents, winners = _exponents(model, winner)
    t = _positive(steps)
    m = np.asarray(shares, np.float64)
    if m.shape[-2:] != (t.size, model.num_tokens):
        raise ValueError(
            f"shares: expected {t.size} steps of {model.num_tokens} tokens on the last axes, "
            f"got shape {m.shape}"
        )
    last = m[..., -1, :]
    constants = np.where(last > 0, last * t[-1] ** (1 - exponents), 0)
    constants[..., winners] = 1
    return constants


def _exponents(model: CCMC, winner: int | Iterable[int]) -> tuple[np.ndarray, list[int]]:
    winners = as_winners(winner, model.num_tokens).tolist()
    return np.asarray(winner_exponents(model, winners), np.float64), winners


def _positive(steps: ArrayLike) -> np.ndarray:
    t = np.atleast_1d(_validate.finite(steps, "steps"))
    if t.ndim != 1 or t.size == 0:
        raise ValueError(f"steps: expected a non-empty (T,) vector, got shape {t.shape}")
    if (t <= 0).any():
        raise ValueError(f"steps: must be positive, got {t[t <= 0][0]:g}")
    return t
