"""Colours and axes shared by the figures; no global style is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers (yellow left out: too pale).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def colour(index: int) -> str:
    """The colour of series number ``index``, cycling."""
    return COLOURS[index % len(COLOURS)]


def axes(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure that pyplot does not hold on to."""
    return ax if ax is not None else Figure(figsize=(6, 4.2), layout="constrained").subplots()


def finish(ax: Axes, *, xlabel: str, ylabel: str, title: str | None = None) -> Axes:
    """Label the axes and draw a light grid."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if title:
        ax.set_title(title, fontsize=10)
    ax.grid(True, which="major", alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
