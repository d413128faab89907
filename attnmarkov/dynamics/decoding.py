"""What decoding does to collapse: which regime, at what cost, and when only one token comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics.drift import check_power, check_shares, power_of, stationary_law
from attnmarkov.dynamics.equilibria import Equilibria, equilibria
from attnmarkov.model import Sampling

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC

DECODING_REGIMES = ("all tokens keep a share", "power-law collapse", "finite-time fixation")
"""Names of the regimes of decoded generation."""

_EXACT_TERMS = 64  # of a long sum that are added one by one, before it is taken as an integral
_NODES = 32


@dataclass(frozen=True, eq=False)
class DecodingPrediction:
    """What generation with a power of the shares comes to.

    Attributes:
        power: ``a = exponent * repetition_penalty / temperature``.
        equilibria: Equilibria of the mean field at that power.
        regime: One of :data:`DECODING_REGIMES`. Finite-time fixation for ``a > 1`` (where
            a stable equilibrium of more tokens may hold some trajectories as well), power-law
            collapse if a stable equilibrium lacks a token at ``a = 1``, else the first.
        entropies: (S,) entropy in nats of the shares at each stable equilibrium.
        costs: (S,) :func:`decoding_cost` there, in nats per token.
        relaxation_rates: (S,) shares come to it as ``t**-rate``.
    """

    power: float
    equilibria: Equilibria
    regime: str
    entropies: Float[np.ndarray, " equilibrium"]
    costs: Float[np.ndarray, " equilibrium"]
    relaxation_rates: Float[np.ndarray, " equilibrium"]

    @property
    def shares(self) -> Float[np.ndarray, "equilibrium token"]:
        """(S, K) shares at the stable equilibria."""
        size = self.equilibria.num_tokens
        return np.array([e.occupancy for e in self.equilibria.stable]).reshape(-1, size)

    def __repr__(self) -> str:
        """Power, regime, and the entropy and cost of each stable equilibrium."""
        ends = ", ".join(
            f"entropy {h:.3f} at cost {c:.3f}"
            for h, c in list(zip(self.entropies, self.costs, strict=True))[:8]
        )
        more = ", ..." * (len(self.costs) > 8)
        return f"DecodingPrediction(power {self.power:.4g}, {self.regime}; {ends}{more})"


def predict_decoding(
    model: CCMC,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
) -> DecodingPrediction:
    """Whether generation collapses under a temperature, penalty and reinforcement exponent.

    All three act as one power ``a = exponent * repetition_penalty / temperature`` of the shares,
    with ``Q = P ** (repetition_penalty / temperature)`` beside it. For ``a > 1`` from a finite
    time on a few tokens alone come; for ``a < 1`` all keep a share; at ``a = 1`` winners take
    over by power laws. (In a CCMC only tokens of the context can come, all of which a repetition
    penalty touches: above 1 it makes repetition *more* likely.)

    Args:
        model: The CCMC that generates.
        exponent: Reinforcement exponent, as ``FullContext(exponent=...)``.
        temperature: As ``Sampling(temperature=...)``.
        repetition_penalty: As ``Sampling(repetition_penalty=...)``.

    Returns:
        A :class:`DecodingPrediction`.

    Raises:
        ValueError: If a parameter is out of range.

    References:
        Pemantle (1992), Benaïm (1997), Volkov (2006), for reinforced walks with powers.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.75, 0.25], [0.25, 0.75]])
    >>> predict_decoding(model, temperature=2.0)
    DecodingPrediction(power 0.5, all tokens keep a share; entropy 0.693 at cost 0.690)
    """
    heat = _temperature(exponent, temperature, repetition_penalty)
    power = power_of(exponent, heat)
    found = equilibria(model, exponent=exponent, temperature=heat)
    regime = DECODING_REGIMES[0]
    if power > 1:
        regime = DECODING_REGIMES[2]
    elif power == 1 and found.winner_sets:
        regime = DECODING_REGIMES[1]
    shares = np.array([e.occupancy for e in found.stable]).reshape(-1, model.num_tokens)
    rates = np.array([e.relaxation_rate for e in found.stable])
    costs = np.empty(0)
    if len(shares):
        costs = decoding_cost(model, shares, exponent=exponent, temperature=heat)
    return DecodingPrediction(power, found, regime, _entropy(shares), costs, rates)


def decoding_cost(
    model: CCMC,
    shares: ArrayLike,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Float[np.ndarray, "*batch"]:
    """Mean of ``-log p_model`` of the tokens that come while the shares are held at ``m``.

    ``Σ_k ν_k Σ_j M[k, j] (-log (m_j P[k, j] / Σ_i m_i P[k, i]))``, where ``M`` is the decoded law,
    ``ν`` its stationary law, and the model's own law is that of plain attention to the same
    history. With plain decoding it is the entropy rate at these shares.

    Args:
        model: The CCMC that generates.
        shares: (..., K) shares, or counts: only ratios matter.
        exponent: As :func:`predict_decoding`.
        temperature: As :func:`predict_decoding`.
        repetition_penalty: As :func:`predict_decoding`.

    Returns:
        (...) nats per token, float64; 0 where one token has everything.

    Raises:
        ValueError: As :func:`attnmarkov.dynamics.stationary_law`.

    >>> import attnmarkov as am, numpy as np
    >>> model = am.CCMC.from_transition_matrix([[0.75, 0.25], [0.25, 0.75]])
    >>> decoding_cost(model, [[0.5, 0.5], [1.0, 0.0]]).round(4).tolist()
    [0.5623, 0.0]
    """
    heat = _temperature(exponent, temperature, repetition_penalty)
    visits = stationary_law(model, shares, exponent=exponent, temperature=heat)
    m = np.asarray(check_shares(shares, "shares", model.num_tokens), np.float64)
    logits = np.asarray(model.logits, np.float64)
    drawn = np.exp(_log_softmax(logits / heat + _weights(m, exponent / heat)[..., None, :]))
    own = _log_softmax(logits + _weights(m, 1.0)[..., None, :])
    surprise = -np.where(drawn > 0, drawn * np.where(drawn > 0, own, 0), 0).sum(axis=-1)
    return np.maximum((np.asarray(visits, np.float64) * surprise).sum(axis=-1), 0.0)


def staying_probability(
    model: CCMC,
    counts: ArrayLike,
    last: ArrayLike,
    num_steps: int,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Float[np.ndarray, "*batch token"]:
    """The chance that each of the next ``num_steps`` tokens is token ``w``, for every ``w``.

    With ``c = Σ_{j≠w} n_j**a Q[w, j] / Q[w, w]`` it is the chance to go to ``w`` times
    ``Π_s 1 / (1 + c / (n_w + s)**a)``: for ``a > 1`` the product stays above 0 for ever, and the
    token comes alone from some time on; for ``a <= 1`` it falls to 0, at ``a = 1`` like
    ``s**-c``. Long products as integrals, to a relative error of about 1e-5 of their logarithm.

    Args:
        model: The CCMC that generates.
        counts: (..., K) counts of the whole history.
        last: (...) its last token.
        num_steps: Number of next tokens, at least 1.
        exponent: As :func:`predict_decoding`.
        temperature: As :func:`predict_decoding`.
        repetition_penalty: As :func:`predict_decoding`.

    Returns:
        (..., K) probabilities, float64: disjoint, so that their sum is the chance that one
        token alone comes.

    Raises:
        ValueError: If a parameter or number is out of range, or shapes disagree.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.5, 0.5]])
    >>> staying_probability(model, [1, 1], 0, 3).round(4).tolist()  # 1/2 · 2/3 · 3/4
    [0.25, 0.25]
    """
    heat = _temperature(exponent, temperature, repetition_penalty)
    num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
    size, power = model.num_tokens, power_of(exponent, heat)
    n = np.asarray(_validate.finite(counts, "counts"), np.float64)
    at = _validate.integer_array(last, "last", ndim=(n.ndim - 1,))
    if n.shape != (*at.shape, size):
        raise ValueError(f"counts: expected shape {(*at.shape, size)}, got {n.shape}")
    if (n < 0).any():
        raise ValueError(f"counts: must not be negative, got {n.min():g}")
    _validate.token_range(at, "last", size)
    weight = _weights(n, power)
    logits = np.asarray(model.logits, np.float64) / heat
    first = _log_softmax(logits[at] + weight)
    scores = logits + weight[..., None, :]
    others = np.where(np.eye(size, dtype=bool), -np.inf, scores)
    with np.errstate(invalid="ignore"):
        log_c = np.logaddexp.reduce(others, axis=-1) - np.diagonal(logits)
    reached = first > -np.inf
    log_c = np.where(reached, np.where(np.isnan(log_c), np.inf, log_c), 0)  # NaN: no way on
    lost = _log_losses(log_c, np.where(reached, n, 1) + 1, num_steps - 1, power)
    return np.where(reached, np.exp(np.where(reached, first, 0) - lost), 0.0)


def _weights(counts: np.ndarray, power: float) -> np.ndarray:
    """``power * log n``; minus infinity for absent tokens, whatever the power."""
    present = counts > 0
    return np.where(present, power * np.log(np.where(present, counts, 1)), -np.inf)


def _log_losses(log_c: np.ndarray, n: np.ndarray, num: int, power: float) -> np.ndarray:
    """``Σ_{s<num} log(1 + c / (n + s)**a)``: the midpoint rule, in log time, past some terms."""
    exact = np.arange(min(num, _EXACT_TERMS))
    total = np.logaddexp(0, log_c[..., None] - power * np.log(n[..., None] + exact)).sum(axis=-1)
    if num > _EXACT_TERMS:
        x, w = np.polynomial.legendre.leggauss(_NODES)
        low, high = np.log(n + _EXACT_TERMS - 0.5), np.log(n + num - 0.5)
        half = (high - low)[..., None] / 2
        u = (high + low)[..., None] / 2 + half * x
        total += (w * half * np.exp(u) * np.logaddexp(0, log_c[..., None] - power * u)).sum(axis=-1)
    return total


def _temperature(exponent: float, temperature: float, repetition_penalty: float) -> float:
    """The temperature that temperature and penalty are together."""
    check_power(exponent, temperature)
    Sampling(repetition_penalty=repetition_penalty).check()
    return float(temperature) / float(repetition_penalty)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    with np.errstate(invalid="ignore"):  # rows with nothing to attend are NaN
        return log_softmax(scores, axis=-1)


def _entropy(shares: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    return entr(shares).sum(axis=-1)
