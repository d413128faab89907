"""The plain Markov chain, against QuantEcon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import pytest

import attnmarkov as am
from benchmarks.cases import matrix, needs_cpu, shrunk, sizes
from benchmarks.measure import Run

if TYPE_CHECKING:
    from benchmarks.measure import Measure


@pytest.mark.parametrize("case", [(16, 4096, 4096), (256, 4096, 1024)], ids=lambda c: f"K{c[0]}")
def test_against_quantecon(measure: Measure, smoke: bool, case: tuple[int, int, int]) -> None:
    """Every token kept."""
    needs_cpu()
    pytest.importorskip("quantecon")
    from benchmarks.peers import quantecon_chain

    size, lanes, steps = shrunk(smoke, *case)
    chain = am.MarkovChain.from_transition_matrix(matrix(size))
    measure.against(
        Run(
            "MarkovChain.sample",
            lambda seed: chain.sample(jax.random.key(seed), steps, lanes),
            lanes * steps,
        ),
        Run("QuantEcon", quantecon_chain.build(matrix(size), steps, lanes), lanes * steps),
        "Plain Markov chain, every token kept",
        sizes(size, lanes, steps),
    )
