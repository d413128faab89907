"""How token shares concentrate along sequences, and from when on few tokens are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from attnmarkov.dynamics._sequences import Sequences


class Curves(NamedTuple):
    """Shares and entropy of the counts at recorded lengths; NaN past a sequence's end."""

    top_share: Float[np.ndarray, "replicate step top"]
    entropy: Float[np.ndarray, "replicate step"]
    winner_share: Float[np.ndarray, " replicate"]


def share_curves(sequences: Sequences, at: np.ndarray, top: tuple[int, ...]) -> Curves:
    """Curves at the lengths ``at`` (increasing), and the share of the whole's top token.

    Args:
        sequences: R sequences.
        at: (T,) lengths, each in 1..L.
        top: Numbers ``k`` of most frequent tokens whose joint share is taken.
    """
    local, names = sequences.local
    many, size = names.shape
    most = min(max(top), size)
    logs = np.arange(sequences.codes.shape[1] + 1, dtype=np.float64)
    logs[1:] *= np.log(logs[1:])  # c log c
    shares = np.full((many, len(at), len(top)), np.nan)
    entropy = np.full((many, len(at)), np.nan)
    counts = np.zeros((many, size), np.int64)
    rows = np.arange(many)[:, None] * size
    for i, (start, stop) in enumerate(zip([0, *at], [*at, len(logs) - 1], strict=True)):
        index = (local[:, start:stop] + rows)[sequences.valid[:, start:stop]]
        counts += np.bincount(index, minlength=many * size).reshape(many, size)
        if i == len(at):
            break
        going = sequences.lengths >= stop
        n = counts[going]
        best = np.partition(n, size - most, axis=1)[:, size - most :] if most < size else n
        best = np.cumsum(-np.sort(-best, axis=1), axis=1)
        shares[going, i] = best[:, np.minimum(top, most) - 1] / stop
        entropy[going, i] = np.maximum(np.log(stop) - logs[n].sum(axis=1) / stop, 0)
    return Curves(shares, entropy, counts.max(axis=1) / sequences.lengths)


def collapse_times(
    sequences: Sequences, share: float, window: int, num_winners: int
) -> Int[np.ndarray, " replicate"]:
    """The length from which on the last window's top tokens keep ``share`` of every window.

    Args:
        sequences: R sequences.
        share: In (0, 1].
        window: Tokens of the trailing window; a shorter sequence is one window.
        num_winners: How many tokens, the most frequent of the last window, share it.

    Returns:
        (R,) lengths, at least that of the first window; -1 where the last window falls short.
    """
    local, names = sequences.local
    many, length = local.shape
    sizes = np.minimum(window, sequences.lengths)
    position = np.arange(length)
    last = sequences.valid & (position >= (sequences.lengths - sizes)[:, None])
    size = names.shape[1]
    rows = np.arange(many)[:, None] * size
    counts = np.bincount((local + rows)[last], minlength=many * size).reshape(many, size)
    chosen = np.argsort(-counts, axis=1, kind="stable")[:, :num_winners]
    inside = np.zeros((many, size + 1), bool)
    np.put_along_axis(inside, chosen, True, axis=1)
    local = np.minimum(local, size)
    held = np.take_along_axis(inside, local, axis=1) & sequences.valid
    total = np.zeros((many, length + 1), np.int64)
    np.cumsum(held, axis=1, out=total[:, 1:])
    ends = np.arange(length + 1)
    start = np.maximum(ends - sizes[:, None], 0)
    needed = share * (1 - 2.0**-40) * sizes  # 0.07 * 100 is above 7 in binary
    short = (total - np.take_along_axis(total, start, axis=1)) < needed[:, None]
    short &= (ends >= sizes[:, None]) & (ends <= sequences.lengths[:, None])
    bad = np.where(short, ends, -1).max(axis=1)
    return np.where(bad == sequences.lengths, -1, np.maximum(bad + 1, sizes))
