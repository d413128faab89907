"""Damped Newton steps for all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from attnmarkov.estimate.graphs import component_projector
from attnmarkov.estimate.likelihood import curvature, evaluate, scale_of_rows
from attnmarkov.estimate.status import Solution

if TYPE_CHECKING:
    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate.prior import Prior

_LARGEST_STEP = 8.0  # in nats; only separated data ask for more
_SUFFICIENT = 1e-4  # Armijo's constant
_EXACT = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


def regular(hessian: jax.Array, projector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``H`` made invertible on the component indicators, and the eigenvalue it has there.

    Each indicator gets the mean curvature of its own component (1 if that is zero).
    """
    mean = jnp.einsum("kab,kbb->ka", projector, hessian, precision=_EXACT)
    scale = jnp.where(mean > 0, mean, 1)
    return hessian + projector * scale[..., None], scale


def newton(
    blocks: Blocks,
    components: jax.Array,
    prior: Prior,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    start: jax.Array | None = None,
) -> Solution:
    """Minimise every row's objective by damped Newton steps, from ``S = 0`` unless told.

    One pass over the prompts per iteration: it evaluates loss, gradient and curvature of all
    rows at their trial points. A row whose trial lowers its loss enough moves there and takes a
    new direction; another halves its step. A row is done when no entry of its gradient per label
    exceeds ``tolerance``, or when its Newton step is at the floating-point noise or a negligible
    part of a standard error; the step is then taken.

    A gradient sums to zero over each component; what rounding leaves there is shared out by
    curvature. Else a rare token would get as much of it as a common one, and
    divide it by its own small curvature. With ``max_iterations`` 0 a single step is taken from
    ``start``, if it is short.
    """
    size, dtype = blocks.num_tokens, blocks.weight.dtype
    eps = jnp.finfo(dtype).eps
    projector = component_projector(components).astype(dtype)
    scale = scale_of_rows(blocks.labels_per_row())
    identity = jnp.eye(size, dtype=dtype)
    settled = 3e-6 * eps**0.5 + (8 * eps) ** 2 / scale  # negligible, or the gradient's rounding

    def look(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss, gradient and Newton direction of every row."""
        at = evaluate(blocks, logits, prior)
        gradient = at.gradient
        hessian = curvature(blocks, at.probs) + prior.laplacian(logits)
        hessian = scale[:, None, None] * (hessian + prior.precision * identity)
        diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)
        excess = jnp.einsum("kab,kb->ka", projector, gradient, precision=_EXACT)
        mean = jnp.einsum("kab,kb->ka", projector, diagonal, precision=_EXACT)
        gradient = gradient - excess * jnp.where(
            mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1
        )
        matrix, level = regular(hessian, projector)
        ridge = 8 * eps * level
        factor = jnp.linalg.cholesky(matrix + ridge[..., None] * identity)
        direction = -jax.vmap(lambda f, g: cho_solve((f, True), g))(factor, gradient)
        usable = jnp.isfinite(direction).all(-1, keepdims=True)
        direction = jnp.where(usable, direction, -gradient / level)
        direction = direction - jnp.einsum("kab,kb->ka", projector, direction, precision=_EXACT)
        length = jnp.abs(direction).max(-1, keepdims=True)
        direction = direction * jnp.minimum(1, _LARGEST_STEP / jnp.maximum(length, eps))
        return at.loss, gradient, direction

    def is_done(logits: jax.Array, gradient: jax.Array, direction: jax.Array) -> jax.Array:
        flat = jnp.abs(gradient).max(-1) <= tolerance
        noise = 8 * eps * (1 + jnp.abs(logits).max(-1))
        short = jnp.abs((gradient * direction).sum(-1)) / scale <= settled
        return flat | short | (jnp.abs(direction).max(-1) <= noise)

    def unfinished(state) -> jax.Array:
        return ~state["done"].all() & (state["iteration"] < max_iterations)

    def iterate(state):
        trial = state["logits"] + state["step"][:, None] * state["direction"]
        loss, gradient, direction = look(trial)
        slope = (state["gradient"] * state["direction"]).sum(-1)
        slack = 32 * eps * (1 + jnp.abs(state["loss"]))
        lower = loss <= state["loss"] + _SUFFICIENT * state["step"] * slope + slack
        moved = lower & ~state["done"]

        def pick(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(moved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return {
            "logits": pick(trial, state["logits"]),
            "loss": pick(loss, state["loss"]),
            "gradient": pick(gradient, state["gradient"]),
            "direction": pick(direction, state["direction"]),
            "step": jnp.where(lower, 1, state["step"] / 2).astype(dtype),
            "done": state["done"] | (lower & is_done(trial, gradient, direction)),
            "iteration": state["iteration"] + 1,
        }

    zero = jnp.zeros((size, size), dtype)
    state = {  # the first pass moves nowhere and looks at S = 0
        "logits": zero if start is None else start,
        "loss": jnp.full(size, jnp.inf, dtype),
        "gradient": zero,
        "direction": zero,
        "step": jnp.ones(size, dtype),
        "done": jnp.zeros(size, bool),
        "iteration": jnp.array(-1, jnp.int32),
    }
    state = jax.lax.while_loop(unfinished, iterate, state)
    # The next step is known and, this close, lands at the floating-point noise.
    near = state["done"] | (max_iterations == 0)
    near &= jnp.abs(state["direction"]).max(-1) < 1e-2
    logits = state["logits"] + jnp.where(near[:, None], state["direction"], 0)
    return Solution(logits, state["done"].all(), state["iteration"])
