"""The reference engine: softmax attention over the growing context. Slow, and plainly right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.prompts import Prompts


@dataclass(frozen=True)
class Reference(Engine):
    """Keeps the whole context, attends every position at every step, and copies one.

    A step draws a *position* from the attention weights and emits the token that stands there:
    nothing is counted. Time and memory grow with the context, O((L + T)²) a trajectory.
    """

    max_lanes: int = 1024

    def tokens(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        num_steps: int,
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        context, lengths = _context(prompts)
        return _tokens(logits, keys, context, lengths, prompts.last, num_steps)

    def counts(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        at: np.ndarray,
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`; tallied from the tokens."""
        drawn = self.tokens(logits, keys, prompts, int(at[-1]))
        drawn = jnp.pad(drawn, ((0, 0), (1, 0)), constant_values=-1)  # nothing after 0 steps
        grown = [(drawn == token).cumsum(1)[:, at] for token in range(logits.shape[0])]
        return prompts.counts[:, None] + jnp.stack(grown, axis=-1)


def _context(prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """Token ids of the prompts; any order will do where only counts are known."""
    if prompts.tokens is not None and prompts.lengths is not None:
        return prompts.tokens, prompts.lengths
    if not _validate.is_concrete(prompts):
        raise ValueError("prompt: the reference engine needs token ids, not traced counts")
    counts = np.asarray(prompts.counts)
    lengths = counts.sum(axis=1)
    ids = np.zeros((len(counts), lengths.max()), np.int32)
    for row, n in enumerate(counts):
        ids[row, : lengths[row]] = np.repeat(np.arange(n.size), n)
    return jnp.asarray(ids), jnp.asarray(lengths)


@partial(jax.jit, static_argnames="num_steps")
def _tokens(
    logits: jax.Array,
    keys: jax.Array,
    context: jax.Array,
    lengths: jax.Array,
    last: jax.Array,
    num_steps: int,
) -> jax.Array:
    lanes = jnp.arange(context.shape[0])
    context = jnp.pad(context, ((0, 0), (0, num_steps)))
    positions = jnp.arange(context.shape[1])

    def step(state: tuple, bits: jax.Array) -> tuple[tuple, jax.Array]:
        context, lengths, last = state
        scores = logits[last[:, None], context]  # x_iᵀ W x_L of every position i
        scores = jnp.where(positions < lengths[:, None], scores, -jnp.inf)
        place = _random.draw(jax.nn.softmax(scores, axis=1), bits)
        token = jnp.where(place < 0, -1, context[lanes, place])
        alive = token >= 0
        context = context.at[lanes, lengths].set(jnp.where(alive, token, 0))
        return (context, lengths + alive, jnp.where(alive, token, last)), token

    return _random.scan_steps(step, (context, lengths, last), keys, num_steps)[1].T
