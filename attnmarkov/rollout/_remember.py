"""What has been found out about an array, kept while the array lives."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import jax

from attnmarkov import _validate

if TYPE_CHECKING:
    from collections.abc import Callable


class Remembered:
    """``find(array)``, found once for each of the last ``most`` arrays that it was asked of.

    Only of JAX arrays, which do not change: others, and traced ones, are looked at every time.
    The arrays themselves are not kept alive. Where the array is known the work is done at once,
    within jit too.
    """

    def __init__(self, find: Callable[[Any], Any], most: int) -> None:
        """Nothing is known yet."""
        self._find, self._most = find, most
        self._known: dict[int, tuple[weakref.ref, Any]] = {}

    def __call__(self, array: Any) -> Any:
        """What ``find`` says of the array."""
        if not _validate.is_concrete(array):
            return self._find(array)
        entry = self._known.get(id(array))
        if entry is not None and entry[0]() is array:
            return entry[1]
        with jax.ensure_compile_time_eval():
            found = self._find(array)
        if isinstance(array, jax.Array):
            self._keep(array, found)
        return found

    def _keep(self, array: jax.Array, found: Any) -> None:
        key, known = id(array), self._known

        def forget(gone: weakref.ref) -> None:
            if key in known and known[key][0] is gone:
                del known[key]

        known.pop(key, None)
        known[key] = weakref.ref(array, forget), found
        while len(known) > self._most:
            del known[next(iter(known))]
