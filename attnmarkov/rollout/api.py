"""The entry point of rollouts: checks, replicate keys, lanes split for the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.model import CCMC, SelfAttention
from attnmarkov.prompts import Prompts
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.reference import Reference
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.trajectory import Trajectory
from attnmarkov.rollout.urn import Urn

if TYPE_CHECKING:
    from jaxtyping import Array, Key
    from numpy.typing import ArrayLike


_SPREAD = 60.0  # nats; exp(-60) times a count leaves float32 room for rare tokens beside it
ENGINES: dict[str, Engine] = {
    "reference": Reference(),
    "scan": Scan(),
    "skip_ahead": SkipAhead(),
    "urn": Urn(),
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
    record: Literal["tokens", "counts"] = "tokens",
    at: ArrayLike | None = None,
    *,
    first_replicate: int = 0,
) -> Trajectory:
    """Generate from a CCMC: draw a token, append it to the context, repeat.

    Trajectory ``r`` depends on ``(key, first_replicate + r)``, the model and its prompt alone:
    not on the batch it stands in, nor on ``num_steps`` (a longer run begins with the shorter),
    nor on what is recorded (``urn`` excepted: its draws depend on ``at``). Different engines
    give different draws of the same law.

    Args:
        model: A CCMC, or self-attention (taken through its exact CCMC).
        key: A typed JAX key.
        prompt: (L,) token ids shared by all trajectories; or one prompt per trajectory as an
            (R, L) array, a sequence of sequences, or a :class:`~attnmarkov.Prompts`.
        num_steps: Tokens to generate per trajectory, at least 0. The context must stay below
            2**31 tokens (2**62 with ``skip_ahead`` and ``urn``).
        num_trajectories: Number of trajectories R, at least 1.
        engine: ``"auto"``, ``"scan"`` (O(K) a step, on counts), ``"reference"`` (attention over
            the growing context), ``"skip_ahead"`` (whole runs at once, counts to 2**62 tokens:
            for horizons past a million where generation collapses), ``"urn"`` (all rows of
            ``P`` equal), or an engine object. Auto is ``scan``, and ``skip_ahead`` for counts
            past 2**30 steps.
        record: ``"tokens"`` keeps every token; ``"counts"`` keeps the context's counts at the
            steps ``at``, with memory independent of ``num_steps``.
        at: Increasing numbers of steps in 0..num_steps at which counts are recorded;
            ``[num_steps]`` if None. See :func:`log_spaced`.
        first_replicate: Replicate id of the first trajectory, to continue or split a batch.

    Returns:
        A :class:`~attnmarkov.rollout.Trajectory`; its tokens (or counts) have a leading axis of
        R trajectories. A lane with nothing left to attend emits -1 (only possible if zeros of
        ``P`` could not be checked because the model is traced).

    Raises:
        ValueError: If a size is out of range, the prompt is empty or holds a bad id, ``at`` is
            not increasing or leaves 0..num_steps, the engine or record is unknown, or masked
            tokens would leave a reachable token with nothing to attend.

    References:
        [CCMC], on learning from a single trajectory.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.9, 0.1], [0.2, 0.8]])
    >>> traj = am.rollout(model, jax.random.key(0), [0, 1], 100, 8, record="counts", at=[10, 100])
    >>> traj.counts.shape, traj.counts[0].sum(-1).tolist()
    ((8, 2, 2), [12, 102])
    """
    _validate.check_key(key)
    num_steps = _validate.integer(num_steps, "num_steps", minimum=0)
    num_trajectories = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    first = _validate.integer(first_replicate, "first_replicate", minimum=0)
    if first + num_trajectories > 2**32:
        raise ValueError(f"first_replicate: replicate ids end at 2**32, got {first_replicate}")
    _validate.choice(record, "record", ["tokens", "counts"])
    if isinstance(engine, str):
        name = _validate.choice(engine, "engine", ["auto", *ENGINES])
    elif isinstance(engine, Engine):
        name = type(engine).__name__
    else:
        raise ValueError(f"engine: expected a name or an engine object, got {engine!r}")
    if isinstance(model, SelfAttention):
        model = model.to_ccmc()
    prompts = _prompts(prompt, model.num_tokens, num_trajectories)
    if name == "auto":
        name = _choose(record, num_steps)
    if isinstance(engine, str):
        engine = ENGINES[name]
    _check_horizon(prompts, num_steps, engine)
    if _validate.is_concrete(model, prompts):
        _check_reachable(model, prompts)
        _check_spread(model, prompts, engine)
    steps = None
    if record == "counts":
        steps = _recorded_steps(at, num_steps)
    elif at is not None:
        raise ValueError("at: only counts are recorded at chosen steps; pass record='counts'")

    # Lanes go to the engine in equal parts, the last one filled up with lanes thrown away.
    parts = -(-num_trajectories // engine.max_lanes)
    lanes = -(-num_trajectories // parts)
    out: list[Any] = []
    for part in range(parts):
        index = np.arange(part * lanes, (part + 1) * lanes)
        keys = _random.replicate_keys(key, jnp.asarray(first + index, jnp.uint32), "rollout")
        rows = prompts[np.minimum(index, num_trajectories - 1) if len(prompts) > 1 else 0 * index]
        if steps is None:
            out.append(engine.tokens(model.logits, keys, rows, num_steps))
        else:
            out.append(engine.counts(model.logits, keys, rows, steps))
    join = np if isinstance(out[0], np.ndarray) else jnp
    values: Any = out[0] if parts == 1 else join.concatenate(out)[:num_trajectories]
    return Trajectory(model.num_tokens, name, values, steps)


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


def _choose(record: str, num_steps: int) -> str:
    """The engine of ``"auto"``: counts past int32 need skipping."""
    far = num_steps >= Scan.max_context // 2
    return "skip_ahead" if far and record == "counts" else "scan"


def _check_horizon(prompts: Prompts, num_steps: int, engine: Engine) -> None:
    """Raise if the context would outgrow the engine's counts."""
    longest = 0
    if _validate.is_concrete(prompts):
        longest = int(np.asarray(prompts.counts).sum(axis=1, dtype=np.int64).max())
    if longest + num_steps > engine.max_context:
        able = [name for name, e in ENGINES.items() if longest + num_steps <= e.max_context]
        raise ValueError(
            f"num_steps: a context of {longest} + {num_steps} tokens passes {engine.max_context}, "
            f"the most that this engine's counts hold; these can: {', '.join(able) or 'none'} "
            "(with record='counts')"
        )


def _check_spread(model: CCMC, prompts: Prompts, engine: Engine) -> None:
    """Raise if float32 weights relative to a row's largest would vanish on a whole context."""
    logits = np.asarray(model.logits, np.float64)
    below = logits - logits.max(axis=1, keepdims=True)
    if isinstance(engine, Reference) or below[np.isfinite(below)].min() > -_SPREAD:
        return
    for support in np.unique(np.asarray(prompts.counts) > 0, axis=0):
        best = below[:, support].max(axis=1)
        row = int(np.where(np.isfinite(best), best, 0).argmin())
        if np.isfinite(best[row]) and best[row] < -_SPREAD:
            raise ValueError(
                f"model: after token {row}, the likeliest token of the context has a logit "
                f"{-best[row]:.0f} below the row's largest; engine='reference' can hold that"
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
