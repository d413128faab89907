"""The reference engine: softmax attention over the growing context. Slow, and plainly right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary


@dataclass(frozen=True)
class Reference(Engine):
    """Keeps the whole history and weighs every position of it at every step.

    Where the law is plain attention (exponent 1, no decoding), a step draws a *position* from the
    attention weights and emits the token that stands there: nothing is counted. Otherwise the
    weights of each token's positions are added up and decoded. Time and memory grow with the
    history, O((L + T)²) a trajectory. Takes any context and decoder.
    """

    max_lanes: int | None = 1024
    keeps_history: ClassVar[bool] = True

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        if record in ("tokens", "counts"):
            return None
        return "can't summarise or cut a run into chunks: it keeps the whole history"

    def tokens(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`.

        Raises:
            ValueError: If the context cannot weigh these prompts.
        """
        law.context.check_prompts(prompts, num_steps)
        history, lengths = token_history(prompts)
        drawn = _tokens(law, seeds, history, lengths, prompts.last, num_steps, law.is_plain)
        return drawn.astype(smallest_dtype(law.num_tokens))

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`; tallied from the tokens."""
        drawn = self.tokens(law, seeds, prompts, int(at[-1]))
        drawn = jnp.pad(drawn, ((0, 0), (1, 0)), constant_values=-1)  # nothing after 0 steps
        grown = [(drawn == token).cumsum(1)[:, at] for token in range(law.num_tokens)]
        return prompts.counts[:, None] + jnp.stack(grown, axis=-1)


def token_history(prompts: Prompts) -> tuple[Any, Any]:
    """Token ids of the prompts; any order will do where only counts are known."""
    if prompts.tokens is not None and prompts.lengths is not None:
        return prompts.tokens, prompts.lengths
    if not _validate.is_concrete(prompts):
        raise ValueError("prompt: this engine needs token ids, not traced counts")
    counts = np.asarray(prompts.counts)
    lengths = counts.sum(axis=1)
    ids = np.zeros((len(counts), lengths.max()), np.int32)
    for row, n in enumerate(counts):
        ids[row, : lengths[row]] = np.repeat(np.arange(n.size), n)
    return ids, lengths.astype(np.int32)


@partial(jax.jit, static_argnames=("num_steps", "plain"))
def _tokens(
    law: Law,
    seeds: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    last: jax.Array,
    num_steps: int,
    plain: bool,
) -> jax.Array:
    lanes = jnp.arange(history.shape[0])
    history = jnp.pad(history, ((0, 0), (0, num_steps)))

    def attend(history: jax.Array, lengths: jax.Array, last: jax.Array, bits: _random.Words):
        """The token that stands at a position drawn from the attention weights."""
        scores = law.logits[last[:, None], history]  # x_iᵀ W x_L of every position i
        scores = scores + law.context.position_log_weights(history, lengths, last)
        shift = law.context.token_shift(lengths)
        if shift is not None:
            scores = scores + jnp.take_along_axis(shift, history, axis=1)
        place = _random.draw(_weights(scores), bits)
        return jnp.where(place < 0, -1, history[lanes, place])

    def decode(history: jax.Array, lengths: jax.Array, last: jax.Array, bits: _random.Words):
        scores = law.context.token_log_weights(history, lengths, last, law.num_tokens)
        return _random.draw(_weights(law.decoder.log_law(scores + law.logits[last])), bits)

    def step(state: tuple, bits: _random.Words) -> tuple[tuple, jax.Array]:
        history, lengths, last = state
        token = (attend if plain else decode)(history, lengths, last, bits)
        alive = token >= 0
        history = history.at[lanes, lengths].set(jnp.where(alive, token, 0))
        return (history, lengths + alive, jnp.where(alive, token, last)), token

    return _random.scan_steps(step, (history, lengths, last), seeds, num_steps)[1].T


def _weights(scores: jax.Array) -> jax.Array:
    """Softmax without its normaliser; zeros where nothing can be attended."""
    top = scores.max(axis=1, keepdims=True)
    return jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
