"""Teachers, what their prompts can teach, and students that are fitted many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, prompts
from attnmarkov.chains import MarkovChain, random_transition_matrix, zipf_law
from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._embedding import coordinates_of, num_identified
from attnmarkov.estimate.attention import fit_attention
from attnmarkov.estimate.fisher import information_trace
from attnmarkov.estimate.fit import fit
from attnmarkov.estimate.graphs import (
    component_projector,
    cooccurrence_components,
    has_finite_maximum,
)
from attnmarkov.estimate.likelihood import curvature, laws
from attnmarkov.estimate.risk import excess_risk
from attnmarkov.estimate.status import Status
from attnmarkov.estimate.win_graph import comparisons_of, separable
from attnmarkov.model.ccmc import CCMC
from attnmarkov.model.contexts import FullContext

if TYPE_CHECKING:
    from collections.abc import Callable

    import optax
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.estimate.prior import Prior
    from attnmarkov.model.contexts import Context

    Distribution = str | Callable[[Any, int, int, int], prompts.Prompts]

DISTRIBUTIONS = ("uniform", "zipf", "markov", "without_replacement")
_PADDING = 2**24  # numbers of padding, over all fits, that cost as much as a compilation


def draw_prompts(
    distribution: Distribution, key: Key[Array, ""], n: int, length: int, teacher: CCMC
) -> prompts.Prompts:
    """``n`` prompts of ``length`` tokens: one of :data:`DISTRIBUTIONS`, or a function's."""
    size = teacher.num_tokens
    if callable(distribution):
        return distribution(key, n, length, size)
    match distribution:
        case "uniform":
            return prompts.uniform(key, n, length, size)
        case "zipf":
            return prompts.iid(key, n, length, zipf_law(size))
        case "markov":
            return prompts.markov(key, n, length, MarkovChain(teacher.transition_matrix))
        case "without_replacement":
            return prompts.without_replacement(key, n, length, size)
    raise ValueError(f"distribution: unknown {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")


