"""The model of the benchmarks, and its engines as things to measure."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import jax
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.rollout import ENGINES
from benchmarks.measure import Run

COLLAPSING = [[0.6, 0.24, 0.16], [0.7, 0.2, 0.1], [0.65, 0.15, 0.2]]  # token 0 wins; λ = 0.4, 0.27
URN = [[0.5, 0.3, 0.2]] * 3


@cache
def model(size: int) -> am.CCMC:
    """A CCMC with uniform rows on the simplex."""
    return am.CCMC.from_transition_matrix(am.random_transition_matrix(jax.random.key(0), size))


def matrix(size: int) -> np.ndarray:
    """Its transition matrix, for the peers."""
    p = np.asarray(model(size).transition_matrix, np.float64)
    return p / p.sum(axis=1, keepdims=True)


def rollout(
    engine: str,
    of: am.CCMC,
    num_steps: int,
    lanes: int,
    record: Literal["tokens", "counts"] = "counts",
    name: str | None = None,
    **law: Any,
) -> Run:
    """A rollout from every token once, as something to measure; skips what does not exist.

    ``law`` is passed on: the context and the decoder.
    """
    if engine != "auto" and engine not in ENGINES:
        pytest.skip(f"there is no engine {engine!r}")
    prompt = np.arange(of.num_tokens)

    def call(seed: int) -> am.Trajectory:
        key = jax.random.key(seed)
        return am.rollout(of, key, prompt, num_steps, lanes, engine, record, **law)

    return Run(name or engine, call, float(lanes) * num_steps)


def shrunk(smoke: bool, size: int, lanes: int, num_steps: int) -> tuple[int, int, int]:
    """The sizes of a case, or tiny ones in a smoke run."""
    return (min(size, 80), min(lanes, 8), min(num_steps, 32)) if smoke else (size, lanes, num_steps)


def sizes(size: int, lanes: int, num_steps: int) -> str:
    """How the table names them."""
    return f"K = {size}, {lanes} lanes, {num_steps} steps"


def needs_cpu() -> None:
    """Skip a comparison with a program for the CPU where the engines run elsewhere."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"the peer runs on the CPU, the engines here on {jax.default_backend()}")
