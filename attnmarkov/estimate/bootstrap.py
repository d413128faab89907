"""Parametric bootstrap of a fit: draw data from it again and again, and refit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.estimate import _check, _contrasts, _guards
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._strong import maximum
from attnmarkov.estimate.graphs import cooccurrence_components
from attnmarkov.estimate.intervals import check_level
from attnmarkov.estimate.status import Status
from attnmarkov.estimate.trajectory import trajectory_prompts
from attnmarkov.model.ccmc import CCMC
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike

    from attnmarkov.estimate.result import Fit
    from attnmarkov.model.contexts import Context
    from attnmarkov.rollout.engine import Engine

_ELEMENTS = 2**22  # numbers of the prompts that are refitted at once, n K each


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BootstrapFits:
    """Refits to data drawn from a fit.

    A replicate may send a contrast to infinity (one of the tokens beats the other without
    return) or not compare its tokens at all; both are decided from its win graph.

    Attributes:
        contrasts: (m, 3) int32, each a row ``k`` and tokens ``a`` and ``b``.
        estimate: (m,) ``S[k, a] − S[k, b]`` of the fit that was drawn from.
        estimates: (B, m) of the replicates: infinite where the data send them there, NaN where
            the replicate does not compare the tokens.
        logits: (B, K, K) of the replicates, comparable only within a strong component of a
            row's win graph; of a replicate that is not separated, the fit's.
        status: (B,) how the refits ended.
    """

    contrasts: Int[Array, "contrast 3"]
    estimate: Float[Array, " contrast"]
    estimates: Float[Array, "replicate contrast"]
    logits: Float[Array, "replicate row token"]
    status: Status

    @property
    def num_replicates(self) -> int:
        """Number of replicates B."""
        return self.estimates.shape[-2]

    @property
    def num_infinite(self) -> Int[Array, " contrast"]:
        """(m,) how many replicates have an infinite estimate."""
        return jnp.isinf(self.estimates).sum(-2)

    @property
    def num_unknown(self) -> Int[Array, " contrast"]:
        """(m,) how many replicates do not compare the two tokens (or were not solved)."""
        return jnp.isnan(self.estimates).sum(-2)

    @property
    def standard_errors(self) -> Float[Array, " contrast"]:
        """(m,) standard deviation over the replicates with a finite estimate; NaN below two.

        With infinite replicates, which the others' spread ignores, trust :meth:`interval`.
        """
        finite = jnp.isfinite(self.estimates)
        number = finite.sum(-2)
        mean = jnp.where(finite, self.estimates, 0).sum(-2) / jnp.maximum(number, 1)
        off = jnp.where(finite, self.estimates - mean[..., None, :], 0)
        variance = (off**2).sum(-2) / jnp.maximum(number - 1, 1)
        return jnp.where(number > 1, jnp.sqrt(variance), jnp.nan)

    def interval(
        self, level: float = 0.95, kind: str = "percentile"
    ) -> tuple[Float[Array, " contrast"], Float[Array, " contrast"]]:
        """Lower and upper ends (m,) of bootstrap intervals.

        With ``h = (B + 1)(1 − level)/2`` rounded down, ``"percentile"`` takes the ``h``-th least
        and ``h``-th greatest estimate, and ``"basic"`` reflects them about the fit's own.
        Infinite replicates stand at their end of the order; one that says nothing of a contrast
        counts against it, as minus infinity for the one quantile and plus infinity for the
        other.

        Raises:
            ValueError: If ``level`` is not in (0, 1), the kind is unknown, or there are too few
                replicates for the level.
        """
        _validate.choice(kind, "kind", ("percentile", "basic"))
        check_level(level)
        rank = math.floor((self.num_replicates + 1) * (1 - level) / 2 + 1e-9)
        if rank < 1:
            raise ValueError(
                f"level: {level:g} needs at least {math.ceil(2 / (1 - level) - 1e-9) - 1} "
                f"replicates, there are {self.num_replicates}"
            )
        unknown = jnp.isnan(self.estimates)
        low = jnp.sort(jnp.where(unknown, -jnp.inf, self.estimates), axis=-2)
        high = jnp.sort(jnp.where(unknown, jnp.inf, self.estimates), axis=-2)
        low, high = low[..., rank - 1, :], high[..., -rank, :]
        if kind == "basic":
            low, high = 2 * self.estimate - high, 2 * self.estimate - low
        return low, high

    def __repr__(self) -> str:
        """How many replicates, how they ended, and how many contrasts are not finite in some."""
        if not isinstance(self.logits, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"BootstrapFits(estimates={self.estimates})"
        infinite, unknown = (np.asarray(x) for x in (self.num_infinite, self.num_unknown))
        return (
            f"BootstrapFits({self.num_replicates} replicates, {infinite.shape[-1]} contrasts: "
            f"infinite in some replicate {int((infinite > 0).sum())}, "
            f"not compared in some {int((unknown > 0).sum())}. {self.status})"
        )


def bootstrap(
    fit: Fit,
    prompts: Prompts,
    key: Key[Array, ""],
    num_replicates: int = 999,
    *,
    contrasts: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    row_groups: ArrayLike | None = None,
) -> BootstrapFits:
    """Draw labels for the same prompts from the fitted model and refit, many times.

    Weights, context and row groups are those of the fit; labels are drawn in that context, one
    for every copy of a prompt, and rows are tied in every refit. On concrete inputs the
    components of the fit and its standard errors are computed anew from them, and must be the
    fit's.

    Replicate ``b`` depends on ``(key, b)``, the model and the prompts alone. The refits are
    maximum likelihood, without a prior, vmapped in blocks of bounded memory. Works under jit
    and vmap over ``(fit, prompts, key)`` with ``contrasts`` given; weights and row groups must be
    concrete.

    Args:
        fit: The fit whose model is drawn from. If it is separated its model is wherever the
            solver stopped, and what is drawn from it says little.
        prompts: The n prompts.
        key: A typed JAX key.
        num_replicates: Number of replicates B, at least 1.
        contrasts: (m, 3) integers, a row ``k`` and tokens ``a`` and ``b`` each. By default every
            token against the least token of its component, in every row.
        weights: (n,) whole numbers, how many copies of each prompt were fitted: a weight of 3
            draws three labels, and takes the memory of three prompts.
        context: As the fit's.
        row_groups: (K,) as the fit's.

    Raises:
        ValueError: If an argument is out of range, the vocabularies differ, a weight is not a
            whole number, or the fit was made of other prompts or in another way.

    >>> import jax, attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 1]] * 60, 2)
    >>> fit = am.fit(prompts, [0] * 20 + [1] * 40)
    >>> fits = bootstrap(fit, prompts, jax.random.key(0), 99, contrasts=[(1, 1, 0)])
    >>> low, high = fits.interval(0.9)
    >>> bool(low[0] < fits.estimate[0]) and bool(fits.estimate[0] < high[0])
    True
    """
    _validate.check_key(key)
    _guards.is_fit(fit)
    _check.prompts(prompts)
    _check.vocabulary(prompts, fit.model, "fit")
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    groups = _check.row_groups(prompts, row_groups)
    number = _validate.integer(num_replicates, "num_replicates", minimum=1)
    wanted = _wanted(fit, contrasts)
    own = _contrasts.in_groups(wanted, groups)
    copies = _copies(weights)
    if _validate.is_concrete(fit, prompts, log_counts):
        _guards.same_prompts(fit, prompts, weights, log_counts, groups)
    data = prompts.counts, prompts.last, log_counts
    if copies is not None:
        data = tuple(None if x is None else x[copies] for x in data)
    estimates, logits, status = _redraw(
        fit.model.logits, *data, groups, key, jnp.asarray(own), num_replicates=number
    )
    wanted = jnp.asarray(wanted)
    return BootstrapFits(wanted, _of(fit, wanted), estimates, logits, status)


def _copies(weights: jax.Array | None) -> np.ndarray | None:
    """The prompt of every copy, in order."""
    if weights is None:
        return None
    if not _validate.is_concrete(weights):
        raise ValueError("weights: must be concrete for a bootstrap, also under jit and vmap")
    number = np.asarray(weights, np.float64)
    broken = number != np.round(number)
    if broken.any():
        row = int(broken.argmax())
        raise ValueError(
            f"weights: must be whole numbers for a bootstrap, which draws a label for every copy "
            f"of a prompt; got {number[row]:g} at [{row}]"
        )
    return np.repeat(np.arange(number.size), number.astype(np.int64))


def bootstrap_trajectory(
    fit: Fit,
    prompt: Any,
    num_steps: int,
    key: Key[Array, ""],
    num_replicates: int = 999,
    *,
    num_trajectories: int = 1,
    contrasts: ArrayLike | None = None,
    engine: str | Engine = "auto",
) -> BootstrapFits:
    """Roll out whole trajectories from the fitted model and refit each, many times.

    What :func:`bootstrap` is for independent prompts, for an estimate that was learned from
    generated text: the prompts themselves depend on the tokens drawn before, so they are drawn
    anew too. Replicate ``b`` depends on ``(key, b)``, the model, the prompt, the sizes and the
    engine alone.

    Args:
        fit: The fit whose model is rolled out.
        prompt: (L,) token ids, the prompt of every trajectory, or a
            :class:`~attnmarkov.Prompts` of that one prompt.
        num_steps: Tokens T generated per trajectory, at least 1.
        key: A typed JAX key.
        num_replicates: Number of replicates B, at least 1.
        num_trajectories: Trajectories pooled in one replicate, M.
        contrasts: (m, 3) integers, a row ``k`` and tokens ``a`` and ``b`` each. By default every
            token against the least token of its component, in every row.
        engine: As :func:`attnmarkov.rollout`.

    Raises:
        ValueError: If an argument is out of range, as :func:`bootstrap` and
            :func:`attnmarkov.rollout` say.

    >>> import jax, attnmarkov as am
    >>> key = jax.random.key(0)
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.4, 0.6]])
    >>> prompts = am.prompts.uniform(key, 200, 6, 2)
    >>> fit = am.fit(prompts, model.sample(key, prompts))
    >>> bootstrap_trajectory(fit, [0, 1], 50, key, 19).estimates.shape
    (19, 2)
    """
    from attnmarkov.rollout import rollout

    _guards.is_fit(fit)
    steps = _validate.integer(num_steps, "num_steps", minimum=1)
    number = _validate.integer(num_replicates, "num_replicates", minimum=1)
    each = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    wanted = jnp.asarray(_wanted(fit, contrasts))
    size = fit.model.num_tokens
    start_from = prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, size)
    if start_from.num_tokens != size:
        raise ValueError(f"prompt: over {start_from.num_tokens} tokens, but the fit has {size}")
    if len(start_from) != 1:
        raise ValueError(
            f"prompt: expected the one prompt of every trajectory, got {len(start_from)}"
        )
    grown_from = Prompts(start_from.counts, start_from.last)  # all that a refit looks at
    together = max(1, min(number, _ELEMENTS // (each * steps * size)))
    parts = []
    for start in range(0, number, together):  # the last block may reach beyond: shapes stay
        trajectory = rollout(
            fit.model,
            key,
            prompt,
            steps,
            together * each,
            engine=engine,
            first_replicate=start * each,
        )
        tokens = trajectory.tokens.reshape(together, each, steps)
        parts.append(_refit_trajectories(tokens, grown_from, wanted, size))
    found = jax.tree.map(lambda *x: jnp.concatenate(x)[:number], *parts)
    return BootstrapFits(wanted, _of(fit, wanted), *found)


def _wanted(fit: Fit, contrasts: Any) -> np.ndarray:
    if contrasts is None:
        return _contrasts.default(fit.components)
    return _contrasts.check(contrasts, fit.model.num_tokens)


def _of(fit: Fit, contrasts: jax.Array) -> jax.Array:
    """The fit's own contrasts; NaN between components, where its logits do not compare."""
    row, a, b = contrasts.T
    logits, joined = fit.model.logits, fit.components[row, a] == fit.components[row, b]
    return jnp.where(joined, logits[row, a] - logits[row, b], jnp.nan)


