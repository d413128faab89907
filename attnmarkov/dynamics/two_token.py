"""Two tokens, completely: who can win, at what shares both stay, and what that teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics.drift import check_power, power_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy.typing import ArrayLike

REGIMES = (
    "token 0 wins",
    "token 1 wins",
    "either wins",
    "both stay",
    "either wins, or both stay",
    "both stay, at either of two shares",
    "any share",
)
"""Names of the regimes, by their number."""

_BISECTIONS = 80


@dataclass(frozen=True, eq=False, repr=False)
class TwoTokenPhases:
    """What generation with ``P = [[1 − p, p], [q, 1 − q]]`` comes to.

    The leading dimensions are those of ``p`` and ``q``, broadcast against each other.

    Attributes:
        p: (...) chance of token 1 after token 0 at equal counts.
        q: (...) chance of token 0 after token 1.
        power: ``a = exponent / temperature``.
        regime: (...) int, an index of :data:`REGIMES`.
        can_win: (..., 2) bool, whether the token can take over alone.
        growth: (..., 2) exponent ``λ`` of the other token's count once token ``w`` has nearly
            all: ``Q[w, j] / Q[w, w]`` for power 1, 0 above (it comes finitely often),
            infinite below (it comes back). Where ``w`` cannot win, how fast it is left.
        shares: (..., 3) shares of token 0 at the equilibria with both tokens, increasing,
            NaN beyond the last.
        stable: (..., 3) bool, whether generations can come to them.
    """

    p: Float[np.ndarray, "*grid"]
    q: Float[np.ndarray, "*grid"]
    power: float
    regime: Int[np.ndarray, "*grid"]
    can_win: Bool[np.ndarray, "*grid 2"]
    growth: Float[np.ndarray, "*grid 2"]
    shares: Float[np.ndarray, "*grid 3"]
    stable: Bool[np.ndarray, "*grid 3"]

    @property
    def information_exponents(self) -> Float[np.ndarray, "*grid 2"]:
        """(..., 2) exponents ``2 λ − 1`` of the information on the loser's row beside winner ``w``.

        The loser is asked about ``t**λ`` times, and an answer brings about ``t**(λ − 1)``; the
        winner's row gets ``t**λ``. NaN where ``w`` cannot win.
        """
        return np.where(self.can_win, 2 * self.growth - 1, np.nan)

    @property
    def learnable(self) -> Bool[np.ndarray, "*grid 2"]:
        """(..., 2) whether one trajectory won by ``w`` teaches the loser's row: ``λ >= 1/2``."""
        return self.can_win & (self.growth >= 0.5)

    def __repr__(self) -> str:
        """How many points lie in each regime."""
        numbers = np.bincount(np.ravel(self.regime), minlength=len(REGIMES))
        named = zip(numbers, REGIMES, strict=True)
        shown = ", ".join(f"{name}: {number}" for number, name in named if number)
        return f"TwoTokenPhases({np.size(self.regime)} points, power {self.power:g}; {shown})"


def two_token_phases(
    p: ArrayLike, q: ArrayLike, *, exponent: float = 1.0, temperature: float = 1.0
) -> TwoTokenPhases:
    """The regimes of two-token generation, for arrays of ``(p, q)`` at once.

    With ``P = [[1 − p, p], [q, 1 − q]]``, power ``a = exponent / temperature``, ``Q = P**(1/T)``:

    * ``a = 1``: token 0 can win iff ``p < 1/2``, token 1 iff ``q < 1/2``. If both are above, both
      stay, at shares of ratio ``m_1 / m_0 = Q10 (Q01 − Q00) / (Q01 (Q10 − Q11))``; if both
      are below, either wins and the same point is where their basins meet. On the lines
      ``p = 1/2`` or ``q = 1/2`` second order decides (the loser's share falls like 1 / log t);
      at ``p = q = 1/2`` it is Pólya's urn, which comes to any share.
    * ``a > 1``: either wins, and from a finite time on comes alone. If the tokens call
      each other strongly enough (``p`` and ``q`` large), both may stay as well.
    * ``a < 1``: no token wins; both stay. If both call themselves strongly enough and ``a > 1/2``,
      there are two shares to come to.

    With ``s = log(m_1 / m_0)`` the equilibria solve ``h(s) = (1 − a) s − G(s) = 0``, where ``G`` is
    a difference of softplus functions with slope ``a θ``, ``θ = M11 − M01``. ``h`` has at most two
    critical points, in closed form, so that all zeros are found between them.

    Args:
        p: (...) chance of token 1 after token 0, in (0, 1).
        q: (...) chance of token 0 after token 1, in (0, 1).
        exponent: Reinforcement exponent of the context; ``a`` must be positive.
        temperature: Temperature of the decoder.

    Returns:
        A :class:`TwoTokenPhases`, in float64 on the host.

    Raises:
        ValueError: If an entry of ``p`` or ``q`` is outside (0, 1), their shapes do not broadcast,
            or a parameter is out of range.

    References:
        [CCMC], on winner-takes-all with two tokens.

    >>> two_token_phases([0.2, 0.2, 0.8], [0.4, 0.7, 0.6]).regime.tolist()
    [2, 0, 3]
    >>> two_token_phases(0.8, 0.6).shares.round(4).tolist()
    [0.3077, nan, nan]
    """
    check_power(exponent, temperature)
    a = power_of(exponent, temperature)
    if a <= 0:
        raise ValueError(f"exponent: must be above 0 for two-token phases, got {exponent:g}")
    p, q = _inside(p, "p"), _inside(q, "q")
    try:
        p, q = np.broadcast_arrays(p, q)
    except ValueError:
        raise ValueError(f"q: shape {q.shape} does not broadcast with {p.shape} of p") from None
    # log Q01/Q00 and log Q10/Q11: what each token gives the other.
    away, back = ((np.log(x) - np.log1p(-x)) / float(temperature) for x in (p, q))
    if a == 1:
        shares, slope = _closed_form(away, back)
        with np.errstate(over="ignore"):  # infinite at very low temperatures
            growth = np.exp(np.stack([away, back], axis=-1))
        can_win = np.stack([_falls(away, back), _falls(back, away)], axis=-1)
    else:
        shares, slope = _zeros(away, back, a)
        growth = np.full((*p.shape, 2), 0.0 if a > 1 else np.inf)
        can_win = np.full((*p.shape, 2), a > 1)
    stable = slope > 0  # ds/dτ goes as -h(s)
    order = np.argsort(shares, axis=-1)  # NaN last
    shares, stable = (np.take_along_axis(x, order, axis=-1) for x in (shares, stable))
    return TwoTokenPhases(p, q, a, _regimes(can_win, stable), can_win, growth, shares, stable)


