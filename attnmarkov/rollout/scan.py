"""The scan engine: steps the history's sufficient statistics, O(K) a step, no context stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attnmarkov.model import FullContext, Greedy, WindowContext
from attnmarkov.rollout import _devices
from attnmarkov.rollout._layout import layout
from attnmarkov.rollout._memory import KINDS, smallest_dtype
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.summary import Summaries, Summary, at_record, observe, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    import numpy as np
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law

_CACHE = 2**20  # bytes of the lanes run together on a CPU, so that they stay in a core's cache
_MEMORY = 2**32  # the same elsewhere


@dataclass(frozen=True)
class Scan(Engine):
    """Steps counts, or what else a context needs of the history.

    Takes full, decaying, window and lag contexts, every decoder, and every kind of record. Where
    the law is plain attention on counts (exponent 1, no decoding) the weights are products of a
    count and an entry of ``P``; otherwise logarithms are added, and nothing can underflow.
    """

    max_lanes: int | None = None
    shares_cores: ClassVar[bool] = True

    def lanes(self, law: Law) -> int:
        """See :class:`~attnmarkov.rollout.Engine`: as many as stay in a CPU's cache."""
        if self.max_lanes is not None:
            return self.max_lanes
        state = 4 * law.num_tokens + KINDS[type(law.context)].slots(law.context)
        if jax.default_backend() != "cpu":
            return max(1, _MEMORY // state)
        return _devices.count() * max(64, _CACHE // state)

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        if type(law.context) not in KINDS:
            return f"can't weigh positions as {type(law.context).__name__} does"
        return None

    def tokens(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        needed = _needed(law, prompts)
        return _tokens(law, seeds, needed, num_steps=num_steps, linear=_is_linear(law))

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        at_ = jnp.asarray(at, jnp.uint32)
        return _counts(law, seeds, _needed(law, prompts), at_, linear=_is_linear(law))

    def summary(
        self,
        law: Law,
        seeds: UInt32[Array, "2 lane"],
        prompts: Prompts,
        at: np.ndarray,
        summary: Summary,
    ) -> Summaries:
        """See :class:`~attnmarkov.rollout.Engine`."""
        at_ = jnp.asarray(at, jnp.uint32)
        needed = _needed(law, prompts)
        return _summary(law, seeds, needed, at_, summary, linear=_is_linear(law))

    def chunks(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, edges: Iterable[int]
    ) -> Iterator[Int[Array, "lane step"]]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        linear = _is_linear(law)
        state = _begin(law, seeds, _needed(law, prompts))
        for start, stop in itertools.pairwise(edges):
            state, tokens = _chunk(
                law,
                seeds,
                state,
                jnp.uint32(start),
                num_steps=int(stop - start),
                linear=linear,
            )
            yield tokens


def _needed(law: Law, prompts: Prompts) -> Prompts:
    """What the context sees of the prompts, so that their length alone compiles nothing anew."""
    full = isinstance(law.context, FullContext)
    return replace(prompts, tokens=None, lengths=None) if full else prompts


def _is_linear(law: Law) -> bool:
    """Whether products of counts and ``P`` will do: plain attention, in the range of float32.

    Decided by the law alone, so that a trajectory's draws don't depend on those beside it.
    """
    counted = isinstance(law.context, FullContext | WindowContext)
    return counted and law.is_plain and law.fits_float32


class _State(NamedTuple):
    counts: jax.Array  # of the whole history
    last: Int[Array, " lane"]  # the query; -1 for a lane that had nothing to attend
    memory: Any


def _start(law: Law, prompts: Prompts) -> _State:
    place = layout(law.num_tokens)
    memory = KINDS[type(law.context)](law.context, place)
    return _State(place.place(prompts.counts), prompts.last, memory.start(prompts))


def _stepper(
    law: Law, seeds: jax.Array, linear: bool
) -> Callable[[_State, jax.Array], tuple[_State, jax.Array]]:
    """One step; a lane with nothing to attend emits -1 from then on."""
    place = layout(law.num_tokens)
    memory = KINDS[type(law.context)](law.context, place)
    exponent = law.context.exponent
    if linear:
        table = place.table(jnp.exp(law.logits - law.logits.max(axis=1, keepdims=True)))
    else:
        table = place.scores(law.logits)

    def choose(state: _State, query: jax.Array, step: jax.Array) -> jax.Array:
        if linear:
            n = memory.counts(state.memory, state.counts)
            return place.draw_product(n, table, query, seeds, step)
        log_n = memory.log_n(state.memory, state.counts, step)
        log_n = jnp.where(log_n > -jnp.inf, exponent * log_n, -jnp.inf)
        weights = log_n + place.lookup(table, query)
        if isinstance(law.decoder, Greedy):
            best = jnp.argmax(weights, place.axis).astype(jnp.int32)
            return jnp.where(weights.max(place.axis) > -jnp.inf, best, -1)
        weights = law.decoder.log_law(weights, place.axis)
        top = weights.max(place.axis, keepdims=True)
        weights = jnp.exp(weights - jnp.where(top > -jnp.inf, top, 0))
        return place.draw(weights, seeds, step)

    def step(state: _State, t: jax.Array) -> tuple[_State, jax.Array]:
        token = choose(state, jnp.maximum(state.last, 0), t)
        token = jnp.where(state.last < 0, -1, token)
        # The token must be carried as it is: XLA would draw it again for each of its uses else.
        pushed = memory.push(state.memory, token, t)
        return _State(place.add(state.counts, token), token, pushed), token

    return step


def _records(
    step: Callable[[Any, jax.Array], Any],
    note: Callable[[Any], tuple[Any, Any]],
    state: Any,
    at: jax.Array,
) -> tuple[Any, Any]:
    """Run ``state = step(state, t)`` and, after each of ``at`` steps, ``state, out = note(state)``.

    Returns the last state and the outputs, stacked on the first axis.
    """

    def to(state: Any, span: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        return note(jax.lax.fori_loop(*span, lambda t, s: step(s, t), state))

    since = jnp.concatenate([jnp.zeros(1, at.dtype), at[:-1]])
    return jax.lax.scan(to, state, (since, at))


def _emit(
    law: Law, seeds: jax.Array, linear: bool, state: _State, start: jax.Array, num_steps: int
) -> tuple[_State, jax.Array]:
    step, dtype = _stepper(law, seeds, linear), smallest_dtype(law.num_tokens)

    def body(state: _State, t: jax.Array) -> tuple[_State, jax.Array]:
        state, token = step(state, t)
        return state, token.astype(dtype)

    state, tokens = jax.lax.scan(body, state, start + jnp.arange(num_steps, dtype=jnp.uint32))
    return state, tokens.T


_IN = _devices.WHOLE, _devices.SECOND, _devices.FIRST  # law, seeds, prompts


@partial(jax.jit, static_argnames=("num_steps", "linear"))
def _tokens(
    law: Law, seeds: jax.Array, prompts: Prompts, *, num_steps: int, linear: bool
) -> jax.Array:
    def run(law: Law, seeds: jax.Array, prompts: Prompts) -> jax.Array:
        return _emit(law, seeds, linear, _start(law, prompts), jnp.uint32(0), num_steps)[1]

    return _devices.over_lanes(run, seeds.shape[1], _IN)(law, seeds, prompts)


@partial(jax.jit, static_argnames="linear")
def _counts(
    law: Law, seeds: jax.Array, prompts: Prompts, at: jax.Array, *, linear: bool
) -> jax.Array:
    def run(law: Law, seeds: jax.Array, prompts: Prompts, at: jax.Array) -> jax.Array:
        place, step = layout(law.num_tokens), _stepper(law, seeds, linear)
        _, out = _records(
            lambda s, t: step(s, t)[0],
            lambda s: (s, place.rows(s.counts)),
            _start(law, prompts),
            at,
        )
        return out.swapaxes(0, 1)

    run = _devices.over_lanes(run, seeds.shape[1], (*_IN, _devices.WHOLE))
    return run(law, seeds, prompts, at)


@partial(jax.jit, static_argnames="linear")
def _summary(
    law: Law,
    seeds: jax.Array,
    prompts: Prompts,
    at: jax.Array,
    summary: Summary,
    *,
    linear: bool,
) -> Summaries:
    def run(
        law: Law, seeds: jax.Array, prompts: Prompts, at: jax.Array, summary: Summary
    ) -> Summaries:
        place, step = layout(law.num_tokens), _stepper(law, seeds, linear)

        def follow(carry: tuple, t: jax.Array) -> tuple:
            state, seen, before = carry
            after, token = step(state, t)
            count = place.pick(after.counts, token)
            return after, observe(summary, law.context, seen, state.last, token, count, t), before

        def note(carry: tuple) -> tuple[tuple, Any]:
            state, seen, before = carry
            counts = place.rows(state.counts)
            return (state, seen, counts), at_record(prompts.counts, before, counts)

        carry = _start(law, prompts), watch(summary, law.context, prompts), prompts.counts
        (_, seen, _), out = _records(follow, note, carry, at)
        transitions = seen.transitions
        if transitions is not None:
            transitions = transitions.reshape(-1, law.num_tokens, law.num_tokens)
        entropy, distinct, recent = (x.T for x in out)
        return Summaries(
            entropy,
            distinct,
            recent,
            transitions,
            seen.passage,
            seen.absorption,
            jnp.asarray(summary.share, jnp.float32),
        )

    each, whole = _IN[2], _devices.WHOLE
    out = Summaries(each, each, each, each, each, each, whole)  # pyright: ignore[reportArgumentType]
    run = _devices.over_lanes(run, seeds.shape[1], (*_IN, whole, whole), out)
    return run(law, seeds, prompts, at, summary)


# A state crosses the edge of a computation with the devices on a leading axis of their own.


@jax.jit
def _begin(law: Law, seeds: jax.Array, prompts: Prompts) -> _State:
    def run(law: Law, seeds: jax.Array, prompts: Prompts) -> _State:
        return jax.tree.map(lambda x: x[None], _start(law, prompts))

    return _devices.over_lanes(run, seeds.shape[1], _IN)(law, seeds, prompts)


@partial(jax.jit, static_argnames=("num_steps", "linear"))
def _chunk(
    law: Law,
    seeds: jax.Array,
    state: _State,
    start: jax.Array,
    *,
    num_steps: int,
    linear: bool,
) -> tuple[_State, jax.Array]:
    def run(
        law: Law, seeds: jax.Array, state: _State, start: jax.Array
    ) -> tuple[_State, jax.Array]:
        own = jax.tree.map(lambda x: x[0], state)
        own, tokens = _emit(law, seeds, linear, own, start, num_steps)
        return jax.tree.map(lambda x: x[None], own), tokens

    run = _devices.over_lanes(run, seeds.shape[1], (*_IN, _devices.WHOLE), (_IN[2], _IN[2]))
    return run(law, seeds, state, start)
