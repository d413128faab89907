"""The experiments that ship with the package, by name; each is loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmarkov.sweep import Experiment

REGISTRY: dict[str, str] = {
    "sample-complexity": "attnmarkov.experiments.sample_complexity:SampleComplexity",
    "coverage-threshold": "attnmarkov.experiments.coverage_threshold:CoverageThreshold",
    "positional-learning": "attnmarkov.experiments.positional_learning:PositionalLearning",
    "single-trajectory": "attnmarkov.experiments.single_trajectory:SingleTrajectory",
    "winner-takes-all": "attnmarkov.experiments.winner_takes_all:WinnerTakesAll",
    "two-token-phase-diagram": (
        "attnmarkov.experiments.two_token_phase_diagram:TwoTokenPhaseDiagram"
    ),
    "temperature-and-repetition": (
        "attnmarkov.experiments.temperature_and_repetition:TemperatureAndRepetition"
    ),
    "decoding-remedies": "attnmarkov.experiments.decoding_remedies:DecodingRemedies",
    "finite-context-absorption": (
        "attnmarkov.experiments.finite_context_absorption:FiniteContextAbsorption"
    ),
}


def names() -> list[str]:
    """Names of the registered experiments."""
    return list(REGISTRY)


def get(name: str) -> type[Experiment]:
    """The class of a registered experiment.

    Raises:
        ValueError: If there is none of that name; the nearest name is suggested.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"experiment: unknown experiment {name!r}; {hint}known: {', '.join(REGISTRY)}"
        )
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
