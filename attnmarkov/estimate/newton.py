"""Damped Newton steps for all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from attnmarkov.estimate.graphs import component_projector
from attnmarkov.estimate.likelihood import (
    Derivatives,
    derivatives,
    laplacian,
    scale_of_rows,
    wins_of,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate.prior import Prior

_LARGEST_STEP = 8.0  # in nats; only separated data ask for more
_SUFFICIENT = 1e-4  # Armijo's constant
_MOST = 12  # passes without curvature
_EXACT = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


def regular(hessian: jax.Array, projector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``H`` made invertible on the component indicators, and the eigenvalue it has there.

    Each indicator gets the mean curvature of its own component (1 if that is zero).
    """
    mean = jnp.einsum("kab,kbb->ka", projector, hessian, precision=_EXACT)
    scale = jnp.where(mean > 0, mean, 1)
    return hessian + projector * scale[..., None], scale


class Stop(NamedTuple):
    """Where Newton's steps end.

    Attributes:
        logits: (K, K).
        converged: () whether every row is done.
        iterations: () moves of the row that took most.
        products: ``Σ_i w_i p_i p_iᵀ`` of every row, one ``last_step`` before ``logits``.
        last_step: (K, K), zero where none was taken.
    """

    logits: Float[Array, "row token"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    products: Float[Array, "row token token"]
    last_step: Float[Array, "row token"]


class _State(NamedTuple):
    """Of every row: the lowest point seen, and where it goes from there."""

    logits: jax.Array
    loss: jax.Array
    gradient: jax.Array
    mass: jax.Array  # the diagonal of a Hessian without its p_a² terms, per label
    direction: jax.Array
    step: jax.Array
    level: jax.Array
    fall: jax.Array  # what the direction promises
    active: jax.Array
    iteration: jax.Array


def newton(
    blocks: Blocks,
    components: jax.Array,
    prior: Prior,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    start: jax.Array | None = None,
) -> Stop:
    """Minimise every row's objective by damped Newton steps, from ``S = 0`` unless told.

    One pass over the prompts per iteration: it evaluates loss, gradient and curvature of all
    rows at their trial points. A row whose trial lowers its loss enough moves there and takes a
    new direction; another halves its step. A row is done when no entry of its gradient per label
    exceeds ``tolerance``, or when its Newton step is at the floating-point noise or a negligible
    part of a standard error; the step is then taken.

    The first passes leave the curvature out, which costs K times the rest: where the prompts of
    a row are alike, it is close to ``c (diag p̄ − p̄ p̄ᵀ)`` with their mean law ``p̄``. A step then
    multiplies ``e^S`` by the ratios of what was won to what was expected, to the power ``1/c``,
    with ``c`` from the last change of the gradient along the last step. As long as that brings a
    row to a quarter of what there was to gain or less, it goes on; often that is all it takes,
    and Newton's pass confirms it.

    A gradient sums to zero over each component; what rounding leaves there is shared out by
    curvature. Else a rare token would get as much of it as a common one, and
    divide it by its own small curvature. With ``max_iterations`` 0 a single step is taken from
    ``start``, if it is short.
    """
    size, dtype = blocks.num_tokens, blocks.weight.dtype
    eps = jnp.finfo(dtype).eps
    projector = component_projector(components).astype(dtype)
    scale = scale_of_rows(blocks.labels_per_row())
    wins = blocks.sum_by_row(wins_of(blocks))
    identity = jnp.eye(size, dtype=dtype)
    settled = 3e-6 * eps**0.5 + (8 * eps) ** 2 / scale  # negligible, or the gradient's rounding

    def centred(x: jax.Array) -> jax.Array:
        return x - jnp.einsum("kab,kb->ka", projector, x, precision=_EXACT)

    def capped(direction: jax.Array) -> jax.Array:
        length = jnp.abs(direction).max(-1, keepdims=True)
        return direction * jnp.minimum(1, _LARGEST_STEP / jnp.maximum(length, eps))

    def look(logits: jax.Array, *, products: bool) -> Derivatives:
        """Loss and gradient of every row, per label, and the products of its prompts."""
        at = derivatives(blocks, logits, products=products)
        return Derivatives(
            scale * (at.loss + prior.penalty(logits)),
            scale[:, None] * (at.gradient + prior.gradient(logits)),
            at.products,
        )

    def newton_direction(logits: jax.Array, at: Derivatives) -> tuple[jax.Array, jax.Array]:
        """The gradient, less what rounding left in it, and Newton's direction."""
        hessian = laplacian(at.products) + prior.laplacian(logits)
        hessian = scale[:, None, None] * (hessian + prior.precision * identity)
        diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)
        excess = jnp.einsum("kab,kb->ka", projector, at.gradient, precision=_EXACT)
        mean = jnp.einsum("kab,kb->ka", projector, diagonal, precision=_EXACT)
        gradient = at.gradient - excess * jnp.where(
            mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1
        )
        matrix, level = regular(hessian, projector)
        ridge = 8 * eps * level
        factor = jnp.linalg.cholesky(matrix + ridge[..., None] * identity)
        direction = -jax.vmap(lambda f, g: cho_solve((f, True), g))(factor, gradient)
        usable = jnp.isfinite(direction).all(-1, keepdims=True)
        direction = jnp.where(usable, direction, -gradient / level)
        return gradient, capped(centred(direction))

    def mass_of(logits: jax.Array, gradient: jax.Array) -> jax.Array:
        """What each token was expected to win, per label: the Hessian's diagonal plus ``Σ p²``."""
        expected = gradient - scale[:, None] * (prior.gradient(logits) - prior.precision - wins)
        if prior.pseudo_counts is None:
            return expected
        alpha = jnp.asarray(prior.pseudo_counts).sum(-1, keepdims=True)
        return expected + scale[:, None] * alpha * jax.nn.softmax(logits)

    def ratio_direction(gradient: jax.Array, mass: jax.Array, level: jax.Array) -> jax.Array:
        """Towards the logits at which each token would win what it did."""
        share = gradient / jnp.where(mass > 0, mass, 1)
        won = mass - gradient
        far = jnp.log(jnp.where(won > 0, won, 1) / jnp.where(mass > 0, mass, 1))
        near = jnp.log1p(-jnp.where(jnp.abs(share) < 0.5, share, 0))
        direction = jnp.where(jnp.abs(share) < 0.5, near, jnp.where(won > 0, far, -share))
        seen = mass > 0
        direction = jnp.where(seen, direction, 0) / level[:, None]
        middle = direction.sum(-1, keepdims=True) / jnp.maximum(seen.sum(-1, keepdims=True), 1)
        return capped(jnp.where(seen, direction - middle, 0))

    def lowers(state: _State, loss: jax.Array) -> jax.Array:
        slope = (state.gradient * state.direction).sum(-1)
        slack = 32 * eps * (1 + jnp.abs(state.loss))
        return loss <= state.loss + _SUFFICIENT * state.step * slope + slack

    def approaching(state: _State) -> jax.Array:
        return state.active.any() & (state.iteration < jnp.minimum(max_iterations, _MOST) - 1)

    def approach(state: _State) -> _State:
        trial = state.logits + state.step[:, None] * state.direction
        at = look(trial, products=False)
        mass = mass_of(trial, at.gradient)
        between = (mass + state.mass) / 2
        along = (between * state.direction).sum(-1) ** 2 / jnp.maximum(between.sum(-1), eps)
        along = (between * state.direction**2).sum(-1) - along
        change = ((at.gradient - state.gradient) * state.direction).sum(-1)
        level = jnp.where(along > 0, change / jnp.where(along > 0, along, 1), 1)
        level = jnp.where(jnp.isfinite(state.loss), jnp.clip(level, 0.1, 4), 1)
        direction = ratio_direction(at.gradient, mass, level)
        fall = -(at.gradient * direction).sum(-1)
        moved = lowers(state, at.loss) & state.active
        further = moved & (fall / scale > settled) & (fall <= state.fall / 4)
        new = _State(
            trial,
            at.loss,
            at.gradient,
            mass,
            direction,
            jnp.ones_like(fall),
            level,
            fall,
            further,
            state.iteration + 1,
        )
        old = state._replace(
            step=jnp.where(state.active, 0, state.step), active=jnp.zeros_like(moved)
        )
        return _picked(moved, new, old)

    def is_done(logits: jax.Array, gradient: jax.Array, direction: jax.Array) -> jax.Array:
        flat = jnp.abs(gradient).max(-1) <= tolerance
        noise = 8 * eps * (1 + jnp.abs(logits).max(-1))
        short = jnp.abs((gradient * direction).sum(-1)) / scale <= settled
        return flat | short | (jnp.abs(direction).max(-1) <= noise)

    def unfinished(carry: tuple[_State, jax.Array]) -> jax.Array:
        return carry[0].active.any() & (carry[0].iteration < max_iterations)

    def iterate(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, products = carry
        trial = state.logits + state.step[:, None] * state.direction
        at = look(trial, products=True)
        gradient, direction = newton_direction(trial, at)
        lower = lowers(state, at.loss)
        moved = lower & state.active
        new = state._replace(
            logits=trial,
            loss=at.loss,
            gradient=gradient,
            direction=direction,
            step=jnp.ones_like(state.step),
            active=~is_done(trial, gradient, direction),
            iteration=state.iteration + 1,
        )
        old = state._replace(step=jnp.where(lower, 1, state.step / 2))
        return _picked(moved, new, old), jnp.where(moved[:, None, None], at.products, products)

    zero, ones = jnp.zeros((size, size), dtype), jnp.ones(size, dtype)
    state = _State(  # the first pass moves nowhere and looks at S = 0
        logits=zero if start is None else start,
        loss=jnp.inf * ones,
        gradient=zero,
        mass=zero,
        direction=zero,
        step=ones,
        level=ones,
        fall=jnp.inf * ones,
        active=jnp.ones(size, bool),
        iteration=jnp.array(-1, jnp.int32),
    )
    state = jax.lax.while_loop(approaching, approach, state)
    state = state._replace(active=jnp.ones_like(state.active))
    carry = (state, jnp.zeros((size, size, size), dtype))
    state, products = jax.lax.while_loop(unfinished, iterate, carry)
    # The next step is known and, this close, lands at the floating-point noise.
    near = ~state.active | (max_iterations == 0)
    near &= jnp.abs(state.direction).max(-1) < 1e-2
    last = jnp.where(near[:, None], state.direction, 0)
    done = ~state.active.any()
    return Stop(state.logits + last, done, state.iteration, products, last)


def _picked(moved: jax.Array, new: _State, old: _State) -> _State:
    """Row by row what is new where it moved; the iteration is the new one."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(moved.reshape(-1, *[1] * (a.ndim - 1)), a, b) if a.ndim else a

    return jax.tree.map(pick, new, old)
