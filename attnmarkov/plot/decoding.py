"""What temperature, penalties and other decoders do to collapse, and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def decoding_phases(points: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the measured top share over temperature and repetition penalty.

    Args:
        points: Dataset along ``point`` with ``temperature``, ``penalty``, ``exponent`` and
            ``top_share``; only points with exponent 1 are shown.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If no point has exponent 1.
    """
    points = points.isel(point=np.flatnonzero(points["exponent"] == 1))
    if points.sizes["point"] == 0:
        raise ValueError("points: none has exponent 1")
    ax = _style.axes(ax)
    t, r = points["temperature"].values, points["penalty"].values
    xs, ys = np.unique(t), np.unique(r)
    share = np.full((len(ys), len(xs)), np.nan)
    share[np.searchsorted(ys, r), np.searchsorted(xs, t)] = points["top_share"].values
    x_edges, y_edges = _edges(xs), _edges(ys)
    image = ax.pcolormesh(x_edges, y_edges, share, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            value = share[row, column]
            if np.isfinite(value):
                _value(ax, x, y, value, image.cmap(value))
    ends = np.array([max(x_edges[0], y_edges[0]), min(x_edges[-1], y_edges[-1])])
    if ends[0] < ends[1]:
        line = ax.plot(ends, ends, color="#D55E00", linestyle="--", linewidth=2)
        ax.legend(
            line,
            ["predicted boundary, a = ρ / T = 1"],
            fontsize=8,
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, -0.32),
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, values in ((ax.xaxis, xs), (ax.yaxis, ys)):
        axis.set_ticks(values, [f"{v:g}" for v in values])
        axis.set_ticks([], minor=True)
    ax.figure.colorbar(image, ax=ax, label="top share in the last decade")
    _style.finish(ax, xlabel="temperature $T$", ylabel=r"repetition penalty $\rho$")
    ax.grid(False)
    return ax


def losers_by_decade(points: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Plot the share of trajectories in which more than one token came between t and 10 t.

    Args:
        points: Dataset along ``point`` with ``temperature``, ``penalty``, ``exponent`` and
            ``power``, and over (point, decade) ``alone`` and ``alone_predicted``, with the
            coordinate ``start``; points with exponent and penalty 1 are shown.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.
    """
    shown = np.flatnonzero((points["exponent"] == 1) & (points["penalty"] == 1))
    points = points.isel(point=shown).sortby("power")
    ax, start = _style.axes(ax), points["start"].values
    for i in range(points.sizes["point"]):
        at, colour = points.isel(point=i), _style.colour(i)
        label = f"T = {float(at['temperature']):g}, a = {float(at['power']):g}"
        ax.plot(start, 1 - at["alone"], "o-", color=colour, linewidth=2, label=label)
        ax.plot(start, 1 - at["alone_predicted"], "--", color="0.25", linewidth=1, zorder=4)
    ax.plot([], [], "--", color="0.25", linewidth=1, label="predicted")
    ax.set_xscale("log")
    ax.set_ylim(-0.03, 1.06)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _style.finish(
        ax, xlabel="generated tokens $t$", ylabel="a second token comes in $(t, 10\\,t]$"
    )


def decoding_costs(settings: xr.Dataset, *, scale: str = "linear", ax: Axes | None = None) -> Axes:
    """Plot the entropy that each decoding setting keeps against what it costs in likelihood.

    Filled dots are measured, open squares predicted, joined by dashed lines.

    Args:
        settings: Dataset along ``setting`` (a coordinate of names) with ``entropy`` and ``cost``,
            and ``entropy_predicted`` and ``cost_predicted``, NaN where nothing is predicted.
        scale: "linear" axes, or "symlog": logarithmic from 0.01 nats on, for settings that
            collapse.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If the scale is unknown.
    """
    _validate.choice(scale, "scale", ["linear", "symlog"])
    ax = _style.axes(ax)
    order = np.lexsort((settings["cost"].values, settings["entropy"].values))
    for number, i in enumerate(order):
        at, colour = settings.isel(setting=int(i)), _style.colour(number)
        x, y = float(at["entropy"]), float(at["cost"])
        marker = "os^Dv"[number // len(_style.COLOURS) % 5]
        name = str(at["setting"].values)
        ax.plot([x], [y], marker, color=colour, ms=7, zorder=4, linestyle="none", label=name)
        px, py = float(at["entropy_predicted"]), float(at["cost_predicted"])
        if np.isfinite(px) and np.isfinite(py):
            ax.plot([x, px], [y, py], "--", color=colour, linewidth=0.9)
            ax.plot([px], [py], "s", color=colour, mfc="none", ms=11, mew=1.4, zorder=3)
    ax.plot([], [], "s", color="0.25", mfc="none", ms=10, mew=1.4, label="predicted limit")
    if scale == "symlog":
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_yscale("symlog", linthresh=0.01)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
        ax.set_xlim(-0.002, 2)
        ax.set_ylim(-0.002, 2)
    else:
        ax.margins(0.12)
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel="entropy of the last decade's tokens (nats)",
        ylabel="cost under the model's own law\n(nats per token)",
    )


def _value(ax: Axes, x: float, y: float, value: float, fill: tuple) -> None:
    """A number on its cell, above the boundary."""
    ax.text(
        x,
        y,
        f"{value:.2f}",
        ha="center",
        va="center",
        fontsize=8,
        color="black" if value > 0.6 else "white",
        bbox={"facecolor": fill, "edgecolor": "none", "pad": 1.5},
        zorder=5,
    )


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of cells around increasing values on a logarithmic axis."""
    logs = np.log(values)
    if len(logs) == 1:
        return np.exp(logs + np.array([-0.2, 0.2]))
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))
