"""Basins of winners over the counts that a generation starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from attnmarkov.dynamics.basins import Basins


def basins(
    basins: Basins, winner: int | Iterable[int] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Plot the probability that a winner set takes over, by the counts of the prompt.

    Of two tokens as a map over their counts, of three as points of the simplex.

    Args:
        basins: From ``attnmarkov.dynamics.basins``.
        winner: The winner set; the first if None.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If there are more than three tokens, there is no winner set, or ``winner`` is
            none.
    """
    size = basins.counts.shape[1]
    if size not in (2, 3):
        raise ValueError(f"basins: expected two or three tokens, got {size}")
    if winner is None:
        if not basins.sets:
            raise ValueError("basins: nothing can win")
        winner = basins.sets[0]
    tokens = basins.sets[basins.index(winner)]
    p = basins.probability(tokens)
    ax = _style.axes(ax)
    if size == 2:
        shape = basins.counts.max(axis=0) + 1
        grid = np.full(shape, np.nan)
        grid[tuple(basins.counts.T)] = p
        low = basins.counts.min(axis=0)
        shown = ax.pcolormesh(
            np.arange(low[0], shape[0]),
            np.arange(low[1], shape[1]),
            grid[low[0] :, low[1] :].T,
            vmin=0,
            vmax=1,
            cmap="viridis",
        )
        ax.set_aspect("equal")
        _style.finish(ax, xlabel="count of token 0", ylabel="count of token 1")
        ax.grid(False)
    else:
        shown = _simplex(basins.counts, p, ax)
    assert ax.figure is not None
    name = ", ".join(map(str, tokens))
    what = f"token {name} wins" if len(tokens) == 1 else f"tokens {name} win"
    ax.figure.colorbar(shown, ax=ax, shrink=0.85, label=f"probability that {what}")
    return ax


def _simplex(counts: np.ndarray, p: np.ndarray, ax: Axes):
    """Hexagons at the compositions, corners labelled."""
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    place = (counts / counts.sum(axis=1, keepdims=True)) @ corners
    ring = np.vstack([corners, corners[:1]])
    ax.plot(*ring.T, color="0.4", linewidth=1)
    shown = ax.scatter(*place.T, c=p, s=18000 / max(len(p), 60), marker="h", vmin=0, vmax=1)
    gaps = [
        (-0.03, -0.03, "right", "top"),
        (0.03, -0.03, "left", "top"),
        (0, 0.03, "center", "bottom"),
    ]
    for token, (dx, dy, side, edge) in enumerate(gaps):
        x, y = corners[token]
        ax.text(x + dx, y + dy, f"token {token}", ha=side, va=edge, fontsize=9)
    ax.set_aspect("equal")
    ax.set_xlim(-0.2, 1.2)
    ax.set_ylim(-0.12, 1.0)
    ax.axis("off")
    return shown
