"""What any token sequences show of collapse: repetition, concentration, growth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics._sequences import as_sequences
from attnmarkov.dynamics.concentration import collapse_times, share_curves
from attnmarkov.dynamics.growth import GrowthFit, growth_of
from attnmarkov.dynamics.repetition import distinct_ngrams, repetition_rates
from attnmarkov.rollout.api import log_spaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Diagnostics of R token sequences; print it for a table, or see :meth:`to_dataset`.

    Attributes:
        num_tokens: Vocabulary size K.
        lengths: (R,) tokens of each sequence.
        distinct: (R, N) distinct-n for ``n = 1..N``: different n-grams over all n-grams; NaN
            where a sequence is shorter than ``n``.
        corpus_distinct: (N,) the same of all sequences together, as Li et al. (2016) have it.
        windows: (W,) windows ``w`` of the repetition rates.
        repetition: (R, W) share of tokens that stand among the ``w`` before them: rep/w of
            Welleck et al. (2020), of the tokens themselves.
        at: (T,) increasing numbers of tokens at which the curves are taken.
        top: (M,) numbers ``k`` of most frequent tokens.
        top_share: (R, T, M) joint share of the ``k`` most frequent among the first ``at``
            tokens; NaN past a sequence's end.
        entropy: (R, T) entropy in nats of the shares of the first ``at`` tokens; likewise.
        winner: (R,) the most frequent token of the whole (the smallest id among equals).
        winner_share: (R,) its share of the whole.
        collapse_time: (R,) the number of tokens after which the top tokens of the last window
            keep at least ``collapse_share`` of every trailing window, so at least one window;
            -1 if they never do.
        collapse_share: That share.
        collapse_window: Tokens of that window.
        num_winners: How many tokens share it.
        growth: Growth exponents with intervals, see :class:`GrowthFit`.
    """

    num_tokens: int
    lengths: Int[np.ndarray, " replicate"]
    distinct: Float[np.ndarray, "replicate n"]
    corpus_distinct: Float[np.ndarray, " n"]
    windows: Int[np.ndarray, " window"]
    repetition: Float[np.ndarray, "replicate window"]
    at: Int[np.ndarray, " step"]
    top: Int[np.ndarray, " top"]
    top_share: Float[np.ndarray, "replicate step top"]
    entropy: Float[np.ndarray, "replicate step"]
    winner: Int[np.ndarray, " replicate"]
    winner_share: Float[np.ndarray, " replicate"]
    collapse_time: Int[np.ndarray, " replicate"]
    collapse_share: float
    collapse_window: int
    num_winners: int
    growth: GrowthFit

    @property
    def sequence_repetition(self) -> Float[np.ndarray, "replicate n"]:
        """(R, N) seq-rep-n of Welleck et al. (2020), ``1 - distinct``: n-grams that are repeats."""
        return 1 - self.distinct

    def to_dataset(self) -> xr.Dataset:
        """The same as an ``xarray.Dataset`` with dims ``replicate``, ``step``, ``token``, ...

        ``token`` numbers the tokens with growth exponents, ``ngram`` is ``n``, ``window`` and
        ``top`` are the windows and the numbers of top tokens.
        """
        import xarray as xr

        lower, upper = self.growth.interval()
        per_token = ("replicate", "token")
        data = {
            "length": ("replicate", self.lengths),
            "distinct": (("replicate", "ngram"), self.distinct),
            "corpus_distinct": ("ngram", self.corpus_distinct),
            "repetition": (("replicate", "window"), self.repetition),
            "top_share": (("replicate", "step", "top"), self.top_share),
            "entropy": (("replicate", "step"), self.entropy),
            "winner": ("replicate", self.winner),
            "winner_share": ("replicate", self.winner_share),
            "collapse_time": ("replicate", self.collapse_time),
            "growth_exponent": (per_token, self.growth.exponents),
            "growth_lower": (per_token, lower),
            "growth_upper": (per_token, upper),
            "growth_arrivals": (per_token, self.growth.arrivals),
            "growth_dispersion": (per_token, self.growth.dispersion),
            "growth_slope": (per_token, self.growth.slope),
        }
        coords = {
            "step": self.at,
            "ngram": np.arange(1, self.distinct.shape[1] + 1),
            "window": self.windows,
            "top": self.top,
            "token": self.growth.tokens,
        }
        attrs = {
            "num_tokens": self.num_tokens,
            "collapse_share": self.collapse_share,
            "collapse_window": self.collapse_window,
            "num_winners": self.num_winners,
            "level": self.growth.level,
        }
        return xr.Dataset(data, coords, attrs)

    def __repr__(self) -> str:
        """A short table: medians, with the middle half of the sequences, and the growth."""
        many = len(self.lengths)
        sizes = " to ".join(map(str, sorted({int(self.lengths.min()), int(self.lengths.max())})))
        last = np.searchsorted(self.at, self.lengths, side="right") - 1
        each = np.flatnonzero(last >= 0)  # the others end before the first record
        last = last[each]
        rows: list[tuple[str, np.ndarray]] = [
            *((f"distinct-{n}", column) for n, column in enumerate(self.distinct.T, 1)),
            *((f"repeats within {w}", self.repetition[:, i]) for i, w in enumerate(self.windows)),
            *((f"share of top {k}", self.top_share[each, last, i]) for i, k in enumerate(self.top)),
            ("entropy (nats)", self.entropy[each, last]),
        ]
        done = self.collapse_time[self.collapse_time >= 0]
        what = "one token" if self.num_winners == 1 else f"{self.num_winners} tokens"
        collapse = f"{done.size} of {many} collapse: {what} with {self.collapse_share:g} of every "
        collapse += f"{self.collapse_window} tokens"
        if done.size:
            collapse += f", from {np.median(done):.0f} on in the median"
        lines = [
            f"Diagnostics({many} sequence{'s' * (many != 1)} of {sizes} tokens from a "
            f"vocabulary of {self.num_tokens}:",
            *(f"{name:18} {_middle(values)}" for name, values in rows),
            collapse,
            *self.growth.table(),
        ]
        return "\n  ".join(lines) + ")"


