"""The urn engine: exact counts in O(K) a record when all rows of ``P`` are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary

_ROW_TOLERANCE = 1e-5  # rows of logits that differ by rounding alone


@dataclass(frozen=True)
class Urn(Engine):
    """Draws counts at any horizon, if every query weighs the tokens alike.

    With equal rows the rollout is an urn with replacement weights ``n_j P_j``. In continuous
    time its counts are independent Yule processes, and given ``W_j ~ Gamma(n_j)`` the births of
    token ``j`` are a Poisson process with cumulative rate ``W_j (exp(P_j s) − 1)``. So the time
    ``s`` of birth ``T`` solves ``Σ_j W_j (exp(P_j s) − 1) = Gamma(T)``; the births before it are
    multinomial in proportion to the cumulative rates, and the last one to the rates themselves.
    No approximation, whatever ``T``.

    It computes on the host in float64 and 64-bit integers, so it takes concrete arguments only.

    References:
        Athreya and Karlin (1968).
    """

    max_lanes: int | None = 65536
    max_context: int = 2**62

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        reason = super().refusal(law, record)
        if reason is not None:
            return reason
        if not _validate.is_concrete(law.logits):
            return "can't run inside jit: it works on the host"
        s = np.asarray(law.logits, np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.where(s == s[0], 0, np.abs(s - s[0]))
        if gap.max() > _ROW_TOLERANCE:
            row = int(gap.max(axis=1).argmax())
            return f"can't take unequal rows of P: rows 0 and {row} differ"
        return None

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> np.ndarray:
        """See :class:`~attnmarkov.rollout.Engine`; int64 on the host.

        Raises:
            ValueError: If an argument is traced.
        """
        if not _validate.is_concrete(law, seeds, prompts):
            raise ValueError("engine: urn works on concrete arguments only; use 'scan' in jit")
        s = np.asarray(law.logits, np.float64)
        rates = np.exp(s[0] - s[0].max())
        start = np.asarray(prompts.counts, np.int64)
        entropy = np.concatenate([np.asarray(_random.words(seeds, i)) for i in range(2)]).T
        return np.stack(
            [
                _lane(np.random.Generator(np.random.Philox(_seed(seed))), rates, n, at)
                for seed, n in zip(entropy, start, strict=True)
            ]
        )


def _seed(words: np.ndarray) -> int:
    return int.from_bytes(words.astype("<u4").tobytes(), "little")


def _lane(rng: np.random.Generator, rates: np.ndarray, n: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(len(at), K) counts of one trajectory."""
    out = np.empty((len(at), n.size), np.int64)
    alive = (n > 0) & (rates > 0)
    rates = np.where(alive, rates, 0) / rates[alive].max()
    scale = np.where(alive, rng.standard_gamma(np.maximum(n, 1)), 0)
    counts, time, births = n.copy(), 0.0, 0
    for i, target in enumerate(at):
        new = int(target) - births
        if new > 0:
            # The cumulative rate from `time` on: scale exp(rates time) (exp(rates s) - 1).
            now = scale * np.exp(rates * time)
            step = _solve(now, rates, rng.standard_gamma(new))
            mass = now * np.expm1(rates * step)
            counts = counts + rng.multinomial(new - 1, mass / mass.sum())
            time += step
            pace = rates * scale * np.exp(rates * time)
            counts[rng.choice(n.size, p=pace / pace.sum())] += 1
            births = int(target)
        out[i] = counts
    return out


def _solve(now: np.ndarray, rates: np.ndarray, target: float) -> float:
    """The root s > 0 of Σ now (exp(rates s) − 1) = target, by bracketing in float64."""
    from scipy import optimize

    def gap(s: float) -> float:
        return float(np.log(now @ np.expm1(rates * s)) - np.log(target))

    # A single token j alone reaches the target at log1p(target / now_j) / rate_j: an upper end;
    # all tokens at the fastest rate reach it at the lower end.
    alive = (now > 0) & (rates > 0)
    upper = float((np.log1p(target / now[alive]) / rates[alive]).min())
    lower = float(np.log1p(target / now.sum()) / rates[alive].max())
    widen = 1e-9  # the ends meet where one token is alone, or rates are equal
    ends = lower * (1 - widen), upper * (1 + widen)
    root: Any = optimize.brentq(gap, *ends, xtol=1e-300, rtol=np.float64(1e-14))
    return float(root)
