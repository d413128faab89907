"""The arguments of a rollout, checked and brought into the form that engines take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.model import (
    Context,
    Decoder,
    FullContext,
    LagContext,
    Sampling,
    SelfAttention,
    WindowContext,
)
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import _check, _cores, _devices
from attnmarkov.rollout._engines import ENGINES, able, choose, too_long
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.law import Law
from attnmarkov.rollout.reference import token_history

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Array, Key, UInt32
    from numpy.typing import ArrayLike

    from attnmarkov.rollout.summary import Summary


@dataclass(frozen=True)
class Plan:
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
    is_known: bool  # no argument is traced

    def parts(self) -> Iterator[tuple[UInt32[Array, "2 lane"], Prompts]]:
        """Seeds and prompts of equal parts of the lanes, filled up with lanes thrown away."""
        many, devices = self.num_trajectories, _devices.count()
        parts = -(-many // max(1, self.engine.lanes(self.law)))
        if self.is_known and self.engine.shares_cores and self.record != "chunks":
            parts = max(parts, _cores.parts(many, self.num_steps, self.law.num_tokens))
        lanes = -(-many // parts)
        if many >= devices:
            lanes = -(-lanes // devices) * devices
        for start in range(0, many, lanes):
            index = np.arange(start, start + lanes)
            ids = jnp.asarray(self.first + index, jnp.uint32)
            seeds = _random.replicate_seeds(self.key, ids, "rollout")
            shared = len(self.prompts) == 1
            rows = 0 * index if shared else np.minimum(index, many - 1)
            rows = rows[:1] if shared and self.engine.shares_prompt else rows
            yield _devices.global_inputs((seeds, _take(self.prompts, rows)))


def make_plan(
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
) -> Plan:
    """The plan; arguments, and what is raised, as :func:`attnmarkov.rollout`."""
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
        name = choose(law, record, prompts, num_steps)
        asked = name != "reference"
    if isinstance(engine, str):
        engine = ENGINES[name]
    longest = num_steps + (_longest(prompts) or 0)
    traced = not _validate.is_concrete(model, prompts, key)
    reason = None if asked else engine.refusal(law, record)
    reason = reason or too_long(engine, longest, traced)
    if reason is not None:
        names = able(law, record, longest, traced)
        raise ValueError(f"engine: {name} {reason}; engines that can: {', '.join(names) or 'none'}")
    law = _devices.global_inputs(replace(law, context=_simplest(context, prompts, num_steps)))
    if engine.keeps_history and prompts.tokens is None:
        ids, lengths = token_history(prompts)
        prompts = replace(prompts, tokens=ids, lengths=lengths)
    elif isinstance(law.context, FullContext) and not engine.keeps_history:
        prompts = replace(prompts, tokens=None, lengths=None)  # not to carry them for every lane
    if not traced:
        _check.reachable(law, prompts)
        _check.spread(law, prompts, engine)
    return Plan(
        law,
        prompts,
        key,
        num_steps,
        num_trajectories,
        first,
        engine,
        name,
        record,
        steps,
        not traced,
    )


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


def _longest(prompts: Prompts) -> int | None:
    """Tokens of the longest prompt; None if traced."""
    if not _validate.is_concrete(prompts):
        return None
    return int(np.asarray(prompts.counts).sum(axis=1, dtype=np.int64).max())


def _take(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Prompts by their row: on the host where they are known, inside jit too."""
    if _validate.is_concrete(prompts):
        return jax.tree.map(lambda x: np.take(np.asarray(x), rows, axis=0), prompts)
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), prompts)
