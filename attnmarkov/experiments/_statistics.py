"""Intervals that the experiments judge by."""

from __future__ import annotations

import numpy as np

from attnmarkov._intervals import binomial_interval

__all__ = ["INTERVAL_99_99", "binomial_interval", "median_interval", "weighted_line"]

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
