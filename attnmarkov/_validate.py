"""Checks at the boundary: concrete inputs only, errors that name the argument and the value."""

from __future__ import annotations

import contextlib
import operator
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROW_SUM_TOLERANCE = 1e-5  # float32 rows of a few thousand entries sum to 1 within this


def is_concrete(*arrays: Any) -> bool:
    """Whether no argument (or leaf of one) is traced by jit, vmap or grad."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))


def check_key(key: Any) -> None:
    """Raise ``ValueError`` unless ``key`` is a single typed JAX key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key: expected a typed key such as jax.random.key(0), got {type(key).__name__}"
            + (f" of dtype {dtype}" if dtype is not None else "")
        )
    if key.shape != ():
        raise ValueError(f"key: expected a single key, got an array of keys of shape {key.shape}")


def integer(value: Any, name: str, *, minimum: int) -> int:
    """``value`` as a Python int that is at least ``minimum``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if number < minimum:
        raise ValueError(f"{name}: must be at least {minimum}, got {number}")
    return number


def seed(value: Any) -> int:
    """``value`` as a seed, 0 to 2**32 - 1: a JAX key takes no more than 32 bits of it."""
    number = integer(value, "seed", minimum=0)
    if number >= 2**32:
        raise ValueError(f"seed: must be below 2**32, got {number}")
    return number


@contextlib.contextmanager
def writing(path: Path, name: str, folder: Path | None = None) -> Iterator[None]:
    """Make ``folder`` (``path`` if None), see that it can be written, then do the block.

    An ``OSError``, of the block too, becomes a ``ValueError`` that names the argument and ``path``.
    """
    folder = folder or path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fails now rather than after an hour
        yield
    except OSError as error:
        raise ValueError(f"{name}: cannot write to {path} ({error})") from None


def choice(value: Any, name: str, known: Iterable[str]) -> str:
    """``value`` if it is one of the ``known`` names."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name}: unknown {name} {value!r}; known: {', '.join(known)}")
    return value


def square(array: Any, name: str) -> None:
    """Raise unless ``array`` has shape (K, K) with K >= 1."""
    shape = np.shape(array)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name}: expected a square (K, K) array, got shape {shape}")


def _finite_nonnegative(p: np.ndarray, name: str) -> None:
    for bad, word in ((np.isnan(p), "NaN"), (np.isinf(p), "infinite"), (p < 0, "negative")):
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{name}: entry {list(where)} is {word} ({p[where]})")


def probability_vector(law: Any, name: str) -> np.ndarray:
    """A concrete (K,) law as float64; raises for negative, NaN, or a sum other than 1."""
    p = _as_float64(law, name)
    if p.ndim != 1 or p.size == 0:
        raise ValueError(f"{name}: expected a (K,) vector of probabilities, got shape {p.shape}")
    _finite_nonnegative(p, name)
    if abs(p.sum() - 1) > ROW_SUM_TOLERANCE:
        raise ValueError(f"{name}: sums to {p.sum():.6g}, not 1")
    return p


def stochastic_matrix(matrix: Any, name: str) -> np.ndarray:
    """A concrete (K, K) row-stochastic matrix as float64, or a ``ValueError`` naming the row."""
    p = _as_float64(matrix, name)
    square(p, name)
    _finite_nonnegative(p, name)
    sums = p.sum(axis=1)
    bad = np.flatnonzero(abs(sums - 1) > ROW_SUM_TOLERANCE)
    if bad.size:
        raise ValueError(f"{name}: row {bad[0]} sums to {sums[bad[0]]:.6g}, not 1")
    return p


def finite(array: Any, name: str, *, allow_minus_inf: bool = False) -> np.ndarray:
    """A concrete array as float64 with no NaN or infinity (minus infinity on request)."""
    x = _as_float64(array, name)
    bad = ~np.isfinite(x) & ~(np.isneginf(x) & allow_minus_inf)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}: entry {list(where)} is {x[where]}")
    return x


def _as_float64(array: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an array of real numbers, got {array!r:.80}") from None


def integer_array(array: Any, name: str, *, ndim: tuple[int, ...]) -> np.ndarray:
    """A concrete integer array with one of the given numbers of dimensions."""
    try:
        x = np.asarray(array)
    except ValueError:
        raise ValueError(f"{name}: rows have different lengths") from None
    if x.dtype == object or x.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected integers, got dtype {x.dtype}")
    if x.dtype.kind == "f":
        if x.size == 0:
            return np.zeros(x.shape, np.int64)
        bad = x[x != np.floor(x)] if np.isfinite(x).all() else x[~np.isfinite(x)]
        value = bad[0] if bad.size else x.flat[0]
        raise ValueError(f"{name}: expected integers, got {x.dtype} values such as {value!r}")
    if x.ndim not in ndim:
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, ndim))} dimension(s), got shape {x.shape}"
        )
    return x


def token_range(tokens: np.ndarray, name: str, num_tokens: int) -> None:
    """Raise unless every token id is in 0..num_tokens-1; names the first offender."""
    bad = (tokens < 0) | (tokens >= num_tokens)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        at = f"entry {where}" if where else "the value"
        raise ValueError(
            f"{name}: {at} is token id {tokens[tuple(where)]}, outside 0..{num_tokens - 1}"
        )
