"""Prompt distributions. Prompt ``i`` depends on ``(key, i)`` alone, however many are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.chains import MarkovChain
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Key, UInt32
    from numpy.typing import ArrayLike


def uniform(key: Key[Array, ""], num_prompts: int, length: int, num_tokens: int) -> Prompts:
    """Prompts of independent, uniformly distributed tokens.

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        length: Tokens per prompt L, at least 1.
        num_tokens: Vocabulary size K, at least 1.

    Raises:
        ValueError: If a size is below 1 or ``key`` is no typed key.

    >>> import jax
    >>> uniform(jax.random.key(0), 5, 8, 3)
    Prompts(num_prompts=5, num_tokens=3, lengths 8 to 8)
    """
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    return iid(key, num_prompts, length, jnp.full(num_tokens, 1 / num_tokens))


def iid(key: Key[Array, ""], num_prompts: int, length: int, law: ArrayLike) -> Prompts:
    """Prompts of independent tokens with a given law, such as ``zipf_law(K)``.

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        length: Tokens per prompt L, at least 1.
        law: (K,) token probabilities; tokens of probability 1e-9 come at their rate.

    Raises:
        ValueError: If a size is below 1, or ``law`` is negative, NaN or does not sum to 1.
    """
    seeds = _seeds(key, num_prompts, "iid")
    length = _validate.integer(length, "length", minimum=1)
    if _validate.is_concrete(law):
        law = _validate.probability_vector(law, "law")
    law = jnp.asarray(law, jnp.result_type(float))
    bits = _random.words(seeds, jnp.arange(length)[:, None])
    return _pack(_random.lookup(_random.fixed_table(law), bits).T, law.shape[0])


def markov(key: Key[Array, ""], num_prompts: int, length: int, chain: MarkovChain) -> Prompts:
    """Prompts that are stationary stretches of a Markov chain.

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        length: Tokens per prompt L, at least 1.
        chain: The source.

    Raises:
        ValueError: If a size is below 1 or the chain's stationary law is not unique.
    """
    num_prompts = _validate.integer(num_prompts, "num_prompts", minimum=1)
    length = _validate.integer(length, "length", minimum=1)
    return _pack(chain.sample(key, length, num_prompts), chain.num_tokens)


def from_supports(
    key: Key[Array, ""],
    num_prompts: int,
    length: int,
    supports: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    probs: ArrayLike | None = None,
) -> Prompts:
    """Prompts of uniform tokens from a support that each prompt picks at random.

    Supports that overlap in a chain still cover the vocabulary; blocks that do not leave the
    co-occurrence graphs disconnected, and the model unidentified ([CCMC], consistency).

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        length: Tokens per prompt L, at least 1.
        supports: Lists of distinct token ids, none empty.
        num_tokens: Vocabulary size K.
        probs: Probability of each support; equal if None.

    Raises:
        ValueError: If a size is below 1, a support is empty, repeats a token or holds a bad id,
            or ``probs`` is no law over the supports.

    >>> import jax
    >>> prompts = from_supports(jax.random.key(0), 4, 10, [[0, 1], [2, 3]], 4)
    >>> bool(((prompts.counts[:, :2].sum(1) == 0) | (prompts.counts[:, 2:].sum(1) == 0)).all())
    True
    """
    seeds = _seeds(key, num_prompts, "supports")
    length = _validate.integer(length, "length", minimum=1)
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    if len(supports) == 0:
        raise ValueError("supports: expected at least one support, got none")
    laws = np.zeros((len(supports), num_tokens))
    for i, support in enumerate(supports):
        ids = _validate.integer_array(support, f"supports[{i}]", ndim=(1,))
        if ids.size == 0:
            raise ValueError(f"supports[{i}]: is empty")
        _validate.token_range(ids, f"supports[{i}]", num_tokens)
        if np.unique(ids).size < ids.size:
            raise ValueError(f"supports[{i}]: a token is repeated in {ids.tolist()}")
        laws[i, ids] = 1 / ids.size
    choice = np.full(len(supports), 1 / len(supports))
    if probs is not None:
        choice = _validate.probability_vector(probs, "probs")
        if choice.shape != (len(supports),):
            raise ValueError(f"probs: expected shape ({len(supports)},), got {choice.shape}")
    dtype = jnp.result_type(float)
    first = _random.words(seeds, 0)
    picked = _random.lookup(_random.fixed_table(jnp.asarray(choice, dtype)), first)
    rest = _random.words(seeds, 1 + jnp.arange(length)[:, None])
    table = _random.fixed_table(jnp.asarray(laws, dtype))
    rows = jnp.broadcast_to(picked, rest[0].shape)
    return _pack(_random.lookup(table, rest, rows).T, num_tokens)


def without_replacement(
    key: Key[Array, ""], num_prompts: int, length: int, num_tokens: int
) -> Prompts:
    """Prompts of ``length`` distinct tokens in random order, every set equally likely.

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        length: Tokens per prompt L, in 1..K.
        num_tokens: Vocabulary size K.

    Raises:
        ValueError: If a size is out of range.
    """
    keys = _random.replicate_keys(key, _ids(key, num_prompts), "prompts.order")
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    length = _validate.integer(length, "length", minimum=1)
    if length > num_tokens:
        raise ValueError(
            f"length: {length} distinct tokens cannot be drawn from a vocabulary of {num_tokens}"
        )
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_tokens))(keys)
    return _pack(orders[:, :length], num_tokens)


def every_token_once(key: Key[Array, ""], num_prompts: int, num_tokens: int) -> Prompts:
    """Prompts that hold every token exactly once, in random order (length K).

    Args:
        key: A typed JAX key.
        num_prompts: Number of prompts n, at least 1.
        num_tokens: Vocabulary size K, at least 1.

    Raises:
        ValueError: If a size is below 1.
    """
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    return without_replacement(key, num_prompts, num_tokens, num_tokens)


def _ids(key: Key[Array, ""], num_prompts: int) -> Int[Array, " prompt"]:
    _validate.check_key(key)
    return jnp.arange(_validate.integer(num_prompts, "num_prompts", minimum=1))


def _seeds(key: Key[Array, ""], num_prompts: int, stream: str) -> UInt32[Array, "2 prompt"]:
    return _random.replicate_seeds(key, _ids(key, num_prompts), f"prompts.{stream}")


def _pack(ids: jax.Array, num_tokens: int) -> Prompts:
    return Prompts._from_arrays(ids.astype(jnp.int32), num_tokens, None, None)
