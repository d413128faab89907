"""The entry points of rollouts."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import AttentionHead
from attnmarkov.rollout import _check
from attnmarkov.rollout._cores import over_cores
from attnmarkov.rollout._plan import make_plan
from attnmarkov.rollout.summary import Summary
from attnmarkov.rollout.support import join, parts
from attnmarkov.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Array, Key
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC, Context, Decoder, SelfAttention
    from attnmarkov.rollout.engine import Engine


def log_spaced(num_steps: int, num: int) -> np.ndarray:
    """At most ``num`` increasing integers from 1 to ``num_steps``, evenly spaced in the log.

    Rounding merges neighbours at the small end, so that there may be fewer than ``num``.

    Raises:
        ValueError: If either number is below 1.

    >>> log_spaced(1000, 7).tolist()
    [1, 3, 10, 32, 100, 316, 1000]
    """
    num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
    num = _validate.integer(num, "num", minimum=1)
    if num == 1:
        return np.array([num_steps])
    return np.unique(np.rint(np.geomspace(1, num_steps, num)).astype(np.int64))


def rollout(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    prompt: Any,
    num_steps: int,
    num_trajectories: int = 1,
    engine: str | Engine = "auto",
    record: Literal["tokens", "counts", "summary"] | Summary = "tokens",
    at: ArrayLike | None = None,
    context: Context | None = None,
    decoder: Decoder | None = None,
    *,
    first_replicate: int = 0,
) -> Trajectory:
    """Generate from a CCMC: draw a token, append it to the context, repeat.

    Trajectory ``r`` depends on ``(key, first_replicate + r)``, the model, its prompt and the
    engine alone: not on the batch it stands in, the number of devices, nor on ``num_steps`` (a
    longer run begins with the shorter), nor on what is recorded (``urn`` excepted: its draws
    depend on ``at``). Different engines give different draws of the same law, and
    ``engine="auto"`` may choose another for another ``num_steps`` or ``record``.

    The trajectories are spread over all devices of the process (of all processes, under
    ``jax.distributed``).

    Args:
        model: A CCMC, or self-attention (taken through its exact CCMC), or an
            :class:`~attnmarkov.model.AttentionHead` (taken through its exact CCMC on the tokens
            of each prompt, one prompt after the other, so that K may be large).
        key: A typed JAX key.
        prompt: (L,) token ids shared by all trajectories; or one prompt per trajectory as an
            (R, L) array, a sequence of sequences, or a :class:`~attnmarkov.Prompts`.
        num_steps: Tokens to generate per trajectory, at least 0. The history must stay below
            2**31 tokens (2**62 with ``skip_ahead`` and ``urn``).
        num_trajectories: Number of trajectories R, at least 1.
        engine: ``"auto"``, ``"scan"`` (O(K) a step, on counts), ``"rejection"`` (copies
            positions of the history, at a cost that K does not enter), ``"reference"``
            (attention over the growing history, any context and decoder), ``"skip_ahead"``
            (whole runs at once, counts to 2**62 tokens: for horizons past a million where
            generation collapses), ``"urn"`` (all rows of ``P`` equal), ``"pallas"`` (one kernel
            for the whole horizon, on GPU and TPU), or an engine object. Auto is ``scan``;
            ``skip_ahead`` (``urn`` where it can) for counts past 2**30 steps; on CPU
            ``rejection`` from 1,024 tokens on, for tokens or counts of up to 2**16 steps;
            ``reference`` for contexts that only it takes. Name one to keep to its draws.
        record: ``"tokens"`` keeps every token; ``"counts"`` keeps the history's counts at the
            steps ``at``; ``"summary"``, or a :class:`~attnmarkov.Summary`, keeps entropies,
            transition counts and first-passage times. Memory of the latter two does not depend
            on ``num_steps``; nor does that of :func:`rollout_chunks`, which yields tokens.
        at: Increasing numbers of steps in 0..num_steps at which counts and summaries are
            recorded; ``[num_steps]`` if None. See :func:`log_spaced`.
        context: How the history becomes weights; ``FullContext()`` if None. See
            ``attnmarkov.model``.
        decoder: How weights become the law that is drawn from; ``Sampling()`` if None.
        first_replicate: Replicate id of the first trajectory, to continue or split a batch.

    Returns:
        A :class:`~attnmarkov.rollout.Trajectory`; what it recorded has a leading axis of R
        trajectories; counts and summaries of an attention head are over its prompts' tokens,
        whose ids are ``.support``. A lane with nothing left to attend emits -1 and stays as it
        is (only possible if a query attends no token that its context may be left with).

    Raises:
        ValueError: If a size is out of range, the prompt is empty or holds a bad id, ``at`` is
            not increasing or leaves 0..num_steps, the engine or record is unknown, the engine
            can't do the combination (the message names those that can), a parameter of the
            context or decoder is out of range, the record would not fit in memory, or masked
            tokens would leave a reachable token with nothing to attend.

    References:
        [CCMC], on learning from a single trajectory.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.9, 0.1], [0.2, 0.8]])
    >>> traj = am.rollout(model, jax.random.key(0), [0, 1], 100, 8, record="counts", at=[10, 100])
    >>> traj.counts.shape, traj.counts[0].sum(-1).tolist()
    ((8, 2, 2), [12, 102])
    """
    if isinstance(model, AttentionHead):
        first = _validate.integer(first_replicate, "first_replicate", minimum=0)
        todo = parts(model, prompt, num_trajectories)
        options = engine, record, at, context, decoder
        found = [
            rollout(
                part.model,
                key,
                part.prompts,
                num_steps,
                part.number,
                *options,
                first_replicate=first + part.start,
            )
            for part in todo
        ]
        return join(model.num_tokens, [part.ids for part in todo], found)
    plan = make_plan(
        model,
        key,
        prompt,
        num_steps,
        num_trajectories,
        engine,
        _record(record),
        at,
        context,
        decoder,
        first_replicate,
    )
    _check.memory(plan)

    def run(part: tuple[Any, Any]) -> Any:
        if isinstance(plan.record, Summary):
            return plan.engine.summary(plan.law, *part, plan.at, plan.record)
        if plan.record == "counts":
            return plan.engine.counts(plan.law, *part, plan.at)
        return plan.engine.tokens(plan.law, *part, plan.num_steps)

    out = over_cores(run, plan.parts()) if plan.is_known else list(map(run, plan.parts()))
    values = jax.tree.map(partial(_join, plan.num_trajectories), *out)
    at_ = None if plan.record == "tokens" else plan.at
    return Trajectory(plan.law.num_tokens, plan.name, values, at_)


def rollout_chunks(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    prompt: Any,
    num_steps: int,
    num_trajectories: int = 1,
    engine: str | Engine = "auto",
    context: Context | None = None,
    decoder: Decoder | None = None,
    *,
    chunk: int,
    first_replicate: int = 0,
) -> Iterator[Trajectory]:
    """The tokens of a rollout, ``chunk`` steps at a time, in memory that does not grow.

    One after the other the chunks are, to the bit, the tokens that :func:`rollout` with the same
    engine (from 1,024 tokens on: with ``engine="scan"``) would return at once. Arguments as there.

    Args:
        model: As :func:`rollout`.
        key: As :func:`rollout`.
        prompt: As :func:`rollout`.
        num_steps: As :func:`rollout`.
        num_trajectories: As :func:`rollout`.
        engine: As :func:`rollout`; of the built-in engines ``scan`` can.
        context: As :func:`rollout`.
        decoder: As :func:`rollout`.
        chunk: Steps per chunk, at least 1; the last one may be shorter.
        first_replicate: As :func:`rollout`.

    Yields:
        Trajectories of R times ``chunk`` tokens.

    Raises:
        ValueError: As :func:`rollout`, before the first chunk is drawn.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.9, 0.1], [0.2, 0.8]])
    >>> parts = am.rollout_chunks(model, jax.random.key(0), [0, 1], 250, 8, chunk=100)
    >>> [part.tokens.shape for part in parts]
    [(8, 100), (8, 100), (8, 50)]
    """
    chunk = _validate.integer(chunk, "chunk", minimum=1)
    if isinstance(model, AttentionHead):
        first = _validate.integer(first_replicate, "first_replicate", minimum=0)
        todo = parts(model, prompt, num_trajectories)
        options = engine, context, decoder
        running = [
            rollout_chunks(
                part.model,
                key,
                part.prompts,
                num_steps,
                part.number,
                *options,
                chunk=chunk,
                first_replicate=first + part.start,
            )
            for part in todo
        ]
        supports = [part.ids for part in todo]
        return (join(model.num_tokens, supports, found) for found in zip(*running, strict=True))
    plan = make_plan(
        model,
        key,
        prompt,
        num_steps,
        num_trajectories,
        engine,
        "chunks",
        None,
        context,
        decoder,
        first_replicate,
    )
    _check.memory(plan, min(chunk, plan.num_steps))
    starts = range(0, plan.num_steps, chunk)  # lazy: there may be very many
    running = [
        plan.engine.chunks(plan.law, *part, itertools.chain(starts, [plan.num_steps]))
        for part in plan.parts()
    ]
    return (
        Trajectory(
            plan.law.num_tokens,
            plan.name,
            jax.tree.map(partial(_join, plan.num_trajectories), *tokens),
        )
        for tokens in zip(*running, strict=True)
    )


def _record(record: Any) -> str | Summary:
    if isinstance(record, Summary):
        record.check()
        return record
    _validate.choice(record, "record", ["tokens", "counts", "summary"])
    return Summary() if record == "summary" else record


def _join(num_trajectories: int, *parts: Any) -> Any:
    """Parts of the lanes put together, less the lanes that filled up the last."""
    if parts[0].ndim == 0 or (len(parts) == 1 and parts[0].shape[0] == num_trajectories):
        return parts[0]
    join = np if isinstance(parts[0], np.ndarray) else jnp
    return join.concatenate(parts)[:num_trajectories]