class Teachers(NamedTuple):
    """Several teachers of one size."""

    logits: Float[np.ndarray, "teacher token token"]
    embedding: Float[np.ndarray, "teacher token d"] | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether the embeddings have fewer dimensions than tokens, so that ``S`` is confined."""
        return self.embedding is not None and self.embedding.shape[2] < self.embedding.shape[1]


def draw_teachers(
    key: Key[Array, ""],
    number: int,
    num_tokens: int,
    concentration: float,
    embedding_dim: int | None = None,
) -> Teachers:
    """Teachers with Dirichlet rows, or ``S = E Wᵀ Eᵀ`` where ``E`` is narrower than K.

    The Gaussian ``W`` of a narrow teacher is scaled so that the centred logits have the root mean
    square ``√ψ₁(concentration)``, which is about that of the logits of Dirichlet rows. Teacher
    ``i`` depends on ``(key, i)`` alone.
    """
    from scipy.special import polygamma

    logits, embeddings = [], []
    for i in range(number):
        of_p, of_e, of_w = jax.random.split(jax.random.fold_in(key, i), 3)
        p = random_transition_matrix(of_p, num_tokens, concentration)
        model = CCMC.from_transition_matrix(p)
        if embedding_dim is not None:
            e = np.asarray(jax.random.normal(of_e, (num_tokens, embedding_dim)))
            embeddings.append(e)
            if embedding_dim < num_tokens:
                e = e.astype(np.float64)
                s = e @ np.asarray(jax.random.normal(of_w, (embedding_dim,) * 2), np.float64) @ e.T
                s = s - s.mean(1, keepdims=True)
                s *= np.sqrt(polygamma(1, concentration) / (s**2).mean())
                model = CCMC.from_logits(s)
        logits.append(np.asarray(model.logits))
    return Teachers(np.stack(logits), np.stack(embeddings) if embeddings else None)


class Population(NamedTuple):
    """What endless prompts would teach about each teacher.

    Attributes:
        components: Of the co-occurrence graphs.
        rank: Number r of identified parameters; -1 for a narrow embedding whose ``W`` is not
            identified whole, where no errors are measured.
        trace: ``tr(I⁺)`` of one sample; NaN where the rank is -1.
    """

    components: Int[np.ndarray, "teacher token token"]
    rank: Int[np.ndarray, " teacher"]
    trace: Float[np.ndarray, " teacher"]


@dataclass(frozen=True)
class Source:
    """Where prompts come from; part of the compiled program."""

    distribution: Distribution
    length: int


def population(
    teachers: Teachers,
    source: Source,
    context: Context | None,
    key: Key[Array, ""],
    num_prompts: int,
) -> Population:
    """What ``num_prompts`` prompts per teacher, drawn from ``(key, teacher)``, would teach."""
    components, ranks, traces = [], [], []
    for i, logits in enumerate(teachers.logits):
        s, own = jnp.asarray(logits), jax.random.fold_in(key, i)
        sample = _draw(s[None], own[None], context, source=source, num_prompts=num_prompts)
        information, parts = _information(s, jax.tree.map(lambda x: x[0], sample), context)
        if teachers.is_narrow:
            assert teachers.embedding is not None
            rank, trace = _narrow(np.asarray(information), np.asarray(parts), teachers.embedding[i])
        else:
            trace, rank = information_trace(information, parts)
        components.append(np.asarray(parts))
        ranks.append(int(rank))
        traces.append(float(trace))
    return Population(np.stack(components), np.array(ranks), np.array(traces))


def _narrow(
    information: np.ndarray, components: np.ndarray, embedding: np.ndarray
) -> tuple[int, float]:
    """Rank and ``tr(I⁺)`` of the information about ``S = Q Bᵀ Aᵀ``: ``‖S‖ = ‖B‖``."""
    coordinates = coordinates_of(embedding)
    number, largest = num_identified(components, coordinates, None, np)
    if number < largest:
        return -1, np.nan
    a, q = coordinates.attended, coordinates.query
    within = np.einsum("ip,kij,js->kps", a, information.astype(np.float64), a)
    full = np.einsum("kps,kq,kr->pqsr", within, q, q)
    return int(number), float((1 / np.linalg.eigvalsh(full.reshape(largest, largest))).sum())


def room_for(num_prompts: int, num_tokens: int, num_fits: int) -> int:
    """Slots to fit ``num_prompts`` prompts in, so that a few sizes share one compilation.

    The next power of 4 where padding costs less than a compilation would; else ``num_prompts``.
    """
    room = 4 ** int(np.ceil(np.log2(max(num_prompts, 256)) / 2))
    return room if (room - num_prompts) * num_tokens * num_fits <= _PADDING else num_prompts


def fit_students(
    teachers: Teachers,
    known: Population,
    which: np.ndarray,
    keys: Key[Array, " fit"],
    *,
    source: Source,
    num_prompts: int,
    num_test_prompts: int,
    context: Context | None = None,
    solver: str | optax.GradientTransformation = "newton",
    prior: Prior | None = None,
    room: int | None = None,
    max_bytes: int = 2**30,
) -> dict[str, np.ndarray]:
    """Draw data of teacher ``which[i]`` from ``keys[i]``, fit a student, measure its errors.

    Fits run in blocks of equal size that hold about ``max_bytes``. Without a prior the errors
    of a fit are NaN unless it has a unique maximum that identifies all that the population does;
    ``nll`` is NaN where no maximum was reached.

    Args:
        teachers: The T teachers; with an embedding, students learn ``W`` by
            :func:`fit_attention`.
        known: What the source can teach about them.
        which: (m,) teacher of each fit.
        keys: (m,) keys.
        source: Of the prompts.
        num_prompts: n of every fit.
        num_test_prompts: Fresh prompts on which the excess risk is measured.
        context: Under which the teacher speaks; the student knows it.
        solver: As :func:`fit`, or :func:`fit_attention` with an embedding.
        prior: As :func:`fit`.
        room: Slots that the prompts are padded to; n if None, with an embedding, or where a
            function draws the prompts.
        max_bytes: Memory of one block.

    Returns:
        (m,) arrays ``excess_risk``, ``squared_error``, ``nll``, ``status``, ``iterations`` and
        ``num_parameters``.
    """
    m, size = len(which), teachers.logits.shape[-1]
    if room is None or teachers.embedding is not None or callable(source.distribution):
        room = num_prompts
    each = _bytes(size, source.length, room, num_test_prompts)
    number = -(-m // max(1, int(max_bytes // each)))
    block = -(-m // number)
    arrays = (jnp.asarray(teachers.logits), jnp.asarray(known.components), jnp.asarray(known.rank))
    parts = []
    for start in range(0, m, block):
        picked = np.resize(np.arange(start, min(start + block, m)), block)
        t = which[picked]
        logits, components, rank = (x[t] for x in arrays)
        data = _data(logits, keys[picked], context, source, room, num_test_prompts)
        embedding = None if teachers.embedding is None else jnp.asarray(teachers.embedding[t])
        n = jnp.asarray(num_prompts)
        found = _learn(logits, embedding, components, rank, data, n, context, prior, solver=solver)
        found = {k: np.array(v) for k, v in found.items()}
        if teachers.is_narrow:
            assert teachers.embedding is not None
            _mark_separated(found, data, teachers.embedding[t])
        parts.append({k: v[: min(block, m - start)] for k, v in found.items()})
    out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    del out["is_doubtful"]
    return out


def _bytes(size: int, length: int, room: int, num_test_prompts: int) -> int:
    """About what one fit holds: prompts in blocks, their laws, and the curvature."""
    rows = room + min(room, size) * 8 + room // 8
    curvatures = min(2**20, (rows // 8 + size) * size**2) + 16 * size**3
    numbers = rows * (_PER_PROMPT * size + length + 8) + curvatures
    numbers += num_test_prompts * (_PER_PROMPT * size + length + 8)
    return numbers * jnp.dtype(jnp.result_type(float)).itemsize


_PER_PROMPT = 6


class Data(NamedTuple):
    """Labelled prompts to learn from, and prompts to judge by; leading axes of a batch."""

    train: prompts.Prompts
    y: Int[Array, "... prompt"]
    test: prompts.Prompts


def _data(
    logits: jax.Array,
    keys: jax.Array,
    context: Context | None,
    source: Source,
    room: int,
    num_test_prompts: int,
) -> Data:
    """Prompt and label ``i`` depend on ``(key, i)`` alone, so that room changes none of them.

    In two compiled parts: labels need no program of their own for every source, and prompts to
    learn from and to judge by come from one.
    """
    draw, label, test = _split(keys)
    drawn = room if callable(source.distribution) else max(room, num_test_prompts)
    train = _draw(logits, draw, context, source=source, num_prompts=drawn)
    train = jax.tree.map(lambda x: x[:, :room], train)
    fresh = _draw(logits, test, context, source=source, num_prompts=num_test_prompts)
    return Data(train, _emit(logits, label, train, context), fresh)


@jax.jit
def _split(keys: jax.Array) -> jax.Array:
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)


@partial(jax.jit, static_argnames=("source", "num_prompts"))
def _draw(
    logits: jax.Array, keys: jax.Array, context: Context | None, *, source: Source, num_prompts: int
) -> prompts.Prompts:
    """Prompts of every teacher, as much of them as fits look at."""

    def one(s: jax.Array, key: jax.Array) -> prompts.Prompts:
        batch = draw_prompts(source.distribution, key, num_prompts, source.length, CCMC(s))
        if context is None or isinstance(context, FullContext):
            # Without the tokens, prompts of all lengths share a compilation.
            return prompts.Prompts(batch.counts, batch.last)
        return batch

    return jax.vmap(one)(logits, keys)


@jax.jit
def _emit(
    logits: jax.Array, keys: jax.Array, batch: prompts.Prompts, context: Context | None
) -> jax.Array:
    """A label for every prompt, as :meth:`CCMC.sample` draws them, under a context."""

    def one(s: jax.Array, key: jax.Array, batch: prompts.Prompts) -> jax.Array:
        log_counts = _check.offsets(batch, context)
        if log_counts is None:
            return CCMC(s).sample(key, batch)
        seeds = _random.replicate_seeds(key, jnp.arange(batch.num_prompts), "labels")
        weights = s[batch.last] + log_counts
        weights = jnp.exp(weights - weights.max(-1, keepdims=True))
        return _random.draw(weights, _random.words(seeds, 0))

    return jax.vmap(one)(logits, keys, batch)


@jax.jit
def _information(
    logits: jax.Array, batch: prompts.Prompts, context: Context | None
) -> tuple[jax.Array, jax.Array]:
    """Fisher information of one sample (K, K, K), and the components of the graphs (K, K)."""
    blocks = blocks_of(batch.counts, batch.last, log_counts=_check.offsets(batch, context))
    information = curvature(blocks, laws(blocks, logits)[0]) / batch.num_prompts
    return information, cooccurrence_components(blocks)


@partial(jax.jit, static_argnames="solver")
def _learn(
    logits: jax.Array,
    embedding: jax.Array | None,
    components: jax.Array,
    rank: jax.Array,
    data: Data,
    num_prompts: jax.Array,
    context: Context | None,
    prior: Prior | None,
    *,
    solver: str | optax.GradientTransformation,
) -> dict[str, jax.Array]:
    def one(s, embedding, components, rank, data: Data) -> dict[str, jax.Array]:
        train, y = data.train, data.y
        is_doubtful = jnp.array(False)
        if embedding is None:
            weights = (jnp.arange(train.num_prompts) < num_prompts).astype(s.dtype)
            found = fit(train, y, solver, prior=prior, weights=weights, context=context)
        else:
            found = fit_attention(train, y, embedding, solver=solver)
            # No strong connectivity, no promise that a narrow W has a finite maximum.
            blocks = blocks_of(train.counts, train.last, y)
            is_doubtful = ~has_finite_maximum(blocks, cooccurrence_components(blocks)).all()
        code = found.status.code
        ended = (code == Status.CONVERGED) | (code == Status.NOT_IDENTIFIED)
        kept = ended & (found.num_parameters == rank)
        if prior is not None:
            kept = ended & (prior.is_proper | kept)

        gap = found.model.logits - s
        projector = component_projector(components).astype(gap.dtype)
        gap = gap - jnp.einsum("kab,kb->ka", projector, gap, precision=jax.lax.Precision.HIGHEST)
        risk = excess_risk(CCMC(s), found.model, data.test, context=context)
        return {
            "excess_risk": jnp.where(kept, risk, jnp.nan),
            "squared_error": jnp.where(kept, (gap**2).sum(), jnp.nan),
            "nll": jnp.where(ended, found.nll, jnp.nan),
            "status": code,
            "iterations": found.iterations,
            "num_parameters": jnp.asarray(found.num_parameters, jnp.int32),
            "is_doubtful": is_doubtful,
        }

    return jax.vmap(one)(logits, embedding, components, rank, data)


def _mark_separated(found: dict[str, np.ndarray], data: Data, embedding: np.ndarray) -> None:
    """Decide by a linear program whether the doubtful fits of a block have a finite maximum."""
    counts, last, y = (np.asarray(x) for x in (data.train.counts, data.train.last, data.y))
    for i in np.flatnonzero(found["is_doubtful"]):
        if separable(comparisons_of(counts[i], last[i], y[i]), coordinates_of(embedding[i])):
            found["status"][i] = Status.SEPARATED
            for name in ("excess_risk", "squared_error", "nll"):
                found[name][i] = np.nan
