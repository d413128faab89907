"""Maximum likelihood of a CCMC from prompts and their next tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._groups import by_groups
from attnmarkov.estimate._joined import components_and_finite
from attnmarkov.estimate._lazy import unless
from attnmarkov.estimate.first_order import MAX_ITERATIONS, minimise, minimise_minibatch, named
from attnmarkov.estimate.graphs import component_projector
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal
from attnmarkov.estimate.likelihood import curvature_at, laplacian, losses, total_objective
from attnmarkov.estimate.newton import Stop, newton
from attnmarkov.estimate.prior import Prior, as_prior
from attnmarkov.estimate.result import Fit
from attnmarkov.estimate.status import Solution, Status
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optax
    from jaxtyping import Array, Key
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts

_MAX_ITERATIONS = {"newton": 100, **MAX_ITERATIONS}
_MAX_STEPS = 20_000  # of minibatches
_SHORT = 1e-5  # a step in nats: what it changes in a standard error is no more than that share
_TOLERANCE = {"float32": 4e-8, "float64": 1e-10}


def fit(
    prompts: Prompts,
    y: ArrayLike | Sequence[int],
    solver: str | optax.GradientTransformation = "newton",
    *,
    prior: float | Prior | None = None,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    row_groups: ArrayLike | None = None,
    batch_size: int | None = None,
    key: Key[Array, ""] | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Fit:
    """Fit a CCMC to prompts and the tokens that followed them.

    Minimises ``Σ_i −w_i log P_S(y_i | X_i) + penalty(S)``. The first term is convex and splits
    into K problems, one per last token, each with a unique solution per component of its
    co-occurrence graph when the data are not separated ([CCMC], consistency). Whether that holds
    is decided from the data and reported in ``status``, ``separated`` and ``components``; the
    solver's behaviour has no say in it.

    Works under jit and vmap over ``(prompts, y)`` and the keyword arguments; inputs are checked
    only where they are concrete. Newton takes O(nK²) per iteration at most, the others O(nK);
    memory is O(nK + K³). On a CPU a large vmapped batch goes group by group, as many datasets at
    a time as its caches hold.

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels; each stands in its prompt.
        solver: ``"newton"`` (damped, per row), ``"lbfgs"``, ``"adam"``, or any
            ``optax.GradientTransformation``, which is run on the full batch and minimises the
            sum over rows of the loss per label. Keep the object: a new one compiles anew.
            Adam's rate falls from 0.1 to 0.001 over 4000 iterations and stays there, whatever
            ``max_iterations``.
        prior: A :class:`~attnmarkov.estimate.Prior`, or the precision τ >= 0 of independent
            Gaussians on the centred logits; None is none.
        weights: (n,) how often each prompt and label counts, finite and >= 0; None is once. A
            whole number is the same as that many copies. What has weight 0 is padding: it may
            hold anything and changes nothing.
        context: How positions are weighed, as in :func:`attnmarkov.rollout`; its weights are
            known, not learned. None is the full context.
        row_groups: (K,) ids in 0..K-1. Rows with the same id share their logits: all zeros is a
            model in which the query does not matter. None is a row of its own for each token.
        batch_size: Prompts in a minibatch, for a first-order solver; None is the full batch. The
            optimum is the same: a step on a minibatch is corrected by the full gradient of its
            epoch's beginning (SVRG, Johnson and Zhang 2013), which the stopping rule reads too,
            so that a constant rate converges. Fixed under jit.
        key: A typed JAX key for the minibatches; step ``t`` depends on ``(key, t)`` alone.
        tolerance: Largest entry allowed in the gradient of any row's loss per label. By default
            4e-8 in float32 and 1e-10 in float64.
        max_iterations: By default 100 for newton, 500 for lbfgs, 4000 for the others, and 20000
            steps with minibatches.

    Returns:
        A :class:`Fit`.

    Raises:
        ValueError: If the solver is unknown, there is no prompt, ``y`` does not have shape (n,)
            or holds something other than token ids, a label does not stand in its prompt (the
            row and label are named) or in its context, the context can't take the prompts,
            minibatches are asked of newton or lbfgs or without a key, or a number is out of
            range.

    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[0, 1, 0]] * 4 + [[0, 1]] * 2, 2)
    >>> result = fit(prompts, [0, 0, 0, 1, 0, 1])
    >>> print(result.status)
    The solver converged to the unique maximum, and the prompts identify every logit.
    >>> result.model.transition_matrix.round(3).tolist()
    [[0.6000000238418579, 0.4000000059604645], [0.5, 0.5]]
    """
    _check.solver(solver, _MAX_ITERATIONS)
    _check.prompts(prompts)
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    labels = _check.labels(prompts, y, weights, log_counts)
    prior = as_prior(prior)
    prior.check(prompts.num_tokens)
    dtype = jnp.result_type(float)
    if tolerance is None:
        tolerance = _TOLERANCE[str(dtype)]
    batch_size = _check.minibatch(solver, batch_size, key)
    if max_iterations is None:
        name = solver if isinstance(solver, str) else "adam"
        max_iterations = _MAX_ITERATIONS[name] if batch_size is None else _MAX_STEPS
    _check.limits(tolerance, max_iterations)
    return _fit(
        *_check.shared_shape(prompts.counts, prompts.last, labels, weights, log_counts),
        _check.row_groups(prompts, row_groups),
        prior.over(prompts.num_tokens, dtype),
        jnp.asarray(tolerance, dtype),
        jnp.asarray(max_iterations, jnp.int32),
        key,
        solver=solver,
        batch_size=batch_size,
    )


@partial(jax.jit, static_argnames=("solver", "batch_size"))
def _fit(counts: jax.Array, *rest: Any, solver: Any, batch_size: int | None) -> Fit:
    """:func:`_solve`, group by group where it is vmapped."""
    solve = partial(_solve, solver=solver, batch_size=batch_size)
    return by_groups(solve, counts.size)(counts, *rest)


def _solve(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
    groups: jax.Array | None,
    prior: Prior,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    key: jax.Array | None,
    *,
    solver: str | optax.GradientTransformation,
    batch_size: int | None,
) -> Fit:
    blocks = blocks_of(counts, last if groups is None else groups[last], y, weights, log_counts)
    components, finite = components_and_finite(blocks)
    # With a prior the whole row is identified: by the prior alone between components.
    joined = jnp.where(prior.is_proper, 0, components)
    stop = None
    if solver == "newton":
        stop = newton(blocks, joined, prior, tolerance, max_iterations)
        solution = Solution(stop.logits, stop.converged, stop.iterations)
    else:
        transform = named(solver) if isinstance(solver, str) else solver
        start = jnp.zeros((blocks.num_tokens, blocks.num_tokens), blocks.weight.dtype)
        limits = tolerance, max_iterations
        if batch_size is None or key is None:
            solution = Solution(
                *minimise(transform, total_objective, start, *limits, blocks, prior)
            )
        else:
            solution = minimise_minibatch(transform, blocks, prior, key, batch_size, *limits)
    projector = component_projector(joined).astype(solution.logits.dtype)

    def centred(logits: jax.Array) -> jax.Array:
        exact = jax.lax.Precision.HIGHEST
        return logits - jnp.einsum("kab,kb->ka", projector, logits, precision=exact)

    if solver != "newton":  # a last step, since a small gradient of a rare token says little
        none = jnp.zeros_like(max_iterations)
        last_step = newton(blocks, joined, prior, tolerance, none, centred(solution.logits))
        ended = jnp.where(solution.converged, last_step.logits, solution.logits)
        solution = solution._replace(logits=ended)
    logits = centred(solution.logits)

    n = blocks.labels_per_row().sum()
    nll = blocks.sum_by_row((losses(blocks, logits) * blocks.weight).sum(-1)).sum() / n
    known_token = (y >= 0) & (y < blocks.num_tokens)
    if weights is not None:
        known_token |= weights <= 0
    nll = jnp.where(known_token.all(), nll, jnp.inf)

    data = curvature_at(blocks, logits) if stop is None else _at_the_end(blocks, logits, stop)
    elimination = eliminate(data + prior.laplacian(logits), prior.precision)
    variance = pseudo_inverse_diagonal(elimination, joined)
    alone = (joined[:, :, None] == joined[:, None, :]).sum(-1) == 1
    known = ~alone & (finite | prior.is_proper)
    errors = jnp.where(known, jnp.sqrt(variance), jnp.nan)
    used = jnp.ones(blocks.num_tokens, bool)
    if groups is not None:
        used = jnp.zeros_like(used).at[groups].set(True)
    identified = (components != jnp.arange(blocks.num_tokens)) & used[:, None]

    def by_token(x: jax.Array) -> jax.Array:
        return x if groups is None else x[groups]

    return Fit(
        model=CCMC(by_token(logits)),
        status=Status.decide(
            finite=jnp.isfinite(nll) & jnp.isfinite(logits).all(),
            solved=solution.converged,
            separated=~(finite.all() | prior.is_proper),
            identified=(by_token(components) == 0).all() | prior.is_proper,
        ),
        nll=nll,
        loss=nll + (prior.penalty(logits) * used).sum() / n,
        iterations=solution.iterations,
        standard_errors=by_token(errors),
        components=by_token(components),
        separated=by_token(~finite.all(-1)),
        num_parameters=identified.sum(),
    )


def _at_the_end(blocks: Blocks, logits: jax.Array, stop: Stop) -> jax.Array:
    """The curvature of the data where Newton ended.

    As it was before the last step where that was so short that it can't be told.
    """
    far = (jnp.abs(stop.last_step) > _SHORT).any()
    return unless(far, laplacian(stop.products), curvature_at, blocks, logits)
