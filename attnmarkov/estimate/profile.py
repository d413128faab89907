"""The ends of profile-likelihood intervals, for one contrast of every row at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.estimate._contrasts import eliminate_in, order_with
from attnmarkov.estimate._strong import restrict
from attnmarkov.estimate.likelihood import curvature, laws

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate._strong import Maximum

_MAX_PASSES = 200
_LARGEST_STEP = 8.0  # in nats; only one-sided contrasts ask for more
_SUFFICIENT = 1e-4  # Armijo's constant
_SETTLED = 1e-6  # of the deviance, left to gain at one value of the contrast
_CLOSE = 1e-4  # of the signed root deviance, before the last step, which squares it
_SERIES_BELOW = 0.5


class Look(NamedTuple):
    """One evaluation of every row at ``δ``, its distance from the maximum.

    Attributes:
        deviance: ``2 (ℓ_max − ℓ(δ))``.
        direction: Newton step that keeps the contrast.
        decrement: How much the deviance exceeds its least value at this contrast (about).
        tangent: How the best ``δ`` moves per unit of the contrast.
        slope: Derivative of half the least deviance in the contrast.
        stiffness: Second derivative of half the least deviance in the contrast (about).
    """

    deviance: Float[Array, " row"]
    direction: Float[Array, "row token"]
    decrement: Float[Array, " row"]
    tangent: Float[Array, "row token"]
    slope: Float[Array, " row"]
    stiffness: Float[Array, " row"]


def profile_end(
    blocks: Blocks,
    maximum: Maximum,
    first: Int[Array, " row"],
    second: Int[Array, " row"],
    side: Float[Array, " row"],
    quantile: Float[Array, ""],
) -> Float[Array, " row"]:
    """Where the profile likelihood of ``S[k, first] − S[k, second]`` has fallen to a level.

    The end is the contrast at which the root of twice the fall reaches ``quantile`` (the normal
    one, whose square is that of χ² with one degree). An infinite end is told by the win graph:
    towards a side to which no chain of wins leads back, the likelihood does not fall.

    One pass over the prompts per iteration, of all rows at once: it goes either to a Newton step
    of the other logits at a fixed contrast or, once they have settled, to a safeguarded Newton
    step of the contrast on the root of the fall, along the tangent of the constrained maximum.
    Everything is computed in ``δ``, the distance from the maximum, and the fall is the sum over
    prompts of KL divergences from the laws at the maximum (which it equals in this exponential
    family): nothing large is subtracted.

    Args:
        blocks: All prompts.
        maximum: Of :func:`attnmarkov.estimate._strong.maximum`, on these blocks.
        first: A token for every row.
        second: Another one. A row where both are the same is left alone and gets NaN.
        side: 1 for the upper end, -1 for the lower one.
        quantile: Positive.

    Returns:
        (K,), infinite where the end is, NaN where the iterations did not suffice.
    """
    size, dtype = blocks.num_tokens, blocks.weight.dtype
    eps = jnp.finfo(dtype).eps
    rows = jnp.arange(size)
    order = order_with(second, first, size)
    inverse = jnp.argsort(order, axis=-1)

    # Holding the contrast ties the two tokens: what reaches one of them reaches the other.
    reach = maximum.reach
    into = reach[rows, :, first] | reach[rows, :, second]
    out = reach[rows, first] | reach[rows, second]
    tied = reach | (into[:, :, None] & out[:, None, :])
    offset = blocks.log_counts + maximum.logits[blocks.row][:, None, :]
    wide = restrict(blocks._replace(log_counts=offset, counts=None), tied & tied.swapaxes(-1, -2))
    origin = jnp.zeros((size, size), dtype)
    reference = laws(maximum.blocks, maximum.logits)[0]

    above, below = reach[rows, second, first], reach[rows, first, second]
    is_finite = above & below
    falls = jnp.where(side > 0, below, above)  # wins of the lesser one stop the contrast

    def look(point: jax.Array) -> Look:
        probs = laws(wide, point)[0]
        fall = (_divergence(reference, probs, point[blocks.row]) * blocks.weight).sum(-1)
        gradient = ((probs - reference) * blocks.weight[..., None]).sum(1)
        gradient = jnp.take_along_axis(blocks.sum_by_row(gradient), order, axis=-1)
        visits, pivot = eliminate_in(curvature(blocks, probs), order)
        along = jnp.einsum("kaj,ka->kj", visits, gradient, precision=_HIGHEST)
        free = (pivot > 0) & (jnp.arange(size) >= 2)  # the two tokens stay where they are
        scaled = jnp.where(free, along / jnp.where(free, pivot, 1), 0)
        direction = -jnp.einsum("kaj,kj->ka", visits, scaled, precision=_HIGHEST)
        length = jnp.abs(direction).max(-1, keepdims=True)
        direction = direction * jnp.minimum(1, _LARGEST_STEP / jnp.maximum(length, eps))
        return Look(
            deviance=2 * blocks.sum_by_row(fall),
            direction=jnp.take_along_axis(direction, inverse, axis=-1),
            decrement=(along * scaled).sum(-1),
            tangent=jnp.take_along_axis(visits[..., 1], inverse, axis=-1),
            slope=along[:, 1],
            stiffness=pivot[:, 1],
        )

    def outward(state, at: Look) -> dict[str, jax.Array]:
        """The next contrast, from the least deviance at this one."""
        root = jnp.sqrt(jnp.maximum(at.deviance - at.decrement, 0))
        rate = jnp.where(root > 0, side * at.slope / root, jnp.sqrt(at.stiffness))
        is_inside = root < quantile
        low = jnp.where(is_inside, jnp.maximum(state["low"], state["at"]), state["low"])
        high = jnp.where(is_inside, state["high"], jnp.minimum(state["high"], state["at"]))
        gap = quantile - root
        # Towards an infinite estimate the root decays exponentially: its logarithm is straight.
        decays = ~is_finite & is_inside & (root > 0)
        gap = jnp.where(decays, root * jnp.log(quantile / jnp.where(decays, root, 1)), gap)
        step = jnp.where(rate > 0, gap / jnp.where(rate > 0, rate, 1), jnp.sign(gap))
        step = jnp.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        new = state["at"] + step
        is_close = jnp.abs(quantile - root) <= _CLOSE * quantile
        middle = (low + high) / 2
        astray = ~is_close & jnp.isfinite(middle) & ((new <= low) | (new >= high))
        new = jnp.where(astray, middle, new)
        return {"low": low, "high": high, "at": new, "done": is_close}

    def unfinished(state) -> jax.Array:
        return ~state["done"].all() & (state["passes"] < _MAX_PASSES)

    def iterate(state):
        trial = state["point"] + state["step"][:, None] * state["direction"]
        at = look(trial)
        slack = 32 * eps * (1 + state["deviance"])
        aim = state["deviance"] - 2 * _SUFFICIENT * state["step"] * state["decrement"] + slack
        moved = (state["is_fresh"] | (at.deviance <= aim)) & ~state["done"]
        settled = moved & (at.decrement <= _SETTLED)
        stepped = moved & ~settled
        next_ = outward(state, at)
        ahead = side * (next_["at"] - state["at"])
        beyond = trial + at.direction + ahead[:, None] * at.tangent

        def pick(*cases: tuple[jax.Array, jax.Array], old: jax.Array) -> jax.Array:
            for where, new in cases:
                old = jnp.where(where.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            return old

        return {
            "point": pick((stepped, trial), (settled, beyond), old=state["point"]),
            "direction": pick((stepped, at.direction), (settled, origin), old=state["direction"]),
            "step": jnp.where(moved | state["done"], 1, state["step"] / 2).astype(dtype),
            "deviance": pick((stepped, at.deviance), old=state["deviance"]),
            "decrement": pick((stepped, at.decrement), old=state["decrement"]),
            "is_fresh": jnp.where(moved, settled, state["is_fresh"]),
            **{name: pick((settled, next_[name]), old=state[name]) for name in next_},
            "passes": state["passes"] + 1,
        }

    zero = jnp.zeros(size, dtype)
    state = {
        "point": origin,
        "direction": origin,
        "step": jnp.ones(size, dtype),
        "deviance": zero,
        "decrement": zero,
        "is_fresh": jnp.ones(size, bool),  # the contrast is new: there is nothing to improve on
        "at": zero,  # the contrast less that of the maximum's logits, outwards
        "low": jnp.where(is_finite, 0, -jnp.inf).astype(dtype),
        "high": jnp.full(size, jnp.inf, dtype),
        "done": ~falls | (first == second),
        "passes": jnp.zeros((), jnp.int32),
    }
    state = jax.lax.while_loop(unfinished, iterate, state)
    centre = maximum.logits[rows, first] - maximum.logits[rows, second]
    end = jnp.where(state["done"], centre + side * state["at"], jnp.nan)
    end = jnp.where(falls, end, side * jnp.inf)
    return jnp.where(first == second, jnp.nan, end)


def _divergence(reference: jax.Array, probs: jax.Array, shift: jax.Array) -> jax.Array:
    """KL(p ‖ q) of every prompt, (G, C), for ``q ∝ p e^shift`` on the support of ``p``.

    Accurate relative to itself however small: a sum of non-negative terms
    ``p (e^x − 1 − x)``, ``x`` the shift less its mean under ``p``, and what ``q`` gives to other
    tokens.
    """
    held = reference > 0
    own = jnp.where(held, shift[:, None, :], 0)
    x = jnp.where(held, own - (reference * own).sum(-1, keepdims=True), 0)
    near = jnp.where(jnp.abs(x) < _SERIES_BELOW, x, 0)
    series = jnp.ones_like(near)  # e^x − 1 − x = x²/2 (1 + x/3 (1 + x/4 (1 + ...)))
    for term in range(14, 2, -1):
        series = 1 + near / term * series
    excess = jnp.where(near == x, near**2 / 2 * series, jnp.expm1(x) - x)
    lost = jnp.where(held, 0, probs).sum(-1)
    kept = jnp.where(held, probs, 0).sum(-1)
    outside = jnp.where(lost < 0.5, -jnp.log1p(-jnp.minimum(lost, 0.5)), -jnp.log(kept))
    return jnp.log1p((reference * excess).sum(-1)) + outside


_HIGHEST = jax.lax.Precision.HIGHEST
