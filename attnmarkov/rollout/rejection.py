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
from attnmarkov.rollout._proposals import Tables, find_tables
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.reference import token_history

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary

_TURNS = 16  # proposals between looks at who waits and who is done
_PATIENCE = 8  # looks in a row without a token after which a lane draws from all its weights

_LARGEST = 46_340  # tokens; twice the square is below 2**32


@dataclass(frozen=True)
class Rejection(Engine):
    """Draws a position of the history uniformly, and accepts its token by ``P``.

    The token ``x`` of a uniform position comes with weight ``n_x``; accepted with probability
    ``P[k, x] / max_j P[k, j]`` it has the law of the CCMC. A prompt that holds much of the
    vocabulary is proposed from the other way round: a token by its ``P[k, x]``, from a table of
    cells (see ``_proposals``), accepted with ``n_x / max_j n_j``. Whichever accepts more is taken
    for each query, and mixed with the positions drawn since. No step touches all K tokens. Every
    lane goes at its own pace: one that rejects tries again at the next turn, while the others go
    on. A lane that is rejected 128 times in a row (its history holds little that its query
    attends) waits until a quarter of the lanes do, and then draws from its weights as ``scan``
    does, which bounds the cost.

    The history is kept: memory grows with the horizon, 1 to 4 bytes a token. The tables take up
    to 8 K² bytes beside the logits (12 K² beyond 32,768 tokens); those of the last model asked
    for are kept while it lives, so that only its first rollout pays for them.
    """

    max_lanes: int | None = 1024
    max_context: int = 2**20
    keeps_history: ClassVar[bool] = True
    shares_prompt: ClassVar[bool] = True
    shares_cores: ClassVar[bool] = True

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        reason = super().refusal(law, "counts")
        if reason is not None:
            return reason
        if record not in ("tokens", "counts"):
            return "can't summarise or cut a run into chunks: every lane has its own pace"
        if law.num_tokens > _LARGEST:
            return f"can't index tables of more than {_LARGEST} tokens"
        if not law.fits_float32:
            return "can't hold logits more than 60 nats below their row's largest"
        return None

    @staticmethod
    def tables(law: Law) -> int:
        """Bytes of what is kept of a model."""
        return law.num_tokens**2 * (4 + 2 * np.dtype(smallest_dtype(law.num_tokens)).itemsize)

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
        if seeds.shape[1] * (history.shape[1] + room + 1) >= 2**31:
            raise ValueError(
                f"engine: rejection can't index histories of {seeds.shape[1]} lanes at once; "
                "lower its max_lanes"
            )
        start = prompts.counts, prompts.last, jnp.int32(num_steps)
        tables = find_tables(law.logits, prompts)
        return _tokens(tables, seeds, history, lengths, *start, room=room)


class _State(NamedTuple):
    history: jax.Array  # (lane * room,) tokens; a lane's prompt ends where its own begin
    counts: jax.Array  # of the prompt and the tokens before ``counted``
    counted: UInt32[Array, " lane"]
    last: Int[Array, " lane"]
    place: UInt32[Array, " lane"]  # of the next token, in the history
    attempt: UInt32[Array, " lane"]  # numbers the calls on the generator
    idle: Int[Array, " lane"]  # looks in a row without a token


@partial(jax.jit, static_argnames="room")
def _tokens(
    tables: Tables,
    seeds: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    num_steps: jax.Array,
    *,
    room: int,
) -> jax.Array:
    lanes = seeds.shape[1]
    first, whole = _devices.FIRST, _devices.WHOLE
    each = first if len(last) == lanes else whole
    specs = (whole, _devices.SECOND, each, each, each, each, whole)
    run = _devices.over_lanes(partial(_run, room), lanes, specs)
    return run(tables, seeds, history, lengths, counts, last, num_steps)


