"""Errors of models that were learned from the same number of tokens in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_WORDS = {
    "one": "one trajectory",
    "restarts": "restarts",
    "refreshing": "fresh prompts",
}


def budget_errors(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the squared error of every row, by scheme: medians and quartiles over replicates.

    Args:
        dataset: With ``squared_error`` over (replicate, scheme, row).
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    rows = dataset["row"].values
    for i, scheme in enumerate(dataset["scheme"].values):
        values = dataset["squared_error"].sel(scheme=scheme).transpose("replicate", "row").values
        _points(ax, rows + 0.16 * (i - 1), values, i, _WORDS.get(str(scheme), str(scheme)))
    ax.set_xticks(rows, [f"row {r}" for r in rows])
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="", ylabel=r"squared error $\|\hat S_a - S^\star_a\|^2$")


def budget_risks(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the excess risk by scheme: medians and quartiles over replicates.

    Args:
        dataset: With ``excess_risk`` over (replicate, scheme).
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    schemes = [str(s) for s in dataset["scheme"].values]
    values = dataset["excess_risk"].transpose("replicate", "scheme").values
    for i in range(len(schemes)):
        _points(ax, np.array([i]), values[:, i : i + 1], i, None)
    ax.set_xticks(range(len(schemes)), [_WORDS.get(s, s).replace(" ", "\n") for s in schemes])
    ax.set_xlim(-0.5, len(schemes) - 0.5)
    ax.set_yscale("log")
    return _style.finish(ax, xlabel="", ylabel="excess risk (nats per token)")


def _points(ax: Axes, x: np.ndarray, values: np.ndarray, i: int, label: str | None) -> None:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    errors = np.stack([middle - low, high - middle])
    ax.errorbar(x, middle, errors, fmt="o", ms=5, capsize=3, color=_style.colour(i), label=label)
