"""Horizons out of reach step by step, and the memory of long ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import attnmarkov as am
from benchmarks.cases import COLLAPSING, URN, rollout
from benchmarks.table import Row, Target

if TYPE_CHECKING:
    from benchmarks.measure import Measure

FAR = "64 trajectories to far horizons"


@pytest.mark.parametrize(("num_steps", "limit"), [(10**9, 1), (10**12, 20)], ids=["1e9", "1e12"])
def test_skip_ahead_limits(measure: Measure, smoke: bool, num_steps: int, limit: float) -> None:
    """Seconds of a collapsing model once it is compiled."""
    of = am.CCMC.from_transition_matrix(COLLAPSING)
    num_steps = 10**6 if smoke else num_steps
    case = f"K = 3, λ = 0.4 and 0.27, {num_steps:.0e} steps"
    measure.within(rollout("skip_ahead", of, num_steps, 64), limit, FAR, case)


def test_skip_ahead_against_scan(measure: Measure, smoke: bool) -> None:
    """Per token; scan at a horizon that it can reach."""
    of = am.CCMC.from_transition_matrix(COLLAPSING)
    far, near = (10**6, 10**3) if smoke else (10**9, 10**6)
    measure.against(
        rollout("skip_ahead", of, far, 64),
        rollout("scan", of, near, 64, name=f"scan, {near:.0e} steps, per token"),
        FAR,
        f"K = 3, λ = 0.4 and 0.27, {far:.0e} steps",
    )


def test_urn_against_skip_ahead(measure: Measure, smoke: bool) -> None:
    """Equal rows; the tokens that lose grow as T to the powers 0.6 and 0.4."""
    of = am.CCMC.from_transition_matrix(URN)
    steps = 10**4 if smoke else 10**6
    measure.against(
        rollout("urn", of, steps, 64),
        rollout("skip_ahead", of, steps, 64),
        FAR,
        f"K = 3, equal rows, {steps:.0e} steps",
    )


_CHILD = """
import sys
import jax, numpy as np, attnmarkov as am
def peak():  # of this process alone; getrusage would begin with the parent's
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1])
lanes, steps = map(int, sys.argv[1:])
model = am.CCMC.from_transition_matrix(am.random_transition_matrix(jax.random.key(0), 16))
before = peak()
at = [steps // 8, steps // 4, steps // 2, steps]
traj = am.rollout(model, jax.random.key(1), np.arange(16), steps, lanes, record="counts", at=at)
assert (np.asarray(traj.counts).sum(-1) == 16 + np.array(at)).all()
print(peak() - before)
"""


def test_memory_does_not_grow(measure: Measure, smoke: bool) -> None:
    """Growth of the peak resident memory at 16 T, over that at T."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    lanes, steps = (8, 64) if smoke else (2048, 2048)

    def grown(num_steps: int) -> int:
        command = [sys.executable, "-c", _CHILD, str(lanes), str(num_steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    short: list[int] = []
    rounds = 1 if smoke else 5
    long: list[int] = []
    measure.benchmark.pedantic(
        lambda: long.append(grown(16 * steps)),
        setup=lambda: short.append(grown(steps)),
        rounds=rounds,
    )
    each = [b / a for a, b in zip(short, long, strict=True)]
    measure.add(
        Row(
            "Memory of a rollout that records counts",
            f"K = 16, {lanes} lanes, {16 * steps} over {steps} steps",
            "auto",
            f"T = {steps}",
            min(long) / min(short),
            min(each),
            max(each),
            rounds,
            Target(1.1, at_least=False),
            note=f"{min(long) / 1024:.0f} MiB over {min(short) / 1024:.0f} MiB",
        )
    )