@partial(jax.jit, static_argnames="num_replicates")
def _redraw(
    logits: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    log_counts: jax.Array | None,
    groups: jax.Array | None,
    key: jax.Array,
    contrasts: jax.Array,
    *,
    num_replicates: int,
) -> tuple[jax.Array, jax.Array, Status]:
    model, prompts = CCMC(logits), Prompts(counts, last)

    @jax.vmap
    def replicate(index: jax.Array) -> tuple[jax.Array, jax.Array, Status]:
        own = jax.random.fold_in(key, index)
        if log_counts is None:
            y = model.sample(own, prompts)
        else:
            scores = logits[last] + log_counts
            scores = jnp.exp(scores - scores.max(-1, keepdims=True))
            seeds = _random.replicate_seeds(own, jnp.arange(last.size), "labels")
            y = _random.draw(scores, _random.words(seeds, 0))
        return _refit(counts, last, y, contrasts, log_counts, groups)

    # Blocks of one size: the batched Cholesky factors of a smaller rest, run beside the loop,
    # could wait for those of the loop on XLA's threads for ever.
    together = max(1, min(num_replicates, _ELEMENTS // counts.size))
    number = -(-num_replicates // together)
    ids = jnp.arange(number * together).reshape(number, together)
    found = jax.lax.map(replicate, ids)
    return jax.tree.map(
        lambda x: x.reshape(number * together, *x.shape[2:])[:num_replicates], found
    )


def _refit(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    contrasts: jax.Array,
    log_counts: jax.Array | None = None,
    groups: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Status]:
    """Contrasts (of groups, where rows are tied), logits by row and status of one replicate."""
    blocks = blocks_of(counts, last if groups is None else groups[last], y, None, log_counts)
    top = maximum(blocks)
    components = cooccurrence_components(blocks)
    joined = components[:, :, None] == components[:, None, :]
    status = Status.decide(
        finite=jnp.isfinite(top.logits).all(),
        solved=top.converged,
        separated=(joined & ~top.reach).any(),
        identified=((components if groups is None else components[groups]) == 0).all(),
    )
    logits = top.logits if groups is None else top.logits[groups]
    return jnp.where(top.converged, top.contrast(contrasts), jnp.nan), logits, status


@partial(jax.jit, static_argnames="num_tokens")
def _refit_trajectories(
    tokens: jax.Array, prompt: Prompts, contrasts: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array, Status]:
    """The same for (B, M, T) tokens, the M trajectories of a replicate pooled."""

    @jax.vmap
    def replicate(tokens: jax.Array) -> tuple[jax.Array, jax.Array, Status]:
        prompts, y = trajectory_prompts(tokens, prompt, num_tokens)
        return _refit(prompts.counts, prompts.last, y, contrasts)

    return replicate(tokens)
