"""The entry point of rollouts: checks, replicate keys, lanes split for the engine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.model import (
    CCMC,
    Context,
    Decoder,
    FullContext,
    LagContext,
    Sampling,
    SelfAttention,
    WindowContext,
)
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import _devices
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.law import Law
from attnmarkov.rollout.pallas import Pallas
from attnmarkov.rollout.reference import Reference, token_history
from attnmarkov.rollout.rejection import Rejection
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.summary import Summary
from attnmarkov.rollout.trajectory import Trajectory
from attnmarkov.rollout.urn import Urn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Array, Key, UInt32
    from numpy.typing import ArrayLike


_SPREAD = 60.0  # nats; exp(-60) times a count leaves float32 room for rare tokens beside it
_MANY = 1024  # tokens from which "rejection" is faster than "scan"
_KEPT = 2**16  # the most steps of a history that "auto" keeps, so that memory is bounded
ENGINES: dict[str, Engine] = {
    "reference": Reference(),
    "scan": Scan(),
    "rejection": Rejection(),
    "skip_ahead": SkipAhead(),
    "urn": Urn(),
    "pallas": Pallas(),
}


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
    model: CCMC | SelfAttention,
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
        model: A CCMC, or self-attention (taken through its exact CCMC).
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
        trajectories. A lane with nothing left to attend emits -1 and stays as it is (only
        possible if a query attends no token that its context may be left with).

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
    plan = _plan(
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
    _check_memory(plan)
    out: list[Any] = []
    for seeds, prompts in plan.parts():
        if isinstance(plan.record, Summary):
            out.append(plan.engine.summary(plan.law, seeds, prompts, plan.at, plan.record))
        elif plan.record == "counts":
            out.append(plan.engine.counts(plan.law, seeds, prompts, plan.at))
        else:
            out.append(plan.engine.tokens(plan.law, seeds, prompts, plan.num_steps))
    values = jax.tree.map(partial(_join, plan.num_trajectories), *out)
    at_ = None if plan.record == "tokens" else plan.at
    return Trajectory(plan.law.num_tokens, plan.name, values, at_)


def rollout_chunks(
    model: CCMC | SelfAttention,
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
    plan = _plan(
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
    _check_memory(plan, min(chunk, plan.num_steps))
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


@dataclass(frozen=True)
class _Plan:
    """A rollout whose arguments have been checked."""

    law: Law
    prompts: Prompts  # one, or one for each trajectory
    key: Key[Array, ""]
    num_steps: int
    num_trajectories: int
    first: int
    engine: Engine
    name: str
    record: str | Summary
    at: np.ndarray

    def parts(self) -> Iterator[tuple[UInt32[Array, "2 lane"], Prompts]]:
        """Seeds and prompts of equal parts of the lanes, filled up with lanes thrown away."""
        many, devices = self.num_trajectories, _devices.count()
        parts = -(-many // max(1, self.engine.lanes(self.law)))
        lanes = -(-many // parts)
        if many >= devices:
            lanes = -(-lanes // devices) * devices
        for start in range(0, many, lanes):
            index = np.arange(start, start + lanes)
            ids = jnp.asarray(self.first + index, jnp.uint32)
            seeds = _random.replicate_seeds(self.key, ids, "rollout")
            rows = np.minimum(index, many - 1) if len(self.prompts) > 1 else 0 * index
            take = _take if _validate.is_concrete(self.prompts) else jnp.take
            prompts = jax.tree.map(lambda x: take(x, rows, axis=0), self.prompts)  # noqa: B023
            yield _devices.global_inputs((seeds, prompts))


def _plan(
    model: Any,
    key: Any,
    prompt: Any,
    num_steps: Any,
    num_trajectories: Any,
    engine: Any,
    record: str | Summary,
    at: Any,
    context: Any,
    decoder: Any,
    first_replicate: Any,
) -> _Plan:
    _validate.check_key(key)
    num_steps = _validate.integer(num_steps, "num_steps", minimum=0)
    num_trajectories = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    first = _validate.integer(first_replicate, "first_replicate", minimum=0)
    if first + num_trajectories > 2**32:
        raise ValueError(f"first_replicate: replicate ids end at 2**32, got {first_replicate}")
    if isinstance(engine, str):
        name = _validate.choice(engine, "engine", ["auto", *ENGINES])
    elif isinstance(engine, Engine):
        name = type(engine).__name__
        engine.check()
    else:
        raise ValueError(f"engine: expected a name or an engine object, got {engine!r}")
    if isinstance(model, SelfAttention):
        model = model.to_ccmc()
    prompts = _prompts(prompt, model.num_tokens, num_trajectories)
    context = _checked(context, "context", Context, FullContext())
    context.check_prompts(prompts, num_steps)
    decoder = _checked(decoder, "decoder", Decoder, Sampling())
    law = Law(model.logits, context, _few(decoder, model.num_tokens))
    if at is not None and record in ("tokens", "chunks"):
        raise ValueError("at: only counts and summaries are recorded at chosen steps; see record")
    steps = _recorded_steps(at, num_steps)
    asked = False  # whether the engine is known to take the law
    if name == "auto":
        name = _choose(law, record, prompts, num_steps)
        asked = name != "reference"
    if isinstance(engine, str):
        engine = ENGINES[name]
    longest = num_steps + (_longest(prompts) or 0)
    traced = not _validate.is_concrete(model, prompts, key)
    reason = None if asked else engine.refusal(law, record)
    reason = reason or _too_long(engine, longest, traced)
    if reason is not None:
        able = _able(law, record, longest, traced)
        raise ValueError(f"engine: {name} {reason}; engines that can: {', '.join(able) or 'none'}")
    law = _devices.global_inputs(replace(law, context=_simplest(context, prompts, num_steps)))
    if engine.keeps_history and prompts.tokens is None:
        ids, lengths = token_history(prompts)
        prompts = replace(prompts, tokens=ids, lengths=lengths)
    elif isinstance(law.context, FullContext) and not engine.keeps_history:
        prompts = replace(prompts, tokens=None, lengths=None)  # not to carry them for every lane
    if not traced:
        _check_reachable(model, prompts)
        _check_spread(model, prompts, engine)
    return _Plan(law, prompts, key, num_steps, num_trajectories, first, engine, name, record, steps)


def _record(record: Any) -> str | Summary:
    if isinstance(record, Summary):
        record.check()
        return record
    _validate.choice(record, "record", ["tokens", "counts", "summary"])
    return Summary() if record == "summary" else record


def _checked(value: Any, name: str, kind: type, default: Any) -> Any:
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a {kind.__name__} such as {default}, got {value!r}")
    value.check()
    return value


def _simplest(context: Context, prompts: Prompts, num_steps: int) -> Context:
    """The same context in the form that needs the least."""
    if isinstance(context, WindowContext) and prompts.tokens is not None:
        same = context.size >= prompts.tokens.shape[1] + num_steps
        return FullContext(exponent=context.exponent) if same else context
    if isinstance(context, LagContext) and _validate.is_concrete(context.weights):
        weights = np.asarray(context.weights, np.float64)  # scaled, so that float32 holds them
        return replace(context, weights=(weights / weights.max()).astype(np.float32))
    return context


def _few(decoder: Decoder, num_tokens: int) -> Decoder:
    """``decoder`` with a ``top_k`` that int32 holds."""
    if not isinstance(decoder, Sampling) or not isinstance(decoder.top_k, int):
        return decoder
    return replace(decoder, top_k=min(decoder.top_k, num_tokens))


def _join(num_trajectories: int, *parts: Any) -> Any:
    """Parts of the lanes put together, less the lanes that filled up the last."""
    if parts[0].ndim == 0 or (len(parts) == 1 and parts[0].shape[0] == num_trajectories):
        return parts[0]
    join = np if isinstance(parts[0], np.ndarray) else jnp
    return join.concatenate(parts)[:num_trajectories]


def _check_memory(plan: _Plan, num_steps: int | None = None) -> None:
    """Raise if the record would not fit in the devices' memory, and say what to ask for."""
    size, many = plan.law.num_tokens, plan.num_trajectories
    steps = plan.num_steps if num_steps is None else num_steps
    dtype = np.dtype(smallest_dtype(size))
    if isinstance(plan.record, Summary):
        need = many * size**2 * 4 * plan.record.transitions
        what = f"transition counts of {many} x {size} x {size} int32"
        instead = "Summary(transitions=False), or fewer trajectories at a time (first_replicate)"
    elif plan.record == "counts":
        wide = 4 if plan.engine.max_context < 2**31 else 8
        need = many * len(plan.at) * size * wide
        what = f"counts of {many} x {len(plan.at)} x {size} int{8 * wide}"
        instead = "fewer steps in `at`, record='summary', or fewer trajectories at a time"
        if plan.engine.keeps_history:
            need += min(many, plan.engine.lanes(plan.law)) * steps * 4
            what += f" and histories of {steps} steps"
            instead = "engine='scan', which keeps no history, or fewer trajectories at a time"
    else:
        need, what = many * steps * dtype.itemsize, f"tokens of {many} x {steps} {dtype}"
        instead = "a shorter chunk"
        if num_steps is None:
            instead = "record='counts' or 'summary', or rollout_chunks"
    room = _devices.memory()
    if room is not None and 2 * need > room:  # parts are put together in a second copy
        raise ValueError(
            f"record: {what} take {need / 2**30:,.1f} GiB, and as much again to put them "
            f"together, but there are {room / 2**30:,.1f}; ask for {instead} instead"
        )


