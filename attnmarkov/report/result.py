"""Results, what they say of the theory, and the verdicts as plain text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import xarray as xr
    from matplotlib.figure import Figure

    from attnmarkov.sweep import Claim, Experiment


@dataclass(frozen=True)
class Result:
    """An experiment, its results, and what they say. ``note`` tells what is missing."""

    experiment: Experiment
    dataset: xr.Dataset
    claims: Sequence[Claim]
    figures: Mapping[str, Figure]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`write_outputs` wrote: the page, and the claims on it."""

    path: Path
    claims: Sequence[Claim]
    skipped: Sequence[str] = field(default=())

    def count(self, verdict: str) -> int:
        """How many claims have this verdict."""
        return sum(c.verdict == verdict for c in self.claims)

    def __str__(self) -> str:
        """The claims as a plain-text table, then the verdicts counted."""
        head = ("verdict", "predicted", "measured", "uncertainty", "experiment", "claim")
        rows: list[tuple[str, ...]] = [head]
        for c in self.claims:
            j = c.to_json()
            shown = number(j["predicted"]), number(j["measured"]), number(j["uncertainty"], 2)
            rows.append((c.verdict, *shown, c.experiment, c.claim))
        widths = [max(len(r[i]) for r in rows) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(x.ljust(w) for x, w in zip(r, widths, strict=False)), r[-1]]) for r in rows
        ]
        counts = Counter(c.verdict for c in self.claims)
        return "\n".join([*lines, f"{len(self.claims)} claims: " + tally(counts)])


def evaluate(experiment: Experiment, dataset: xr.Dataset) -> Result:
    """Claims and figures of a dataset, finished or not.

    No verdict is given on part of a run: its claims read "inconclusive".
    """
    done = np.asarray(dataset["done"])
    if done.all():
        return Result(experiment, dataset, experiment.claims(dataset), experiment.figures(dataset))
    note = f"Unfinished: {done.mean():.0%} of the replicates are there, so no verdict is given."
    try:
        claims = [
            dataclasses.replace(c, verdict="inconclusive") for c in experiment.claims(dataset)
        ]
        return Result(experiment, dataset, claims, experiment.figures(dataset), note)
    except Exception as error:  # an experiment may need its whole grid
        note += f" They do not suffice for the claims and figures ({error})."
        return Result(experiment, dataset, [], {}, note)


def number(value: float | int | str | None, digits: int = 4) -> str:
    """A quantity for people: a few digits, words as they are, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def tally(counts: Counter[str]) -> str:
    """The verdicts counted, in words."""
    passed, failed, rest = (counts[v] for v in ("pass", "fail", "inconclusive"))
    return f"{passed} pass, {failed} fail, {rest} inconclusive"
