"""One-layer attention in JAX, evaluated again over the whole context at every step.

With embeddings ``E``, weight ``W`` and head ``C``, a step computes the query ``W x_L``, the score
of every position of the context, their softmax, its average of the context, and the head:
``C Xᵀ softmax(X W x_L)``. Nothing of this is kept for the next step. What is kept is ``X`` itself,
the embeddings of the tokens so far; as ``W`` stands on the query's side, they are the keys and the
values, so there is nothing else that a cache could hold.

The context is padded to a multiple of 128 positions, one compiled scan for each multiple, so that
at most 128 positions are computed in vain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SEGMENT = 128
_State = tuple[jax.Array, jax.Array]  # embeddings (lane, position, d), last (lane,)


def build(
    embedding: np.ndarray,
    weight: np.ndarray,
    head: np.ndarray,
    prompt: Sequence[int],
    num_steps: int,
    lanes: int,
) -> Callable[[int], np.ndarray]:
    """It returns the tokens (lanes, num_steps)."""
    e, w, c = (jnp.asarray(x, jnp.float32) for x in (embedding, weight, head))
    begin, end = len(prompt), len(prompt) + num_steps

    def step(state: _State, inputs: _State) -> tuple[_State, jax.Array]:
        (x, last), (length, key) = state, inputs
        scores = jnp.einsum("rld,rd->rl", x, e[last] @ w.T)
        scores = jnp.where(jnp.arange(x.shape[1]) < length, scores, -jnp.inf)
        law = jnp.einsum("rl,rld->rd", jax.nn.softmax(scores), x) @ c.T
        token = jax.random.categorical(key, jnp.log(jnp.clip(law, 1e-30))).astype(jnp.int32)
        return (x.at[:, length].set(e[token]), token), token

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, num_steps)
        x = jnp.broadcast_to(e[jnp.asarray(prompt)], (lanes, begin, e.shape[1]))
        last = jnp.full(lanes, prompt[-1], jnp.int32)
        drawn = []
        for first in range(begin, end, _SEGMENT):
            stop = min(first + _SEGMENT, end)
            x = jnp.pad(x, ((0, 0), (0, stop - first), (0, 0)))
            inputs = jnp.arange(first, stop), keys[first - begin : stop - begin]
            (x, last), tokens = jax.lax.scan(step, (x, last), inputs)
            drawn.append(tokens)
        return jnp.concatenate(drawn).T

    return lambda seed: np.asarray(run(jax.random.key(seed)))
