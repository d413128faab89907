"""What a stepping engine carries of the history besides its counts, context by context.

Each class keeps the state of one kind of context for a batch of lanes, in a layout of
:mod:`attnmarkov.rollout._layout`, and says how much each token weighs now.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.model import DecayContext, FullContext, LagContext, WindowContext

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout._layout import LaneMajor, TokenMajor


def smallest_dtype(num_tokens: int) -> type[np.signedinteger]:
    """The narrowest signed type for token ids and -1."""
    return next(t for t in (np.int8, np.int16, np.int32) if num_tokens - 1 <= np.iinfo(t).max)


@dataclass(frozen=True)
class Full:
    """Nothing: the counts of the whole context are the state."""

    context: Any
    layout: TokenMajor | LaneMajor

    @staticmethod
    def slots(context: Any) -> int:
        """Tokens of the history that are kept."""
        return 0

    def start(self, prompts: Prompts) -> Any:
        """State after the prompt."""
        return ()

    def push(self, state: Any, token: Int[Array, " lane"], step: jax.Array) -> Any:
        """State after the token drawn at ``step``."""
        return ()

    def counts(self, state: Any, counts: jax.Array) -> jax.Array:
        """How often each token stands in the context, given the counts of the whole history."""
        return counts

    def log_n(self, state: Any, counts: jax.Array, step: jax.Array) -> Float[Array, ...]:
        """Log of the position-weighted count of every token, minus infinity if absent."""
        return jnp.log(self.counts(state, counts).astype(jnp.float32))


class _Ring(NamedTuple):
    tokens: Int[Array, "slot lane"]  # slot ``step % size`` holds the oldest; -1 is empty
    counts: jax.Array  # of the tokens in it; () where not needed


@dataclass(frozen=True)
class Window(Full):
    """The tokens in the window, in a ring, and their counts."""

    @staticmethod
    def slots(context: Any) -> int:
        """See :class:`Full`."""
        return context.size

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return self.slots(self.context)

    def start(self, prompts: Prompts) -> _Ring:
        """See :class:`Full`."""
        ring = self._ring(prompts)
        slots = jax.nn.one_hot(ring, self.layout.size, axis=-1, dtype=jnp.int32)
        return _Ring(ring, self.layout.place(slots.sum(0)))

    def _ring(self, prompts: Prompts) -> jax.Array:
        assert prompts.tokens is not None
        assert prompts.lengths is not None
        place = prompts.lengths - self.size + jnp.arange(self.size)[:, None]
        ids = jnp.take_along_axis(prompts.tokens, jnp.maximum(place, 0).T, axis=1).T
        return jnp.where(place >= 0, ids, -1).astype(smallest_dtype(self.layout.size))

    def push(self, state: _Ring, token: jax.Array, step: jax.Array) -> _Ring:
        """See :class:`Full`."""
        slot = (step % self.size).astype(jnp.int32)
        oldest = jax.lax.dynamic_index_in_dim(state.tokens, slot, keepdims=False)
        counts = self.layout.add(state.counts, oldest.astype(token.dtype), -1)
        return _Ring(self._write(state.tokens, token, slot), self.layout.add(counts, token))

    def _write(self, ring: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(ring, token.astype(ring.dtype), slot, 0)

    def counts(self, state: _Ring, counts: jax.Array) -> jax.Array:
        """See :class:`Full`."""
        return state.counts


@dataclass(frozen=True)
class Lags(Window):
    """The last tokens, in a ring; their weights are summed at every step."""

    @staticmethod
    def slots(context: Any) -> int:
        """See :class:`Full`."""
        return np.shape(context.weights)[0]

    def start(self, prompts: Prompts) -> _Ring:
        """See :class:`Full`."""
        return _Ring(self._ring(prompts), jnp.zeros(()))

    def push(self, state: _Ring, token: jax.Array, step: jax.Array) -> _Ring:
        """See :class:`Full`."""
        slot = (step % self.size).astype(jnp.int32)
        return _Ring(self._write(state.tokens, token, slot), state.counts)

    def log_n(self, state: _Ring, counts: jax.Array, step: jax.Array) -> jax.Array:
        """See :class:`Full`."""
        lag = (step.astype(jnp.int32) % self.size - 1 - jnp.arange(self.size)) % self.size
        weights = jnp.asarray(self.context.weights, jnp.float32)
        weights = (weights / weights.max())[lag]
        lanes = jnp.arange(state.tokens.shape[1])
        ids = state.tokens.astype(jnp.int32)
        ids = jnp.where(ids < 0, self.layout.size, ids)  # dropped
        n = jnp.zeros((lanes.size, self.layout.size), jnp.float32)
        n = n.at[lanes, ids].add(weights[:, None], mode="drop")
        return jnp.log(self.layout.place(n))


class _Faded(NamedTuple):
    n: jax.Array  # weight at the token's last visit; 0 if never visited
    rest: jax.Array  # what float32 could not hold of it
    log_n: jax.Array  # its logarithm
    age: jax.Array  # steps since


@dataclass(frozen=True)
class Decay(Full):
    """Each token's weight at its last visit, and how long ago that was.

    Weights faded far below the smallest float32 keep their logarithm. Weights grow by a
    compensated sum of what a visit adds and the time since the last one took, so that long
    memories, of weights past 2**24, lose nothing to rounding.
    """

    def start(self, prompts: Prompts) -> _Faded:
        """See :class:`Full`."""
        assert prompts.tokens is not None
        assert prompts.lengths is not None
        tokens, lengths, size = prompts.tokens, prompts.lengths, self.layout.size
        context = dataclasses.replace(self.context, exponent=1.0)
        full = context.token_log_weights(tokens, lengths, prompts.last, size)
        lag = lengths[:, None] - 1 - jnp.arange(tokens.shape[1])
        lag = jnp.where(lag >= 0, lag, np.iinfo(np.int32).max)
        lanes = jnp.arange(tokens.shape[0])[:, None]
        age = jnp.full((len(tokens), size), np.iinfo(np.int32).max).at[lanes, tokens].min(lag)
        visited = jnp.isfinite(full)
        age = jnp.where(visited, age, 0)
        n = self.layout.place(jnp.where(visited, jnp.exp(full - self._slope() * age), 0))
        return _Faded(n, jnp.zeros_like(n), jnp.log(n), self.layout.place(age))

    def _slope(self) -> jax.Array:
        """Log-weight gained with each step, at most 0."""
        return self.context.lag_log_weights(jnp.ones((), jnp.int32))

    def push(self, state: _Faded, token: jax.Array, step: jax.Array) -> _Faded:
        """See :class:`Full`."""
        hit, age = self.layout.hit(token), state.age + 1
        n, rest, since = (self.layout.pick(x, token) for x in (state.n, state.rest, age))
        fade = self._slope() * since
        more = 1 + (n + rest) * jnp.expm1(fade) + rest
        slow, fast = n + more, 1 + (n + rest) * jnp.exp(fade)
        new = jnp.where(fade > -0.1, slow, fast)
        lost = jnp.where(fade > -0.1, more - (slow - n), 0)

        def put(old: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.where(hit, jnp.expand_dims(value, self.layout.axis), old)

        return _Faded(
            put(state.n, new),
            put(state.rest, lost),
            put(state.log_n, jnp.log(new)),
            jnp.where(hit, 0, age),
        )

    def log_n(self, state: _Faded, counts: jax.Array, step: jax.Array) -> jax.Array:
        """See :class:`Full`."""
        return state.log_n + self._slope() * state.age


KINDS = {FullContext: Full, DecayContext: Decay, WindowContext: Window, LagContext: Lags}
