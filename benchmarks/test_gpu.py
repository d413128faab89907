"""A GPU: large batches, and how near the engines come to what the device can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cases import matrix, model, rollout, sizes
from benchmarks.measure import Run
from benchmarks.peers import textbook

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Measure

if jax.default_backend() != "gpu":
    pytest.skip(f"the backend is {jax.default_backend()}", allow_module_level=True)

GROUP = "On the GPU"
SIZES = [
    (4, 2**20, 1024),
    (16, 2**20, 1024),
    (64, 2**18, 512),
    (256, 2**16, 256),
    (4096, 2**12, 64),
]
_CALLS = 16
_OPERATIONS = 4  # of a token of the vocabulary in a step: weigh, add up, compare, count


engines = pytest.mark.parametrize("engine", ["auto", "scan", "rejection", "pallas"])
cases = pytest.mark.parametrize("case", SIZES, ids=lambda case: f"K{case[0]}")


def _sizes(smoke: bool, case: tuple[int, int, int]) -> tuple[int, int, int]:
    return (min(case[0], 20), 256, 16) if smoke else case


@engines
@cases
def test_against_textbook(
    measure: Measure, smoke: bool, engine: str, case: tuple[int, int, int]
) -> None:
    """Final counts, against the textbook scan on the same device, at a shorter horizon."""
    size, lanes, steps = _sizes(smoke, case)
    short = max(steps // 16, 1)
    peer = textbook.build(matrix(size), range(size), short, lanes)
    measure.against(
        rollout(engine, model(size), steps, lanes),
        Run(f"vmap + scan, {short} steps", peer, lanes * short),
        GROUP,
        sizes(size, lanes, steps),
    )


@engines
@cases
def test_against_bandwidth(
    measure: Measure, smoke: bool, engine: str, case: tuple[int, int, int]
) -> None:
    """Share of the rate at which int32 counts can be read and written in the device's memory.

    An engine that holds its state nearer to the arithmetic units may pass it.
    """
    size, lanes, steps = _sizes(smoke, case)
    words = 2**14 if smoke else 2**28
    run = jax.jit(lambda x: x + 1)
    counts = jnp.zeros(words, jnp.int32)
    measure.against(
        rollout(engine, model(size), steps, lanes),
        Run("reading and writing the counts", _repeat(run, counts), _CALLS * words / size),
        GROUP,
        sizes(size, lanes, steps),
        note="estimate",
    )


@pytest.mark.parametrize("engine", ["pallas"])
@cases
def test_against_arithmetic(
    measure: Measure, smoke: bool, engine: str, case: tuple[int, int, int]
) -> None:
    """Share of the rate that float32 arithmetic allows, at four operations a token and step."""
    size, lanes, steps = _sizes(smoke, case)
    words, depth = (2**12, 16) if smoke else (2**26, 512)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        for _ in range(depth):  # one fused multiply-add each, all in one kernel
            x = x * 0.999 + 0.001
        return x

    operations = _CALLS * words * depth
    call = _repeat(run, jnp.ones(words, jnp.float32))
    measure.against(
        rollout(engine, model(size), steps, lanes),
        Run("arithmetic alone", call, operations / (_OPERATIONS * size)),
        GROUP,
        sizes(size, lanes, steps),
        note="estimate",
    )


def _repeat(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[int], jax.Array]:
    """``run`` again and again on its own result, without waiting in between."""

    def call(_: int) -> jax.Array:
        out = x
        for _ in range(_CALLS):
            out = run(out)
        return out

    return call