def _inside(values: ArrayLike, name: str) -> np.ndarray:
    x = _validate.finite(values, name)
    bad = (x <= 0) | (x >= 1)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        at = f"entry {where}" if where else "the value"
        raise ValueError(f"{name}: {at} is {x[tuple(where)]:g}, outside (0, 1)")
    return x


def _falls(away: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Whether the token can win for power 1; on its boundary, if the other one lets go."""
    return (away < 0) | ((away == 0) & (back > 0))


def _closed_form(away: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of token 0 (..., 3) and the slope of ``h`` there, for power 1."""
    from scipy.special import expit

    inside = np.sign(away) * np.sign(back) > 0
    # m_1 / m_0 = Q10 (Q01 - Q00) / (Q01 (Q10 - Q11)) = (1 - e^-away) / (1 - e^-back)
    first, second = (
        np.maximum(-x, 0) + np.log(-np.expm1(-abs(np.where(inside, x, 1)))) for x in (away, back)
    )
    shares, slope = np.full((2, *away.shape, 3), np.nan)
    shares[..., 0] = np.where(inside, expit(second - first), np.nan)
    slope[..., 0] = np.where(inside, np.sign(away), np.nan)  # θ < 0 iff both leave
    return shares, slope


def _zeros(away: np.ndarray, back: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of token 0 at the zeros of ``h`` (..., 3), and the sign of its slope there.

    By bisection between the critical points of ``h``.
    """
    from scipy.special import expit

    away, back = away[..., None], back[..., None]

    def h(s: np.ndarray) -> np.ndarray:
        return (1 - a) * s - away - np.logaddexp(0, a * s - back) + np.logaddexp(0, a * s + away)

    inner = _critical_points(away, back, a)
    far = 1 + (abs(away) + abs(back)) / abs(1 - a) + abs(inner).max(axis=-1, keepdims=True)
    ends = np.concatenate([-far, inner, far], axis=-1)
    low, high = ends[..., :-1], ends[..., 1:]
    start, stop = h(low), h(high)
    crossed = (start < 0) != (stop < 0)
    for _ in range(_BISECTIONS):
        centre = (low + high) / 2
        same = (h(centre) < 0) == (start < 0)
        low, high = np.where(same, centre, low), np.where(same, high, centre)
    shares = np.where(crossed, expit(-(low + high) / 2), np.nan)
    return shares, np.where(crossed, np.sign(stop - start), np.nan)


def _critical_points(away: np.ndarray, back: np.ndarray, a: float) -> np.ndarray:
    """(..., 2) where ``h' = 1 − a (1 + θ)`` changes its sign; 0 and 0 if nowhere.

    ``θ = σ(u + d) − σ(u − d) = sinh d / (cosh d + cosh u)``, ``u = a s + (away − back) / 2``,
    ``d = −(away + back) / 2``. So ``cosh u = a sinh(d) / (1 − a) − cosh d``, here in logarithms.
    """
    d = -(away + back) / 2
    tail = np.exp(-2 * abs(d))
    scaled = (np.sign(d) * a / (1 - a) * (1 - tail) - (1 + tail)) / 2  # e^-|d| cosh u
    with np.errstate(divide="ignore", invalid="ignore"):
        log_cosh = abs(d) + np.log(scaled)
    log_cosh = np.where(log_cosh > 0, log_cosh, 0.0)  # NaN: nowhere
    u = log_cosh + np.log1p(np.sqrt(-np.expm1(-2 * log_cosh)))
    s = (u * np.array([-1.0, 1.0]) - (away - back) / 2) / a
    return np.where(u > 0, s, 0.0)


def _regimes(can_win: np.ndarray, stable: np.ndarray) -> np.ndarray:
    """Indices of :data:`REGIMES`."""
    both = stable.sum(axis=-1)
    first, second = can_win[..., 0], can_win[..., 1]
    cases = [
        first & second & (both > 0),
        first & second,
        first,
        second,
        both == 1,
        both == 2,
    ]
    return np.select(cases, [4, 2, 0, 1, 3, 5], default=6)
