"""What prompts that do not cover the vocabulary leave unlearned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def coverage_threshold(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the mean excess risk on prompts of all tokens against ``n``, one series per bridge.

    Args:
        dataset: Results of the experiment ``coverage-threshold``: ``excess_risk``,
            ``predicted_risk`` and ``floor`` over (config, replicate), and coordinates ``family``,
            ``bridge`` and ``num_prompts`` on config.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    dataset = dataset.isel(config=np.flatnonzero(dataset["family"] == "bridge"))
    for i, bridge in enumerate(np.unique(dataset["bridge"])):
        part = dataset.isel(config=np.flatnonzero(dataset["bridge"] == bridge))
        n, risk = part["num_prompts"].values, part["excess_risk"].values
        done = (~np.isnan(risk)).sum(axis=1) > 1
        if not done.any():
            continue
        n, risk = n[done], risk[done]
        error = 2 * np.nanstd(risk, axis=1, ddof=1) / np.sqrt((~np.isnan(risk)).sum(axis=1))
        predicted = part["predicted_risk" if bridge else "floor"].values[done]
        label = f"may meet in {bridge:.0%}" if bridge else "never meet"
        colour, mean = _style.colour(i), np.nanmean(risk, axis=1)
        ax.errorbar(n, mean, error, fmt="o", ms=4, capsize=2, color=colour, label=label)
        ax.plot(n, np.nanmean(predicted, axis=1), linestyle="--", linewidth=1, color=colour)
    ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label="predicted")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8, title="first and last token, of prompts", title_fontsize=8)
    return _style.finish(
        ax, xlabel="prompts $n$", ylabel="excess risk (nats per token), mean ± 2 s.e."
    )


def lost_contrasts(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the squared error of every row under random supports against what its graph loses.

    Args:
        dataset: As :func:`coverage_threshold`, with ``squared_error``, ``lost`` and ``connected``
            over (config, replicate, row).
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    ax = _style.axes(ax)
    part = dataset.isel(config=np.flatnonzero(dataset["family"] == "random"))
    error, lost = part["squared_error"].values.ravel(), part["lost"].values.ravel()
    connected = part["connected"].values.ravel()
    known = ~np.isnan(error)
    for i, (which, label) in enumerate(((~connected, "split graph"), (connected, "connected"))):
        shown = which & known
        ax.scatter(
            lost[shown],
            error[shown],
            s=10,
            alpha=0.5,
            linewidths=0,
            color=_style.colour(i),
            label=f"{label} ({shown.sum()} rows)",
        )
    top = float(np.nanmax(lost, initial=1e-3))
    ax.plot([0, top], [0, top], color="0.25", linestyle="--", linewidth=1, label="predicted")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel=r"what the graph of the row loses, $\|S_k - \Pi_k S_k\|^2$",
        ylabel=r"squared error of the row, $\|\hat S_k - S_k\|^2$",
    )
