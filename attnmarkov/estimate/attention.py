"""Maximum likelihood of self-attention: the key-query matrix ``W``, whole or of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._embedding import (
    Coordinates,
    check_embedding,
    coordinates_of,
    num_identified,
    width,
)
from attnmarkov.estimate.first_order import MAX_ITERATIONS, minimise, named
from attnmarkov.estimate.graphs import cooccurrence_components, has_finite_maximum
from attnmarkov.estimate.likelihood import evaluate
from attnmarkov.estimate.status import Status
from attnmarkov.estimate.win_graph import comparisons_of, separable
from attnmarkov.model import _leaves
from attnmarkov.model.attention import SelfAttention
from attnmarkov.model.ccmc import CCMC
from attnmarkov.model.maps import scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optax
    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.prompts.batch import Prompts

_TOLERANCE = {"float32": 1e-7, "float64": 1e-10}
_START = 0.3  # standard deviation of the factors' entries at the start, times rank ** -1/4
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class AttentionFit:
    """Fitted self-attention and how the fit ended.

    Under vmap every array has leading batch axes.

    Attributes:
        weight: (d, d) ``W``, in ``span{(e_i − e_j) e_kᵀ}``: what is outside changes no law.
        key_weight: (d, r) ``W_K`` with ``W = W_K W_Qᵀ``; None if ``W`` was learned whole.
        query_weight: (d, r) ``W_Q``; None if ``W`` was learned whole.
        model: The CCMC with the same laws, ``S[k, j] = e_jᵀ W e_k`` with centred rows.
        attention: The self-attention with its head; None where the embedding has rank below K,
            so that no head ``C`` has ``C Eᵀ = I``.
        status: How the fit ended, a code; ``str(fit.status)`` is a sentence.
        nll: Mean negative log-likelihood per label, in nats, without the penalty.
        losses: (num_restarts,) what was minimised, per label, as each start left it; the best
            one is returned. One entry if ``W`` was learned whole.
        iterations: Iterations taken by the best start.
        num_parameters: How many parameters of this family the prompts identify: the rank of the
            Fisher information (for rank r, of a generic ``W`` of that rank). Covered prompts
            give ``a b``, or ``r (a + b − r)`` for rank r, where ``a`` is the rank of the
            embedding with its mean taken off and ``b`` its rank; ``K(K−1)`` for d >= K.
    """

    weight: Float[Array, "d d"]
    key_weight: Float[Array, "d r"] | None
    query_weight: Float[Array, "d r"] | None
    model: CCMC
    attention: SelfAttention | None
    status: Status
    nll: Float[Array, ""]
    losses: Float[Array, " restart"]
    iterations: Int[Array, ""]
    num_parameters: Int[Array, ""]

    def __repr__(self) -> str:
        """How the fit ended, its loss, and the size of the family."""
        if not _validate.is_concrete(self) or not isinstance(self.weight, jax.Array):
            return f"AttentionFit(model={self.model}, status={self.status!r}, ...)"
        if self.weight.ndim > 2:
            return f"AttentionFit(batch={self.weight.shape[:-2]}, {self.status})"
        rank = "" if self.key_weight is None else f"rank={self.key_weight.shape[-1]}, "
        return (
            f"AttentionFit({self.status.name} after {int(self.iterations)} iterations, "
            f"num_tokens={self.model.num_tokens}, d={self.weight.shape[-1]}, {rank}"
            f"nll={float(self.nll):.4f} nats per label, "
            f"{int(self.num_parameters)} parameters identified)"
        )


def fit_attention(
    prompts: Prompts,
    y: ArrayLike | Sequence[int],
    embedding: ArrayLike,
    *,
    rank: int | None = None,
    solver: str | optax.GradientTransformation = "lbfgs",
    weight_decay: float | None = None,
    key: Key[Array, ""] | None = None,
    num_restarts: int = 8,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> AttentionFit:
    """Fit self-attention with a given embedding: ``S[k, j] = e_jᵀ W e_k``.

    Minimises ``Σ_i −log P_W(y_i | X_i) + weight_decay/2 ‖W‖²_F``. Without ``rank`` that is
    convex: a linear submodel of ``S``, and all of ``S`` if the embedding has rank K. With it
    ``W = W_K W_Qᵀ`` with (d, rank) factors, each penalised by ``weight_decay/2``; that is not
    convex, and the best of ``num_restarts`` random starts is kept. The embedding may be narrower
    than the vocabulary.

    The solver works in orthonormal coordinates of the logits that the embedding can express, in
    which the embedding's condition does not slow it; learning by gradient descent on ``W`` itself
    is :func:`gradient_descent_path`.

    Status: separated data are found from the data. Where the embedding has rank K that is strong
    connectivity of the win graph; below, a linear program decides whether some ``W`` ranks every
    label at least as high as all tokens of its prompt and one of them higher. The program needs
    concrete inputs: under jit and vmap an embedding of lower rank is never reported as separated.
    With ``rank`` the verdict is that of the whole ``W``: where it is not separated, every rank
    has a maximum; where it is, a low rank may still have one.

    Works under jit and vmap over ``(prompts, y, embedding)`` and the numbers.

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels; each stands in its prompt.
        embedding: (K, d) ``E``, any d >= 1.
        rank: r >= 1, the width of ``W_K`` and ``W_Q``; None learns ``W`` whole.
        solver: ``"lbfgs"``, ``"adam"`` or any ``optax.GradientTransformation``.
        weight_decay: Precision >= 0 of a Gaussian on the entries of ``W`` (of ``W_K`` and
            ``W_Q``); None is 0.
        key: Of the random starts; needed with ``rank`` and unused without.
        num_restarts: Starts tried, all at once.
        tolerance: Largest entry allowed in the gradient of the loss per label times the number
            of rows that have labels. By default 1e-7 in float32 and 1e-10 in float64.
        max_iterations: By default 500 for lbfgs, 4000 for the others.

    Raises:
        ValueError: As :func:`attnmarkov.fit`; and if the embedding does not have K rows, or
            ``rank`` comes without a key.

    >>> import jax.numpy as jnp
    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[0, 1, 0]] * 4 + [[0, 1]] * 2, 2)
    >>> result = fit_attention(prompts, [0, 0, 0, 1, 0, 1], jnp.eye(2, 3))
    >>> result.model.transition_matrix.round(3).tolist()
    [[0.6000000238418579, 0.4000000059604645], [0.5, 0.5]]
    >>> int(result.num_parameters)
    2
    """
    _check.solver(solver, MAX_ITERATIONS)
    _check.prompts(prompts)
    labels = _check.labels(prompts, y)
    check_embedding(embedding, prompts.num_tokens)
    dtype = jnp.result_type(float)
    if rank is not None:
        rank = _validate.integer(rank, "rank", minimum=1)
        if key is None:
            raise ValueError(f"key: rank={rank} starts from random matrices; give a typed key")
        _validate.check_key(key)
    decay = 0.0 if weight_decay is None else weight_decay
    number = _leaves.number(decay, "weight_decay")
    if number is not None and not (np.isfinite(number) and number >= 0):
        raise ValueError(f"weight_decay: must be finite and at least 0, got {number}")
    starts = 1 if rank is None else _validate.integer(num_restarts, "num_restarts", minimum=1)
    if tolerance is None:
        tolerance = _TOLERANCE[str(dtype)]
    if max_iterations is None:
        max_iterations = MAX_ITERATIONS[solver if isinstance(solver, str) else "adam"]
    _check.limits(tolerance, max_iterations)

    coordinates = coordinates_of(embedding)
    whole = _validate.is_concrete(embedding) and width(coordinates.query) == prompts.num_tokens
    facts = None
    if _validate.is_concrete(prompts, y, embedding) and not (whole and rank is None):
        facts = _facts(prompts, np.asarray(y), coordinates, rank)
    return _fit_attention(
        prompts.counts,
        prompts.last,
        labels,
        jnp.asarray(embedding, dtype),
        jax.tree.map(lambda x: jnp.asarray(x, dtype), coordinates),
        jnp.asarray(decay, dtype),
        jnp.asarray(tolerance, dtype),
        jnp.asarray(max_iterations, jnp.int32),
        key,
        facts,
        solver=solver,
        rank=rank,
        starts=starts,
        whole=bool(whole),
    )


class _Facts(NamedTuple):
    """What float64 and linear programs on the host say of concrete data; else what jit can."""

    num_parameters: jax.Array
    identified: jax.Array
    separated: jax.Array


def _facts(prompts: Prompts, y: np.ndarray, coordinates: Coordinates, rank: int | None) -> _Facts:
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    with jax.ensure_compile_time_eval():  # also where a key, say, is being traced
        blocks = blocks_of(prompts.counts, prompts.last)
        components = np.asarray(cooccurrence_components(blocks))
    number, largest = num_identified(components, coordinates, rank, np)
    separated = separable(comparisons_of(counts, last, y), coordinates)
    return _Facts(
        jnp.asarray(number, jnp.int32), jnp.asarray(number == largest), jnp.asarray(separated)
    )


@partial(jax.jit, static_argnames=("solver", "rank", "starts", "whole"))
def _fit_attention(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    embedding: jax.Array,
    coordinates: Coordinates,
    decay: jax.Array,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    key: jax.Array | None,
    facts: _Facts | None,
    *,
    solver: str | optax.GradientTransformation,
    rank: int | None,
    starts: int,
    whole: bool,
) -> AttentionFit:
    blocks = blocks_of(counts, last, y)
    transform = named(solver) if isinstance(solver, str) else solver
    size = counts.shape[1]
    present = (blocks.labels_per_row() > 0).sum()

    if rank is None or key is None:
        shape = (coordinates.attended.shape[1], coordinates.query.shape[1])
        start: Any = jnp.zeros((1, *shape), embedding.dtype)
    else:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(starts))
        start = jax.vmap(lambda k: _random_factors(k, coordinates, rank))(keys)

    def run(start):
        return minimise(
            transform, _objective, start, tolerance, max_iterations, blocks, coordinates, decay
        )

    found = jax.vmap(run)(start)
    offsets = jnp.take_along_axis(jnp.log(counts.astype(embedding.dtype)), y[:, None], axis=1)
    left_out = offsets.mean()
    losses = jax.vmap(lambda p: _objective(p, blocks, coordinates, decay))(found.params)
    losses = losses / jnp.maximum(present, 1) - left_out
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    params, converged, iterations = jax.tree.map(lambda x: x[best], found)

    b = _matrix(params)
    logits = coordinates.logits(b)
    law = jax.nn.log_softmax(scores(logits, counts, last))
    nll = -jnp.take_along_axis(law, y[:, None], axis=1, mode="clip").mean()
    nll = jnp.where(((y >= 0) & (y < size)).all(), nll, jnp.inf)

    if facts is None:
        components = cooccurrence_components(blocks)
        if whole and rank is None:
            number = (components != jnp.arange(size)).sum()
            largest = size * (size - 1)
        else:
            number, largest = num_identified(components, coordinates, rank, jnp)
        spans = width(coordinates.query) == size
        endless = ~has_finite_maximum(blocks, components).all()
        facts = _Facts(number, number == largest, spans & endless)
    factors = None, None
    if rank is not None:
        factors = tuple(
            jnp.matmul(right, params[name], precision=_HIGHEST)
            for right, name in ((coordinates.to_key, "key"), (coordinates.to_query, "query"))
        )
    weight = coordinates.weight(b)
    attention = None
    if coordinates.query.shape[1] == size:
        head = jnp.matmul(coordinates.query, coordinates.to_query.T, precision=_HIGHEST)
        attention = SelfAttention(embedding, weight, head)
    return AttentionFit(
        weight=weight,
        key_weight=factors[0],
        query_weight=factors[1],
        model=CCMC(logits),
        attention=attention,
        status=Status.decide(
            finite=jnp.isfinite(nll) & jnp.isfinite(b).all(),
            solved=converged,
            separated=facts.separated & ~(decay > 0),
            identified=facts.identified | (decay > 0),
        ),
        nll=nll,
        losses=losses,
        iterations=iterations,
        num_parameters=facts.num_parameters,
    )


def _random_factors(key: jax.Array, coordinates: Coordinates, rank: int) -> dict[str, jax.Array]:
    out, dtype = {}, coordinates.query.dtype
    for i, (name, basis) in enumerate(
        (("key", coordinates.attended), ("query", coordinates.query))
    ):
        normal = jax.random.normal(jax.random.fold_in(key, i), (basis.shape[1], rank), dtype)
        out[name] = _START / rank**0.25 * normal * (basis != 0).any(0)[:, None]
    return out


def _matrix(params: Any) -> jax.Array:
    """``B`` (a, b), whole or as the product of its factors."""
    if isinstance(params, dict):
        return jnp.matmul(params["key"], params["query"].T, precision=_HIGHEST)
    return params


def _objective(
    params: Any, blocks: Blocks, coordinates: Coordinates, decay: jax.Array
) -> jax.Array:
    """Loss per label plus penalty, times the number of rows that have labels.

    Unlike the sum of the rows' own means, this weighs rows by their labels: they share ``W``.
    """
    per_row = blocks.labels_per_row()
    n, present = per_row.sum(), (per_row > 0).sum()
    if isinstance(params, dict):
        parts = ((coordinates.to_key, params["key"]), (coordinates.to_query, params["query"]))
        squares = sum((jnp.matmul(right, x, precision=_HIGHEST) ** 2).sum() for right, x in parts)
    else:
        squares = (coordinates.weight(params) ** 2).sum()
    loss = _total_loss(coordinates.logits(_matrix(params)), blocks)
    return present / n * (loss + decay / 2 * squares)


@jax.custom_vjp
def _total_loss(logits: jax.Array, blocks: Blocks) -> jax.Array:
    """``Σ_i ℓ_i`` without the constants ``−log n_y``; its gradient sums residuals."""
    return _forward(logits, blocks)[0]


def _forward(logits: jax.Array, blocks: Blocks):
    at = evaluate(blocks, logits, None)
    per_row = blocks.labels_per_row()
    return (per_row * at.loss).sum(), per_row[:, None] * at.gradient


def _backward(gradient: jax.Array, cotangent: jax.Array):
    return cotangent * gradient, None


_total_loss.defvjp(_forward, _backward)