def diagnose(
    tokens: Any,
    num_tokens: int | None = None,
    lengths: ArrayLike | None = None,
    *,
    max_n: int = 4,
    windows: Sequence[int] = (16, 32, 128, 512),
    at: ArrayLike | None = None,
    top: Sequence[int] = (1, 10),
    collapse_share: float = 0.9,
    collapse_window: int = 128,
    num_winners: int = 1,
    decades: float = 2.0,
    max_tokens: int = 64,
    level: float = 0.95,
) -> Diagnostics:
    """How repetitive and how collapsed token sequences are, whatever made them.

    On the host, in NumPy: a few seconds for 64 sequences of 100,000 tokens.

    Args:
        tokens: (R, L) integer token ids, NumPy or JAX; or (L,) for a single sequence; or a
            sequence of R sequences of different lengths.
        num_tokens: Vocabulary size K; one more than the largest id if None.
        lengths: (R,) numbers of valid tokens, each in 1..L; what follows is padding and may hold
            anything. All L are valid if None.
        max_n: distinct-n is taken for ``n = 1..max_n``.
        windows: Numbers ``w`` of preceding tokens in which a repetition is looked for.
        at: Increasing numbers of tokens in 1..L at which the curves are taken; 60 evenly spaced
            in the log if None.
        top: Increasing numbers ``k`` of most frequent tokens whose joint share is followed.
        collapse_share: Share, in (0, 1], that a collapsed sequence keeps in every window.
        collapse_window: Tokens of that trailing window; a shorter sequence is one window.
        num_winners: How many tokens may hold the share together: the most frequent ones of the
            sequence's last window.
        decades: As :func:`fit_growth`, for the growth exponents.
        max_tokens: As :func:`fit_growth`.
        level: As :func:`fit_growth`.

    Raises:
        ValueError: If there is no sequence, one is empty, an id is negative, too large or no
            integer, ``lengths`` disagrees with ``tokens``, or an option is out of range.

    References:
        Li et al. (2016), A diversity-promoting objective function for neural conversation
        models (distinct-n); Welleck et al. (2020), Neural text generation with unlikelihood
        training (rep/w and seq-rep-n); :func:`fit_growth` for the exponents.

    >>> d = diagnose([[0, 1, 2, 0, 0, 0, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3]], collapse_window=4)
    >>> d.distinct[:, 1].round(3).tolist(), d.winner.tolist(), d.collapse_time.tolist()
    ([0.571, 0.571], [0, 0], [7, -1])
    """
    sequences = as_sequences(tokens, num_tokens, lengths)
    longest = sequences.codes.shape[1]
    max_n = _validate.integer(max_n, "max_n", minimum=1)
    sizes = _increasing(windows, "windows")
    ks = _increasing(top, "top")
    steps = log_spaced(longest, 60) if at is None else _increasing(at, "at")
    if steps[-1] > longest:
        raise ValueError(
            f"at: {steps[-1]} is past the longest sequence, which has {longest} tokens"
        )
    collapse_share = float(_validate.finite(collapse_share, "collapse_share"))
    if not 0 < collapse_share <= 1:
        raise ValueError(f"collapse_share: must lie in (0, 1], got {collapse_share:g}")
    collapse_window = _validate.integer(collapse_window, "collapse_window", minimum=1)
    num_winners = _validate.integer(num_winners, "num_winners", minimum=1)
    growth = growth_of(sequences, decades, max_tokens, level)
    distinct, corpus = distinct_ngrams(sequences, max_n)
    curves = share_curves(sequences, steps, tuple(ks.tolist()))
    return Diagnostics(
        sequences.num_tokens,
        sequences.lengths,
        distinct,
        corpus,
        sizes,
        repetition_rates(sequences, sizes.tolist()),
        steps,
        ks,
        curves.top_share,
        curves.entropy,
        growth.winner,
        curves.winner_share,
        collapse_times(sequences, collapse_share, collapse_window, num_winners),
        collapse_share,
        collapse_window,
        num_winners,
        growth,
    )


def _increasing(values: Any, name: str) -> np.ndarray:
    numbers = np.atleast_1d(_validate.integer_array(values, name, ndim=(0, 1)))
    if numbers.size == 0:
        raise ValueError(f"{name}: is empty")
    if numbers[0] < 1:
        raise ValueError(f"{name}: must be at least 1, got {numbers[0]}")
    if (np.diff(numbers) <= 0).any():
        i = int((np.diff(numbers) <= 0).argmax())
        raise ValueError(f"{name}: must increase, but has {numbers[i + 1]} after {numbers[i]}")
    return numbers.astype(np.int64)


def _middle(values: np.ndarray) -> str:
    """Median and middle half of the numbers that there are."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        return "-"
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f}" + (f"  ({low:.3f} to {high:.3f})" if values.size > 1 else "")
