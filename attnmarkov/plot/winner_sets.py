"""Token shares beside a set of winners, on the predicted shares and power laws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.dynamics import equilibria
from attnmarkov.plot import _style

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from attnmarkov.model import CCMC
    from attnmarkov.rollout import Trajectory


def winner_set_shares(
    trajectory: Trajectory,
    model: CCMC,
    winners: Iterable[int],
    *,
    share: float = 0.9,
    max_lines: int = 8,
    ax: Axes | None = None,
) -> Axes:
    """Plot token shares of the trajectories that a set of tokens takes over together.

    Thick lines are medians, thin ones single trajectories. Dashed lines are the shares of the
    winners at their equilibrium, and power laws ``t**(λ_j − 1)`` through the losers' last median.

    Args:
        trajectory: A rollout with ``record="counts"`` at two or more positive steps.
        model: The model that generated it.
        winners: The tokens of the set.
        share: What they must hold together, and none of them alone, at the end.
        max_lines: Single trajectories shown.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If counts were not recorded, the tokens have no equilibrium of their own, or no
            trajectory ends with them.
    """
    shares, steps = np.asarray(trajectory.frequencies), np.asarray(trajectory.at)
    shares, steps = shares[:, steps > 0], steps[steps > 0]
    if steps.size < 2:
        raise ValueError("trajectory: counts at two or more positive steps are needed")
    ids = sorted(winners)
    found = equilibria(model).at(ids)
    if not found:
        raise ValueError(f"winners: the tokens {ids} have no equilibrium of their own")
    end = shares[:, -1, ids]
    group = shares[(end.sum(axis=-1) > share) & (end.max(axis=-1) <= share)]
    if len(group) == 0:
        raise ValueError(f"winners: no trajectory ends with the tokens {ids}")
    ax, medians = _style.axes(ax), np.median(group, axis=0)
    for j in range(shares.shape[-1]):
        colour = _style.colour(j)
        ax.plot(steps, group[:max_lines, :, j].T, color=colour, alpha=0.18, linewidth=0.7)
        label = f"token {j}" + " (winner)" * (j in ids)
        ax.plot(steps, medians[:, j], color=colour, linewidth=2, label=label)
        line = medians[-1, j] * (steps / steps[-1]) ** (found[0].growth_exponents[j] - 1)
        line = np.full(len(steps), found[0].occupancy[j]) if j in ids else line
        ax.plot(steps, line, color="0.25", linestyle="--", linewidth=1)
    ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label="predicted share or slope")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(max(medians[-1].min() / 3, 1 / (2 * steps[-1])), 1.3)
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    names = ", ".join(map(str, ids))
    return _style.finish(
        ax,
        xlabel="generated tokens $t$",
        ylabel="share of the context",
        title=f"{len(group)} of {len(shares)} trajectories, won by {{{names}}} together",
    )
