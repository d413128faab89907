"""Growth exponents measured on token sequences, with intervals that a single sequence allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnmarkov import _validate
from attnmarkov._intervals import quantile_interval
from attnmarkov.dynamics._sequences import Sequences, as_sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

_BLOCKS = 8  # of equal log-time, for the dispersion
_SLOPE_COUNTS = 50  # counts below which the table says that slopes fall short


class GroupGrowth(NamedTuple):
    """Growth beside one winner, over the sequences that it wins; arrays over ``tokens``.

    Attributes:
        winner: The token they have most of.
        num_sequences: How many they are.
        tokens: (J,) token ids.
        exponent: (J,) ``λ̂`` of all these sequences together; NaN if none was exposed.
        lower: (J,) lower ends of its intervals.
        upper: (J,) upper ends.
        slope: (J,) median slopes of log counts, of the sequences that have one: below the
            exponent where counts are small, see :class:`GrowthFit`.
        slope_lower: (J,) lower ends of their distribution-free intervals, minus infinity where
            sequences are too few for one.
        slope_upper: (J,) upper ends.
        dispersion: (J,) dispersion of the arrivals, mean over the sequences.
    """

    winner: int
    num_sequences: int
    tokens: Int[np.ndarray, " token"]
    exponent: Float[np.ndarray, " token"]
    lower: Float[np.ndarray, " token"]
    upper: Float[np.ndarray, " token"]
    slope: Float[np.ndarray, " token"]
    slope_lower: Float[np.ndarray, " token"]
    slope_upper: Float[np.ndarray, " token"]
    dispersion: Float[np.ndarray, " token"]


@dataclass(frozen=True, eq=False)
class GrowthFit:
    """Growth of J tokens over the last decades of R sequences.

    Arrivals of token ``j`` are taken for a birth process with intensity ``λ_j n_j(t) / t`` at
    history length ``t``: what a CCMC tends to when a winner has nearly all of its context, and
    what makes ``n_j`` grow as ``t**λ_j``. Given the past it has one parameter, and its likelihood
    is that of ``arrivals`` events at rate ``λ_j`` over an ``exposure`` ``Σ_t n_j(t) / t``: hence
    ``λ̂_j = arrivals / exposure``, with an interval from that one sequence, although its steps
    are neither independent nor identically distributed.

    Attributes:
        tokens: (J,) token ids, increasing.
        winner: (R,) the most frequent token of each sequence (the smallest id among equals).
        arrivals: (R, J) int64, times that the token came within the fitted range; its very first
            occurrence is not one, since it cannot have been copied.
        exposure: (R, J) ``Σ n_j(t) / t`` over the fitted range.
        slope: (R, J) ``log(n_j(T) / n_j(t0)) / log(T / t0)``; NaN if ``n_j(t0) = 0``. Its median
            falls short of the exponent while counts are small (over two decades from
            ``n_j(t0) = 1``, 0.42 for 0.5 and 0.15 for 0.25): compare it from some 50 counts on.
        dispersion: (R, J) Pearson's mean squared residual of the arrivals in 8 blocks of equal
            log-time. Near 1 if arrivals are as supposed; well above it if they come in clusters
            or their rate drifts, and then the intervals are too short. NaN without arrivals.
        start: (R,) where the fitted range begins, ``t0``.
        counts: (R, J) counts ``n_j(t0)`` where it begins.
        level: Coverage that the intervals aim at.
    """

    tokens: Int[np.ndarray, " token"]
    winner: Int[np.ndarray, " replicate"]
    arrivals: Int[np.ndarray, "replicate token"]
    exposure: Float[np.ndarray, "replicate token"]
    slope: Float[np.ndarray, "replicate token"]
    dispersion: Float[np.ndarray, "replicate token"]
    start: Int[np.ndarray, " replicate"]
    counts: Int[np.ndarray, "replicate token"]
    level: float

    @property
    def exponents(self) -> Float[np.ndarray, "replicate token"]:
        """(R, J) maximum-likelihood ``λ̂`` of every sequence; NaN where nothing was exposed."""
        return _ratio(self.arrivals, self.exposure)

    def interval(
        self,
    ) -> tuple[Float[np.ndarray, "replicate token"], Float[np.ndarray, "replicate token"]]:
        """Lower and upper ends, each (R, J), of intervals for every sequence's exponents.

        Quantiles of gamma laws, as for a Poisson count (Garwood 1936), finite above without any
        arrival. Conservative but for tokens that hardly come, whose exposure depends on their
        arrivals: from a count of 1 intervals of 95 % hold an exponent of 0.95 in 94.5 % of
        sequences. They are for a fixed exponent and rare tokens: too wide for tokens with a
        large share, the winner above all.
        """
        return _gamma_interval(self.arrivals, self.exposure, self.level)

    def by_winner(self) -> list[GroupGrowth]:
        """Growth beside each winner, most common winner first (one matrix often has several).

        ``exponent`` adds up arrivals and exposures, which supposes one exponent for the whole
        group. The median of slopes does not: its interval comes from order statistics.
        """
        winners, number = np.unique(self.winner, return_counts=True)
        out = []
        for w in winners[np.argsort(-number, kind="stable")]:
            rows = self.winner == w
            arrivals, exposure = self.arrivals[rows].sum(0), self.exposure[rows].sum(0)
            dispersion = self.dispersion[rows]
            known = ~np.isnan(dispersion)
            out.append(
                GroupGrowth(
                    int(w),
                    int(rows.sum()),
                    self.tokens,
                    _ratio(arrivals, exposure),
                    *_gamma_interval(arrivals, exposure, self.level),
                    *_medians(self.slope[rows], self.level),
                    _ratio(np.where(known, dispersion, 0).sum(0), known.sum(0)),
                )
            )
        return out

    def __repr__(self) -> str:
        """A table of the most common winner's losers, those with most arrivals first."""
        many = len(self.winner)
        head = f"GrowthFit({many} sequence{'s' * (many != 1)}, {len(self.tokens)} tokens"
        lines = self.table()
        return "\n  ".join([head + ":" * bool(lines), *lines]) + ")"

    def table(self, max_lines: int = 5) -> list[str]:
        """Lines of text on the losers beside the most common winner, most arrivals first."""
        group = self.by_winner()[0]
        rows = self.winner == group.winner
        arrivals = self.arrivals[rows].sum(0)
        seen = (self.tokens != group.winner) & ~np.isnan(group.exponent)
        losers = [j for j in np.argsort(-arrivals, kind="stable") if seen[j]][:max_lines]
        if not losers:
            return []
        before = np.median(self.counts[rows], axis=0)
        low = np.where(before < _SLOPE_COUNTS, f" (low: counts below {_SLOPE_COUNTS})", "")
        return [f"beside token {group.winner}, which has most of {group.num_sequences}:"] + [
            f"  token {self.tokens[j]}: exponent {group.exponent[j]:.3f} "
            f"[{group.lower[j]:.3f}, {group.upper[j]:.3f}] of {arrivals[j]} arrivals, "
            f"median slope {group.slope[j]:.3f}{low[j]}, dispersion {group.dispersion[j]:.2f}"
            for j in losers
        ]


