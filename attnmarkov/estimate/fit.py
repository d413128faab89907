"""Maximum likelihood of a CCMC from prompts and their next tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.first_order import MAX_ITERATIONS, minimise, named
from attnmarkov.estimate.graphs import (
    component_projector,
    cooccurrence_components,
    has_finite_maximum,
)
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal
from attnmarkov.estimate.likelihood import curvature, evaluate
from attnmarkov.estimate.newton import newton
from attnmarkov.estimate.result import Fit
from attnmarkov.estimate.status import Status
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optax
    from numpy.typing import ArrayLike

    from attnmarkov.prompts.batch import Prompts

_MAX_ITERATIONS = {"newton": 100, **MAX_ITERATIONS}
_TOLERANCE = {"float32": 4e-8, "float64": 1e-10}


def fit(
    prompts: Prompts,
    y: ArrayLike | Sequence[int],
    solver: str | optax.GradientTransformation = "newton",
    *,
    prior: float | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Fit:
    """Fit a CCMC to prompts and the tokens that followed them.

    Minimises ``Σ_i −log P_S(y_i | X_i) + prior/2 ‖S‖²_F``. The first term is convex and splits
    into K problems, one per last token, each with a unique solution per component of its
    co-occurrence graph when the data are not separated ([CCMC], consistency). Whether that holds
    is decided from the data and reported in ``status``, ``separated`` and ``components``; the
    solver's behaviour has no say in it.

    Works under jit and vmap over ``(prompts, y)`` (and ``prior``, ``tolerance``,
    ``max_iterations``); inputs are checked only where they are concrete. Newton takes O(nK²) per
    iteration, the others O(nK); memory is O(nK + K³).

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels; each stands in its prompt.
        solver: ``"newton"`` (damped, per row), ``"lbfgs"``, ``"adam"``, or any
            ``optax.GradientTransformation``, which is run on the full batch and minimises the
            sum over rows of the loss per label. Keep the object: a new one compiles anew.
            Adam's rate falls from 0.1 to 0.001 over 4000 iterations and stays there, whatever
            ``max_iterations``.
        prior: Precision τ >= 0 of independent Gaussians on the centred logits; None is 0.
        tolerance: Largest entry allowed in the gradient of any row's loss per label. By default
            4e-8 in float32 and 1e-10 in float64.
        max_iterations: By default 100 for newton, 500 for lbfgs, 4000 for the others.

    Returns:
        A :class:`Fit`.

    Raises:
        ValueError: If the solver is unknown, there is no prompt, ``y`` does not have shape (n,)
            or holds something other than token ids, a label does not stand in its prompt (the
            row and label are named), or a number is out of range.

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
    labels = _check.labels(prompts, y)
    dtype = jnp.result_type(float)
    if tolerance is None:
        tolerance = _TOLERANCE[str(dtype)]
    if max_iterations is None:
        name = solver if isinstance(solver, str) else "adam"
        max_iterations = _MAX_ITERATIONS[name]
    _check.limits(prior, tolerance, max_iterations)
    return _fit(
        prompts.counts,
        prompts.last,
        labels,
        jnp.asarray(0.0 if prior is None else prior, dtype),
        jnp.asarray(tolerance, dtype),
        jnp.asarray(max_iterations, jnp.int32),
        solver=solver,
    )


@partial(jax.jit, static_argnames="solver")
def _fit(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    prior: jax.Array,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    *,
    solver: str | optax.GradientTransformation,
) -> Fit:
    blocks = blocks_of(counts, last, y)
    components = cooccurrence_components(blocks)
    finite = has_finite_maximum(blocks, components)
    if solver == "newton":
        solution = newton(blocks, components, prior, tolerance, max_iterations)
    else:
        transform = named(solver) if isinstance(solver, str) else solver
        solution = minimise(transform, blocks, prior, tolerance, max_iterations)
    projector = component_projector(components).astype(solution.logits.dtype)
    logits = solution.logits - jnp.einsum("kab,kb->ka", projector, solution.logits)

    at = evaluate(blocks, logits, jnp.zeros_like(prior))
    n = counts.shape[0]
    known_token = (y >= 0) & (y < blocks.num_tokens)
    chosen = jnp.take_along_axis(counts, y[:, None], axis=1, mode="clip")[:, 0]
    chosen = jnp.where(known_token, chosen, 0).astype(logits.dtype)
    nll = (at.loss * blocks.labels_per_row()).sum() / n - jnp.log(chosen).mean()

    # With a prior the whole row is identified: by the prior alone between components.
    joined = jnp.where(prior > 0, 0, components)
    elimination = eliminate(curvature(blocks, at.probs), prior)
    variance = pseudo_inverse_diagonal(elimination, joined)
    alone = (joined[:, :, None] == joined[:, None, :]).sum(-1) == 1
    known = ~alone & (finite | (prior > 0))
    return Fit(
        model=CCMC(logits),
        status=Status.decide(
            finite=known_token.all() & jnp.isfinite(nll) & jnp.isfinite(logits).all(),
            solved=solution.converged,
            separated=~finite.all() & ~(prior > 0),
            identified=(components == 0).all() | (prior > 0),
        ),
        nll=nll,
        loss=nll + prior / (2 * n) * (logits**2).sum(),
        iterations=solution.iterations,
        standard_errors=jnp.where(known, jnp.sqrt(variance), jnp.nan),
        components=components,
        separated=~finite.all(-1),
    )
