"""Where results are kept: a Zarr group whose chunks are tasks, read back with xarray."""

from __future__ import annotations

import datetime
import functools
import json
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore

import attnmarkov
from attnmarkov import _validate
from attnmarkov.sweep.experiment import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from attnmarkov.sweep.experiment import Config, Experiment

FORMAT = "attnmarkov-sweep-1"
# Results may only be added to a store that agrees in these.
IDENTITY = ("experiment", "spec", "attnmarkov", "jax", "backend", "dtype", "fingerprint")


class Task(NamedTuple):
    """A block of replicates of one grid point: what is computed, and stored, at once."""

    config: int
    start: int
    stop: int


@dataclass(frozen=True)
class Store:
    """An open store: which tasks are missing, and where their results go."""

    group: zarr.Group

    @functools.cached_property
    def _arrays(self) -> dict[str, zarr.Array]:
        return dict(self.group.arrays())

    def tasks(self) -> list[Task]:
        """All tasks, in order."""
        mask = self._arrays["done"]
        (configs, replicates), (_, block) = mask.shape, mask.chunks
        return [
            Task(c, start, min(start + block, replicates))
            for c in range(configs)
            for start in range(0, replicates, block)
        ]

    def pending(self) -> list[Task]:
        """The tasks that are not done yet."""
        done = np.asarray(self._arrays["done"][:])
        return [t for t in self.tasks() if not done[t.config, t.start]]

    def write(self, task: Task, results: Mapping[str, ArrayLike]) -> None:
        """Keep a task's results (each a whole chunk), then mark it as done."""
        index = (task.config, slice(task.start, task.stop))
        for name, values in results.items():
            self._arrays[name][index] = np.asarray(values)
        self._arrays["done"][index] = True

    def dataset(self) -> xr.Dataset:
        """Everything; from disk, read when it is used."""
        dataset = xr.open_zarr(self.group.store, chunks=None, consolidated=False)
        words = {k: v for k, v in dataset.coords.items() if v.dtype.kind in "TO"}
        plain = {k: (v.dims, np.array(v.values.tolist(), dtype=str)) for k, v in words.items()}
        dataset = dataset.assign_coords(plain)
        return dataset.load() if isinstance(self.group.store, MemoryStore) else dataset


def open_results(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open the results of a sweep, finished or not.

    Args:
        path: The folder that :func:`attnmarkov.sweep.run` wrote.

    Returns:
        The dataset, read lazily. ``done`` (config, replicate) says which entries are there; the
        others are NaN in floats, -1 in signed integers, the largest value in unsigned ones.

    Raises:
        ValueError: If there is no such store.
    """
    path = Path(path)
    if _attributes(path) is None:
        raise ValueError(f"path: no results of a sweep at {path}")
    return Store(zarr.open_group(LocalStore(path, read_only=True), mode="r")).dataset()


def prepare(
    experiment: Experiment,
    configs: list[Config],
    out: str | os.PathLike[str] | None,
    *,
    resume: bool,
    block: int,
    command: str,
) -> Store:
    """The store of a run: in memory if ``out`` is None, found again, or new."""
    attributes = _provenance(experiment, configs, command)
    if out is None:
        return Store(_create(MemoryStore(), experiment, configs, block, attributes))
    path = Path(out).resolve()
    found = _attributes(path)
    kept = found is not None and resume
    with _validate.writing(path, "out", path if kept else path.parent):
        if found is None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ValueError(f"out: {path} exists and holds no results of a sweep; left as it is")
        if found is not None and resume:
            _check_same(found, attributes, path)
            return Store(zarr.open_group(LocalStore(path), mode="r+"))
        # Built beside its place and moved in, so that no half-made store can be found later.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            fresh = Path(scratch, "new")
            _create(LocalStore(fresh), experiment, configs, block, attributes)
            if found is not None:
                path.rename(Path(scratch, "old"))
            fresh.replace(path)
    return Store(zarr.open_group(LocalStore(path), mode="r+"))


def _create(
    store: LocalStore | MemoryStore,
    experiment: Experiment,
    configs: list[Config],
    block: int,
    attributes: dict[str, str],
) -> zarr.Group:
    """Write coordinates, empty variables and attributes."""
    layout = {**experiment.layout(), "done": ((), bool)}
    dims = {k: _column(v) for k, v in experiment.coords().items()}
    for name, (own, _) in layout.items():
        missing = sorted(set(own) - set(dims))
        if missing:
            raise ValueError(f"coords: no coordinate for dim {missing[0]!r} of {name!r}")
    parameters = {k: ("config", _column([c[k] for c in configs])) for k in configs[0]}
    taken = sorted(set(parameters) & {*layout, *dims, "config", "replicate"})
    if taken:
        raise ValueError(f"configs: parameter {taken[0]!r} has the name of a variable or dim")
    sizes = {"config": len(configs), "replicate": experiment.num_replicates}
    indexes = {k: (k, np.arange(n)) for k, n in sizes.items()}
    further = {k: (k, v) for k, v in dims.items()}
    coords: Any = {**indexes, **parameters, **further}
    xr.Dataset(coords=coords).to_zarr(store, zarr_format=3, consolidated=False)
    group = zarr.open_group(store, mode="r+")
    for name, (own, dtype) in layout.items():
        inner = tuple(len(dims[d]) for d in own)
        group.create_array(
            name,
            shape=(*sizes.values(), *inner),
            chunks=(1, min(block, experiment.num_replicates), *inner),
            dtype=np.dtype(dtype),
            fill_value=_blank(name, np.dtype(dtype)),
            dimension_names=(*sizes, *own),
        )
    group.attrs.update(attributes)
    return group


def _provenance(experiment: Experiment, configs: list[Config], command: str) -> dict[str, str]:
    layout = {k: [d, np.dtype(t).name] for k, (d, t) in experiment.layout().items()}
    return {
        "format": FORMAT,
        "experiment": experiment.name,
        "spec": experiment.spec(),
        "fingerprint": f"{zlib.crc32(canonical_json([configs, layout]).encode()):08x}",
        "attnmarkov": attnmarkov.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "dtype": jnp.result_type(float).name,
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _attributes(path: Path) -> dict[str, str] | None:
    """The attributes of a store of ours; None if it is anything else."""
    try:
        attributes = json.loads(Path(path, "zarr.json").read_text())["attributes"]
        return attributes if attributes["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _check_same(found: dict[str, str], asked: dict[str, str], path: Path) -> None:
    def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        return [f"{k}: stored {a.get(k)!r}, asked {b.get(k)!r}" for k in keys]

    old, new = ({k: a.get(k) for k in IDENTITY if k != "spec"} for a in (found, asked))
    diff = differences(json.loads(found["spec"]), json.loads(asked["spec"]))
    old, new = (x if not diff else {**x, "fingerprint": ""} for x in (old, new))
    diff += differences(old, new)
    if diff:
        raise ValueError(
            f"out: {path} holds another run ({'; '.join(diff)}); choose another folder, "
            "or start afresh with resume=False (--no-resume)"
        )


def _column(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind == "U" else array


def _blank(name: str, dtype: np.dtype) -> float | int | bool:
    if dtype.kind not in "fiub":
        raise ValueError(f"layout: dtype of {name!r} must be float, integer or bool, got {dtype}")
    blanks = {"f": lambda: np.nan, "i": lambda: -1, "b": lambda: False}
    return blanks.get(dtype.kind, lambda: int(np.iinfo(dtype).max))()
