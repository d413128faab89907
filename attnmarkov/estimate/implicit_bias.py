"""Gradient descent on ``W``: to a minimum-norm optimum or along a max-margin direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._embedding import check_embedding, coordinates_of, singular_parts
from attnmarkov.estimate.likelihood import laws
from attnmarkov.estimate.win_graph import (
    Comparisons,
    can_be_strict,
    comparisons_of,
    null_space,
    row_space,
)
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.prompts.batch import Prompts

_HIGHEST = jax.lax.Precision.HIGHEST
_RECORDS = 100  # steps recorded by default


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GraphSVM:
    """The max-margin direction of labelled prompts. Held in float64 by NumPy.

    Attributes:
        weight: (d, d) the ``W`` of least Frobenius norm with margin 0 within every strong
            component of every row's win graph and at least 1 across; zeros if nothing can be
            separated.
        components: (K, K) the strong components: ``[k, a]`` is the least token of the one of
            token ``a`` in row ``k``.
        comparisons: (m, 3) the separated comparisons ``(row, winner, loser)``.
        margin: The largest possible least margin of a ``W`` of norm 1, ``1 / ‖weight‖``;
            infinite if nothing can be separated.
    """

    weight: Float[np.ndarray, "d d"]
    components: Int[np.ndarray, "row token"]
    comparisons: Int[np.ndarray, "comparison 3"]
    margin: float

    def __repr__(self) -> str:
        """How many comparisons are separated, and by how much."""
        if not isinstance(self.comparisons, np.ndarray):
            return "GraphSVM(...)"
        if len(self.comparisons) == 0:
            return "GraphSVM(nothing is separated: a finite maximum exists)"
        rows = len(np.unique(self.comparisons[:, 0]))
        return (
            f"GraphSVM({len(self.comparisons)} comparisons separated in {rows} rows, "
            f"margin {self.margin:.4g} at norm 1)"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Path:
    """A path of gradient descent on ``W`` from ``W = 0``, beside where it is bound to go.

    Arrays are NumPy's. ``weight`` has JAX's default precision; what is worked out from it on the
    host has float64.

    Attributes:
        steps: (T,) how many steps were taken at each record.
        weight: (T, d, d) ``W``.
        nll: (T,) mean negative log-likelihood per label, in nats.
        norm: (T,) Frobenius norm of ``W``.
        margin: (T,) the least margin over the separated comparisons of ``W / ‖W‖``; NaN at
            ``W = 0`` and if there is none. It tends to ``svm.margin``.
        direction_cosine: (T,) ``⟨W, svm.weight⟩ / (‖W‖ ‖svm.weight‖)``; NaN likewise. The angle
            shrinks like ``1 / log t``.
        distance_to_minimum_norm: (T,) Frobenius distance from ``minimum_norm`` to ``W``, or, if
            something is separated, to the part of ``W`` in the span of the ties. It tends to 0.
        minimum_norm: (d, d) the limit of that part. If nothing is separated: the minimiser of
            the loss that has the least norm. Otherwise the same for the loss that is left as the
            separated margins go to infinity.
        svm: The direction in which the rest diverges, ``‖W‖ ~ ‖svm.weight‖ log t``.
        step_size: () the step size used.
        stable_below: () ``2 / L``: below it every step lowers the loss.
    """

    steps: Int[np.ndarray, " record"]
    weight: Float[np.ndarray, "record d d"]
    nll: Float[np.ndarray, " record"]
    norm: Float[np.ndarray, " record"]
    margin: Float[np.ndarray, " record"]
    direction_cosine: Float[np.ndarray, " record"]
    distance_to_minimum_norm: Float[np.ndarray, " record"]
    minimum_norm: Float[np.ndarray, "d d"]
    svm: GraphSVM
    step_size: float
    stable_below: float

    def __repr__(self) -> str:
        """Where the path ended."""
        if not isinstance(self.steps, np.ndarray) or not len(self.steps):
            return "Path(...)"
        text = (
            f"Path({self.steps[-1]} steps of {self.step_size:.3g}, nll={self.nll[-1]:.4f} nats "
            f"per label, norm={self.norm[-1]:.3g}, "
            f"distance to minimum norm {self.distance_to_minimum_norm[-1]:.2g}"
        )
        if len(self.svm.comparisons):
            text += (
                f"; separated: cosine {self.direction_cosine[-1]:.4f} with the max-margin "
                f"direction, margin {self.margin[-1]:.3g} of {self.svm.margin:.3g}"
            )
        return text + ")"


def graph_svm(prompts: Prompts, y: ArrayLike | Sequence[int], embedding: ArrayLike) -> GraphSVM:
    """The direction in which gradient descent on ``W`` diverges on separated data.

    In row ``k``'s win graph each label ``i`` beats every other token ``j`` of its prompt. The
    graph SVM is

        min ‖W‖_F  s.t.  (e_i − e_j)ᵀ W e_k = 0 where i and j beat each other by chains,
                         (e_i − e_j)ᵀ W e_k >= 1 where i beats j and not the reverse.

    An embedding of rank below K may tie further comparisons: those whose margin no ``W`` without
    negative margins makes positive, found by a linear program, then count as the first kind.
    Solved exactly (least-distance programming by non-negative least squares) on the host in
    float64, for small vocabularies: the cost grows like K⁶.

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels.
        embedding: (K, d) ``E``, any d >= 1.

    Raises:
        ValueError: As :func:`attnmarkov.fit`; if the embedding does not have K rows; or under jit
            or vmap.

    References:
        Li, Huang, Ildiz, Rawat and Oymak, AISTATS 2024 (Mechanics of Next Token Prediction with
        Self-Attention), graph-SVM; Ji and Telgarsky, COLT 2019, for data that are separated in
        part; Lawson and Hanson, Solving Least Squares Problems, chapter 23.

    >>> import jax.numpy as jnp
    >>> from attnmarkov.prompts.batch import Prompts
    >>> svm = graph_svm(Prompts.from_tokens([[1, 0]], 2), [1], jnp.eye(2))
    >>> svm
    GraphSVM(1 comparisons separated in 1 rows, margin 1.414 at norm 1)
    >>> svm.weight.round(3).tolist()
    [[-0.5, 0.0], [0.5, 0.0]]
    """
    counts, last, labels, _ = _concrete(prompts, y, embedding)
    comparisons = comparisons_of(counts, last, labels)
    return _solve(comparisons, can_be_strict(comparisons, coordinates_of(embedding)), embedding)


def gradient_descent_path(
    prompts: Prompts,
    y: ArrayLike | Sequence[int],
    embedding: ArrayLike,
    *,
    step_size: float | None = None,
    num_steps: int,
    at: ArrayLike | None = None,
) -> Path:
    """Plain gradient descent on the key-query matrix ``W`` from 0, and its implicit bias.

    The loss is ``(1/n) Σ_i −log P_W(y_i | X_i)`` with ``S[k, j] = e_jᵀ W e_k``. If it has a finite
    minimum, the path tends to the minimiser of least Frobenius norm, since it never leaves
    ``span{(e_i − e_j) e_kᵀ}``. If the data are separated it diverges like ``log t`` along the
    direction of :func:`graph_svm`, and its part in the span of the ties has a finite limit.

    The descent runs in JAX's default precision. In float32 a step below about 1e-7 of an entry
    of ``W`` is lost, so that long paths stop; enable x64 for them. The predictions are worked
    out on the host, so that inputs must be concrete: call it outside jit and vmap.

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels; each stands in its prompt.
        embedding: (K, d) ``E``, any d >= 1.
        step_size: Positive; ``1 / L`` if None. Every step lowers the loss below ``2 / L``,
            where ``L = max_{i,j} ‖e_i − e_j‖² / 4 · λ_max(Σ_k (n_k / n) e_k e_kᵀ)`` bounds the
            curvature; above it may oscillate.
        num_steps: Steps taken.
        at: Increasing steps from 0 to ``num_steps`` to record; about 100 evenly spaced in the
            logarithm, the last included, if None.

    Raises:
        ValueError: As :func:`graph_svm`; and if ``step_size`` is not positive and finite,
            ``num_steps`` is below 1, or ``at`` is not increasing or leaves 0..num_steps.

    >>> import jax.numpy as jnp
    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[1, 0]] * 3, 2)
    >>> path = gradient_descent_path(prompts, [1, 1, 0], jnp.eye(2), num_steps=200)
    >>> path.svm
    GraphSVM(nothing is separated: a finite maximum exists)
    >>> float(path.norm[-1].round(4)), bool(path.distance_to_minimum_norm[-1] < 1e-6)
    (0.4901, True)
    """
    from attnmarkov.rollout.api import log_spaced

    counts, last, labels, e = _concrete(prompts, y, embedding)
    num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
    steps = log_spaced(num_steps, _RECORDS) if at is None else _records(at, num_steps)
    counts, last, labels, weights = _distinct(counts, last, labels)

    smoothness = _smoothness(last, weights, e)
    if step_size is None:
        step_size = 1 / smoothness if smoothness > 0 else 1.0
    elif not _validate.is_concrete(step_size):
        raise ValueError("step_size: must be concrete; call gradient_descent_path outside jit")
    _leaves.positive(step_size, "step_size")

    dtype = jnp.result_type(float)
    with jax.ensure_compile_time_eval():
        path = _descend(
            *(jnp.asarray(x) for x in (counts, last, labels)),
            jnp.asarray(weights, dtype),
            jnp.asarray(e, dtype),
            jnp.asarray(step_size, dtype),
            jnp.asarray(np.diff(steps, prepend=0), jnp.int32),
        )

    comparisons = comparisons_of(counts, last, labels)
    strict = can_be_strict(comparisons, coordinates_of(embedding))
    svm = _solve(comparisons, strict, embedding)
    limit, tied = _finite_part(counts, last, labels, weights, comparisons, strict, embedding)

    w = np.asarray(path, np.float64)
    norm = np.linalg.norm(w, axis=(1, 2))
    scores = np.einsum("jp,tpq,kq->tkj", e, w, e, optimize=True)  # S of every record
    part = np.einsum("rpq,tpq->tr", tied, w, optimize=True)
    distance = np.linalg.norm(part - np.einsum("rpq,pq->r", tied, limit), axis=1)
    cosine = margin = np.full(len(steps), np.nan)
    if len(svm.comparisons):
        row, winner, loser = svm.comparisons.T
        size = np.where(norm > 0, norm, np.nan)
        margin = (scores[:, row, winner] - scores[:, row, loser]).min(1) / size
        cosine = (w * svm.weight).sum((1, 2)) / size / np.linalg.norm(svm.weight)
    return Path(
        steps=steps,
        weight=np.asarray(path),
        nll=_mean_loss(scores, counts, last, labels, weights),
        norm=norm,
        margin=margin,
        direction_cosine=cosine,
        distance_to_minimum_norm=distance,
        minimum_norm=limit,
        svm=svm,
        step_size=float(step_size),
        stable_below=2 / smoothness if smoothness > 0 else np.inf,
    )


@jax.jit
def _descend(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    e: jax.Array,
    step_size: jax.Array,
    gaps: jax.Array,
) -> jax.Array:
    """``W`` after each gap's further steps, (T, d, d)."""
    blocks = blocks_of(counts, last, y, weights)
    rate = step_size / weights.sum()

    def step(_: Any, w: jax.Array) -> jax.Array:
        logits = jnp.linalg.multi_dot([e, w.T, e.T], precision=_HIGHEST)
        slope = _slope(blocks, logits)
        return w - rate * jnp.linalg.multi_dot([e.T, slope.T, e], precision=_HIGHEST)

    def segment(w: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = jax.lax.fori_loop(0, gap, step, w)
        return w, w

    return jax.lax.scan(segment, jnp.zeros((e.shape[1], e.shape[1]), e.dtype), gaps)[1]


def _slope(blocks: Blocks, logits: jax.Array) -> jax.Array:
    """Gradient of the summed loss in ``S``, (K, K).

    A label's residual ``p − 1`` is minus the sum of the others' probabilities: where the label
    is nearly certain, the difference would lose what drives a separated path.
    """
    others = jnp.where(blocks.is_label, 0, laws(blocks, logits)[0]) * blocks.weight[..., None]
    residual = others - blocks.is_label * others.sum(-1, keepdims=True)
    return blocks.sum_by_row(residual.sum(1))


def _concrete(
    prompts: Prompts, y: Any, embedding: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts, last tokens, labels and the float64 embedding, checked."""
    _check.prompts(prompts)
    for value, name in ((prompts, "prompts"), (y, "y"), (embedding, "embedding")):
        if not _validate.is_concrete(value):
            raise ValueError(f"{name}: must be concrete; call this outside jit and vmap")
    check_embedding(embedding, prompts.num_tokens)
    with jax.ensure_compile_time_eval():  # also where something else is being traced
        labels = np.asarray(_check.labels(prompts, y))
    return (
        np.asarray(prompts.counts),
        np.asarray(prompts.last),
        labels,
        np.asarray(embedding, np.float64),
    )


def _records(at: Any, num_steps: int) -> np.ndarray:
    steps = _validate.integer_array(at, "at", ndim=(1,)).astype(np.int64)
    if steps.size == 0:
        raise ValueError("at: there is no step to record")
    if steps[0] < 0 or steps[-1] > num_steps or (np.diff(steps) <= 0).any():
        raise ValueError(f"at: expected increasing steps in 0..{num_steps}, got {steps.tolist()}")
    return steps


def _distinct(
    counts: np.ndarray, last: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts that differ, with how often each stands there."""
    table = np.concatenate([counts, last[:, None], y[:, None]], axis=1)
    table, times = np.unique(table, axis=0, return_counts=True)
    return table[:, :-2], table[:, -2], table[:, -1], times.astype(np.float64)


def _smoothness(last: np.ndarray, weights: np.ndarray, e: np.ndarray) -> float:
    """An upper bound of the curvature of the mean loss in ``W``.

    A law's variance of ``e_jᵀ v`` is at most a quarter of the squared range.
    """
    squares = (e**2).sum(1)
    widest = (squares[:, None] + squares - 2 * e @ e.T).max()
    share = np.bincount(last, weights, len(e)) / weights.sum()
    return float(widest / 4 * np.linalg.norm((e.T * share) @ e, 2))


def _mean_loss(
    scores: np.ndarray, counts: np.ndarray, last: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mean negative log-likelihood at every record of ``scores`` (T, K, K), small ones exactly."""
    n = np.arange(len(y))
    with np.errstate(divide="ignore"):
        offsets = np.log(counts) - np.log(counts[n, y])[:, None]
    offsets[n, y] = -np.inf
    losses = []
    for s in scores:
        worse = s[last] - s[last, y][:, None] + offsets
        losses.append(weights @ np.logaddexp(0, np.logaddexp.reduce(worse, axis=1)))
    return np.array(losses) / weights.sum()


def _metric(embedding: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(A, Q, R_a, R_b)``: with ``W = R_a M R_bᵀ``, ``S = Q Mᵀ Aᵀ`` and ``‖W‖ = ‖M‖``."""
    (ua, sa, va), (ub, sb, vb) = singular_parts(embedding)
    return ua * sa, ub * sb, va, vb


def _solve(comparisons: Comparisons, strict: np.ndarray, embedding: Any) -> GraphSVM:
    from scipy.optimize import nnls

    attended, query, keys, queries = _metric(embedding)
    features = comparisons.features(attended, query)
    triples = np.stack([comparisons.row, comparisons.winner, comparisons.loser], axis=1)
    solution = np.zeros(attended.shape[1] * query.shape[1])
    if strict.any():
        free = null_space(_ties(comparisons, strict, attended, query))
        constraints = features[strict] @ free.T  # rows g with g·z >= 1
        stacked = np.concatenate([constraints.T, np.ones((1, len(constraints)))])
        target = np.zeros(len(stacked))
        target[-1] = 1
        dual, _ = nnls(stacked, target, maxiter=100 * stacked.shape[1])
        residual = stacked @ dual - target
        z = -residual[:-1] / residual[-1]
        active = constraints[dual > 0]  # and once more, from the constraints that hold it up
        exact = np.linalg.lstsq(active, np.ones(len(active)), rcond=None)[0]
        z = exact if (constraints @ exact >= 1 - 1e-9).all() else z
        solution = free.T @ z
    weight = keys @ solution.reshape(attended.shape[1], query.shape[1]) @ queries.T
    norm = np.linalg.norm(weight)
    return GraphSVM(
        weight=weight,
        components=comparisons.components,
        comparisons=triples[strict],
        margin=float(1 / norm) if norm > 0 else float("inf"),
    )


def _ties(
    comparisons: Comparisons, strict: np.ndarray, attended: np.ndarray, query: np.ndarray
) -> np.ndarray:
    """Features of all margins that are zero in the direction: within components, or forced."""
    forced = comparisons.features(attended, query)[comparisons.across & ~strict]
    return np.concatenate([comparisons.ties(attended, query), forced])


def _finite_part(
    counts: np.ndarray,
    last: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    comparisons: Comparisons,
    strict: np.ndarray,
    embedding: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The limit of the path in the span of the ties, and that span's orthonormal basis.

    It minimises the loss with all separated losers gone from their prompts, which on the span
    has a unique minimum.

    Returns:
        (d, d) and (r, d, d).
    """
    from scipy.optimize import minimize

    attended, query, keys, queries = _metric(embedding)
    ties = _ties(comparisons, strict, attended, query)
    basis = row_space(ties).reshape(-1, attended.shape[1], query.shape[1])
    moves = np.einsum("rab,ja,kb->kjr", basis, attended, query, optimize=True)  # dS[k, j] / dz

    size = counts.shape[1]
    gone = np.zeros((size, size, size), bool)
    gone[comparisons.row[strict], comparisons.winner[strict], comparisons.loser[strict]] = True
    with np.errstate(divide="ignore"):
        offsets = np.where(gone[last, y], -np.inf, np.log(counts))
    share = weights / weights.sum()

    def law(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = (moves @ z)[last] + offsets
        total = np.logaddexp.reduce(logits, axis=1)
        return np.exp(logits - total[:, None]), total - logits[np.arange(len(y)), y]

    def value(z: np.ndarray) -> float:
        return float(share @ law(z)[1])

    def gradient(z: np.ndarray) -> np.ndarray:
        residual = law(z)[0]
        residual[np.arange(len(y)), y] -= 1
        by_row = np.zeros((size, size))
        np.add.at(by_row, last, share[:, None] * residual)
        return np.einsum("kj,kjr->r", by_row, moves, optimize=True)

    def hessian(z: np.ndarray) -> np.ndarray:
        p = law(z)[0]
        out = np.zeros((len(z), len(z)))
        for k in range(size):
            own, s = p[last == k], share[last == k]
            middle = np.diag(s @ own) - (own.T * s) @ own
            out += moves[k].T @ middle @ moves[k]
        return out

    z = np.zeros(len(basis))
    if z.size:
        options = {"gtol": 1e-8, "maxiter": 500}
        z = minimize(value, z, jac=gradient, hess=hessian, method="trust-exact", options=options).x
        for _ in range(2):
            z = z - np.linalg.solve(hessian(z), gradient(z))
    limit = keys @ np.einsum("rab,r->ab", basis, z) @ queries.T
    span = np.einsum("pa,rab,qb->rpq", keys, basis, queries, optimize=True)
    return limit, span
