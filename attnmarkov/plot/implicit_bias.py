"""Gradient descent on ``W`` beside the limit or direction that it is bound for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnmarkov.estimate.implicit_bias import Path


def implicit_bias(path: Path, *, ax: Axes | None = None) -> Axes:
    """Plot the norm of ``W`` against the steps, and how far it follows its prediction.

    On separated data the right-hand axis shows the cosine with the max-margin direction, and a
    dashed line the predicted growth ``‖W_svm‖ log t``, made to pass through the last point.
    Otherwise it shows the distance to the minimum-norm optimum, whose norm is dashed.

    Args:
        path: From :func:`attnmarkov.estimate.gradient_descent_path`, with a positive step.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes of the norm; the right-hand axes share its figure.

    Raises:
        ValueError: If no positive step was recorded.
    """
    shown = np.asarray(path.steps) > 0
    if not shown.any():
        raise ValueError("path: has no record at a positive step")
    steps, norm = np.asarray(path.steps)[shown], np.asarray(path.norm)[shown]
    separated = len(path.svm.comparisons) > 0
    ax = _style.axes(ax)
    ax.plot(steps, norm, color=_style.colour(0), label=r"$\|W\|_F$")
    if separated:
        line = norm[-1] + np.linalg.norm(path.svm.weight) * np.log(steps / steps[-1])
        positive = line > 0
        label, title = r"$\|W_{\mathrm{svm}}\| \log t$", "separated data: to infinity"
        ax.plot(steps[positive], line[positive], color="0.25", ls="--", lw=1, label=label)
    else:
        limit = float(np.linalg.norm(path.minimum_norm))
        title = "to the optimum of least norm"
        ax.axhline(limit, color="0.25", ls="--", lw=1, label="norm of the limit")
    ax.set_xscale("log")
    ax.set_ylim(0, None)

    right = ax.twinx()
    if separated:
        values, name = path.direction_cosine, r"cosine with $W_{\mathrm{svm}}$"
        right.set_ylim(min(0, float(np.nanmin(values[shown]))), 1.02)
    else:
        values, name = path.distance_to_minimum_norm, "distance to the limit"
        right.set_yscale("log")
    right.plot(steps, np.asarray(values)[shown], color=_style.colour(1), label=name)
    right.set_ylabel(name, color=_style.colour(1))
    right.spines["top"].set_visible(False)
    handles = [*ax.get_lines(), *right.get_lines()]
    labels = [str(line.get_label()) for line in handles]
    place = (0.65, 0.45) if separated else (0.03, 0.6)
    ax.legend(handles, labels, frameon=False, fontsize=8, loc=place)
    return _style.finish(ax, xlabel="steps of gradient descent $t$", ylabel="norm", title=title)
