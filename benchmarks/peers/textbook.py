"""The textbook JAX rollout: ``vmap`` of a ``lax.scan`` that calls ``jax.random.categorical``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def build(
    p: np.ndarray, prompt: Sequence[int], num_steps: int, lanes: int, record: str = "counts"
) -> Callable[[int], np.ndarray]:
    """It returns the final counts (lanes, K), or the tokens (lanes, num_steps)."""
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    start = jnp.asarray(np.bincount(prompt, minlength=len(p)), jnp.int32)
    last = jnp.int32(prompt[-1])

    def step(
        state: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        counts, last = state
        token = jax.random.categorical(key, jnp.log(counts) + logits[last]).astype(jnp.int32)
        return (counts.at[token].add(1), token), token if record == "tokens" else None

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> jax.Array:
        (counts, _), tokens = jax.lax.scan(step, (start, last), jax.random.split(key, num_steps))
        return counts if tokens is None else tokens

    return lambda seed: np.asarray(run(jax.random.split(jax.random.key(seed), lanes)))
