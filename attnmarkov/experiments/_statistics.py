"""Intervals that the experiments judge by."""

from __future__ import annotations

import numpy as np

INTERVAL_99_99 = 3.890592  # normal standard errors each side of a two-sided 99.99 % interval


def median_interval(values: np.ndarray, alpha: float) -> tuple[float, float]:
    """Distribution-free interval for a median from order statistics; misses with ``alpha``.

    >>> import numpy as np
    >>> median_interval(np.arange(101.0), 0.05)
    (40.0, 60.0)
    """
    from scipy import stats

    ordered = np.sort(values)
    low = max(int(stats.binom.ppf(alpha / 2, ordered.size, 0.5)) - 1, 0)
    return float(ordered[low]), float(ordered[ordered.size - 1 - low])


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


def weighted_line(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares ``y = a + b x`` with known standard errors: ``(a, b)`` and theirs.

    >>> import numpy as np
    >>> values, errors = weighted_line(np.array([0.0, 1, 2]), np.array([1.0, 3, 5]), np.ones(3))
    >>> values.round(6).tolist(), errors.round(3).tolist()
    ([1.0, 2.0], [0.913, 0.707])
    """
    design = np.column_stack([np.ones_like(x), x]) / error[:, None]
    inverse = np.linalg.inv(design.T @ design)
    return inverse @ design.T @ (y / error), np.sqrt(np.diag(inverse))
