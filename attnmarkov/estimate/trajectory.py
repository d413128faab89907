"""Learning from generated trajectories: every prefix is a prompt, the next token its label."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate.fit import fit
from attnmarkov.model.contexts import FullContext
from attnmarkov.model.decoders import Decoder
from attnmarkov.prompts.batch import Prompts
from attnmarkov.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    import optax
    from jaxtyping import Array, Int
    from numpy.typing import ArrayLike

    from attnmarkov.estimate.prior import Prior
    from attnmarkov.estimate.result import Fit
    from attnmarkov.model.contexts import Context


def trajectory_prompts(
    tokens: ArrayLike, prompt: Any, num_tokens: int
) -> tuple[Prompts, Int[Array, " prompt"]]:
    """The prompts that a trajectory is made of, and the tokens that followed them.

    Prompt ``t`` of a trajectory is the prompt it grew from with its first ``t`` tokens; the label
    is the token after these. Works under jit and vmap. O(nK) time and memory: the counts of
    1e6 steps over 16 tokens take 64 MB, and two or three times that while they are summed.

    Args:
        tokens: (T,) generated tokens, or (R, T) of R trajectories, which are pooled.
        prompt: What they grew from: (L,) tokens, or one prompt per trajectory, or a
            :class:`~attnmarkov.Prompts`, as in :func:`attnmarkov.rollout`.
        num_tokens: Vocabulary size K.

    Returns:
        ``T`` or ``R·T`` prompts, trajectory after trajectory, and their (n,) int32 labels. Only
        counts and last tokens of the prompts are known.

    Raises:
        ValueError: If there is no step, there are as many prompts as neither one nor R, or a
            token is no token id or does not stand in its prompt.

    >>> prompts, y = trajectory_prompts([0, 0, 1], [0, 1], 2)
    >>> prompts.counts.tolist(), prompts.last.tolist(), y.tolist()
    ([[1, 1], [2, 1], [3, 1]], [1, 0, 0], [0, 0, 1])
    """
    tokens, start = check_tokens(tokens, prompt, num_tokens)
    counts, last = _prefixes(tokens, start.counts, start.last)
    prompts = Prompts(counts.reshape(-1, start.num_tokens), last.reshape(-1))
    return prompts, tokens.reshape(-1)


def fit_trajectory(
    trajectory: Trajectory,
    prompt: Any,
    solver: str | optax.GradientTransformation = "newton",
    *,
    each: bool = False,
    prior: float | Prior | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    context: Context | None = None,
    decoder: Decoder | None = None,
) -> Fit:
    """Fit a CCMC to what it generated, one model to all trajectories or one to each.

    The likelihood of a trajectory is the product of its steps', so this is :func:`fit` on
    :func:`trajectory_prompts`. The prompts depend on the labels before them; the standard errors,
    from the information that the trajectory did gather, stay right (the score is a martingale).
    A trajectory that collapses on a winner teaches little about the other rows: see
    :func:`learnable_contrasts`. Needs O(R·T·K) memory, as :func:`trajectory_prompts`.

    Args:
        trajectory: A rollout with ``record="tokens"``, R trajectories of T tokens.
        prompt: The prompt given to :func:`attnmarkov.rollout`, or one per trajectory.
        solver: As :func:`fit`.
        each: Whether to fit every trajectory by itself; the arrays of the result then have a
            leading axis of R.
        prior: As :func:`fit`.
        tolerance: As :func:`fit`.
        max_iterations: As :func:`fit`.
        context: The context it was generated with; only the full one is understood.
        decoder: The decoder it was generated with; only one that leaves the law as it is.

    Raises:
        ValueError: If tokens were not recorded, the context or decoder changes the law of the
            next token, or as :func:`trajectory_prompts` and :func:`fit`.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.6, 0.4], [0.5, 0.5]])
    >>> traj = am.rollout(model, jax.random.key(0), [0, 1], 500, 4)
    >>> fit_trajectory(traj, [0, 1]).status.name
    'converged'
    >>> fit_trajectory(traj, [0, 1], each=True).model.logits.shape
    (4, 2, 2)
    """
    check_law(context, decoder)
    tokens = check_recorded(trajectory)
    options = {"prior": prior, "tolerance": tolerance, "max_iterations": max_iterations}
    if not each:
        prompts, labels = trajectory_prompts(tokens, prompt, trajectory.num_tokens)
        return fit(prompts, labels, solver, **options)
    tokens, start = check_tokens(tokens, prompt, trajectory.num_tokens)
    counts, last = _prefixes(tokens, start.counts, start.last)
    return _fit_each(Prompts(counts, last), tokens, options, solver)


@partial(jax.jit, static_argnames="solver")
def _fit_each(prompts: Prompts, labels: jax.Array, options: dict[str, Any], solver: Any) -> Fit:
    return jax.vmap(lambda p, y: fit(p, y, solver, **options))(prompts, labels)


@jax.jit
def _prefixes(
    tokens: Int[Array, "replicate step"],
    counts: Int[Array, "start token"],
    last: Int[Array, " start"],
) -> tuple[Int[Array, "replicate step token"], Int[Array, "replicate step"]]:
    """Counts and last token of the history before every step."""
    before = tokens[:, :-1]
    drawn = (before[..., None] == jnp.arange(counts.shape[-1])).astype(jnp.int32)
    start = jnp.broadcast_to(counts[:, None], (tokens.shape[0], 1, counts.shape[-1]))
    grown = jnp.cumsum(jnp.concatenate([start, drawn], axis=1), axis=1)
    first = jnp.broadcast_to(last[:, None], (tokens.shape[0], 1))
    return grown, jnp.concatenate([first, before], axis=1)


def check_recorded(trajectory: Any) -> jax.Array:
    """The tokens of a trajectory, or a ``ValueError``."""
    if not isinstance(trajectory, Trajectory):
        raise ValueError(
            f"trajectory: expected what am.rollout returns, got {type(trajectory).__name__}"
        )
    return trajectory.tokens


def check_law(context: Any, decoder: Any) -> None:
    """Raise unless tokens are drawn from the model's own law of the whole history."""
    if context is not None and not (isinstance(context, FullContext) and context.exponent == 1):
        raise ValueError(
            f"context: only trajectories of the full context with exponent 1 are understood, not "
            f"of {context!r}; build their prompts with am.Prompts.from_tokens and fit those"
        )
    if decoder is not None and not (isinstance(decoder, Decoder) and decoder.is_plain):
        raise ValueError(
            f"decoder: {decoder!r} draws from another law than the model's, so what it drew "
            "does not have the model's likelihood"
        )


