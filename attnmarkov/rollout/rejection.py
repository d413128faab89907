"""The rejection engine: copies a position of the history, at a cost that K does not enter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random
from attnmarkov.rollout import _devices
from attnmarkov.rollout._layout import layout
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.reference import token_history

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary

_PATIENCE = 128  # rejections in a row after which a lane draws from all its weights
_TURNS = 8  # proposals between looks at who waits and who is done


@dataclass(frozen=True)
class Rejection(Engine):
    """Draws a position of the history uniformly, and accepts its token by ``P``.

    The token ``x`` of a uniform position comes with weight ``n_x``; accepted with probability
    ``P[k, x] / max_j P[k, j]`` it has the law of the CCMC. No step touches all K tokens. Every
    lane goes at its own pace: one that rejects tries again at the next turn, while the others go
    on. A lane that is rejected 128 times in a row (its history holds little that its query
    attends) waits until a quarter of the lanes do, and then draws from its weights as ``scan``
    does, which bounds the cost.

    The history is kept: memory grows with the horizon, 1 to 4 bytes a token.
    """

    max_lanes: int | None = 1024
    max_context: int = 2**20
    keeps_history: ClassVar[bool] = True

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        reason = super().refusal(law, "counts")
        if reason is not None:
            return reason
        if record not in ("tokens", "counts"):
            return "can't summarise or cut a run into chunks: every lane has its own pace"
        if not law.fits_float32:
            return "can't hold logits more than 60 nats below their row's largest"
        return None

    def tokens(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        return self._drawn(law, seeds, prompts, num_steps)[:, :num_steps]

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`; tallied from the tokens."""
        drawn = self._drawn(law, seeds, prompts, int(at[-1]))
        return _tally(prompts.counts, drawn, jnp.asarray(at))

    def _drawn(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane room"]:
        """The tokens, and -1 behind them to a room of a few sizes that share a compilation."""
        history, lengths = token_history(prompts)
        unit = max(16, 1 << max(0, num_steps.bit_length() - 3))
        room = -(-num_steps // unit) * unit
        if history.shape[0] * (history.shape[1] + room + 1) >= 2**31:
            raise ValueError(
                f"engine: rejection can't index histories of {history.shape[0]} lanes at once; "
                "lower its max_lanes"
            )
        start = prompts.counts, prompts.last, jnp.int32(num_steps)
        return _tokens(law.logits, seeds, history, lengths, *start, room=room)


class _State(NamedTuple):
    history: jax.Array  # (lane * room,) tokens; a lane's prompt ends at column ``width``
    counts: jax.Array  # of the prompt and ``counted`` tokens, in the layout of the vocabulary
    counted: Int[Array, " lane"]
    token: Int[Array, " lane"]  # drawn at the last turn and not settled yet, or -1
    last: Int[Array, " lane"]
    done: Int[Array, " lane"]  # tokens drawn
    attempt: UInt32[Array, " lane"]  # numbers the calls on the generator
    rejected: Int[Array, " lane"]  # in a row


@partial(jax.jit, static_argnames="room")
def _tokens(
    logits: jax.Array,
    seeds: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    num_steps: jax.Array,
    *,
    room: int,
) -> jax.Array:
    first, whole = _devices.FIRST, _devices.WHOLE
    specs = (whole, _devices.SECOND, first, first, first, first, whole)
    run = _devices.over_lanes(partial(_run, room), last.shape[0], specs)
    return run(logits, seeds, history, lengths, counts, last, num_steps)


def _run(
    steps_room: int,
    logits: jax.Array,
    seeds: jax.Array,
    prompt: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    num_steps: jax.Array,
) -> jax.Array:
    (lanes, width), size = prompt.shape, logits.shape[0]
    room, place = width + steps_room + 1, layout(size)
    flat, top = logits.reshape(-1), logits.max(axis=1)
    start = jnp.arange(lanes, dtype=jnp.int32) * room + width  # where a lane's tokens begin

    def settle(s: _State) -> _State:
        """The state after the last turn's token, where one was drawn."""
        drawn = s.token >= 0
        return s._replace(
            token=jnp.full_like(s.token, -1),
            last=jnp.where(drawn, s.token, s.last),
            done=s.done + drawn,
            rejected=jnp.where(drawn, 0, s.rejected),
        )

    def emit(s: _State, token: jax.Array, tried: jax.Array) -> _State:
        """Note the token, or -1, that those that ``tried`` got; what -1 writes is overwritten."""
        history = s.history.at[start + s.done].set(
            token.astype(s.history.dtype),
            mode="promise_in_bounds",
            unique_indices=True,
            indices_are_sorted=True,
        )
        return s._replace(
            history=history,
            token=token,
            attempt=s.attempt + tried.astype(jnp.uint32),
            rejected=s.rejected + tried,
        )

    def propose(s: _State) -> _State:
        # The token is settled a turn later: XLA would draw it again for each of its uses else.
        s = settle(s)
        active = (s.done < num_steps) & (s.rejected < _PATIENCE)
        bits, more = (_random.words(seeds, s.attempt, i) for i in range(2))
        position = _random.below(bits, (lengths + s.done).astype(jnp.uint32))
        at = start - lengths + position
        token = s.history.at[at].get(mode="promise_in_bounds").astype(jnp.int32)
        score = flat.at[s.last * size + token].get(mode="promise_in_bounds") - top[s.last]
        height = more[0].astype(jnp.float32) + more[1].astype(jnp.float32) * 2.0**-32
        accept = active & (height < jnp.exp(score) * 2.0**32)
        return emit(s, jnp.where(accept, token, -1), active)

    def count(s: _State) -> _State:
        behind = s.counted < s.done
        token = s.history.at[start + s.counted].get(mode="promise_in_bounds").astype(jnp.int32)
        counts = place.add(s.counts, jnp.where(behind, token, -1))
        return s._replace(counts=counts, counted=s.counted + behind)

    def weigh(s: _State) -> _State:
        s = jax.lax.while_loop(lambda s: (s.counted < s.done).any(), count, s)
        waits = (s.rejected >= _PATIENCE) & (s.done < num_steps)
        p = place.lookup(place.scores(logits), s.last) - jnp.expand_dims(top[s.last], place.axis)
        token = place.draw(s.counts * jnp.exp(p), seeds, s.attempt)
        dead = waits & (token < 0)  # all weights are zero: it emits -1 to the end
        s = settle(emit(s, jnp.where(waits, token, -1), waits))
        return s._replace(
            done=jnp.where(dead, num_steps, s.done),
            counted=jnp.where(dead, num_steps, s.counted),
        )

    def turn(s: _State) -> _State:
        s = settle(jax.lax.fori_loop(0, _TURNS, lambda _, s: propose(s), s))
        goes = s.done < num_steps
        waits = goes & (s.rejected >= _PATIENCE)
        return jax.lax.cond(waits.sum() * 4 > goes.sum(), weigh, lambda s: s, s)

    columns = jnp.arange(width) - (width - lengths)[:, None]  # right-aligned
    aligned = jnp.take_along_axis(prompt, jnp.maximum(columns, 0), axis=1)
    blank = jnp.full((lanes, room - width), -1, aligned.dtype)
    state = _State(
        jnp.concatenate([aligned, blank], axis=1).astype(smallest_dtype(size)).reshape(-1),
        place.place(counts),
        jnp.zeros(lanes, jnp.int32),
        jnp.full(lanes, -1, jnp.int32),
        last,
        jnp.zeros(lanes, jnp.int32),
        jnp.zeros(lanes, jnp.uint32),
        jnp.zeros(lanes, jnp.int32),
    )
    state = jax.lax.while_loop(lambda s: (s.done < num_steps).any(), turn, state)
    return state.history.reshape(lanes, room)[:, width : width + steps_room]


@jax.jit
def _tally(counts: jax.Array, tokens: jax.Array, at: jax.Array) -> jax.Array:
    """Counts of the prompt and the first ``at`` tokens."""
    lanes, size = counts.shape
    record = jnp.searchsorted(at, jnp.arange(tokens.shape[1]), side="right")
    token = tokens.astype(jnp.int32)
    token = jnp.where(token < 0, size, token)  # dropped
    new = jnp.zeros((lanes, at.shape[0], size), counts.dtype)
    new = new.at[jnp.arange(lanes)[:, None], record, token].add(1, mode="drop")
    return counts[:, None] + new.cumsum(1)
