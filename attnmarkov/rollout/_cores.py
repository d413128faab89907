"""Parts of the lanes on the cores of a CPU, each in a thread of its own.

A step of generation is too short for XLA to share it among cores at a profit. Lanes have nothing
to do with each other, so each core takes some, to the same bits.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from attnmarkov.rollout import _devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Part = TypeVar("Part")
Result = TypeVar("Result")

_FEWEST = 32  # lanes that are worth a core
_WORK = 2**25  # tokens drawn, times K: less is over before the threads have begun


def count() -> int:
    """Cores that this process may use, if they are what runs the lanes; else 1."""
    if _devices.count() > 1 or jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parts(lanes: int, num_steps: int, num_tokens: int) -> int:
    """In how many parts to cut the lanes of a rollout."""
    if lanes * num_steps * num_tokens < _WORK:
        return 1
    return max(1, min(count(), lanes // _FEWEST))


def over_cores(run: Callable[[Part], Result], parts: Iterator[Part]) -> list[Result]:
    """``[run(part) for part in parts]``, as many at once as there are cores."""
    every = list(parts)
    cores = min(count(), len(every))
    if cores == 1:
        return [run(part) for part in every]
    settings: Any = jax.config  # those of this thread
    config = bool(settings.jax_enable_x64), settings.jax_default_device
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(partial(_under, *config, run), every))


def _under(x64: bool, device: Any, run: Callable[[Any], Any], part: Any) -> Any:
    """``run(part)`` with the settings of another thread, done when it returns."""
    with jax.enable_x64(x64), jax.default_device(device):
        return jax.block_until_ready(run(part))