def _prompts(prompt: Any, num_tokens: int, num_trajectories: int) -> Prompts:
    prompts = prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, num_tokens)
    if prompts.num_tokens != num_tokens:
        raise ValueError(
            f"prompt: over {prompts.num_tokens} tokens, but the model has {num_tokens}"
        )
    if len(prompts) not in (1, num_trajectories):
        raise ValueError(
            f"prompt: {len(prompts)} prompts for {num_trajectories} trajectories; "
            "give one, or one for each"
        )
    return prompts


def _recorded_steps(at: ArrayLike | None, num_steps: int) -> np.ndarray:
    if at is None:
        return np.array([num_steps])
    if not _validate.is_concrete(at):
        raise ValueError("at: must be known when the rollout is traced, not computed inside jit")
    steps = _validate.integer_array(at, "at", ndim=(0, 1)).reshape(-1)
    if steps.size == 0:
        raise ValueError("at: is empty")
    if (np.diff(steps) <= 0).any():
        raise ValueError(
            f"at: must increase, but has {steps[np.r_[np.diff(steps) <= 0, False]][0]} "
            f"before {steps[np.r_[False, np.diff(steps) <= 0]][0]}"
        )
    if steps[0] < 0 or steps[-1] > num_steps:
        bad = steps[0] if steps[0] < 0 else steps[-1]
        raise ValueError(f"at: {bad} is outside 0..num_steps = {num_steps}")
    return steps


