"""Phase portraits of the mean field, and the phases of two-token generation."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.dynamics import REGIMES, drift, equilibria, mean_field
from attnmarkov.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from attnmarkov.dynamics import Equilibria, TwoTokenPhases
    from attnmarkov.model import CCMC

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
_PIES = ("#0072B2", "#D55E00", "white")
_FILLS = ("#cfe3f1", "#f7dcc8", "#cdebe1", "#f3e3ef", "#fbeccc", "#dcf0fb", "#d9d9d9")


def phase_portrait(
    model: CCMC,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    log_time: float = 12.0,
    ax: Axes | None = None,
) -> Axes:
    """Plot the mean field of two or three tokens: the flow, and the equilibria on it.

    For two tokens the drift of token 0's share against that share; for three, trajectories of the
    flow on the simplex, with arrows. Equilibria are dots, filled if stable.

    Args:
        model: The CCMC that generates, over two or three tokens.
        exponent: Reinforcement exponent, as :func:`attnmarkov.dynamics.equilibria`.
        temperature: Temperature of the decoder.
        log_time: How far the trajectories are followed, in units of ``log t``.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If the model has another number of tokens, or a parameter is out of range.
    """
    if model.num_tokens not in (2, 3):
        raise ValueError(f"model: portraits show 2 or 3 tokens, got {model.num_tokens}")
    found = equilibria(model, exponent=exponent, temperature=temperature)
    ax = _style.axes(ax)
    title = f"mean field, {len(found)} equilibria, {len(found.stable)} stable"
    if exponent != 1 or temperature != 1:
        title += f"; exponent {exponent:g}, temperature {temperature:g}"
    if model.num_tokens == 2:
        return _line(model, found, exponent, temperature, title, ax)
    return _simplex(model, found, exponent, temperature, log_time, title, ax)


def two_token_diagram(phases: TwoTokenPhases, *, ax: Axes | None = None) -> Axes:
    """Plot the regimes of two-token generation over the square of ``(p, q)``.

    Regimes are areas, named in the legend. For power 1, dotted lines show where the loser's row
    stops being learnable from one trajectory: ``λ = 1/2``.

    Args:
        phases: As :func:`attnmarkov.dynamics.two_token_phases` gives for ``p[:, None]`` and ``q``,
            both increasing.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If the phases are not those of such a grid.
    """
    p, q = phases.p, phases.q
    if p.ndim != 2 or (p != p[:, :1]).any() or (q != q[:1]).any() or min(p.shape) < 2:
        raise ValueError(
            f"phases: expected a grid, two_token_phases(p[:, None], q), got shape {p.shape}"
        )
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    ax = _style.axes(ax)
    norm = BoundaryNorm(np.arange(len(REGIMES) + 1) - 0.5, len(REGIMES))
    ax.pcolormesh(
        p[:, 0],
        q[0],
        phases.regime.T,
        cmap=ListedColormap(_FILLS),
        norm=norm,
        shading="nearest",
        rasterized=True,
    )
    handles: list = [
        Patch(color=_FILLS[i], label=REGIMES[i]) for i in np.unique(phases.regime).tolist()
    ]
    if phases.power == 1:
        for w in (0, 1):
            inside = np.where(phases.can_win[..., w], phases.growth[..., w] - 0.5, np.nan)
            if (inside < 0).any() and (inside > 0).any():
                ax.contour(
                    p[:, 0], q[0], inside.T, [0.0], colors="0.35", linestyles=":", linewidths=1.1
                )
        handles += ax.plot(
            [], [], color="0.35", linestyle=":", lw=1.1, label="loser's row: λ = 1/2"
        )
    ax.set_aspect("equal")
    ax.legend(
        handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1)
    )
    _style.finish(
        ax,
        xlabel="$p = P(1|0)$",
        ylabel="$q = P(0|1)$",
        title=f"two-token generation, power {phases.power:g}",
    )
    ax.grid(False)
    return ax


def two_token_wins(
    p: ArrayLike, q: ArrayLike, won: ArrayLike, *, radius: float = 0.035, ax: Axes
) -> Axes:
    """Add measured outcomes to a :func:`two_token_diagram`: a small pie at every ``(p, q)``.

    Args:
        p: (n,) grid points.
        q: (n,) grid points.
        won: (n, 2) shares of the trajectories that tokens 0 and 1 have taken over; white is
            the rest.
        radius: Of a pie, in units of the axes.
        ax: The axes of the diagram.

    Returns:
        The axes.
    """
    from matplotlib.patches import Patch, Wedge

    for x, y, (first, second) in zip(np.asarray(p), np.asarray(q), np.asarray(won), strict=True):
        turns = np.cumsum([90, 360 * first, 360 * second, 360 * max(0.0, 1 - first - second)])
        for a, b, fill in zip(turns[:-1], turns[1:], _PIES, strict=True):
            if b > a:
                ax.add_patch(Wedge((x, y), radius, a, b, fc=fill, ec="0.25", lw=0.5, zorder=4))
    names = ("won by token 0", "won by token 1", "by neither")
    handles: list = [Patch(fc=c, ec="0.25", label=n) for c, n in zip(_PIES, names, strict=True)]
    old = ax.get_legend()
    if old is not None:
        texts = [t.get_text() for t in old.get_texts()]
        handles = [*old.legend_handles, *handles]
        labels = [*texts, *(f"measured: {n}" for n in names)]
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
        ax.legend(handles, labels, frameon=False, fontsize=8, **place)
    return ax


def _line(
    model: CCMC, found: Equilibria, exponent: float, temperature: float, title: str, ax: Axes
) -> Axes:
    share = np.linspace(0, 1, 401)
    moved = drift(
        model, np.stack([share, 1 - share], axis=-1), exponent=exponent, temperature=temperature
    )
    speed = np.asarray(moved[:, 0])
    ax.axhline(0, color="0.25", linewidth=0.8)
    ax.plot(share, speed, color=_style.colour(0), linewidth=2)
    reach = max(float(abs(speed).max()), 1e-6)
    inner = sorted(float(e.occupancy[0]) for e in found)
    for left, right in pairwise(inner):
        if right - left < 0.03:
            continue
        middle = (left + right) / 2
        way = np.sign(np.interp(middle, share, speed)) * min(0.04, (right - left) / 4)
        ax.annotate(
            "",
            (middle + way, 0),
            (middle - way, 0),
            arrowprops={"arrowstyle": "-|>", "color": "0.25", "lw": 1.2},
        )
    for e in found:
        _dot(ax, float(e.occupancy[0]), 0.0, e.stable)
    ax.set_ylim(-1.15 * reach, 1.15 * reach)
    _named_dots(ax)
    return _style.finish(
        ax, xlabel="share of token 0, $m_0$", ylabel=r"drift $\nu_0(m) - m_0$", title=title
    )


def _simplex(
    model: CCMC,
    found: Equilibria,
    exponent: float,
    temperature: float,
    log_time: float,
    title: str,
    ax: Axes,
) -> Axes:
    starts = _grid(9)
    flow = mean_field(model, starts, log_time, 121, exponent=exponent, temperature=temperature)
    paths = np.asarray(flow.shares, np.float64) @ _CORNERS
    ax.plot(*np.vstack([_CORNERS, _CORNERS[:1]]).T, color="0.25", linewidth=1)
    for path in paths:
        ax.plot(*path.T, color=_style.colour(0), linewidth=0.9, alpha=0.55)
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
        if length[-1] < 0.02:
            continue
        here = int(np.searchsorted(length, min(0.045, length[-1] / 2)))
        ax.annotate(
            "",
            path[here],
            path[here - 1],
            arrowprops={"arrowstyle": "-|>", "color": _style.colour(0), "lw": 0.6, "shrinkA": 0},
        )
    for e in found:
        x, y = e.occupancy @ _CORNERS
        _dot(ax, float(x), float(y), e.stable)
    for token, (x, y, align) in enumerate(
        ((-0.03, -0.02, "right"), (1.03, -0.02, "left"), (0.5, np.sqrt(0.75) + 0.06, "center"))
    ):
        ax.text(x, y, f"token {token}", ha=align, va="center", fontsize=9)
    _named_dots(ax)
    ax.set_aspect("equal")
    ax.set_xlim(-0.16, 1.16)
    ax.set_ylim(-0.06, 0.98)
    ax.set_axis_off()
    ax.set_title(title, fontsize=10)
    return ax


def _grid(parts: int) -> np.ndarray:
    """Points inside the simplex, evenly spaced, (n, 3)."""
    a, b = np.meshgrid(np.arange(parts), np.arange(parts), indexing="ij")
    inside = a + b < parts
    a, b = a[inside] + 1 / 3, b[inside] + 1 / 3
    return np.column_stack([a, b, parts - a - b]) / parts


def _dot(ax: Axes, x: float, y: float, stable: bool) -> None:
    ax.plot(
        [x],
        [y],
        "o",
        ms=8,
        color=_style.colour(1),
        mfc=_style.colour(1) if stable else "white",
        mew=1.5,
        zorder=5,
        clip_on=False,
    )


def _named_dots(ax: Axes) -> None:
    for name, fill in (("stable", _style.colour(1)), ("not stable", "white")):
        ax.plot([], [], "o", ms=7, color=_style.colour(1), mfc=fill, mew=1.5, label=name)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
