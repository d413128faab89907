"""How token sequences collapse and repeat themselves, batch beside batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.plot import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnmarkov.dynamics.diagnostics import Diagnostics

_BAND = "median, middle half"


def diagnostics(
    batches: Diagnostics | Mapping[str, Diagnostics],
    *,
    k: int | None = None,
    axes: tuple[Axes, Axes] | None = None,
) -> tuple[Axes, Axes]:
    """:func:`top_shares` and :func:`distinct_ngrams` side by side.

    Args:
        batches: A result of :func:`attnmarkov.dynamics.diagnose`, or several by their names.
        k: As :func:`top_shares`.
        axes: Two axes to draw on; those of a new figure if None.

    Returns:
        The two axes.

    Raises:
        ValueError: As :func:`top_shares`.
    """
    if axes is None:
        from matplotlib.figure import Figure

        axes = tuple(Figure(figsize=(10, 4.2), layout="constrained").subplots(1, 2))
    left, right = axes
    return top_shares(batches, k=k, ax=left), distinct_ngrams(batches, ax=right)


def top_shares(
    batches: Diagnostics | Mapping[str, Diagnostics],
    *,
    k: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the share of the ``k`` most frequent tokens as sequences grow.

    Lines are medians over the sequences that reach so far, bands their middle half; a dot marks
    the median collapse time where at least half of the sequences collapse.

    Args:
        batches: A result of :func:`attnmarkov.dynamics.diagnose`, or several by their names.
        k: One of their numbers ``top``; the first one if None.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no batch, or ``k`` was not followed in one.
    """
    ax = _style.axes(ax)
    named = _named(batches)
    k = int(next(iter(named.values())).top[0]) if k is None else k
    dots = False
    for i, (name, d) in enumerate(named.items()):
        if k not in d.top:
            known = ", ".join(map(str, d.top))
            raise ValueError(f"k: the share of the top {k} was not followed; known: {known}")
        colour = _style.colour(i)
        shares = d.top_share[:, :, list(d.top).index(k)]
        there = ~np.isnan(shares).all(axis=0)
        low, middle, high = np.nanquantile(shares[:, there], [0.25, 0.5, 0.75], axis=0)
        steps = d.at[there]
        ax.plot(steps, middle, color=colour, linewidth=2, label=name)
        ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        if (d.collapse_time >= 0).mean() >= 0.5:
            dots, time = True, np.median(np.where(d.collapse_time >= 0, d.collapse_time, np.inf))
            ax.plot(time, np.interp(time, steps, middle), "o", color=colour, ms=6)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    if any(named):
        ax.legend(frameon=False, fontsize=8)
    what = "most frequent token" if k == 1 else f"{k} most frequent tokens"
    title = f"concentration ({_BAND}{'; dot: median collapse' * dots})"
    return _style.finish(ax, xlabel="tokens $t$", ylabel=f"share of the {what}", title=title)


def distinct_ngrams(
    batches: Diagnostics | Mapping[str, Diagnostics], *, ax: Axes | None = None
) -> Axes:
    """Plot distinct-n, on a logarithmic axis, against ``n``.

    Dots are medians over sequences, bars their middle half. It falls as sequences grow: compare
    batches of one length.

    Args:
        batches: A result of :func:`attnmarkov.dynamics.diagnose`, or several by their names.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no batch.
    """
    ax = _style.axes(ax)
    named = _named(batches)
    longest = max(d.distinct.shape[1] for d in named.values())
    for i, (name, d) in enumerate(named.items()):
        there = ~np.isnan(d.distinct).all(axis=0)
        low, middle, high = np.nanquantile(d.distinct[:, there], [0.25, 0.5, 0.75], axis=0)
        n = np.flatnonzero(there) + 1 + 0.08 * (i - (len(named) - 1) / 2)
        colour = _style.colour(i)
        bars = [middle - low, high - middle]
        ax.errorbar(n, middle, bars, fmt="o-", ms=5, capsize=2, lw=1.5, color=colour, label=name)
    ax.set_xticks(range(1, longest + 1))
    ax.set_yscale("log")
    if any(named):
        ax.legend(frameon=False, fontsize=8)
    return _style.finish(
        ax,
        xlabel="$n$",
        ylabel="distinct-$n$ (different over all $n$-grams)",
        title=f"variety ({_BAND})",
    )


def _named(batches: Diagnostics | Mapping[str, Diagnostics]) -> Mapping[str, Diagnostics]:
    """Batches by name; one alone has none."""
    if not isinstance(batches, Mapping):
        return {"": batches}
    if not batches:
        raise ValueError("batches: there is none")
    return batches