def check_tokens(tokens: Any, prompt: Any, num_tokens: int) -> tuple[jax.Array, Prompts]:
    """``tokens`` as (R, T) int32 and the one or R prompts that they grew from."""
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    known = _validate.is_concrete(tokens)
    ids = _validate.integer_array(tokens, "tokens", ndim=(1, 2)) if known else jnp.asarray(tokens)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.size == 0:
        raise ValueError(f"tokens: there is no step (shape {ids.shape})")
    start = prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, num_tokens)
    if start.num_tokens != num_tokens:
        raise ValueError(
            f"prompt: over {start.num_tokens} tokens, but the trajectory has {num_tokens}"
        )
    if len(start) not in (1, ids.shape[0]):
        raise ValueError(
            f"prompt: {len(start)} prompts for {ids.shape[0]} trajectories; "
            "give one, or one for each"
        )
    if known:
        _validate.token_range(np.asarray(ids), "tokens", num_tokens)
    if known and _validate.is_concrete(start):
        held = np.asarray(start.counts) > 0
        rows = np.arange(len(ids))[:, None] if len(start) > 1 else 0
        wrong = ~held[rows, ids]
        if wrong.any():
            r, t = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"tokens: trajectory {r} draws token {ids[r, t]} at step {t}, which does not "
                "stand in its prompt; a CCMC emits only tokens of the prompt"
            )
    return jnp.asarray(ids, jnp.int32), Prompts(start.counts, start.last)
