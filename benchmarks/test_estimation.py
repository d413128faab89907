"""Fits of a CCMC, against what one would otherwise use; how they scale; their memory."""

from __future__ import annotations

import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import pytest

import attnmarkov as am
from benchmarks.cases import needs_cpu
from benchmarks.measure import Run
from benchmarks.table import Row, Target

if TYPE_CHECKING:
    from benchmarks.measure import Measure

MANY = "Fits, 200 datasets in one vmapped call against one at a time, per dataset"
GROWTH = "Cost of a fit as it grows, per dataset and iteration"


@cache
def datasets(size: int, length: int, n: int, number: int) -> tuple[am.Prompts, jax.Array]:
    """Uniform prompts and labels of a teacher with Dirichlet(4) rows, one batch per dataset."""
    p = am.random_transition_matrix(jax.random.key(1), size, concentration=4.0)
    teacher = am.CCMC.from_transition_matrix(p)

    def one(key: jax.Array) -> tuple[am.Prompts, jax.Array]:
        draw, label = jax.random.split(key)
        prompts = am.prompts.uniform(draw, n, length, size)
        return prompts, teacher.sample(label, prompts)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), number))


@partial(jax.jit, static_argnames="solver")
def _fits(prompts: am.Prompts, y: jax.Array, *, solver: str) -> am.Fit:
    return jax.vmap(lambda p, labels: am.fit(p, labels, solver))(prompts, y)


def fits(size: int, length: int, n: int, number: int, solver: str = "newton") -> am.Fit:
    """All datasets in one call."""
    return _fits(*datasets(size, length, n, number), solver=solver)


@cache
def arrays(size: int, length: int, n: int, number: int) -> tuple[np.ndarray, ...]:
    """Counts, last tokens, labels and tokens of the datasets, for the peers."""
    prompts, y = datasets(size, length, n, number)
    return tuple(np.asarray(x) for x in (prompts.counts, prompts.last, y, prompts.tokens))


Peer = Literal[
    "SciPy L-BFGS-B", "SciPy, one call", "choix mm_top1", "choix ilsr_top1", "statsmodels"
]


def peer_fit(peer: Peer, sizes: tuple[int, int, int, int], i: int) -> np.ndarray:
    """One dataset by a peer."""
    counts, last, y, tokens = (x[i % sizes[3]] for x in arrays(*sizes))
    if peer in ("SciPy L-BFGS-B", "SciPy, one call"):
        from benchmarks.peers import scipy_fit

        by_row = peer == "SciPy L-BFGS-B"  # its fastest form, and the one that comes to mind
        return (scipy_fit.fit if by_row else scipy_fit.fit_jointly)(counts, last, y)
    if peer == "statsmodels":
        from benchmarks.peers import statsmodels_fit

        return statsmodels_fit.fit(counts, last, y)
    from benchmarks.peers import choix_fit

    method = "mm_top1" if peer == "choix mm_top1" else "ilsr_top1"
    return choix_fit.fit(choix_fit.rows(tokens, y, sizes[0]), method)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
@pytest.mark.parametrize(
    ("peer", "package", "limit"),
    [
        ("SciPy L-BFGS-B", "scipy", 10),
        ("SciPy, one call", "scipy", None),
        ("choix mm_top1", "choix", 100),
        ("choix ilsr_top1", "choix", 100),
        ("statsmodels", "statsmodels", None),
    ],
)
def test_fits_against_peers(
    measure: Measure, smoke: bool, solver: str, peer: Peer, package: str, limit: float | None
) -> None:
    """K = 8, prompts of 12 tokens, n = 4,000; the note says how far the optima are apart."""
    needs_cpu()
    pytest.importorskip(package)
    sizes = (3, 6, 200, 4) if smoke else (8, 12, 4000, 200)
    own, theirs = fits(*sizes, solver).model.logits[0], peer_fit(peer, sizes, 0)
    apart = np.abs(np.asarray(own) - theirs).max()
    assert apart < 1e-3, f"{peer} and {solver} disagree by {apart}"
    measure.against(
        Run(solver, lambda _: fits(*sizes, solver).model.logits, sizes[3]),
        Run(peer, lambda seed: peer_fit(peer, sizes, seed), 1),
        MANY,
        f"K = {sizes[0]}, L = {sizes[1]}, n = {sizes[2]}",
        target=None if limit is None else Target(limit),
        note=f"optima within {apart:.1g}",
    )


