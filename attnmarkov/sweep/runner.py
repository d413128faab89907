"""Run an experiment's grid: a host loop over tasks, each kept as soon as it is finished."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from attnmarkov import _validate
from attnmarkov.sweep import store as _store
from attnmarkov.sweep.experiment import config_id

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import xarray as xr
    from numpy.typing import ArrayLike

    from attnmarkov.sweep.experiment import Config, Experiment
    from attnmarkov.sweep.store import Task

    Executor = Callable[[Callable[[Task], None], Sequence[Task]], Iterator[Task]]


def run(
    experiment: Experiment,
    out: str | os.PathLike[str] | None = None,
    executor: str = "serial",
    resume: bool = True,
    *,
    block_size: int | None = None,
    progress: bool = True,
    command: str | None = None,
) -> xr.Dataset:
    """Run every replicate of every grid point of an experiment.

    Random draws depend on the experiment alone, so draws and integer results are the same to the
    bit for every ``block_size``; floats computed from them may differ in their last bits, since
    XLA compiles each shape anew. A store that is resumed keeps the block size it was made with,
    so on the same device a run that was stopped and resumed equals one that never was, to the bit.

    Args:
        experiment: What to run.
        out: Folder of the Zarr store; in memory if None. Tasks that are finished there are
            kept and skipped.
        executor: "serial".
        resume: If False, results in ``out`` are dropped and everything is computed again.
        block_size: Replicates simulated at once; the experiment's ``block_size`` if None. A
            store that is resumed keeps the one it was made with.
        progress: Whether to show a progress bar on stderr.
        command: What to record as the command that made the results.

    Returns:
        Dims ``config``, ``replicate`` and the experiment's own; parameters of the grid points
        are coordinates on ``config``. ``done`` is True throughout.

    Raises:
        ValueError: If ``out`` cannot be written, holds something else, or holds the results of
            another experiment, parameters, seed, version, or backend (the difference is shown);
            for an unknown executor, or a grid that is empty or has a point twice.
    """
    execute = EXECUTORS[_validate.choice(executor, "executor", EXECUTORS)]
    configs = experiment.configs()
    _check_grid(configs)
    limit = experiment.block_size if block_size is None else block_size
    limit = _validate.integer(limit, "block_size", minimum=1)
    replicates = experiment.num_replicates
    block = limit if block_size is not None else -(-replicates // -(-replicates // limit))
    command = command or f"attnmarkov.sweep.run({experiment!r})"
    store = _store.prepare(experiment, configs, out, resume=resume, block=block, command=command)

    expected = _expected(experiment)

    def work(task: Task) -> None:
        config = configs[task.config]
        ids = np.arange(task.start, task.stop)
        results = experiment.simulate(config, experiment.config_key(config), ids)
        store.write(task, _checked(results, expected, len(ids)))

    tasks = store.pending()
    total = len(store.tasks())
    bar = tqdm(
        total=total,
        initial=total - len(tasks),
        desc=experiment.name,
        unit="task",
        file=sys.stderr,
        disable=not progress,
    )
    with bar:
        for _ in execute(work, tasks):
            bar.update()
    return store.dataset()


def _serial(work: Callable[[Task], None], tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        work(task)
        yield task


EXECUTORS: dict[str, Executor] = {"serial": _serial}
"""Each runs ``work`` once on every task and yields the tasks as they finish."""


def _check_grid(configs: list[Config]) -> None:
    if not configs:
        raise ValueError("configs: the grid is empty")
    seen: dict[int, int] = {}
    for i, config in enumerate(configs):
        if set(config) != set(configs[0]):
            raise ValueError(f"configs: point {i} has other parameters than point 0: {config}")
        first = seen.setdefault(config_id(config), i)
        if first != i:
            raise ValueError(f"configs: points {first} and {i} have the same id: {config}")


def _expected(experiment: Experiment) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape of one replicate's results, and dtype, by name."""
    sizes = {k: len(np.asarray(v)) for k, v in experiment.coords().items()}
    return {
        name: (tuple(sizes[d] for d in dims), np.dtype(dtype))
        for name, (dims, dtype) in experiment.layout().items()
    }


def _checked(
    results: Mapping[str, ArrayLike],
    expected: dict[str, tuple[tuple[int, ...], np.dtype]],
    count: int,
) -> dict[str, np.ndarray]:
    """The results as arrays, of the names, shapes and kinds that the layout promises."""
    if set(results) != set(expected):
        raise ValueError(f"simulate: returned {sorted(results)}, layout has {sorted(expected)}")
    arrays = {name: np.asarray(values) for name, values in results.items()}
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if array.shape != (count, *shape):
            raise ValueError(f"simulate: {name!r} has shape {array.shape}, not {(count, *shape)}")
        casting = "same_kind" if dtype.kind == "f" else "safe"  # integers would wrap
        if not np.can_cast(array.dtype, dtype, casting):
            raise ValueError(f"simulate: {name!r} is {array.dtype}, not {dtype}")
    return arrays
