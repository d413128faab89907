"""Learned positional weights, and the errors of fits that learn or ignore them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def log_weights(dataset: xr.Dataset, true: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Plot log-weights learned by many fits against the true ones, by lag.

    Args:
        dataset: With ``log_weights`` over (config, replicate, lag), ``predicted_variance`` (n
            times the variance of a fit) alike, and ``num_prompts`` on config. Its smallest and
            largest n are shown.
        true: (lag,) the teacher's log-weights.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    lag = np.asarray(dataset["lag"])
    ax.plot(lag, true, color="0.25", linewidth=1, label="true")
    n = dataset["num_prompts"].values
    for i, config in enumerate(dict.fromkeys([int(n.argmin()), int(n.argmax())])):
        part = dataset.isel(config=config)
        learned = part["log_weights"].values
        if (~np.isnan(learned[:, 0])).sum() < 2:
            continue
        x = lag + (-0.15, 0.15)[i]
        mean, spread = np.nanmean(learned, 0), 2 * np.nanstd(learned, 0, ddof=1)
        predicted = 2 * np.sqrt(np.nanmean(part["predicted_variance"].values, 0) / n[config])
        colour = _style.colour(i)
        ax.errorbar(
            x[1:],
            mean[1:],
            spread[1:],
            fmt="o",
            ms=4,
            capsize=2,
            color=colour,
            label=f"n = {n[config]}",
        )
        ends = np.asarray(true)[1:] + np.array([[-1], [1]]) * predicted[1:]
        ax.plot(x[1:] + 0.1, ends[0], "_", color="0.25", ms=6)
        ax.plot(x[1:] + 0.1, ends[1], "_", color="0.25", ms=6)
    ax.plot([], [], "_", color="0.25", label="predicted ± 2 s.d.")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="lag", ylabel=r"log-weight $\beta$, mean ± 2 s.d. of a fit")


def positional_curves(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the excess risk of fits with and without positions against the number of labels.

    Args:
        dataset: With ``excess_risk``, ``flat_excess_risk``, ``predicted_excess_risk`` (times n)
            and ``predicted_floor`` over (config, replicate), and ``scheme`` and ``num_prompts``
            on config.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    for i, scheme in enumerate(dict.fromkeys(dataset["scheme"].values.tolist())):
        part = dataset.isel(config=np.flatnonzero(dataset["scheme"] == scheme))
        done = (~np.isnan(part["excess_risk"].values)).sum(axis=1) > 1
        part = part.isel(config=np.flatnonzero(done))
        n, colour = part["num_prompts"].values, _style.colour(i)
        for variable, marker, filled in (
            ("excess_risk", "o", True),
            ("flat_excess_risk", "s", False),
        ):
            values = part[variable].values
            known = np.sqrt((~np.isnan(values)).sum(axis=1))
            ax.errorbar(
                n,
                np.nanmean(values, axis=1),
                2 * np.nanstd(values, axis=1, ddof=1) / known,
                fmt=marker,
                ms=4,
                capsize=2,
                color=colour,
                mfc=colour if filled else "none",
                label=scheme if filled else None,
            )
        ax.plot(n, np.nanmean(part["predicted_excess_risk"], axis=1) / n, "--", color=colour, lw=1)
        ax.plot(n, np.nanmean(part["predicted_floor"], axis=1), ":", color=colour, lw=1)
    ax.plot([], [], "--", color="0.25", linewidth=1, label="predicted, joint fit")
    ax.plot([], [], "s", color="0.25", mfc="none", ms=4, label="positions ignored")
    ax.plot([], [], ":", color="0.25", linewidth=1, label="predicted floor")
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = np.unique(dataset["num_prompts"])
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax, xlabel="labels $n$", ylabel="excess risk (nats per token), mean ± 2 s.e."
    )