_TAKEN = {"newton": 4, "lbfgs": 10}  # iterations, before any of the fits has converged


@partial(jax.jit, static_argnames="solver")
def _begun(prompts: am.Prompts, y: jax.Array, *, solver: str) -> am.Fit:
    def fit(prompts: am.Prompts, y: jax.Array) -> am.Fit:
        return am.fit(prompts, y, solver, max_iterations=_TAKEN[solver])

    return jax.vmap(fit)(prompts, y)


def _iterations(sizes: tuple[int, int, int, int], solver: str) -> Run:
    """The first iterations of a fit, as what is counted."""
    data = datasets(*sizes)
    taken = np.asarray(_begun(*data, solver=solver).iterations)
    assert (taken == _TAKEN[solver]).all(), f"{solver} took {taken} iterations"
    return Run(
        f"{solver}, K = {sizes[0]}, n = {sizes[2]:,}",
        lambda _: _begun(*data, solver=solver).model.logits,
        sizes[3] * (_TAKEN[solver] + 1),  # the first look at S = 0 is an evaluation too
    )


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
@pytest.mark.parametrize(
    ("large", "small", "limit"),
    [
        ((8, 12, 256_000, 2), (8, 12, 16_000, 2), 16 * 1.2),
        ((32, 24, 64_000, 1), (8, 24, 64_000, 1), 4**2),
        ((64, 24, 64_000, 1), (16, 24, 64_000, 1), 4**2),
    ],
    ids=["n x16", "K 8 to 32", "K 16 to 64"],
)
def test_growth(
    measure: Measure,
    smoke: bool,
    solver: str,
    large: tuple[int, int, int, int],
    small: tuple[int, int, int, int],
    limit: float,
) -> None:
    """An iteration costs in proportion to n, and at most to the square of K."""
    if smoke:
        large, small = (4, 6, 400, 1), (4, 6, 200, 1)
    measure.against(
        _iterations(large, solver),
        _iterations(small, solver),
        GROWTH,
        f"n = {small[2]:,} to {large[2]:,}, K = {small[0]} to {large[0]}",
        cost=True,
        target=Target(limit, at_least=False),
    )


_CHILD = """
import sys
import jax, attnmarkov as am
n, size = map(int, sys.argv[1:])
teacher = am.CCMC.from_transition_matrix(
    am.random_transition_matrix(jax.random.key(1), size, concentration=4.0))
prompts = am.prompts.uniform(jax.random.key(2), n, 32, size)
fit = am.fit(prompts, teacher.sample(jax.random.key(3), prompts))
assert fit.status.name == "converged", fit.status
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


def test_memory_of_a_million_prompts(measure: Measure, smoke: bool) -> None:
    """Peak resident memory of a process that draws them and fits, as a share of 8 GiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    n, size, limit = (1000, 4, 2.0**33) if smoke else (1_000_000, 64, 2.0**33)
    command = [sys.executable, "-c", _CHILD, str(n), str(size)]
    peaks: list[int] = []

    def run() -> Any:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))

    measure.benchmark.pedantic(run, rounds=1)
    peak = peaks[0]
    measure.add(
        Row(
            "Memory of a fit, its prompts and its process",
            f"K = {size}, n = {n:,}",
            "newton",
            "8 GiB",
            peak / limit,
            peak / limit,
            peak / limit,
            1,
            Target(1, at_least=False),
            note=f"{peak / 2**30:.2g} GiB",
        )
    )
