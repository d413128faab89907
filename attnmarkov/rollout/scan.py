"""The scan engine: token counts are the whole state, O(K) a step, no context stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov import _random
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.prompts import Prompts

_State = tuple[jax.Array, jax.Array]  # counts (token, lane), last (lane,)


@dataclass(frozen=True)
class Scan(Engine):
    """Steps a CCMC on its counts, token-major so that a step is K vector operations.

    2048 lanes of 16 tokens stay in a core's cache.
    """

    def tokens(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        num_steps: int,
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        return _tokens(logits, keys, prompts.counts, prompts.last, num_steps)

    def counts(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        at: np.ndarray,
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        return _counts(logits, keys, prompts.counts, prompts.last, jnp.asarray(at, jnp.int32))


def _step(p: jax.Array, state: _State, bits: jax.Array) -> tuple[_State, jax.Array]:
    """One step; ``p`` is (token, query). A lane with nothing to attend emits -1 and stays."""
    counts, last = state
    token = _random.draw(counts.astype(p.dtype) * p[:, last], bits, axis=0)
    hit = jnp.arange(p.shape[0], dtype=token.dtype)[:, None] == token
    return (counts + hit, jnp.where(token < 0, last, token)), token


def _start(logits: jax.Array, counts: jax.Array, last: jax.Array) -> tuple[jax.Array, _State]:
    p = jnp.exp(logits - logits.max(axis=1, keepdims=True)).T
    return p, (counts.T, last)


@partial(jax.jit, static_argnames="num_steps")
def _tokens(
    logits: jax.Array, keys: jax.Array, counts: jax.Array, last: jax.Array, num_steps: int
) -> jax.Array:
    p, state = _start(logits, counts, last)
    return _random.scan_steps(partial(_step, p), state, keys, num_steps)[1].T


@jax.jit
def _counts(
    logits: jax.Array, keys: jax.Array, counts: jax.Array, last: jax.Array, at: jax.Array
) -> jax.Array:
    p, state = _start(logits, counts, last)

    def to(state: _State, span: tuple[jax.Array, jax.Array]) -> tuple[_State, jax.Array]:
        state = _random.advance(lambda s, bits: _step(p, s, bits)[0], state, keys, *span)
        return state, state[0]

    since = jnp.concatenate([jnp.zeros(1, at.dtype), at[:-1]])
    return jax.lax.scan(to, state, (since, at))[1].transpose(2, 0, 1)
