"""A Numba loop on two threads: the compiled program that one would write without JAX.

Each thread owns half of the lanes. A token costs one pass over the row of counts and the row of
``P``, and one search for the token. Which form of the search is fastest depends on the size of
the vocabulary; both were kept, with the precision that suits them:

* up to 64 tokens, the running sums are stored and the token is the number of them below the
  uniform variable. There is no branch to mispredict, and 32 lanes go in turn, so that the
  processor overlaps the steps of one lane with those of the next;
* above, the weights are stored and added up (in any order: ``fastmath``, so that the sum is
  vectorised), and then subtracted from the uniform variable until it is used up. Beyond 256
  tokens in float32, where half of the time goes to fetching rows of ``P``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba  # pyright: ignore[reportMissingImports]
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TURN = 32  # lanes that go in turn


def _count_below(
    p: Any, counts: Any, last: Any, tokens: Any, num_steps: int, seed: int, threads: int
) -> None:
    lanes, size = counts.shape
    keep = tokens.shape[1] > 0
    for part in numba.prange(threads):
        np.random.seed(seed + part)  # noqa: NPY002, seeds this thread's generator
        sums = np.empty(size, counts.dtype)
        begin, end = part * lanes // threads, (part + 1) * lanes // threads
        for first in range(begin, end, _TURN):
            for t in range(num_steps):
                for r in range(first, min(first + _TURN, end)):
                    own, row = counts[r], p[last[r]]
                    total = row[0] * 0
                    for j in range(size):
                        total += own[j] * row[j]
                        sums[j] = total
                    u = np.random.random() * total  # noqa: NPY002, as above
                    token = 0
                    for j in range(size - 1):
                        token += sums[j] <= u
                    own[token] += 1
                    last[r] = token
                    if keep:
                        tokens[r, t] = token


def _subtract(
    p: Any, counts: Any, last: Any, tokens: Any, num_steps: int, seed: int, threads: int
) -> None:
    lanes, size = counts.shape
    keep = tokens.shape[1] > 0
    for part in numba.prange(threads):
        np.random.seed(seed + part)  # noqa: NPY002, seeds this thread's generator
        weights = np.empty(size, counts.dtype)
        for r in range(part * lanes // threads, (part + 1) * lanes // threads):
            own, token = counts[r], last[r]
            for t in range(num_steps):
                row = p[token]
                total = row[0] * 0
                for j in range(size):
                    weights[j] = own[j] * row[j]
                    total += weights[j]
                u = np.random.random() * total - weights[0]  # noqa: NPY002, as above
                token = 0
                while u >= 0 and token < size - 1:
                    token += 1
                    u -= weights[token]
                own[token] += 1
                if keep:
                    tokens[r, t] = token
            last[r] = token


def build(
    p: np.ndarray, prompt: Sequence[int], num_steps: int, lanes: int, record: str = "counts"
) -> Callable[[int], np.ndarray]:
    """A loop for one model and size, compiled at its first call.

    It returns the final counts (lanes, K), or the tokens (lanes, num_steps) in the smallest
    unsigned integers that hold them.
    """
    size = len(p)
    threads = min(2, numba.get_num_threads())
    if size <= 64:
        loop: Any = numba.njit(parallel=True)(_count_below)
    else:
        loop = numba.njit(parallel=True, fastmath=True)(_subtract)
    dtype = np.float64 if size <= 256 else np.float32
    p = np.ascontiguousarray(p, dtype)
    start = np.bincount(prompt, minlength=size).astype(dtype)
    kept = num_steps if record == "tokens" else 0

    def call(seed: int) -> np.ndarray:
        numba.set_num_threads(threads)
        counts = np.tile(start, (lanes, 1))
        last = np.full(lanes, prompt[-1])
        tokens = np.empty((lanes, kept), np.min_scalar_type(size - 1))
        loop(p, counts, last, tokens, num_steps, threads * seed, threads)
        return tokens if kept else counts

    return call
