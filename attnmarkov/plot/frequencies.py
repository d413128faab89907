"""Token shares along rollouts, on the predicted power laws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.dynamics import possible_winners
from attnmarkov.dynamics.frequencies import fit_constants, predicted_frequencies
from attnmarkov.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnmarkov.model import CCMC
    from attnmarkov.rollout import Trajectory


def frequencies(
    trajectory: Trajectory,
    predicted: CCMC | None = None,
    *,
    winner: int | None = None,
    max_lines: int = 12,
    ax: Axes | None = None,
) -> Axes:
    """Plot token shares against the number of steps, both axes logarithmic.

    Thick lines are medians over the trajectories that ``winner`` takes, thin ones single
    trajectories. With a model under which ``winner`` can win alone, dashed lines show the
    predicted decay ``t**(λ_j − 1)`` of each loser; its constant is random, so each line is made
    to pass through the last median.

    Args:
        trajectory: A rollout with ``record="counts"`` at two or more positive steps.
        predicted: The model that generated it, for the dashed predictions.
        winner: Show the trajectories that end with this token on top; the most common if None.
        max_lines: Single trajectories shown.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If counts were not recorded or no trajectory ends with ``winner`` on top.
    """
    shares = np.asarray(trajectory.frequencies)
    steps = np.asarray(trajectory.at)
    shares, steps = shares[:, steps > 0], steps[steps > 0]
    if steps.size < 2:
        raise ValueError("trajectory: counts at two or more positive steps are needed")
    top = shares[:, -1].argmax(axis=-1)
    if winner is None:
        winner = int(np.bincount(top).argmax())
    group = shares[top == winner]
    if len(group) == 0:
        raise ValueError(f"winner: no trajectory ends with token {winner} on top")
    ax = _style.axes(ax)
    medians = np.median(group, axis=0)
    for token in range(shares.shape[-1]):
        colour = _style.colour(token)
        with np.errstate(divide="ignore"):
            lines = np.where(group[:max_lines, :, token] > 0, group[:max_lines, :, token], np.nan)
        ax.plot(steps, lines.T, color=colour, alpha=0.18, linewidth=0.7)
        label = f"token {token}" + (" (on top)" if token == winner else "")
        ax.plot(steps, medians[:, token], color=colour, linewidth=2, label=label)
    if predicted is not None and possible_winners(predicted)[winner]:
        constants = fit_constants(predicted, winner, steps, medians)
        curves = predicted_frequencies(predicted, winner, steps, constants)
        for token in range(shares.shape[-1]):
            if token != winner and medians[-1, token] > 0:
                ax.plot(steps, curves[:, token], color="0.25", linestyle="--", linewidth=1)
        ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label="predicted slope")
    elif predicted is not None:
        ax.plot([], [], " ", label=f"no prediction: token {winner} cannot win alone")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(max(group[:, -1].min() / 2, 1 / (2 * steps[-1])), 1.3)
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel="generated tokens $t$",
        ylabel="share of the context",
        title=f"{len(group)} of {len(shares)} trajectories, token {winner} on top at the end",
    )
