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


def regular(hessian: jax.Array, projector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``H`` made invertible on the component indicators, and the eigenvalue it has there.

    Each indicator gets the mean curvature of its own component (1 if that is zero).
    """
    mean = jnp.einsum("kab,kbb->ka", projector, hessian)
    scale = jnp.where(mean > 0, mean, 1)
    return hessian + projector * scale[..., None], scale


def newton(
    blocks: Blocks,
    components: jax.Array,
    prior: Prior,
    tolerance: jax.Array,
    max_iterations: jax.Array,
) -> Solution:
    """Minimise every row's objective from ``S = 0`` by damped Newton steps.

    One pass over the prompts per iteration: it evaluates loss, gradient and curvature of all
    rows at their trial points. A row whose trial lowers its loss enough moves there and takes a
    new direction; another halves its step. A row is done when no entry of its gradient per label
    exceeds ``tolerance``, or when its Newton step is at the floating-point noise.
    """
    size, dtype = blocks.num_tokens, blocks.weight.dtype
    eps = jnp.finfo(dtype).eps
    projector = component_projector(components).astype(dtype)
    scale = scale_of_rows(blocks.labels_per_row())
    identity = jnp.eye(size, dtype=dtype)

    def look(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss, gradient and Newton direction of every row."""
        at = evaluate(blocks, logits, prior)
        hessian = curvature(blocks, at.probs) + prior.laplacian(logits)
        hessian = scale[:, None, None] * (hessian + prior.precision * identity)
        matrix, level = regular(hessian, projector)
        ridge = 8 * eps * level
        factor = jnp.linalg.cholesky(matrix + ridge[..., None] * identity)
        direction = -jax.vmap(lambda f, g: cho_solve((f, True), g))(factor, at.gradient)
        usable = jnp.isfinite(direction).all(-1, keepdims=True)
        direction = jnp.where(usable, direction, -at.gradient / level)
        direction = direction - jnp.einsum("kab,kb->ka", projector, direction)
        length = jnp.abs(direction).max(-1, keepdims=True)
        direction = direction * jnp.minimum(1, _LARGEST_STEP / jnp.maximum(length, eps))
        return at.loss, at.gradient, direction

    def is_done(logits: jax.Array, gradient: jax.Array, direction: jax.Array) -> jax.Array:
        flat = jnp.abs(gradient).max(-1) <= tolerance
        noise = 8 * eps * (1 + jnp.abs(logits).max(-1))
        return flat | (jnp.abs(direction).max(-1) <= noise)

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
        "logits": zero,
        "loss": jnp.full(size, jnp.inf, dtype),
        "gradient": zero,
        "direction": zero,
        "step": jnp.ones(size, dtype),
        "done": jnp.zeros(size, bool),
        "iteration": jnp.array(-1, jnp.int32),
    }
    state = jax.lax.while_loop(unfinished, iterate, state)
    # The next step is known and, this close, lands at the floating-point noise.
    near = state["done"] & (jnp.abs(state["direction"]).max(-1) < 1e-2)
    logits = state["logits"] + jnp.where(near[:, None], state["direction"], 0)
    return Solution(logits, state["done"].all(), state["iteration"])
