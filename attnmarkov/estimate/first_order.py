"""Full-batch optax solvers with a stopping rule on the gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnmarkov.estimate.likelihood import total_objective
from attnmarkov.estimate.status import Solution

if TYPE_CHECKING:
    import optax

    from attnmarkov.estimate._blocks import Blocks


MAX_ITERATIONS = {"lbfgs": 500, "adam": 4000}


@functools.cache
def named(name: str) -> optax.GradientTransformation:
    """The transformation behind a solver's name; the same object every time."""
    import optax

    if name == "lbfgs":
        return optax.lbfgs()
    if name == "adam":
        # The floor keeps steps alive past the default number of iterations.
        return optax.adam(optax.cosine_decay_schedule(0.1, MAX_ITERATIONS["adam"], alpha=0.01))
    raise ValueError(f"solver: {name!r} names no optax transformation")


def minimise(
    solver: optax.GradientTransformation,
    blocks: Blocks,
    prior: jax.Array,
    tolerance: jax.Array,
    max_iterations: jax.Array,
) -> Solution:
    """Run an optax transformation from ``S = 0`` on the sum over rows of the loss per label.

    Stops when no entry of any row's gradient per label exceeds ``tolerance``. Transformations
    that search along a line get the value, the gradient and the function.
    """
    import optax

    def objective(logits: jax.Array) -> jax.Array:
        return total_objective(logits, blocks, prior)

    transform = optax.with_extra_args_support(solver)
    start = jnp.zeros((blocks.num_tokens, blocks.num_tokens), blocks.weight.dtype)
    first = transform.init(start)
    reuse = optax.value_and_grad_from_state(objective) if _remembers_value(first) else None

    def value_and_grad(logits: jax.Array, state: Any) -> tuple[Any, Any]:
        if reuse is None:
            return jax.value_and_grad(objective)(logits)
        return reuse(logits, state=state)

    def unfinished(carry) -> jax.Array:
        *_, done, iteration = carry
        return ~done & (iteration < max_iterations)

    def iterate(carry):
        logits, state, _, iteration = carry
        value, gradient = value_and_grad(logits, state)
        done = jnp.abs(gradient).max() <= tolerance
        updates: Any
        updates, state = transform.update(
            gradient, state, logits, value=value, grad=gradient, value_fn=objective
        )
        return logits + jnp.where(done, 0, updates), state, done, iteration + jnp.where(done, 0, 1)

    carry = (start, first, jnp.array(False), jnp.zeros((), jnp.int32))
    logits, _, done, iteration = jax.lax.while_loop(unfinished, iterate, carry)
    return Solution(logits, done, iteration)


def _remembers_value(state: Any) -> bool:
    """Whether an optimiser's state keeps the value and gradient of its last line search."""
    import optax

    try:
        return all(optax.tree.get(state, name) is not None for name in ("value", "grad"))
    except KeyError:  # several of that name: which one is meant is not ours to guess
        return False
