"""Error of the fitted model against the number of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_LABELS = {
    "excess_risk": ("excess risk (nats per token)", r"$K(K-1)/2n$"),
    "squared_error": (r"squared error $\|\hat S - S^\star\|_F^2$", r"$\mathrm{tr}(I^+)/n$"),
}


def learning_curves(
    dataset: xr.Dataset, variable: str = "excess_risk", *, ax: Axes | None = None
) -> Axes:
    """Plot a mean error with its standard errors against ``n``, one series per vocabulary.

    Args:
        dataset: With ``variable`` over (config, replicate), its prediction times ``n`` as
            ``predicted_<variable>`` over (config, replicate), and coordinates ``num_tokens``
            and ``num_prompts`` on config.
        variable: ``"excess_risk"`` or ``"squared_error"``.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If ``variable`` is neither.
    """
    if variable not in _LABELS:
        raise ValueError(f"variable: unknown {variable!r}; known: {', '.join(_LABELS)}")
    ax = _style.axes(ax)
    ylabel, formula = _LABELS[variable]
    for i, size in enumerate(np.unique(dataset["num_tokens"])):
        part = dataset.isel(config=np.flatnonzero(dataset["num_tokens"] == size))
        n, values = part["num_prompts"].values, part[variable].values
        done = (~np.isnan(values)).sum(axis=1) > 1  # grid points of an unfinished run are left out
        n, values = n[done], values[done]
        predicted = part[f"predicted_{variable}"].values[done]
        mean = np.nanmean(values, axis=1)
        known = np.sqrt((~np.isnan(values)).sum(axis=1))
        error = 2 * np.nanstd(values, axis=1, ddof=1) / known
        ax.errorbar(
            n, mean, error, fmt="o", ms=4, capsize=2, color=_style.colour(i), label=f"K = {size}"
        )
        prediction = np.nanmean(predicted, axis=1) / n
        ax.plot(n, prediction, color=_style.colour(i), linestyle="--", linewidth=1)
    ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label=f"predicted {formula}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="prompts $n$", ylabel=f"{ylabel}, mean ± 2 s.e.")