def _choose(law: Law, record: str | Summary, prompts: Prompts, num_steps: int) -> str:
    """The engine of ``"auto"``; crossovers as measured by ``benchmarks/`` on CPU."""

    def able(name: str) -> bool:
        return ENGINES[name].refusal(law, record) is None

    if num_steps >= Scan.max_context // 2 and able("skip_ahead"):
        return "urn" if able("urn") else "skip_ahead"
    many = law.num_tokens >= _MANY and jax.default_backend() == "cpu"
    if many and num_steps <= _KEPT and prompts.tokens is not None and able("rejection"):
        return "rejection"
    return "scan" if able("scan") else "reference"


def _longest(prompts: Prompts) -> int | None:
    """Tokens of the longest prompt; None if traced."""
    if not _validate.is_concrete(prompts):
        return None
    return int(np.asarray(prompts.counts).sum(axis=1, dtype=np.int64).max())


def _too_long(engine: Engine, longest: int, traced: bool) -> str | None:
    """Why an engine can't hold a history of this length, or None."""
    most = min(engine.max_context, Scan.max_context) if traced else engine.max_context
    if longest <= most:
        return None
    return f"can't count a history of {longest} tokens{' inside jit' * traced}, {most} at most"


def _able(law: Law, record: str | Summary, longest: int, traced: bool) -> list[str]:
    """The engines that can make the record of a history of this length."""
    return [
        name
        for name, engine in ENGINES.items()
        if engine.refusal(law, record) is None and _too_long(engine, longest, traced) is None
    ]


def _take(x: Any, rows: np.ndarray, axis: int) -> np.ndarray:
    return np.take(np.asarray(x), rows, axis=axis)


def _check_spread(model: CCMC, prompts: Prompts, engine: Engine) -> None:
    """Raise if float32 weights relative to a row's largest would vanish on a whole context."""
    if not isinstance(engine, SkipAhead | Urn):
        return
    logits = np.asarray(model.logits, np.float64)
    below = logits - logits.max(axis=1, keepdims=True)
    if below[np.isfinite(below)].min() > -_SPREAD:
        return
    for support in np.unique(np.asarray(prompts.counts) > 0, axis=0):
        best = below[:, support].max(axis=1)
        row = int(np.where(np.isfinite(best), best, 0).argmin())
        if np.isfinite(best[row]) and best[row] < -_SPREAD:
            raise ValueError(
                f"model: after token {row}, the likeliest token of the context has a logit "
                f"{-best[row]:.0f} below the row's largest; engine='scan' can hold that"
            )


def _check_reachable(model: CCMC, prompts: Prompts) -> None:
    """Raise if a reachable token has nothing to attend."""
    counts = np.asarray(prompts.counts)
    attends = np.isfinite(np.asarray(model.logits))
    if attends.all():
        return
    rows = np.unique(np.column_stack([counts > 0, np.asarray(prompts.last)]), axis=0)
    for row in rows:
        support, last = row[:-1].astype(bool), int(row[-1])
        seen, front = set(), {last}
        while front:
            k = front.pop()
            seen.add(k)
            nxt = np.flatnonzero(attends[k] & support)
            if nxt.size == 0:
                raise ValueError(
                    f"model: token {k} can be reached from the prompt, but attends no token of it "
                    f"(P[{k}, j] = 0 for every j in {np.flatnonzero(support).tolist()})"
                )
            front |= set(nxt.tolist()) - seen
