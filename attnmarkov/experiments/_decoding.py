"""What the experiments on decoding share: their matrices, likelihoods, an exact test."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.model import CCMC


def random_winner_model(seed: int, size: int, weights: tuple[float, float]) -> CCMC:
    """A random matrix with which every token can win plain generation.

    Rows are proportional to 1 on the diagonal and to uniform ``weights`` below 1 off it.
    """
    key = jax.random.fold_in(jax.random.key(seed), size)
    low, high = weights
    p = np.array(jax.random.uniform(key, (size, size), minval=low, maxval=high), np.float64)
    np.fill_diagonal(p, 1)
    return CCMC.from_transition_matrix(p / p.sum(axis=1, keepdims=True))


def poisson_binomial_test(hits: int, chances: np.ndarray) -> float:
    """Two-sided p-value of ``hits`` successes among independent trials with these chances.

    Twice the smaller tail, exact.

    >>> round(poisson_binomial_test(0, np.array([0.5, 0.5, 0.5])), 3)
    0.25
    """
    pmf = np.ones(1)
    for p in np.clip(chances, 0, 1):
        pmf = np.convolve(pmf, [1 - p, p])
    return float(min(1.0, 2 * min(pmf[: hits + 1].sum(), pmf[hits:].sum())))


@jax.jit
def likelihoods(
    logits: jax.Array, tokens: jax.Array, edges: jax.Array, sure: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums of ``-log p`` and of the law's entropy (R, 2) by decade, and absorption under top-p.

    From tokens (R, T) after a prompt that held every token once and ended with the last.
    """
    lanes, size = tokens.shape[0], logits.shape[0]

    def step(state: tuple, now: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        counts, last, cost, own, absorbed, others = state
        time, token = now
        log_law = jax.nn.log_softmax(logits[last] + jnp.log(counts), axis=1)
        law = jnp.exp(log_law)
        here = jnp.take_along_axis(law, last[:, None], axis=1)[:, 0]
        absorbed = jnp.where((absorbed < 0) & (here >= sure), time, absorbed)
        others += (absorbed >= 0) & (token != last)
        which = (jnp.arange(2) == (time >= edges[1])) & (time >= edges[0])
        surprise = -jnp.take_along_axis(log_law, token[:, None], axis=1)
        cost += which * surprise
        own += which * -(law * log_law).sum(axis=1, keepdims=True)
        counts += jax.nn.one_hot(token, size)
        return (counts, token, cost, own, absorbed, others), None

    zero = jnp.zeros((lanes, 2))
    start = (
        jnp.ones((lanes, size)),
        jnp.full(lanes, size - 1, jnp.int32),
        zero,
        zero,
        jnp.full(lanes, -1, jnp.int32),
        jnp.zeros(lanes, jnp.int32),
    )
    tokens = tokens.astype(jnp.int32)
    times = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    end, _ = jax.lax.scan(step, start, (times, tokens.T))
    return end[2], end[3], end[4], end[5]