def _run(
    steps_room: int,
    tables: Tables,
    seeds: jax.Array,
    prompt: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    num_steps: jax.Array,
) -> jax.Array:
    size, lanes, width = tables.rows.p.shape[0], seeds.shape[1], prompt.shape[1]
    room, vocabulary = width + steps_room + 1, layout(size)
    start = jnp.arange(lanes, dtype=jnp.uint32) * room + width  # where a lane's tokens begin
    stop = start + num_steps.astype(jnp.uint32)
    p, scale, weight = tables.rows.p.reshape(-1), tables.rows.scale, tables.rows.weight
    cells = None if tables.cells is None else tables.cells.reshape(-1)
    in_prompt = counts.reshape(-1)
    own_prompt = jnp.arange(lanes, dtype=jnp.uint32) * (size if len(prompt) > 1 else 0)

    def each(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (lanes, *x.shape[1:]))

    def settle(token: jax.Array, last: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The query and the place of the next token, after a token or -1."""
        return jnp.where(token >= 0, token, last), place + (token >= 0).astype(jnp.uint32)

    def write(history: jax.Array, place: jax.Array, token: jax.Array) -> jax.Array:
        """Note the next token; what is not a token yet is overwritten."""
        return history.at[place].set(
            token.astype(history.dtype),
            mode="promise_in_bounds",
            unique_indices=True,
            indices_are_sorted=True,
        )

    def proposal(
        history: jax.Array, last: jax.Array, place: jax.Array, bits: tuple
    ) -> tuple[jax.Array, jax.Array]:
        """A token of the history, and the probability to accept it with."""
        done, row = (place - start).astype(jnp.int32), last.astype(jnp.uint32)
        position, part = bits[:2], _unit(bits[2])
        if cells is None:
            back = lengths + done
            back -= _random.below(position, back.astype(jnp.uint32))
            token = _get(history, place - back.astype(jnp.uint32))
            return token, _get(p, row * size + _id(token))
        own, g = _get(weight, last), _get(scale, last)
        light, drawn = top * own, done.astype(jnp.float32)
        few = light < lengths.astype(jnp.float32)  # the prompt is drawn from by its cells
        least = jnp.minimum(light, drawn)  # the smaller part, which float32 holds best
        cell = few & ((part * (light + drawn) < least) != (drawn < light))
        back = jnp.where(few, done, lengths + done)
        among = jnp.where(cell, jnp.rint(own * g).astype(jnp.int32), back)
        which = _random.below(position, among.astype(jnp.uint32))
        at_cell = row * (2 * size) + which.astype(jnp.uint32)
        at_place = place - (back - which).astype(jnp.uint32)
        token = jnp.where(
            cell,
            _get(cells, jnp.where(cell, at_cell, 0)),
            _get(history, jnp.where(cell, 0, at_place)),
        )
        attended = _get(p, row * size + _id(token))
        x = attended * g
        share = _get(in_prompt, own_prompt + _id(token)).astype(jnp.float32) / top
        return token, jnp.where(cell, share * x / jnp.maximum(jnp.ceil(x), 1), attended)

    def propose(end: jax.Array, carry: tuple, bits: tuple) -> tuple[tuple, None]:
        # A token is settled a turn later: XLA would draw it again for each of its uses else.
        history, last, place, token = carry
        last, place = settle(token, last, place)
        token, accept = proposal(history, last, place, bits)
        level = _unit(bits[3]) + (bits[1] >> 8).astype(jnp.float32) * 2.0**-56
        accepted = jnp.where((place < end) & (level < accept), token.astype(jnp.int32), -1)
        return (write(history, place, token), last, place, accepted), None

    def turns(s: _State) -> _State:
        goes = (s.place < stop) & (s.idle < _PATIENCE)
        attempt = s.attempt + jnp.arange(_TURNS, dtype=jnp.uint32)[:, None]
        bits = *_random.words(seeds, attempt, 0), *_random.words(seeds, attempt, 1)
        begin = s.history, s.last, s.place, jnp.full_like(s.last, -1)
        run = partial(propose, jnp.where(goes, stop, 0))
        (history, last, place, token), _ = jax.lax.scan(run, begin, bits)
        last, place = settle(token, last, place)
        s = s._replace(
            history=history,
            last=last,
            place=place,
            attempt=s.attempt + goes.astype(jnp.uint32) * _TURNS,
            idle=jnp.where(goes, jnp.where(place > s.place, 0, s.idle + 1), s.idle),
        )
        left = s.place < stop
        waits = left & (s.idle >= _PATIENCE)
        return jax.lax.cond(waits.sum() * 4 > left.sum(), weigh, lambda s: s, s)

    def weigh(s: _State) -> _State:
        s = jax.lax.while_loop(lambda s: (s.counted < s.place).any(), count, s)
        waits = (s.idle >= _PATIENCE) & (s.place < stop)
        weights = vocabulary.lookup(vocabulary.place(tables.rows.p), s.last)
        token = vocabulary.draw(s.counts * weights, seeds, s.attempt)
        dead = waits & (token < 0)  # all weights are zero: it emits -1 to the end
        token = jnp.where(waits, token, -1)
        last, place = settle(token, s.last, s.place)
        return s._replace(
            history=write(s.history, s.place, token),
            last=last,
            place=jnp.where(dead, stop, place),
            counted=jnp.where(dead, stop, s.counted),
            attempt=s.attempt + waits.astype(jnp.uint32),
            idle=jnp.where(waits, 0, s.idle),
        )

    def count(s: _State) -> _State:
        behind = s.counted < s.place
        token = jnp.where(behind, _get(s.history, s.counted).astype(jnp.int32), -1)
        counted = s.counted + behind.astype(jnp.uint32)
        return s._replace(counts=vocabulary.add(s.counts, token), counted=counted)

    columns = jnp.arange(width) - (width - lengths)[:, None]  # right-aligned
    aligned = jnp.take_along_axis(prompt, jnp.maximum(columns, 0), axis=1)
    aligned = each(aligned.astype(smallest_dtype(size)))
    blank = jnp.full((lanes, room - width), -1, aligned.dtype)
    state = _State(
        jnp.concatenate([aligned, blank], axis=1).reshape(-1),
        vocabulary.place(each(counts)),
        start,
        each(last),
        start,
        jnp.zeros(lanes, jnp.uint32),
        jnp.zeros(lanes, jnp.int32),
    )
    lengths, top = each(lengths), each(counts.max(axis=1)).astype(jnp.float32)
    state = jax.lax.while_loop(lambda s: (s.place < stop).any(), turns, state)
    return state.history.reshape(lanes, room)[:, width : width + steps_room]


def _get(x: jax.Array, at: jax.Array) -> jax.Array:
    return x.at[at].get(mode="promise_in_bounds")


def _id(token: jax.Array) -> jax.Array:
    """A token as an index; that of a lane that has died, -1, as 0."""
    return jnp.maximum(token, 0).astype(jnp.uint32)


def _unit(word: jax.Array) -> jax.Array:
    """A word as a number in [0, 1]."""
    return word.astype(jnp.float32) * 2.0**-32


@jax.jit
def _tally(counts: jax.Array, tokens: jax.Array, at: jax.Array) -> jax.Array:
    """Counts of the prompt and the first ``at`` tokens."""
    lanes, size, records = tokens.shape[0], counts.shape[1], at.shape[0]
    record = jnp.searchsorted(at, jnp.arange(tokens.shape[1]), side="right")
    token = tokens.astype(jnp.int32)
    token = jnp.where(token < 0, size, token)  # dropped
    counts = jnp.broadcast_to(counts[:, None], (lanes, 1, size))
    new = jnp.pad(counts, ((0, 0), (0, records - 1), (0, 0)))
    new = new.at[jnp.arange(lanes)[:, None], record, token].add(1, mode="drop")
    return new if records == 1 else new.cumsum(1, dtype=counts.dtype)
