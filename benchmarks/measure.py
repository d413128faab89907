"""Two things measured in turn, each round one of both."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import pytest

import attnmarkov as am
from benchmarks import table

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Run:
    """Something to measure.

    Attributes:
        name: As the table calls it.
        call: Generates a batch from a seed.
        tokens: Tokens of a batch (or whatever is counted).
    """

    name: str
    call: Callable[[int], Any]
    tokens: float


def seconds(run: Run, seed: int) -> float:
    """How long one call takes, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run.call(seed))
    return time.perf_counter() - start


def named(run: Run) -> str:
    """Its name, and the engine that ``auto`` chose."""
    result = run.call(0) if run.name.startswith("auto") else None
    return f"{run.name} ({result.engine})" if isinstance(result, am.Trajectory) else run.name


@dataclass(frozen=True)
class Measure:
    """Measures under pytest-benchmark and hands the rows to the table.

    Attributes:
        benchmark: Its fixture; its own report holds the times of the engine.
        rows: Where rows go.
        budget: Seconds of a comparison, its first calls apart.
        smoke: Whether nothing but a run through is wanted.
    """

    benchmark: Any
    rows: list[table.Row]
    budget: float
    smoke: bool

    def against(
        self, engine: Run, peer: Run, group: str, case: str, *, cost: bool = False, **row: Any
    ) -> None:
        """Add a row: ``engine`` and ``peer`` in turn, as often as the budget allows."""
        if self.benchmark.disabled:
            pytest.skip("pytest-benchmark is switched off")
        first = [self._first(peer), self._first(engine)]
        peer.call(1)  # its compiled code went with the engine's first call
        again = seconds(engine, 1) + seconds(peer, 2)
        rounds = 2 if self.smoke else min(max(math.ceil(self.budget / again), 3), 50)
        times: list[float] = []
        seed = iter(range(3, 3 + 2 * rounds))
        self.benchmark.pedantic(
            lambda: jax.block_until_ready(engine.call(next(seed))),
            setup=lambda: times.append(seconds(peer, next(seed))),
            rounds=rounds,
        )
        engine_times = self.benchmark.stats.stats.data
        self.add(
            table.compare(
                engine_times,
                times,
                engine.tokens,
                peer.tokens,
                cost=cost,
                group=group,
                case=case,
                engine=named(engine),
                peer=named(peer),
                engine_compile=max(first[1] - min(engine_times), 0),
                peer_compile=max(first[0] - min(times), 0),
                **row,
            )
        )

    def within(self, engine: Run, limit: float, group: str, case: str) -> None:
        """Add a row: the time of a call as a share of a limit in seconds."""
        if self.benchmark.disabled:
            pytest.skip("pytest-benchmark is switched off")
        first = self._first(engine)
        rounds = 2 if self.smoke else 7
        seed = iter(range(1, 1 + rounds))
        self.benchmark.pedantic(
            lambda: jax.block_until_ready(engine.call(next(seed))), rounds=rounds
        )
        times = self.benchmark.stats.stats.data
        self.add(
            table.Row(
                group,
                case,
                engine.name,
                f"{limit:g} s",
                min(times) / limit,
                min(times) / limit,
                max(times) / limit,
                rounds,
                table.Target(1, at_least=False),
                engine_compile=max(first - min(times), 0),
                note=f"{min(times):.3g} s",
            )
        )

    def add(self, row: table.Row) -> None:
        """Add a row; tiny sizes have no targets."""
        row = replace(row, target=None) if self.smoke else row
        self.rows.append(row)
        self.benchmark.extra_info.update(table.record([row], {})["rows"][0])

    def _first(self, run: Run) -> float:
        """A first call, compilation included."""
        if not self.smoke:
            jax.clear_caches()
        return seconds(run, 0)
