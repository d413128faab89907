"""Predictions: equilibria, phase diagrams, finite windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
import pytest

import attnmarkov as am
from benchmarks.measure import Run
from benchmarks.peers import root_search

if TYPE_CHECKING:
    from benchmarks.measure import Measure

LIMITS = "Predictions, against their limits"


def _model(seed: int, size: int) -> am.CCMC:
    return am.CCMC.from_transition_matrix(am.random_transition_matrix(jax.random.key(seed), size))


@pytest.mark.parametrize("size", [8, 12])
def test_equilibria(measure: Measure, smoke: bool, size: int) -> None:
    """All of them, another matrix each time."""
    size = 4 if smoke else size
    models = [_model(seed, size) for seed in range(8)]
    run = Run("equilibria", lambda seed: len(am.dynamics.equilibria(models[seed])), 1)
    measure.within(run, 1, LIMITS, f"all equilibria, K = {size}")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_phase_diagram(measure: Measure, smoke: bool, temperature: float) -> None:
    """Regimes, exponents and equilibria of two tokens over a grid."""
    axis = np.linspace(0.005, 0.995, 8 if smoke else 200)
    p, q = np.meshgrid(axis, axis)
    run = Run(
        "two_token_phases",
        lambda _: am.dynamics.two_token_phases(p, q, temperature=temperature).regime.shape,
        p.size,
    )
    measure.within(run, 60, LIMITS, f"{len(axis)} × {len(axis)} phase diagram, T = {temperature:g}")


@pytest.mark.parametrize("size", [3, 4])
def test_equilibria_against_a_search(measure: Measure, smoke: bool, size: int) -> None:
    """SciPy's root finder from random starts on every face, which may miss some."""
    size, starts = (2, 2) if smoke else (size, 4)
    models = [_model(seed, size) for seed in range(400)]
    missed = [
        len(am.dynamics.equilibria(m)) - root_search.count(m, starts, seed)
        for seed, m in enumerate(models[:8])
    ]
    measure.against(
        Run("equilibria", lambda seed: len(am.dynamics.equilibria(models[seed])), 1),
        Run("SciPy root", lambda seed: root_search.count(models[seed], starts, seed), 1),
        "All equilibria of a matrix",
        f"K = {size}, {starts} starts a face",
        note=f"of 8 matrices the search misses {sum(m > 0 for m in missed)}",
    )
