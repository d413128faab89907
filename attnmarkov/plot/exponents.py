"""Measured growth exponents against their predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def growth_exponents(slopes: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot measured log-log slopes of losing tokens against what the mean field predicts.

    Args:
        slopes: A dataset along dim ``group``, as
            :meth:`attnmarkov.experiments.winner_takes_all.WinnerTakesAll.slopes` gives, with
            ``predicted`` exponents at the rollout's horizon and their ``limit``
            ``P[w, j] / P[w, w]``, ``median`` slopes, the ends ``lower`` and ``upper`` of their
            intervals, and a coordinate ``num_tokens``.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    sizes = np.unique(slopes["num_tokens"])
    for i, size in enumerate(sizes):
        part = slopes.isel(group=np.flatnonzero(slopes["num_tokens"] == size))
        x, y = part["predicted"].values, part["median"].values
        errors = np.stack([y - part["lower"].values, part["upper"].values - y])
        ax.errorbar(
            x,
            y,
            errors,
            fmt="o",
            ms=5,
            capsize=2,
            lw=1,
            color=_style.colour(i),
            label=f"K = {size}",
        )
        ax.plot(part["limit"], y, "o", ms=5, mfc="none", color=_style.colour(i), alpha=0.5)
    ends = [
        max(0.0, min(float(slopes[v].min()) for v in ("limit", "predicted", "lower")) - 0.05),
        max(float(slopes[v].max()) for v in ("predicted", "upper")) + 0.05,
    ]
    ax.plot(ends, ends, color="0.25", linestyle="--", linewidth=1, label="prediction")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel=r"predicted exponent (mean field; hollow: its limit $\lambda_j = P_{wj}/P_{ww}$)",
        ylabel="measured slope of log count (median, 99.99 % interval)",
        title="growth of losing tokens",
    )
