"""A batch of prompts: what a CCMC sees of each, its token counts and its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Int
    from numpy.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Prompts:
    """``n`` prompts over tokens ``0..K-1``.

    Build them with :meth:`from_tokens`, :meth:`from_counts`, or a distribution in
    ``attnmarkov.prompts``.

    Attributes:
        counts: (n, K) int32, how often each token stands in each prompt.
        last: (n,) int32, the query token of each prompt: its last, unless given apart.
        tokens: (n, L) int32 token ids, right-padded, or None if only counts are known.
        lengths: (n,) int32 numbers of valid tokens, or None if only counts are known.
    """

    counts: Int[Array, "prompt token"]
    last: Int[Array, " prompt"]
    tokens: Int[Array, "prompt position"] | None = None
    lengths: Int[Array, " prompt"] | None = None

    @classmethod
    def from_tokens(
        cls,
        tokens: Any,
        num_tokens: int,
        lengths: ArrayLike | None = None,
        *,
        query: ArrayLike | None = None,
    ) -> Prompts:
        """Build prompts from token ids.

        Args:
            tokens: (n, L) ids; or (L,) for a single prompt; or a sequence of ``n`` sequences of
                different lengths.
            num_tokens: Vocabulary size K.
            lengths: (n,) numbers of valid tokens, each in 1..L; what follows is padding and may
                hold anything. All L are valid if None.
            query: (n,) query tokens given apart from the context (cross-attention); they need
                not stand in it. The last valid tokens if None.

        Raises:
            ValueError: If there is no prompt, a prompt is empty, an id is negative, too large
                or no integer, or ``lengths`` or ``query`` disagrees with ``tokens``.

        >>> prompts = Prompts.from_tokens([[0, 2, 1], [1, 1]], 3)
        >>> prompts.counts.tolist(), prompts.last.tolist()
        ([[1, 1, 1], [0, 2, 0]], [1, 1])
        """
        num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
        if not _validate.is_concrete(tokens, lengths, query):
            return cls._from_arrays(jnp.asarray(tokens), num_tokens, lengths, query)
        if lengths is None:
            tokens, lengths = _pad_ragged(tokens)
        ids = _validate.integer_array(tokens, "tokens", ndim=(1, 2))
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.size == 0:
            what = "there is no prompt" if ids.shape[0] == 0 else "prompt 0 is empty"
            raise ValueError(f"tokens: {what} (shape {ids.shape})")
        n, length = ids.shape
        if lengths is None:
            sizes = np.full(n, length)
        else:
            sizes = _validate.integer_array(
                np.atleast_1d(np.asarray(lengths)), "lengths", ndim=(1,)
            )
            if sizes.shape != (n,):
                raise ValueError(f"lengths: expected shape ({n},), got {sizes.shape}")
            if (sizes < 1).any():
                row = int(np.argmax(sizes < 1))
                what = "is empty" if sizes[row] == 0 else f"has length {sizes[row]}"
                raise ValueError(f"lengths: prompt {row} {what}")
            if (sizes > length).any():
                row = int(np.argmax(sizes > length))
                raise ValueError(
                    f"lengths: prompt {row} has length {sizes[row]}, but tokens hold {length}"
                )
        valid = np.arange(length) < sizes[:, None]
        _validate.token_range(np.where(valid, ids, 0), "tokens", num_tokens)
        if query is not None:
            q = _validate.integer_array(np.atleast_1d(np.asarray(query)), "query", ndim=(1,))
            if q.shape != (n,):
                raise ValueError(f"query: expected shape ({n},), got {q.shape}")
            _validate.token_range(q, "query", num_tokens)
            query = jnp.asarray(q, jnp.int32)
        ids = jnp.asarray(np.where(valid, ids, 0), jnp.int32)
        return cls._from_arrays(ids, num_tokens, jnp.asarray(sizes, jnp.int32), query)

    @classmethod
    def _from_arrays(
        cls, ids: jax.Array, num_tokens: int, sizes: ArrayLike | None, query: ArrayLike | None
    ) -> Prompts:
        """Prompts from (n, L) ids that are known to be good (or are traced)."""
        ids = jnp.atleast_2d(ids).astype(jnp.int32)
        n, length = ids.shape
        lengths = jnp.full(n, length, jnp.int32) if sizes is None else jnp.asarray(sizes, jnp.int32)
        counts = _count(ids, lengths, num_tokens)
        if query is None:
            last = jnp.take_along_axis(ids, lengths[:, None] - 1, axis=1)[:, 0]
        else:
            last = jnp.asarray(query, jnp.int32)
        return cls(counts, last, ids, lengths)

    @classmethod
    def from_counts(cls, counts: ArrayLike, last: ArrayLike) -> Prompts:
        """Build prompts from token counts and query tokens, all that a CCMC sees of them.

        Args:
            counts: (n, K) non-negative integers, or (K,) for a single prompt.
            last: (n,) query tokens; they need not stand in the prompt (cross-attention).

        Raises:
            ValueError: If shapes disagree, a count is negative or past 2**31 - 1, a prompt is
                empty, or ``last`` is no token id.

        >>> Prompts.from_counts([[3, 1]], [1])
        Prompts(num_prompts=1, num_tokens=2, lengths 4 to 4)
        """
        if _validate.is_concrete(counts, last):
            n = np.atleast_2d(_validate.integer_array(counts, "counts", ndim=(1, 2)))
            k = np.atleast_1d(_validate.integer_array(last, "last", ndim=(0, 1)))
            if k.shape != n.shape[:1]:
                raise ValueError(f"last: expected shape ({n.shape[0]},), got {k.shape}")
            bad = (n < 0).any(axis=1) | (n > np.iinfo(np.int32).max).any(axis=1)
            if bad.any():
                raise ValueError(f"counts: row {bad.argmax()} has a count outside 0..2**31-1")
            if n.size == 0 or (n.sum(axis=1) == 0).any():
                row = int((n.sum(axis=1) == 0).argmax()) if n.size else 0
                raise ValueError(f"counts: prompt {row} is empty")
            _validate.token_range(k, "last", n.shape[1])
            counts, last = n, k
        return cls(jnp.asarray(counts, jnp.int32), jnp.asarray(last, jnp.int32))

    @property
    def num_prompts(self) -> int:
        """Number of prompts n."""
        return self.counts.shape[-2]

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.counts.shape[-1]

    def __len__(self) -> int:
        """Number of prompts n."""
        return self.num_prompts

    def __getitem__(self, index: slice | ArrayLike) -> Prompts:
        """The prompts at a slice, an index array or a mask along the prompt axis."""
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"prompt {index} of {len(self)}")
            index = np.array([index])
        return jax.tree.map(lambda x: x[index], self)

    def __repr__(self) -> str:
        """The sizes and the range of lengths."""
        if not isinstance(self.counts, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"Prompts(counts={self.counts}, last={self.last})"
        total = np.asarray(self.counts).sum(axis=-1)
        span = f"lengths {total.min()} to {total.max()}" if total.size else "empty"
        return f"Prompts(num_prompts={self.num_prompts}, num_tokens={self.num_tokens}, {span})"


@jax.jit(static_argnames="num_tokens")
def _count(ids: jax.Array, lengths: jax.Array, num_tokens: int) -> jax.Array:
    valid = jnp.arange(ids.shape[1]) < lengths[:, None]
    rows = jnp.arange(ids.shape[0])[:, None]
    empty = jnp.zeros((ids.shape[0], num_tokens), jnp.int32)
    return empty.at[rows, ids].add(valid.astype(jnp.int32))


def _pad_ragged(tokens: Any) -> tuple[Any, np.ndarray | None]:
    """Right-pad a sequence of sequences of different lengths; leave anything else alone."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or len(tokens) == 0:
        return tokens, None
    if not all(isinstance(row, Sequence | np.ndarray | jax.Array) for row in tokens):
        return tokens, None
    if any(isinstance(row, str) for row in tokens) or any(np.ndim(row) != 1 for row in tokens):
        return tokens, None
    sizes = np.array([len(row) for row in tokens])
    if (sizes == 0).any():
        raise ValueError(f"tokens: prompt {int(np.argmin(sizes))} is empty")
    if (sizes == sizes[0]).all():
        return tokens, None
    rows = [_validate.integer_array(row, "tokens", ndim=(1,)) for row in tokens]
    padded = np.zeros((len(rows), sizes.max()), np.int64)
    for i, row in enumerate(rows):
        padded[i, : row.size] = row
    return padded, sizes
