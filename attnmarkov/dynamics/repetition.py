"""How repetitive token sequences are: distinct n-grams and tokens that were there just before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from attnmarkov.dynamics._sequences import Sequences

_TOP = np.iinfo(np.int64).max


def distinct_ngrams(
    sequences: Sequences, max_n: int
) -> tuple[Float[np.ndarray, "replicate n"], Float[np.ndarray, " n"]]:
    """distinct-n for ``n = 1..max_n``: different n-grams over all n-grams (Li et al. 2016).

    Exact: n-grams are numbered, not hashed.

    Returns:
        (R, max_n) of every sequence by itself, NaN where it has no n-gram; and (max_n,) of all
        together, as the paper has it, where n-grams that several sequences share count once.
    """
    codes, base = sequences.codes.astype(np.int64), len(sequences.vocabulary) + 1
    each, together = [], []
    grams, size = codes, base  # numbers below size
    for n in range(1, max_n + 1):
        if n > codes.shape[1]:
            each.append(np.full(len(codes), np.nan))
            together.append(np.nan)
            continue
        if n > 1:
            grams = grams[:, :-1]
            if size * base >= _TOP:
                kept, index = np.unique(grams, return_inverse=True)
                grams, size = index.reshape(grams.shape), len(kept)
            grams, size = grams * base + codes[:, n - 1 :], size * base
        number = np.maximum(sequences.lengths - n + 1, 0)
        there = np.arange(grams.shape[1]) < number[:, None]
        ordered = np.sort(np.where(there, grams, _TOP), axis=1)
        new = np.ones(ordered.shape, bool)
        np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
        new &= there  # the valid ones come first
        with np.errstate(invalid="ignore"):
            each.append(new.sum(axis=1) / number)
            together.append(_number_distinct(ordered[new]) / number.sum())
    return np.stack(each, axis=1), np.array(together)


def repetition_rates(
    sequences: Sequences, windows: Sequence[int]
) -> Float[np.ndarray, "replicate window"]:
    """Share of tokens that stand among the ``w`` before them, for each ``w``.

    rep/w of Welleck et al. (2020), of the tokens themselves. Over all tokens, the first included.
    """
    gaps = sequences.gaps
    again = gaps > 0
    hits = np.stack([(again & (gaps <= w)).sum(axis=1) for w in windows], axis=1)
    return hits / sequences.lengths[:, None]


def _number_distinct(values: np.ndarray) -> np.ndarray:
    """How many different values; 0 of none. Sorting beats the hashing of ``np.unique``."""
    ordered = np.sort(values)
    return (ordered[1:] != ordered[:-1]).sum() + np.minimum(ordered.size, 1)
