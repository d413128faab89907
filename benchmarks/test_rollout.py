"""Rollouts step by step, against what one would otherwise write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

import attnmarkov as am
from benchmarks.cases import matrix, model, needs_cpu, rollout, shrunk, sizes
from benchmarks.measure import Run
from benchmarks.peers import attention, textbook
from benchmarks.table import Target

if TYPE_CHECKING:
    from benchmarks.measure import Measure

# (K, lanes, steps), so that a round takes some tenths of a second on two cores
MAIN = [(4, 4096, 8192), (16, 4096, 8192), (64, 4096, 2048), (256, 4096, 512), (4096, 256, 512)]
SHAPES = [  # other batches, other horizons
    *[(16, 256, 32768), (16, 32768, 1024)],
    *[(16, 32768, 256), (16, 4096, 4096), (16, 1024, 32768)],
    *[(256, 4096, 256), (256, 512, 4096), (256, 64, 32768)],
]
SLOW = [(4, 1024, 1024), (16, 1024, 1024), (64, 1024, 256), (256, 1024, 128), (4096, 256, 128)]


def _numba_target(size: int) -> Target | None:
    return Target(1.5) if size <= 16 else Target(1.3) if size <= 256 else None


@pytest.mark.parametrize("engine", ["auto", "scan", "rejection"])
@pytest.mark.parametrize("case", MAIN, ids=lambda case: f"K{case[0]}")
def test_counts_against_numba(
    measure: Measure, smoke: bool, engine: str, case: tuple[int, int, int]
) -> None:
    """Final counts; the targets are those of auto."""
    _against_numba(measure, smoke, engine, case, "counts", "Final counts, against a Numba loop")


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: "K{}-{}x{}".format(*case))
def test_shapes_against_numba(measure: Measure, smoke: bool, case: tuple[int, int, int]) -> None:
    """Final counts at other batches and horizons."""
    _against_numba(measure, smoke, "auto", case, "counts", "Other batches and horizons")


@pytest.mark.parametrize("case", [(4, 4096, 1024), (16, 4096, 1024), (256, 1024, 1024)], ids=str)
def test_tokens_against_numba(measure: Measure, smoke: bool, case: tuple[int, int, int]) -> None:
    """Every token kept."""
    group = "Every token kept, against a Numba loop"
    _against_numba(measure, smoke, "auto", case, "tokens", group)


def _against_numba(
    measure: Measure,
    smoke: bool,
    engine: str,
    case: tuple[int, int, int],
    record: Literal["tokens", "counts"],
    group: str,
) -> None:
    needs_cpu()
    pytest.importorskip("numba")
    from benchmarks.peers import numba_loop

    size, lanes, steps = shrunk(smoke, *case)
    call = numba_loop.build(matrix(size), range(size), steps, lanes, record)
    measure.against(
        rollout(engine, model(size), steps, lanes, record),
        Run("Numba, 2 threads", call, lanes * steps),
        group,
        sizes(size, lanes, steps),
        target=_numba_target(size) if engine == "auto" and record == "counts" else None,
    )


@pytest.mark.parametrize("case", SLOW, ids=lambda case: f"K{case[0]}")
def test_against_textbook(measure: Measure, smoke: bool, case: tuple[int, int, int]) -> None:
    """Final counts, against vmap, scan and categorical."""
    size, lanes, steps = shrunk(smoke, *case)
    measure.against(
        rollout("auto", model(size), steps, lanes),
        Run("vmap + scan", textbook.build(matrix(size), range(size), steps, lanes), lanes * steps),
        "Final counts, against the textbook scan in JAX",
        sizes(size, lanes, steps),
        target=Target(10) if case[0] >= 16 else None,
    )


ATTENTION = "Every token kept, against attention over the growing context"


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("width", [16, 64])
def test_against_attention(measure: Measure, smoke: bool, engine: str, width: int) -> None:
    """K = 16, 1,024 tokens, embeddings of 16 and 64 dimensions, in JAX."""
    size, lanes, steps = shrunk(smoke, 16, 256, 1024)
    call = attention.build(*_weights(size, width), range(size), steps, lanes)
    measure.against(
        rollout(engine, model(size), steps, lanes, "tokens"),
        Run("attention, JAX", call, lanes * steps),
        ATTENTION,
        f"{sizes(size, lanes, steps)}, d = {width}",
        target=Target(100) if engine == "auto" else None,
    )


@pytest.mark.parametrize("width", [16, 64])
def test_against_torch(measure: Measure, smoke: bool, width: int) -> None:
    """The same in PyTorch."""
    needs_cpu()
    pytest.importorskip("torch")
    from benchmarks.peers import attention_torch

    size, lanes, steps = shrunk(smoke, 16, 256, 1024)
    call = attention_torch.build(*_weights(size, width), range(size), steps, lanes)
    measure.against(
        rollout("auto", model(size), steps, lanes, "tokens"),
        Run("attention, PyTorch", call, lanes * steps),
        ATTENTION,
        f"{sizes(size, lanes, steps)}, d = {width}",
        target=Target(100),
    )


def _weights(size: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding, weight and head of an attention layer with the law of the model."""
    rng = np.random.default_rng(0)
    embedding = np.linalg.qr(rng.standard_normal((width, width)))[0][:size]
    layer = am.SelfAttention.from_ccmc(model(size), embedding)
    return embedding, np.asarray(layer.weight), np.asarray(layer.head)


def test_large_vocabulary(measure: Measure, smoke: bool) -> None:
    """What a token costs at K = 4096, in tokens at K = 64."""
    large, small = shrunk(smoke, *MAIN[4]), shrunk(smoke, 64, 4096, 1024)
    runs = [
        rollout("auto", model(k), steps, lanes, name=f"auto, {sizes(k, lanes, steps)}")
        for k, lanes, steps in (large, small)
    ]
    measure.against(
        *runs,
        group="Cost of a token of a large vocabulary",
        case=f"K = {large[0]} over K = {small[0]}",
        cost=True,
        target=Target(3, at_least=False),
    )


LAWS = {
    "decay": {"context": am.DecayContext(0.99)},
    "window": {"context": am.WindowContext(64)},
    "lags": {"context": am.LagContext(np.linspace(1, 0.1, 32))},
    "exponent": {"context": am.FullContext(exponent=0.8)},
    "temperature": {"decoder": am.Sampling(temperature=0.7)},
    "top-k, top-p": {"decoder": am.Sampling(top_k=8, top_p=0.9)},
    "greedy": {"decoder": am.Greedy()},
}


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("law", list(LAWS))
def test_contexts_and_decoders(measure: Measure, smoke: bool, law: str, size: int) -> None:
    """What a token costs under other contexts and decoders, in tokens of the plain law."""
    size, lanes, steps = shrunk(smoke, size, 4096, 2**15 // size)
    measure.against(
        rollout("scan", model(size), steps, lanes, name=f"scan, {law}", **LAWS[law]),
        rollout("scan", model(size), steps, lanes),
        group="Cost of a token under other contexts and decoders",
        case=sizes(size, lanes, steps),
        cost=True,
    )


@pytest.mark.parametrize("record", ["tokens", "summary"])
def test_records(measure: Measure, smoke: bool, record: Any) -> None:
    """What a token costs with other records, in tokens of a rollout of counts."""
    size, lanes, steps = shrunk(smoke, 16, 4096, 2048)
    measure.against(
        rollout("scan", model(size), steps, lanes, record, name=f"scan, {record}"),
        rollout("scan", model(size), steps, lanes),
        group="Cost of a token with other records",
        case=sizes(size, lanes, steps),
        cost=True,
    )
