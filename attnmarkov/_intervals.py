"""Intervals without assumptions on the law: of proportions, of medians and other quantiles."""

from __future__ import annotations

import numpy as np


def binomial_interval(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion; each end misses with ``alpha / 2``.

    >>> low, high = binomial_interval(0, 100, 0.1)
    >>> low, round(high, 4)
    (0.0, 0.0295)
    """
    from scipy import stats

    low = stats.beta.ppf(alpha / 2, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - alpha / 2, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def share_intervals(
    hits: np.ndarray, undecided: int, trials: int, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals of several proportions that all hold at once but with ``alpha``.

    Bonferroni over the proportions. The ``undecided`` trials may belong to any of them: lower
    ends take none of them as hits, upper ends all.

    >>> low, high = share_intervals(np.array([90, 0]), 10, 100, 0.1)
    >>> low.round(3).tolist(), high.round(3).tolist()
    ([0.824, 0.0], [1.0, 0.176])
    """
    each = alpha / max(len(hits), 1)
    low = [binomial_interval(int(n), trials, each)[0] for n in hits]
    high = [binomial_interval(int(n) + undecided, trials, each)[1] for n in hits]
    return np.array(low), np.array(high)


def quantile_interval(values: np.ndarray, level: float, alpha: float) -> tuple[float, float]:
    """Interval of a quantile from order statistics; each end misses with ``alpha / 2`` at most.

    Infinite where no order statistic will do. Values may be infinite themselves, such as
    passage times that were not seen.

    >>> quantile_interval(np.arange(100.0), 0.5, 0.05)
    (39.0, 60.0)
    >>> quantile_interval(np.arange(5.0), 0.99, 0.05)
    (3.0, inf)
    """
    from scipy import stats

    ordered = np.sort(values)
    n = ordered.size
    # P(X_(k) > q) = P(Bin(n, level) < k) and P(X_(k) < q) <= P(Bin(n, level) >= k), k from 1.
    k_low = int(stats.binom.ppf(alpha / 2, n, level))
    k_high = int(stats.binom.ppf(1 - alpha / 2, n, level)) + 1
    low = ordered[k_low - 1] if k_low > 0 else -np.inf
    return float(low), float(ordered[k_high - 1] if k_high <= n else np.inf)
