"""Token sequences of any origin, checked and brought into one compact form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy.typing import ArrayLike

_DENSE = 1 << 24  # ids below this are told apart by a table, others by sorting


@dataclass(frozen=True, eq=False)
class Sequences:
    """R token sequences, right-padded, with ids replaced by their rank among those that occur.

    Attributes:
        codes: (R, L) int32 ranks 0..U-1; U at padding.
        lengths: (R,) int64 numbers of valid tokens, each in 1..L.
        vocabulary: (U,) int64, the token ids that occur, increasing.
        num_tokens: Vocabulary size K.
    """

    codes: Int[np.ndarray, "replicate position"]
    lengths: Int[np.ndarray, " replicate"]
    vocabulary: Int[np.ndarray, " code"]
    num_tokens: int

    @cached_property
    def valid(self) -> Bool[np.ndarray, "replicate position"]:
        """Which positions hold a token."""
        return np.arange(self.codes.shape[1]) < self.lengths[:, None]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions sorted by token, then time; their codes; which are a token's first."""
        bits = max(int(self.codes.shape[1] - 1).bit_length(), 1)
        order = self.codes.astype(np.int64) << bits
        order |= np.arange(self.codes.shape[1])
        order.sort(axis=1)
        codes = order >> bits
        order &= (1 << bits) - 1
        first = np.ones(order.shape, bool)
        np.not_equal(codes[:, 1:], codes[:, :-1], out=first[:, 1:])
        return order, codes, first

    @cached_property
    def gaps(self) -> Int[np.ndarray, "replicate position"]:
        """Steps back to the same token's last occurrence; 0 at its first, and at padding."""
        order, _, first = self._sorted
        steps = np.zeros(order.shape, np.int32)
        np.subtract(order[:, 1:], order[:, :-1], out=steps[:, 1:], casting="unsafe")
        steps[first] = 0
        gaps = np.empty_like(steps)
        np.put_along_axis(gaps, order, steps, axis=1)
        return np.where(self.valid, gaps, 0)

    @cached_property
    def local(self) -> tuple[Int[np.ndarray, "replicate position"], Int[np.ndarray, "replicate u"]]:
        """Ranks among each row's own tokens, and the code of every rank (U where there is none)."""
        order, codes, first = self._sorted
        ranks = np.cumsum(first, axis=1, dtype=np.int32) - 1
        local = np.empty_like(ranks)
        np.put_along_axis(local, order, ranks, axis=1)
        names = np.full((len(local), int(ranks.max()) + 1), len(self.vocabulary), np.int64)
        rows, places = np.nonzero(first)
        names[rows, ranks[rows, places]] = codes[rows, places]
        return local, names


def as_sequences(tokens: Any, num_tokens: int | None, lengths: ArrayLike | None) -> Sequences:
    """Check token sequences; arguments, and what is raised, as ``dynamics.diagnose``."""
    ids, sizes, valid = padded_ids(tokens, lengths)
    ragged = not valid.all()
    if num_tokens is None:
        if ids.min() < 0:
            _validate.token_range(ids, "tokens", max(int(ids.max()) + 1, 1))
        num_tokens = int(ids.max()) + 1
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    _validate.token_range(ids, "tokens", num_tokens)
    if num_tokens <= _DENSE:
        vocabulary = np.flatnonzero(np.bincount(ids.reshape(-1), minlength=num_tokens))
        rank = np.zeros(num_tokens, np.int32)
        rank[vocabulary] = np.arange(len(vocabulary))
        codes = rank[ids]
    else:
        vocabulary, codes = np.unique(ids, return_inverse=True)
        vocabulary, codes = vocabulary.astype(np.int64), codes.reshape(ids.shape).astype(np.int32)
    if ragged:
        codes = np.where(valid, codes, np.int32(len(vocabulary)))
    return Sequences(codes, sizes, vocabulary, num_tokens)


def padded_ids(
    tokens: Any, lengths: ArrayLike | None, name: str = "tokens", noun: str = "sequence"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (R, L), right-padded with each row's first; their lengths; which are valid.

    Raises:
        ValueError: As ``dynamics.diagnose`` of sequences and lengths, with these words.
    """
    if not _validate.is_concrete(tokens, lengths):
        raise ValueError(f"{name}: must be known on the host, not traced by jit")
    if lengths is None:
        tokens, lengths = _pad(tokens, name, noun)
    ids = _validate.integer_array(tokens, name, ndim=(1, 2))
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.size == 0:
        what = f"there is no {noun}" if ids.shape[0] == 0 else f"{noun} 0 is empty"
        raise ValueError(f"{name}: {what} (shape {ids.shape})")
    sizes = _lengths(lengths, ids, name, noun)
    ids = ids[:, : sizes.max()]
    valid = np.arange(ids.shape[1]) < sizes[:, None]
    return ids if valid.all() else np.where(valid, ids, ids[:, :1]), sizes, valid


def _lengths(lengths: ArrayLike | None, ids: np.ndarray, name: str, noun: str) -> np.ndarray:
    n, length = ids.shape
    if lengths is None:
        return np.full(n, length)
    sizes = _validate.integer_array(np.atleast_1d(np.asarray(lengths)), "lengths", ndim=(1,))
    if sizes.shape != (n,):
        raise ValueError(f"lengths: expected shape ({n},), got {sizes.shape}")
    bad = (sizes < 1) | (sizes > length)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"lengths: {noun} {row} has length {sizes[row]}, but {name} hold 1 to {length}"
        )
    return sizes.astype(np.int64)


def _pad(tokens: Any, name: str, noun: str) -> tuple[Any, np.ndarray | None]:
    """Right-pad a sequence of sequences of different lengths; leave anything else alone."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or len(tokens) == 0:
        return tokens, None
    if not all(isinstance(row, Sequence) or hasattr(row, "__array__") for row in tokens):
        return tokens, None
    if any(isinstance(row, str) or np.ndim(row) != 1 for row in tokens):
        return tokens, None
    rows = [_validate.integer_array(row, name, ndim=(1,)) for row in tokens]
    sizes = np.array([row.size for row in rows])
    if (sizes == 0).any():
        raise ValueError(f"{name}: {noun} {int(sizes.argmin())} is empty")
    padded = np.zeros((len(rows), sizes.max()), np.result_type(*rows))
    for i, row in enumerate(rows):
        padded[i, : row.size] = row
    return padded, sizes
