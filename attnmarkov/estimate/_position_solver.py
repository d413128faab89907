"""The likelihood of logits and positional log-weights together, and how it is maximised.

With log-weight ``b_i`` of position ``i``, the loss of a label ``y`` is
``log Σ_i e^{b_i + S[k, x_i]} − log Σ_{i: x_i = y} e^{b_i + S[k, x_i]}``: convex in ``S`` alone, and
in ``(S, b)`` a difference of two convex functions. Positions are counted by their lag. The table
of log-weights, one line for each group of prompts that share it, is linear in the free numbers
``θ``: ``b = design @ θ``. Curvature in ``S`` is one block per row, so that a Newton step solves
these, and one system of the size of ``θ``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve

from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.first_order import minimise, named
from attnmarkov.estimate.graphs import (
    component_projector,
    cooccurrence_components,
    has_finite_maximum,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

_ELEMENTS = 2**16  # numbers of a kind that are worked on at once
_LARGEST_STEP = 2.0  # in nats; the likelihood is not concave, so that long steps may miss
_SUFFICIENT = 1e-4  # Armijo's constant
_HIGHEST = jax.lax.Precision.HIGHEST


class Cells(NamedTuple):
    """Prompts by last token and group, in blocks that each belong to one of both.

    Slots stand last, so that what is done for each of the few lags and tokens is one long loop.
    """

    tokens: Int[Array, "block lag slot"]
    visible: Bool[Array, "block lag slot"]
    labels: Int[Array, "block slot"]
    weight: Float[Array, "block slot"]  # 0 for an empty slot
    row: Int[Array, " block"]
    group: Int[Array, " block"]


class Evaluation(NamedTuple):
    """Mean loss per label at one ``(S, table)``, its gradient, and its curvature.

    Of the curvature in the table there is the loss's own, ``observed``, and its expectation
    under the law, the Fisher information. In ``S``, and between both, the two are the same.
    """

    loss: Float[Array, ""]
    logits_gradient: Float[Array, "row token"]
    table_gradient: Float[Array, "group lag"]
    logits: Float[Array, "row token token"]
    cross: Float[Array, "row group token lag"]
    observed: Float[Array, "group lag lag"]
    expected: Float[Array, "group lag lag"]


class Optimum(NamedTuple):
    """Where the solver stopped, and what the data alone decide.

    ``flat_logits`` and ``flat_loss`` belong to the optimum with all log-weights 0, from which
    the joint optimisation starts unless it is given another start. ``never`` marks the positions
    that are seen and never hold the label.
    """

    logits: Float[Array, "row token"]
    theta: Float[Array, " free"]
    loss: Float[Array, ""]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    flat_logits: Float[Array, "row token"]
    flat_loss: Float[Array, ""]
    components: Int[Array, "row token"]
    separated: Bool[Array, " row"]
    never: Bool[Array, "group lag"]


def design_of(positions: str, num_lags: int) -> np.ndarray:
    """(group, lag, free): how the table of log-weights follows from the free numbers.

    The last token, lag 0, is the reference: its log-weight is 0. ``"lag"`` has one group and a
    number for every further lag; ``"decay"`` one group and one number, the slope; ``"absolute"``
    a group for every length ``L`` and numbers for its lags 1 to ``L − 1``.
    """
    lags = np.arange(num_lags)
    if positions == "decay":
        return -lags[None, :, None].astype(float)
    groups = 1 if positions == "lag" else num_lags
    length = np.full(1, num_lags) if positions == "lag" else lags + 1
    free = (lags > 0) & (lags < length[:, None])
    out = np.zeros((groups, num_lags, free.sum()))
    out[free, np.arange(free.sum())] = 1
    return out


def by_lag(tokens: jax.Array, lengths: jax.Array, num_lags: int) -> tuple[jax.Array, jax.Array]:
    """Tokens (n, num_lags) counted back from the last one, and which of them there are."""
    position = lengths[:, None] - 1 - jnp.arange(num_lags)
    at = jnp.clip(position, 0, tokens.shape[1] - 1)
    visible = position >= 0
    return jnp.where(visible, jnp.take_along_axis(tokens, at, axis=1), 0), visible


def unmasked(visible: Any, masked: Any) -> Any:
    """The visible positions that are not masked; all of them where every one is masked."""
    kept = visible & ~masked
    return kept | (visible & ~kept.any(-1, keepdims=True))


@partial(jax.jit, static_argnames=("num_tokens", "solver"))
def maximise(
    tokens: Int[Array, "prompt position"],
    lengths: Int[Array, " prompt"],
    last: Int[Array, " prompt"],
    y: Int[Array, " prompt"],
    design: Float[Array, "group lag free"],
    prior: Float[Array, ""],
    tolerance: Float[Array, ""],
    max_iterations: Int[Array, ""],
    masked: Bool[Array, "group lag"],
    start: tuple[Float[Array, "row token"], Float[Array, " free"]],
    warm: Bool[Array, ""],
    *,
    num_tokens: int,
    solver: str = "newton",
) -> Optimum:
    """Maximise the joint likelihood; no checks.

    ``masked`` positions have weight zero. Newton starts at ``start`` if ``warm``; else at 0, and
    frees the log-weights once the logits are at their optimum.

    Time O(n(K² + KN + KN²)) per Newton iteration with N lags, O(nNK) per iteration of L-BFGS.
    """
    num_groups, num_lags, _ = design.shape
    by_age, visible = by_lag(tokens, lengths, num_lags)
    group = lengths - 1 if num_groups > 1 else jnp.zeros_like(lengths)
    visible = unmasked(visible, masked[group])
    n = tokens.shape[0]
    counts = jnp.zeros((n, num_tokens), jnp.int32)
    counts = counts.at[jnp.arange(n)[:, None], by_age].add(visible.astype(jnp.int32))
    blocks = blocks_of(counts, last, y)
    components = cooccurrence_components(blocks)
    finite = has_finite_maximum(blocks, components).all(-1)

    cells = _cells(by_age, visible, last, y, group, num_tokens, num_groups)
    hit = visible & (by_age == y[:, None])
    table = jnp.zeros((2, num_groups, num_lags), bool)
    table = table.at[0, group].max(visible).at[1, group].max(hit)

    problem = _Problem(cells, design, prior, component_projector(components).astype(design.dtype))
    flat, joint = _newton(problem, tolerance, max_iterations, start, warm, joint=solver == "newton")
    if solver != "newton":
        joint = _first_order(problem, flat, tolerance, max_iterations, solver)
    logits = joint.logits - jnp.einsum("kab,kb->ka", problem.projector, joint.logits)
    return Optimum(
        logits,
        joint.theta,
        joint.loss,
        joint.done,
        joint.iterations,
        flat.logits,
        flat.loss,
        components,
        ~finite,
        table[0] & ~table[1],
    )


class _Problem(NamedTuple):
    cells: Cells
    design: jax.Array
    prior: jax.Array
    projector: jax.Array

    @property
    def labels_per_row(self) -> jax.Array:
        size = self.projector.shape[0]
        return jax.ops.segment_sum(self.cells.weight.sum(-1), self.cells.row, size)


class _Stop(NamedTuple):
    logits: jax.Array
    theta: jax.Array
    loss: jax.Array
    done: jax.Array
    iterations: jax.Array


def _cells(
    tokens: jax.Array,
    visible: jax.Array,
    last: jax.Array,
    y: jax.Array,
    group: jax.Array,
    num_tokens: int,
    num_groups: int,
) -> Cells:
    """Sort prompts into blocks, as :func:`attnmarkov.estimate._blocks.blocks_of` does."""
    n, num_lags = tokens.shape
    number_of_cells = num_tokens * num_groups
    size = min(max(n // (8 * number_of_cells), 8), 256)
    number = (n + min(n, number_of_cells) * (size - 1)) // size
    together = min(number, _together(size, num_lags, num_tokens))
    number = -(-number // together) * together

    cell = last * num_groups + group
    per_cell = jnp.zeros(number_of_cells, jnp.int32).at[cell].add(1)
    blocks_per_cell = -(-per_cell // size)
    ends = jnp.cumsum(blocks_per_cell)
    order = jnp.argsort(cell, stable=True)
    rank = jnp.arange(n) - (jnp.cumsum(per_cell) - per_cell)[cell[order]]
    slot = size * (ends - blocks_per_cell)[cell[order]] + rank
    prompt = jnp.full(number * size, n, jnp.int32).at[slot].set(order.astype(jnp.int32))
    prompt = prompt.reshape(number, size)
    taken = jnp.minimum(prompt, n - 1)
    of_block = jnp.searchsorted(ends, jnp.arange(number), side="right").astype(jnp.int32)
    of_block = jnp.minimum(of_block, number_of_cells - 1)
    return Cells(
        tokens=tokens[taken].swapaxes(1, 2),
        visible=visible[taken].swapaxes(1, 2),
        labels=y[taken],
        weight=(prompt < n).astype(jnp.result_type(float)),
        row=of_block // num_groups,
        group=of_block % num_groups,
    )


def _together(size: int, num_lags: int, num_tokens: int) -> int:
    return max(1, _ELEMENTS // (size * num_lags * num_tokens))


def _shares(scores: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shares of the kept positions and the log of their sum; minus infinity if none is kept."""
    top = jax.lax.stop_gradient(jnp.where(kept, scores, -jnp.inf).max(1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.where(kept, jnp.exp(jnp.where(kept, scores - top, 0)), 0)
    total = weights.sum(1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1), (top + jnp.log(total))[:, 0]


def _laws(cells: Cells, logits: jax.Array, table: jax.Array) -> tuple[jax.Array, ...]:
    """Shares of the positions, shares of those that hold the label, and the loss of each slot."""
    holds = cells.tokens[:, None] == jnp.arange(logits.shape[-1])[:, None, None]
    own = jnp.where(holds, logits[cells.row][:, :, None, None], 0).sum(1)
    scores = table[cells.group][:, :, None] + own
    shares, whole = _shares(scores, cells.visible)
    is_label = cells.visible & (cells.tokens == cells.labels[:, None])
    label_shares, of_label = _shares(scores, is_label)
    return shares, label_shares, jnp.where(cells.weight > 0, whole - of_label, 0)


def mean_loss(cells: Cells, logits: jax.Array, table: jax.Array) -> jax.Array:
    """Mean negative log-likelihood per label; differentiable."""
    return (cells.weight * _laws(cells, logits, table)[2]).sum() / cells.weight.sum()


def evaluate(cells: Cells, logits: jax.Array, table: jax.Array) -> Evaluation:
    """Loss, gradient and curvature in one pass over the prompts."""
    number, num_lags, slots = cells.tokens.shape
    step = min(number, _together(slots, num_lags, logits.shape[-1]))
    cut = jax.tree.map(lambda x: x.reshape(-1, step, *x.shape[1:]), cells)

    def add(total: Evaluation, part: Cells) -> tuple[Evaluation, None]:
        return jax.tree.map(jnp.add, total, _sums(part, logits, table)), None

    one = jax.eval_shape(_sums, jax.tree.map(lambda x: x[0], cut), logits, table)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    total = jax.lax.scan(add, start, cut)[0]
    return jax.tree.map(lambda x: x / cells.weight.sum(), total)


def _sums(cells: Cells, logits: jax.Array, table: jax.Array) -> Evaluation:
    size, (num_groups, num_lags) = logits.shape[-1], table.shape
    shares, label_shares, losses = _laws(cells, logits, table)
    weight = cells.weight[:, None]
    tokens = jnp.arange(size)[:, None]
    holds = cells.tokens[:, :, None] == tokens  # (block, lag, token, slot)
    by_token = jnp.where(holds, shares[:, :, None], 0)
    probs = by_token.sum(1)

    def by_row(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, cells.row, size)

    def by_group(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, cells.group, num_groups)

    def diagonal(x: jax.Array) -> jax.Array:
        return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)

    def products(x: jax.Array) -> jax.Array:
        return jnp.einsum("bis,bjs->bij", x, x, precision=_HIGHEST)

    root = jnp.sqrt(weight)
    both = products(root * jnp.concatenate([probs, shares], 1))
    off_diagonal = by_row(both[:, :size, :size]) * (1 - jnp.eye(size, dtype=probs.dtype))

    cross = (weight[:, None] * by_token).sum(-1).swapaxes(1, 2) - both[:, :size, size:]
    cell = cells.row * num_groups + cells.group
    cross = jax.ops.segment_sum(cross, cell, size * num_groups)

    # By the score of position l, 1{l chosen | y} − w_l, and y's law: Σ_y J_yl J_ym / p_y − w_l w_m.
    own = by_token * jnp.where(probs > 0, 1 / jnp.sqrt(jnp.where(probs > 0, probs, 1)), 0)[:, None]
    own = (root[:, None] * own).reshape(len(own), num_lags, -1)
    surplus = weight * (shares - label_shares)
    within = diagonal(surplus.sum(-1)) + products(root * label_shares)
    shared = both[:, size:, size:]
    return Evaluation(
        loss=(cells.weight * losses).sum(),
        logits_gradient=by_row((weight * (probs - (cells.labels[:, None] == tokens))).sum(-1)),
        table_gradient=by_group(surplus.sum(-1)),
        logits=diagonal(off_diagonal.sum(-1)) - off_diagonal,
        cross=cross.reshape(size, num_groups, size, num_lags),
        observed=by_group(within - shared),
        expected=by_group(products(own) - shared),
    )


def _newton(
    problem: _Problem,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    first: tuple[jax.Array, jax.Array],
    warm: jax.Array,
    *,
    joint: bool,
) -> tuple[_Stop, _Stop]:
    """Damped Newton steps from 0: in ``S`` alone, and from that optimum in both (if ``joint``).

    If ``warm``, in both at once, from ``first``.

    Where the loss curves downwards in ``θ``, the Fisher information takes the place of its
    curvature, so that every direction descends. What the information does not see stays put.
    """
    cells, design, prior, projector = problem
    size, free, dtype = projector.shape[0], design.shape[-1], design.dtype
    eps = jnp.finfo(dtype).eps
    rows = jnp.maximum(problem.labels_per_row, 1) / cells.weight.sum()
    ridge = prior / cells.weight.sum()
    identity = jnp.eye(size, dtype=dtype)
    pull = partial(jnp.einsum, precision=_HIGHEST)

    def look(logits: jax.Array, theta: jax.Array):
        at = evaluate(cells, logits, pull("glm,m->gl", design, theta))
        penalty = ridge / 2 * ((logits**2).sum() + (theta**2).sum())
        slope = at.logits_gradient + ridge * logits
        theta_slope = pull("gl,glm->m", at.table_gradient, design) + ridge * theta

        matrix = at.logits + ridge * identity
        mean = jnp.einsum("kab,kbb->ka", projector, matrix)
        level = jnp.where(mean > 0, mean, 1)
        matrix = matrix + projector * level[..., None] + 8 * eps * level[..., None] * identity
        factor = jnp.linalg.cholesky(matrix)

        def solve(x: jax.Array) -> jax.Array:
            out = jax.vmap(lambda f, v: cho_solve((f, True), v))(factor, x)
            return out - jnp.einsum("kab,kbm->kam", projector, out)

        cross = pull("kgal,glm->kam", at.cross, design)
        solved = solve(jnp.concatenate([slope[..., None], cross], -1))
        alone, carried = -solved[..., 0], solved[..., 1:]
        observed, expected = (
            pull("glm,gle,gen->mn", design, part, design) + ridge * jnp.eye(free, dtype=dtype)
            for part in (at.observed, at.expected)
        )
        explained = pull("kam,kan->mn", cross, carried)
        theta_against = theta_slope + pull("kam,ka->m", cross, alone)
        theta_step = _theta_step(observed, expected, explained, theta_against)
        together = alone - pull("kam,m->ka", carried, theta_step)
        return {
            "loss": at.loss + penalty,
            "slope": slope,
            "theta_slope": theta_slope,
            "alone": alone,
            "together": together,
            "theta_together": theta_step,
        }

    def cap(step: jax.Array, theta_step: jax.Array) -> tuple[jax.Array, jax.Array]:
        table_step = pull("glm,m->gl", design, theta_step)
        length = jnp.maximum(jnp.abs(step).max(), jnp.abs(table_step).max(initial=0))
        shrink = jnp.minimum(1, _LARGEST_STEP / jnp.maximum(length, eps))
        return shrink * step, shrink * theta_step

    def is_done(seen, logits, theta, step, theta_step, freed) -> jax.Array:
        steep = jnp.abs(seen["slope"] / rows[:, None]).max()
        steep = jnp.maximum(steep, jnp.where(freed, jnp.abs(seen["theta_slope"]).max(initial=0), 0))
        still = (jnp.abs(step) <= 8 * eps * (1 + jnp.abs(logits).max())).all()
        still &= (jnp.abs(theta_step) <= 8 * eps * (1 + jnp.abs(theta).max(initial=0))).all()
        return (steep <= tolerance) | still

    def unfinished(state) -> jax.Array:
        return ~state["done"] & (state["iteration"] < max_iterations)

    def iterate(state):
        logits = state["logits"] + state["step"] * state["direction"]
        theta = state["theta"] + state["step"] * state["theta_direction"]
        seen = look(logits, theta)
        slack = 32 * eps * (1 + jnp.abs(state["loss"]))
        lower = seen["loss"] <= state["loss"] + _SUFFICIENT * state["step"] * state["along"] + slack

        freed = state["freed"]
        chosen = cap(
            jnp.where(freed, seen["together"], seen["alone"]),
            jnp.where(freed, seen["theta_together"], 0),
        )
        done = is_done(seen, logits, theta, *chosen, freed)
        if joint:  # at the optimum without positions, let them go
            release = done & ~freed & lower
            both = cap(seen["together"], seen["theta_together"])
            chosen = jax.tree.map(lambda new, old: jnp.where(release, new, old), both, chosen)
            done = done & ~release
        else:
            release = jnp.array(False)
        along = (seen["slope"] * chosen[0]).sum() + (seen["theta_slope"] * chosen[1]).sum()
        new = {
            "logits": logits,
            "theta": theta,
            "loss": seen["loss"],
            "direction": chosen[0],
            "theta_direction": chosen[1],
            "along": along,
            "done": done,
            "freed": freed | release,
            "flat_logits": jnp.where(freed, state["flat_logits"], logits),
            "flat_loss": jnp.where(freed, state["flat_loss"], seen["loss"]),
        }
        out = {name: jnp.where(lower, new[name], state[name]) for name in new}
        out["step"] = jnp.where(lower, 1, state["step"] / 2).astype(dtype)
        out["iteration"] = state["iteration"] + 1
        return out

    zero, none = jnp.zeros((size, size), dtype), jnp.zeros(free, dtype)
    infinite, zero_step = jnp.array(jnp.inf, dtype), jnp.zeros((), dtype)
    state = {  # the first pass moves nowhere and looks at the start
        "logits": jnp.where(warm, first[0], 0),
        "theta": jnp.where(warm, first[1], 0),
        "loss": infinite,
        "direction": zero,
        "theta_direction": none,
        "along": zero_step,
        "done": jnp.array(False),
        "freed": warm,
        "flat_logits": zero,
        "flat_loss": infinite,
        "step": jnp.ones((), dtype),
        "iteration": jnp.array(-1, jnp.int32),
    }
    state = jax.lax.while_loop(unfinished, iterate, state)
    # The next step is known and, this close, lands at the floating-point noise.
    largest = jnp.maximum(
        jnp.abs(state["direction"]).max(), jnp.abs(state["theta_direction"]).max(initial=0)
    )
    near = state["done"] & (largest < 1e-2)
    logits = state["logits"] + jnp.where(near, state["direction"], 0)
    theta = state["theta"] + jnp.where(near, state["theta_direction"], 0)
    end = (state["done"], state["iteration"])
    flat_logits = state["flat_logits"]
    return (
        _Stop(flat_logits, none, state["flat_loss"], *end),
        _Stop(logits, theta, state["loss"], *end),
    )


def _theta_step(
    observed: jax.Array, expected: jax.Array, explained: jax.Array, slope: jax.Array
) -> jax.Array:
    """The Newton step in ``θ`` once ``S`` is eliminated, in the directions that are informed.

    A direction is informed if the information, scaled to a diagonal of one before ``S`` took its
    part, has an eigenvalue above the rounding noise.
    """
    dtype = slope.dtype
    scale = jnp.sqrt(jnp.diagonal(expected))
    scale = jnp.where(scale > 0, scale, 1)
    values, vectors = jnp.linalg.eigh((expected - explained) / scale[:, None] / scale)
    informed = values > (1e-10 if dtype == jnp.float64 else 3e-5)
    turn = jnp.where(informed, vectors, 0)
    curvature = turn.T @ ((observed - explained) / scale[:, None] / scale) @ turn
    curvature = curvature + jnp.diag(jnp.where(informed, 0, 1).astype(dtype))
    against = jnp.where(informed, turn.T @ (slope / scale), 0)
    factor = jnp.linalg.cholesky(curvature)
    step = -cho_solve((factor, True), against)
    fisher = -against / jnp.where(informed, values, 1)
    return turn @ jnp.where(jnp.isfinite(step).all(), step, fisher) / scale


def _objective(params, problem: _Problem, rows: jax.Array, scale: jax.Array) -> jax.Array:
    logits, theta = params[0] / rows[:, None], params[1] / scale
    table = jnp.einsum("glm,m->gl", problem.design, theta, precision=_HIGHEST)
    ridge = problem.prior / problem.cells.weight.sum()
    penalty = ridge / 2 * ((logits**2).sum() + (theta**2).sum())
    return mean_loss(problem.cells, logits, table) + penalty


def _first_order(
    problem: _Problem,
    flat: _Stop,
    tolerance: jax.Array,
    max_iterations: jax.Array,
    solver: str,
) -> _Stop:
    """An optax solver from the optimum without positions, in variables of one scale."""
    share = jnp.maximum(problem.labels_per_row, 1) / problem.cells.weight.sum()
    rows = jnp.sqrt(share)
    scale = jnp.maximum(jnp.abs(problem.design).max((0, 1), initial=0), 1)
    start = (flat.logits * rows[:, None], flat.theta * scale)
    found = minimise(
        named(solver),
        _objective,
        start,
        tolerance * rows.min(),
        max_iterations,
        problem,
        rows,
        scale,
    )
    return _Stop(
        found.params[0] / rows[:, None],
        found.params[1] / scale,
        _objective(found.params, problem, rows, scale),
        found.converged,
        found.iterations,
    )