def fit_growth(
    tokens: Any,
    num_tokens: int | None = None,
    lengths: ArrayLike | None = None,
    *,
    decades: float = 2.0,
    max_tokens: int = 64,
    level: float = 0.95,
) -> GrowthFit:
    """Growth exponents of the tokens of any sequences, over the last ``decades`` of each.

    Hand over the whole history: a prompt that is left out is missing in the small counts.

    Args:
        tokens: As :func:`~attnmarkov.dynamics.diagnose`.
        num_tokens: As there.
        lengths: As there.
        decades: The fitted range is ``T / 10**decades .. T`` of each sequence's length ``T``.
        max_tokens: The exponents are those of the ``max_tokens`` tokens that are the most
            frequent over all sequences.
        level: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: As :func:`~attnmarkov.dynamics.diagnose`, and if an option is out of range.

    References:
        [CCMC], on winner-takes-all, for the exponents that :func:`winner_exponents` predicts;
        Keiding (1974), for the likelihood of a birth process; Garwood (1936).

    >>> import jax, numpy as np, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.8, 0.2]])  # token 1: 0.25
    >>> prompt = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    >>> traj = am.rollout(model, jax.random.key(0), prompt, 4000, 200)
    >>> whole = np.concatenate([np.tile(prompt, (200, 1)), traj.tokens], axis=1)
    >>> fit_growth(whole)
    GrowthFit(200 sequences, 2 tokens:
      beside token 0, which has most of 200:
        token 1: exponent 0.254 [0.240, 0.268] of 1232 arrivals, median slope 0.240
        (low: counts below 50), dispersion 0.99)
    """
    sequences = as_sequences(tokens, num_tokens, lengths)
    return growth_of(sequences, decades, max_tokens, level)


