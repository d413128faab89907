"""Which positions are best without weight: where the likelihood has its maximum on the edge.

In the weights ``w = e^b`` the likelihood is smooth up to ``w_l = 0``. Its maximum lies there, and
``b_l`` runs to minus infinity, if the slope in ``w_l`` is not positive at the best fit without
position ``l`` (Karush, Kuhn and Tucker). How far a solver ran says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attnmarkov.estimate._position_solver import unmasked

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnmarkov.estimate._position_solver import Optimum

_SUSPICIOUS = 5.0  # nats below the heaviest position; there a solver's gradient can vanish
_ROUNDING = 1e-9  # of a slope per label


class Sample(NamedTuple):
    """Prompts and labels on the host, positions counted by lag."""

    tokens: np.ndarray
    visible: np.ndarray
    last: np.ndarray
    y: np.ndarray
    group: np.ndarray


def referred(design: np.ndarray, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The design without masked cells, and each group's reference: its first lag with weight."""
    reference = np.argmax(~masked, axis=1)
    out = np.where(masked[..., None], 0.0, design)
    out[np.arange(len(out)), reference] = 0
    return out, reference


def weightless(
    sample: Sample,
    table: np.ndarray,
    never: np.ndarray,
    refit: Callable[[np.ndarray], tuple[Optimum, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, tuple[Optimum, np.ndarray, np.ndarray] | None]:
    """(group, lag) bool, which positions have weight zero at the maximum, and the fit there.

    Starts from all positions far below the heaviest and gives weight back, one position of each
    group at a time, while a label stands nowhere else or the likelihood rises with it.

    Args:
        sample: The data.
        table: (group, lag) log-weights where the solver stopped.
        never: (group, lag), which never hold the label: these have weight zero.
        refit: The best fit with a mask, its logits, and its table, 0 where masked.
    """
    shown = np.zeros(table.shape, bool)
    np.logical_or.at(shown, sample.group, sample.visible)
    weighed = np.where(shown & ~never, table, -np.inf)
    masked = shown & (never | (weighed < weighed.max(1, keepdims=True) - _SUSPICIOUS))
    while masked.any():
        needed = _needed(sample, masked) & ~never
        if needed.any():
            _release(masked, needed, table)
            continue
        found = refit(masked)
        slope = _slope(sample, masked, *found[1:])
        rising = masked & ~never & (slope > _ROUNDING * len(sample.y))
        if not rising.any():
            return masked, found
        _release(masked, rising, slope)
    return masked, None


def _release(masked: np.ndarray, which: np.ndarray, value: np.ndarray) -> None:
    """Unmask the cell of largest value in each group that has one."""
    groups = np.flatnonzero(which.any(1))
    masked[groups, np.where(which, value, -np.inf).argmax(1)[groups]] = False


def _needed(sample: Sample, masked: np.ndarray) -> np.ndarray:
    """(group, lag), the masked positions that hold a label which stands at no other."""
    hit = sample.visible & (sample.tokens == sample.y[:, None])
    certain = (hit == sample.visible).all(-1)
    lost = ~(hit & ~masked[sample.group]).any(-1) & ~certain
    out = np.zeros(masked.shape, bool)
    np.logical_or.at(out, sample.group[lost], hit[lost])
    return out & masked


def _slope(sample: Sample, masked: np.ndarray, logits: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(group, lag): how the log-likelihood rises with the weight of masked positions, at 0.

    ``Σ_i 1{x = y_i} / N_i − e^{S[k, x]} / Z_i`` over prompts and tokens ``x`` at the position,
    with ``N_i`` the weight of the label and ``Z_i`` that of all tokens by the other positions.
    """
    kept = unmasked(sample.visible, masked[sample.group])
    is_label = sample.tokens == sample.y[:, None]
    b = table[sample.group]
    s = logits[sample.last[:, None], sample.tokens]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        of_label = np.logaddexp.reduce(np.where(kept & is_label, b, -np.inf), axis=-1)
        whole = np.logaddexp.reduce(np.where(kept, b + s, -np.inf), axis=-1)
        rise = np.where(is_label, np.exp(-of_label)[:, None], 0) - np.exp(s - whole[:, None])
    out = np.zeros(masked.shape)
    np.add.at(out, sample.group, np.where(sample.visible & ~kept, rise, 0))
    return out
