"""Optax solvers with a stopping rule on the gradient: on all data at once, or in minibatches."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate._blocks import Blocks
from attnmarkov.estimate.likelihood import evaluate, laws, scale_of_rows
from attnmarkov.estimate.status import Solution

if TYPE_CHECKING:
    from collections.abc import Callable

    import optax
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Int

    from attnmarkov.estimate.prior import Prior

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


class Minimum(NamedTuple):
    """Where a solver stopped."""

    params: Any
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


def minimise(
    transform: optax.GradientTransformation,
    objective: Callable[..., jax.Array],
    start: Any,
    tolerance: ArrayLike,
    max_iterations: ArrayLike,
    *args: Any,
) -> Minimum:
    """Run an optax transformation on ``objective(params, *args)`` from ``start``.

    Stops when no entry of the gradient exceeds ``tolerance``, or after ``max_iterations``
    updates. Transformations that search along a line get the value, the gradient and the
    function.
    """
    import optax

    def value_of(params: Any) -> jax.Array:
        return objective(params, *args)

    transform = optax.with_extra_args_support(transform)
    first = transform.init(start)
    reuse = optax.value_and_grad_from_state(value_of) if _remembers_value(first) else None

    def value_and_grad(params: Any, state: Any) -> tuple[Any, Any]:
        if reuse is None:
            return jax.value_and_grad(value_of)(params)
        return reuse(params, state=state)

    def unfinished(carry) -> jax.Array:
        *_, done, iteration = carry
        return ~done & (iteration < max_iterations)

    def iterate(carry):
        params, state, _, iteration = carry
        value, gradient = value_and_grad(params, state)
        done = _largest(gradient) <= tolerance
        updates: Any
        updates, state = transform.update(
            gradient, state, params, value=value, grad=gradient, value_fn=value_of
        )
        params = jax.tree.map(lambda p, u: p + jnp.where(done, 0, u), params, updates)
        return params, state, done, iteration + jnp.where(done, 0, 1)

    carry = (start, first, jnp.array(False), jnp.zeros((), jnp.int32))
    params, _, done, iteration = jax.lax.while_loop(unfinished, iterate, carry)
    return Minimum(params, done, iteration)


def minimise_minibatch(
    transform: optax.GradientTransformation,
    blocks: Blocks,
    prior: Prior | None,
    key: jax.Array,
    batch_size: int,
    tolerance: ArrayLike,
    max_iterations: ArrayLike,
) -> Solution:
    """Minimise the sum over rows of the loss per label, from ``S = 0``, in minibatches.

    The objective, its optimum and the stopping rule are those of the full batch. An epoch begins
    with the full gradient at an anchor, where the run stops if no entry exceeds ``tolerance``,
    and goes on with as many steps as batches hold all prompts once. Each step corrects the
    anchor's gradient by the change from the anchor to here on one batch (SVRG), so that the
    noise vanishes at the optimum and a constant rate converges. A batch draws prompts with
    replacement, each with its share of the objective (its weight over its row's), by systematic
    strata: rows with few prompts are drawn as often as others. Step ``t`` depends on
    ``(key, t)`` alone. The prior enters every step whole.

    Args:
        transform: Any first-order transformation; none that searches along a line.
        blocks: The prompts, with labels.
        prior: As in :func:`attnmarkov.estimate.likelihood.evaluate`.
        key: Of the batches.
        batch_size: Prompts in a batch, static.
        tolerance: Largest entry allowed in the gradient of any row's loss per label.
        max_iterations: Most steps taken, one batch each. A run that ends there looks at the full
            gradient once more.

    Raises:
        ValueError: If the transformation searches along a line.

    References:
        Johnson and Zhang, NeurIPS 2013 (SVRG); Xiao and Zhang, SIAM Journal on Optimization 24
        (2014), on draws that follow the shares.
    """
    import optax

    transform = optax.with_extra_args_support(transform)
    start = jnp.zeros((blocks.num_tokens, blocks.num_tokens), blocks.weight.dtype)
    first = transform.init(start)
    if _remembers_value(first):
        raise ValueError(
            "batch_size: the solver searches along a line, which needs all prompts at once; use "
            "adam or another first-order solver for minibatches"
        )
    scale = scale_of_rows(blocks.labels_per_row())
    share = (blocks.weight * scale[blocks.row][:, None]).ravel()
    reached = jnp.cumsum(share)
    total = share.sum()
    slots = blocks.weight.shape[1]
    steps = -(-(blocks.weight > 0).sum(dtype=jnp.int32) // batch_size)

    def full_gradient(logits: jax.Array) -> jax.Array:
        return evaluate(blocks, logits, prior).gradient

    def batch_of(iteration: jax.Array) -> Blocks:
        """Blocks of one prompt each, rows in order."""
        own = jax.random.fold_in(key, iteration)
        jitter = jax.random.uniform(own, (batch_size,), blocks.weight.dtype)
        place = (jnp.arange(batch_size) + jitter) / batch_size * reached[-1]
        drawn = jnp.searchsorted(reached, place, side="right")
        drawn = jnp.minimum(drawn, share.size - 1)
        block, slot = drawn // slots, drawn % slots
        return Blocks(
            log_counts=blocks.log_counts[block, slot][:, None],
            labels=blocks.labels[block, slot][:, None],
            weight=(share[drawn] > 0).astype(share.dtype)[:, None],
            row=blocks.row[block],
            counts=None if blocks.counts is None else blocks.counts[block, slot][:, None],
        )

    def change(logits: jax.Array, anchor: jax.Array, batch: Blocks) -> jax.Array:
        """How much the gradient differs at ``logits`` from the anchor's, seen by the batch."""
        moved = laws(batch, logits)[0] - laws(batch, anchor)[0]
        moved = batch.sum_by_row((moved * batch.weight[..., None])[:, 0])
        out = total / batch_size * moved
        if prior is None:
            return out
        return out + scale[:, None] * (prior.gradient(logits) - prior.gradient(anchor))

    def epoch(carry):
        anchor, state, slope, _, begun = carry
        end = jnp.minimum(begun + steps, max_iterations).astype(begun.dtype)

        def step(iteration: jax.Array, carry):
            logits, state = carry
            gradient = slope + change(logits, anchor, batch_of(iteration))
            updates: Any
            updates, state = transform.update(gradient, state, logits)
            return logits + updates, state

        logits, state = jax.lax.fori_loop(begun, end, step, (anchor, state))
        slope = full_gradient(logits)
        return logits, state, slope, _largest(slope) <= tolerance, end

    def unfinished(carry) -> jax.Array:
        *_, done, iteration = carry
        return ~done & (iteration < max_iterations)

    slope = full_gradient(start)
    done = _largest(slope) <= tolerance
    carry = (start, first, slope, done, jnp.zeros((), jnp.int32))
    logits, _, _, done, iteration = jax.lax.while_loop(unfinished, epoch, carry)
    return Solution(logits, done, iteration)


def _largest(gradient: Any) -> jax.Array:
    """The largest absolute entry of a pytree."""
    return jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(gradient)]).max()


def _remembers_value(state: Any) -> bool:
    """Whether an optimiser's state keeps the value and gradient of its last line search."""
    import optax

    try:
        return all(optax.tree.get(state, name) is not None for name in ("value", "grad"))
    except KeyError:  # several of that name: which one is meant is not ours to guess
        return False