def growth_of(sequences: Sequences, decades: float, max_tokens: int, level: float) -> GrowthFit:
    """:func:`fit_growth` of checked sequences."""
    decades = float(_validate.finite(decades, "decades"))
    if not decades > 0:
        raise ValueError(f"decades: must be positive, got {decades:g}")
    level = float(_validate.finite(level, "level"))
    if not 0 < level < 1:
        raise ValueError(f"level: must lie between 0 and 1, got {level:g}")
    max_tokens = _validate.integer(max_tokens, "max_tokens", minimum=1)
    kept, column = _most_frequent(sequences, max_tokens)
    many, longest = sequences.codes.shape
    width = len(kept) + 1  # the last column takes all other tokens
    where = column[sequences.codes] + width * np.arange(many)[:, None]

    def tally(weights: np.ndarray) -> np.ndarray:
        found = np.bincount(where.reshape(-1), weights.reshape(-1), many * width)
        return found.reshape(many, width)[:, :-1]

    # The token at position s brings the history from s to s + 1 tokens.
    total = sequences.lengths
    start = np.maximum(np.ceil(total / 10**decades), 1).astype(np.int64)
    share = np.linspace(0, 1, _BLOCKS + 1)
    edges = np.rint(np.exp(np.log(start)[:, None] + np.log(total / start)[:, None] * share))
    edges = edges.astype(np.int64)
    position = np.arange(longest)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, longest + 1))])  # Σ_{u ≤ t} 1/u
    reborn = (sequences.gaps > 0) & sequences.valid
    arrivals, exposure = [], []
    for low, high in zip(edges.T[:-1, :, None], edges.T[1:, :, None], strict=True):
        arrivals.append(tally(reborn & (position >= low) & (position < high)))
        # n_j(t) is the number of j's positions below t: each is there from t = s + 1 on.
        since = np.clip(position + 1, low, high)
        there = np.where(sequences.valid, harmonic[high - 1] - harmonic[since - 1], 0)
        exposure.append(tally(there))
    n, a = np.stack(arrivals), np.stack(exposure)
    rate = _ratio(n.sum(0), a.sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where(a > 0, (n - rate * a) ** 2 / (rate * a), 0).sum(0)
        freedom = np.maximum((a > 0).sum(0) - 1, 0)
        dispersion = np.where((rate > 0) & (freedom > 0), pearson / freedom, np.nan)
        before = tally(sequences.valid & (position < start[:, None]))
        end = tally(sequences.valid)
        slope = np.log(end / before) / np.log(total / start)[:, None]
    slope[~np.isfinite(slope)] = np.nan
    return GrowthFit(
        sequences.vocabulary[kept],
        _winners(sequences),
        n.sum(0).astype(np.int64),
        a.sum(0),
        slope,
        dispersion,
        start,
        before.astype(np.int64),
        level,
    )


def _most_frequent(sequences: Sequences, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the most frequent tokens, increasing, and the column that each code goes to."""
    size = len(sequences.vocabulary)
    counts = np.bincount(sequences.codes.reshape(-1), minlength=size + 1)[:size]
    kept = np.sort(np.argsort(-counts, kind="stable")[:most])
    column = np.full(size + 1, len(kept))
    column[kept] = np.arange(len(kept))
    return kept, column


def _winners(sequences: Sequences) -> np.ndarray:
    local, names = sequences.local
    many, size = names.shape
    index = (local + size * np.arange(many)[:, None])[sequences.valid]
    counts = np.bincount(index, minlength=many * size).reshape(many, size)
    return sequences.vocabulary[names[np.arange(many), counts.argmax(axis=1)]]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def _gamma_interval(
    arrivals: np.ndarray, exposure: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    from scipy import stats

    tail = (1 - level) / 2
    scale = _ratio(np.ones_like(exposure), exposure)
    lower = np.where(arrivals > 0, stats.gamma.ppf(tail, np.maximum(arrivals, 1)), 0) * scale
    return lower, stats.gamma.isf(tail, arrivals + 1) * scale


def _medians(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Medians of columns and the ends of their intervals; NaN is left out."""
    out = np.full((3, values.shape[1]), np.nan)
    for j, column in enumerate(values.T):
        there = column[~np.isnan(column)]
        if there.size:
            out[:, j] = np.median(there), *quantile_interval(there, 0.5, 1 - level)
    return out[0], out[1], out[2]
