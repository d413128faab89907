"""The table of ratios: what is in a row, and how rows become Markdown and JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGES = ("attnmarkov", "jax", "jaxlib", "numpy", "numba", "torch", "quantecon")


@dataclass(frozen=True)
class Target:
    """A limit that a ratio should keep."""

    limit: float
    at_least: bool = True

    def met(self, ratio: float) -> bool:
        """Whether ``ratio`` keeps it."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        group: What is measured; rows of a group stand together.
        case: Sizes.
        engine: What is measured.
        peer: What it is held against.
        ratio: From the best round of each side.
        low: The least ratio of a single round.
        high: The largest.
        rounds: Number of rounds.
        target: The limit, if there is one.
        engine_rate: Tokens per second.
        peer_rate: Tokens per second.
        engine_compile: Seconds that the first call takes longer than the best one.
        peer_compile: The same of the peer.
        note: Anything else.
    """

    group: str
    case: str
    engine: str
    peer: str
    ratio: float
    low: float
    high: float
    rounds: int
    target: Target | None = None
    engine_rate: float | None = None
    peer_rate: float | None = None
    engine_compile: float | None = None
    peer_compile: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.target.met(self.ratio)


def compare(
    engine_times: Sequence[float],
    peer_times: Sequence[float],
    engine_tokens: float,
    peer_tokens: float,
    *,
    cost: bool = False,
    **row: Any,
) -> Row:
    """The row of two lists of seconds, measured in turn.

    The ratio is how many times faster the engine makes a token than the peer does (or, for
    ``cost``, how many times as long it takes), from the shortest time of each: noise only adds.
    """
    engine = [seconds / engine_tokens for seconds in engine_times]
    peer = [seconds / peer_tokens for seconds in peer_times]

    def ratio(a: float, b: float) -> float:
        return a / b if cost else b / a

    each = [ratio(a, b) for a, b in zip(engine, peer, strict=True)]
    return Row(
        ratio=ratio(min(engine), min(peer)),
        low=min(each),
        high=max(each),
        rounds=len(each),
        engine_rate=1 / min(engine),
        peer_rate=1 / min(peer),
        **row,
    )


def environment() -> dict[str, str]:
    """Machine, versions and date."""
    device = jax.devices()[0]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "CPU": f"{_cpu()}, {usable} cores usable",
        "JAX device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(
    rows: Sequence[Row], environment: dict[str, str], skipped: Sequence[tuple[str, str]] = ()
) -> str:
    """The whole report as Markdown."""
    parts = ["# Benchmarks", "\n".join(f"* {name}: {value}" for name, value in environment.items())]
    for group in dict.fromkeys(row.group for row in rows):
        parts += [f"## {group}", _grid(_RATIOS, [_cells(r) for r in rows if r.group == group])]
    compiled = [r for r in rows if r.engine_compile is not None]
    if compiled:
        cells = [
            (r.group, r.case, r.engine, _number(r.engine_compile), r.peer, _number(r.peer_compile))
            for r in compiled
        ]
        parts += ["## Compilation, in seconds", _grid(_COMPILE, cells)]
    if skipped:
        parts += ["## Not measured", "\n".join(f"* {name}: {why}" for name, why in skipped)]
    return "\n\n".join(parts) + "\n"


_RATIOS = (
    *("case", "engine", "against", "ratio", "rounds: range", "target", "met"),
    *("Mtok/s", "against, Mtok/s", "note"),
)
_COMPILE = ("what", "case", "engine", "seconds", "against", "seconds")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.case,
        row.engine,
        row.peer,
        _number(row.ratio),
        f"{row.rounds}: {_number(row.low)} to {_number(row.high)}",
        "" if row.target is None else str(row.target),
        {None: "", True: "yes", False: "no"}[row.met],
        _number(row.engine_rate and row.engine_rate / 1e6),
        _number(row.peer_rate and row.peer_rate / 1e6),
        row.note,
    )


def _number(value: float | None) -> str:
    """Three significant digits, whole numbers from 100 up."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _grid(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as text."""
    lines = [header, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def record(
    rows: Sequence[Row], environment: dict[str, str], skipped: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The same, ready for JSON."""
    return {
        "environment": environment,
        "rows": [
            {
                **asdict(row),
                "target": None if row.target is None else str(row.target),
                "met": row.met,
            }
            for row in rows
        ],
        "skipped": [{"name": name, "reason": why} for name, why in skipped],
    }
