"""Intervals that the experiments judge by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov._intervals import binomial_interval, quantile_interval

if TYPE_CHECKING:
    import xarray as xr

    from attnmarkov.sweep import Verdict

__all__ = [
    "INTERVAL_99_99",
    "binomial_interval",
    "limit_verdict",
    "quantile_interval",
    "weighted_line",
]

INTERVAL_99_99 = 3.890592  # normal standard errors each side of a two-sided 99.99 % interval


def limit_verdict(group: xr.Dataset, near: float) -> tuple[np.ndarray, np.ndarray, Verdict]:
    """Whether every ``median`` slope is within ``near`` of its ``limit``.

    Returns:
        Half widths of the intervals ``lower`` to ``upper``, distances of the medians from the
        limits, and the verdict: fail if an interval is further away than ``near``, pass if
        all medians are within it and intervals no wider.
    """
    lower, upper, limit = (group[n].values for n in ("lower", "upper", "limit"))
    half, off = (upper - lower) / 2, abs(group["median"].values - limit)
    if (np.maximum(lower - limit, limit - upper) > near).any():
        return half, off, "fail"
    sure = (half <= near).all() and (off <= near).all()
    return half, off, "pass" if sure else "inconclusive"


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
