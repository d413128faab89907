"""Information gathered along trajectories, on the predicted power laws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnmarkov.estimate.information_growth import InformationGrowth
    from attnmarkov.estimate.learnable import LearnableContrasts

_FROM = 10  # steps; before them much of the information is still 0


def information(
    growth: InformationGrowth,
    predicted: LearnableContrasts,
    row: int,
    *,
    decades: float = 2.0,
    first: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Plot the information about one row's contrasts with the winner against time.

    Lines are medians over trajectories, bands their quartiles. Dashed lines start on the medians
    ``decades`` before the end and go on with the predicted exponent ``e``: gains per log time
    ``∝ t**e``, with the constant of the decade before.

    Args:
        growth: The information of trajectories that ``predicted.winner`` takes.
        predicted: The exponents, from ``learnable_contrasts``.
        row: The row ``a``.
        decades: How much of the end is predicted.
        first: Whether to name the y axis and the dashed lines: in the first of several panels.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If ``row`` is no token id, or the records do not reach back a decade further
            than ``decades``.
    """
    size = growth.gain.shape[-1]
    if not 0 <= row < size:
        raise ValueError(f"row: {row} is outside 0..{size - 1}")
    before, start = growth.halves(decades + 1)[0], growth.halves(decades)[0]
    w, ax = predicted.winner, _style.axes(ax)
    gain = np.asarray(growth.gain, np.float64)[:, :, row, w]
    total, at = np.cumsum(gain, axis=1), np.asarray(growth.at, float)
    log_at = np.log(np.maximum(at, 1e-9))
    shown = at >= _FROM
    for j in range(size):
        if j == w:
            continue
        e, colour = float(predicted.exponents[row, j]), _style.colour(j)
        low, middle, high = np.quantile(total[..., j], [0.25, 0.5, 0.75], axis=0)
        ax.fill_between(at[shown], low[shown], high[shown], color=colour, alpha=0.15, linewidth=0)
        mark = "learnable" if predicted.learnable[row, j] else "not learnable"
        label = f"({w}, {j}): exponent {round(e, 2) + 0.0:.2f}, {mark}"
        ax.plot(at[shown], middle[shown], color=colour, linewidth=2, label=label)
        rate = (middle[start] - middle[before]) / _integral(e, log_at[before], log_at[start])
        line = [middle[start] + rate * _integral(e, log_at[start], t) for t in log_at[start:]]
        ax.plot(at[start:], line, color="0.25", linestyle="--", linewidth=1)
    if first:
        ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label="predicted growth")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=7.5, loc="upper left")
    return _style.finish(
        ax,
        xlabel="generated tokens $t$",
        ylabel=r"information $\sum\,p(w)\,p(j)$" if first else "",
        title=f"row {row}" + (" (the winner's)" if row == w else ""),
    )


def _integral(e: float, a: float, b: float) -> float:
    """``∫ exp(e (τ − a)) dτ`` from ``a`` to ``b``, times a constant that does not matter.

    Relative to ``exp(e a)``, put back by taking ``a`` from 0.
    """
    if abs(e) < 1e-6:
        return b - a
    return float((np.exp(e * b) - np.exp(e * a)) / e)
