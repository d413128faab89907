"""Absorption of finite contexts: times and winners, measured on exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def absorption_times(
    dataset: xr.Dataset,
    exact: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot mean times of absorption against the size of the window.

    Points are measured means with their intervals, dashed lines join the exact means.

    Args:
        dataset: Along ``config``: ``regime`` (any text), ``memory``, ``exact``, ``mean``,
            ``half`` (half-width of the interval of the mean).
        exact: By regime, sizes and exact means to join; those of the dataset if None.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    for i, regime in enumerate(np.unique(dataset["regime"].values)):
        part = dataset.isel(config=np.flatnonzero(dataset["regime"] == regime)).sortby("memory")
        size, colour = part["memory"].values, _style.colour(i)
        curve = (size, part["exact"].values) if exact is None else exact[str(regime)]
        ax.plot(*curve, color=colour, linestyle="--", linewidth=1.2)
        ax.errorbar(
            size, part["mean"], part["half"], fmt="o", ms=4.5, capsize=3, color=colour, label=regime
        )
    ax.plot([], [], color="0.25", linestyle="--", linewidth=1.2, label="exact")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="window $w$ (tokens)", ylabel="mean steps to absorption")


def absorption_winners(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot measured against exact absorption probabilities.

    Args:
        dataset: Along ``group``: ``exact``, ``measured``, ``lower``, ``upper``, ``num_tokens``.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    ax.plot([0, 1], [0, 1], color="0.25", linestyle="--", linewidth=1, label="exact")
    for i, size in enumerate(np.unique(dataset["num_tokens"].values)):
        part = dataset.isel(group=np.flatnonzero(dataset["num_tokens"] == size))
        y = part["measured"].values
        errors = np.stack([y - part["lower"].values, part["upper"].values - y])
        label = f"K = {size}"
        colour = _style.colour(i)
        ax.errorbar(
            part["exact"], y, errors, fmt="o", ms=4, capsize=2, lw=1, color=colour, label=label
        )
    ax.set_aspect("equal")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="exact absorption probability", ylabel="share of rollouts")


def collapse_times(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot median times of collapse against the total weight of the context.

    Args:
        dataset: Along ``config``: ``context`` ("window" or "decay"), ``regime``, ``memory``, and
            ``median`` with ``lower`` and ``upper`` ends of its interval.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    regimes = np.unique(dataset["regime"].values)
    for i, regime in enumerate(regimes):
        for context in np.unique(dataset["context"].values):
            which = (dataset["regime"] == regime) & (dataset["context"] == context)
            part = dataset.isel(config=np.flatnonzero(which)).sortby("memory")
            y = part["median"].values
            errors = np.stack([y - part["lower"].values, part["upper"].values - y])
            shape, face = ("o", _style.colour(i)) if context == "decay" else ("s", "white")
            label = f"{regime}, {context}"
            x, line = part["memory"].values, "-" if context == "decay" else ":"
            ax.errorbar(
                x, y, errors, marker=shape, ms=4.5, capsize=3, color=_style.colour(i),
                markerfacecolor=face, linestyle=line, label=label, linewidth=1.5,
            )  # fmt: skip
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel=r"total weight of the context: $w$, or $1/(1-\gamma)$",
        ylabel="median steps to collapse",
    )
