"""Options, the fixture that measures, and the table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.measure import Measure

_ROWS = pytest.StashKey[list[table.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--smoke``, ``--results``, ``--seconds``."""
    group = parser.getgroup("attnmarkov benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny sizes, to see that all of it runs")
    group.addoption("--results", metavar="DIR", help="write benchmarks.md and benchmarks.json")
    group.addoption(
        "--seconds", type=float, default=5.0, help="time for each comparison (default: 5)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Rows are kept with the configuration; pytest-benchmark's own table of times is left out."""
    config.stash[_ROWS] = []
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A smoke run takes the first and the last case of every test and engine."""
    if not config.option.smoke:
        return
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        case = getattr(item, "callspec", None)
        engine = case.params.get("engine", "") if case else ""
        cases.setdefault((item.nodeid.split("[")[0], engine), []).append(item)
    kept = {item for same in cases.values() for item in (same[0], same[-1])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Measure:
    """Measures and fills the table."""
    option = request.config.option
    return Measure(benchmark, request.config.stash[_ROWS], option.seconds, option.smoke)


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether nothing but a run through is wanted."""
    return request.config.option.smoke


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table, and write it where ``--results`` says."""
    skipped = [
        (report.nodeid.split("::")[-1], report.longrepr[2].removeprefix("Skipped: "))
        for report in terminalreporter.stats.get("skipped", [])
    ]
    rows, environment = config.stash[_ROWS], table.environment()
    text = table.markdown(rows, environment, skipped)
    terminalreporter.write_line("")
    terminalreporter.write_line(text)
    if config.option.results:
        folder = Path(config.option.results)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmarks.md").write_text(text)
        data = json.dumps(table.record(rows, environment, skipped), indent=1, ensure_ascii=False)
        (folder / "benchmarks.json").write_text(data + "\n")
