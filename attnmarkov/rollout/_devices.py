"""Lanes spread over all devices: each runs its own, and nothing passes between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from attnmarkov import _validate

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = PartitionSpec()  # the same on every device
FIRST = PartitionSpec("lane")  # lanes on the first axis
SECOND = PartitionSpec(None, "lane")


def count() -> int:
    """Number of devices that lanes are spread over: all of the process, or of all processes."""
    return jax.device_count()


def over_lanes(
    fn: Callable, lanes: int, in_specs: Any, out_specs: Any = FIRST, *, local: bool = False
) -> Callable:
    """``fn`` as it is run by each device on its share of ``lanes``; to be called inside jit.

    Draws are the same to the bit however many devices there are. Lanes that do not divide
    evenly stay on one device. ``local`` keeps to the devices of this process, for results that
    go to the host: each process then has all of them.
    """
    devices = jax.local_devices() if local else jax.devices()
    if len(devices) == 1 or lanes % len(devices):
        return fn
    mesh = Mesh(np.asarray(devices), ("lane",))
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def global_inputs(tree: Any) -> Any:
    """``tree`` in a form that a computation on all devices takes: equal arrays on each host.

    Arrays that were put on one of several devices are taken from there.
    """
    known = count() > 1 and _validate.is_concrete(tree)
    return jax.tree.map(np.asarray, tree) if known else tree


def memory() -> int | None:
    """Bytes of memory of the devices together; None if that can't be told."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max")  # of a container
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            room = min(room, int(text))
        return room * jax.process_count()
    stats = [device.memory_stats() for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s and "bytes_limit" in s]
    return sum(limits) * jax.process_count() if limits else None
