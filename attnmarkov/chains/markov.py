"""First-order Markov chains: stationary law, entropy rate, exact sampling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from attnmarkov import _random, _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MarkovChain:
    """A first-order Markov chain on tokens ``0..K-1``.

    Build one with :meth:`from_transition_matrix`.

    Attributes:
        transition_matrix: (K, K); row ``k`` is the law of the token after ``k``.
    """

    transition_matrix: Float[Array, "token token"]

    @classmethod
    def from_transition_matrix(cls, transition_matrix: ArrayLike) -> MarkovChain:
        """Build a chain from a row-stochastic matrix.

        Args:
            transition_matrix: (K, K), entries non-negative, rows summing to 1.

        Raises:
            ValueError: If the matrix is not square, holds a negative, NaN or infinite entry, or
                has a row that does not sum to 1 within 1e-5 (the row and its sum are named).

        >>> chain = MarkovChain.from_transition_matrix([[0.9, 0.1], [0.2, 0.8]])
        >>> print(chain)
        MarkovChain(num_tokens=2, stationary=[0.667 0.333], entropy_rate=0.384 nats)
        """
        if _validate.is_concrete(transition_matrix):
            p = _validate.stochastic_matrix(transition_matrix, "transition_matrix")
            return cls(jnp.asarray(p / p.sum(axis=1, keepdims=True), jnp.result_type(float)))
        return cls(jnp.asarray(transition_matrix))

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.transition_matrix.shape[-1]

    def stationary(self) -> Float[Array, " token"]:
        """The stationary law π, with ``π P = π``.

        Computed by Grassmann-Taksar-Heyman elimination, which subtracts nothing and is accurate
        in every entry. Transient tokens get 0. Inside jit or vmap the chain must be irreducible
        (otherwise entries are NaN).

        Returns:
            (K,) probabilities.

        Raises:
            ValueError: If the law is not unique (two or more closed classes; they are listed).

        References:
            Grassmann, Taksar and Heyman, Operations Research 33 (1985).

        >>> chain = MarkovChain.from_transition_matrix([[0.9, 0.1], [0.2, 0.8]])
        >>> [round(float(p), 3) for p in chain.stationary()]
        [0.667, 0.333]
        """
        p = self.transition_matrix
        if not _validate.is_concrete(p):
            return _gth(p)
        closed = _closed_classes(np.asarray(p))
        if len(closed) > 1:
            raise ValueError(
                "transition_matrix: the stationary law is not unique; closed classes: "
                + ", ".join(str(c.tolist()) for c in closed)
            )
        states = closed[0]
        return jnp.zeros(p.shape[0], p.dtype).at[states].set(_gth(p[np.ix_(states, states)]))

    def entropy_rate(self) -> Float[Array, ""]:
        """Entropy rate ``Σ_k π_k H(P[k])`` in nats per token.

        Raises:
            ValueError: If the stationary law is not unique.

        >>> round(float(MarkovChain.from_transition_matrix([[.5, .5], [.5, .5]]).entropy_rate()), 4)
        0.6931
        """
        return self.stationary() @ entr(self.transition_matrix).sum(-1)

    def sample(
        self,
        key: Key[Array, ""],
        num_steps: int,
        num_trajectories: int = 1,
        *,
        initial: ArrayLike | None = None,
    ) -> Int[Array, "trajectory step"]:
        """Sample trajectories; exact down to tokens of probability 1e-9.

        Args:
            key: A typed JAX key. Trajectory ``r`` depends on ``(key, r)`` alone, and a longer
                run begins with the shorter one.
            num_steps: Tokens per trajectory, at least 1; the first has the initial law.
            num_trajectories: Number of independent trajectories, at least 1.
            initial: (K,) law of the first token; the stationary law if None.

        Returns:
            (num_trajectories, num_steps) int32 token ids.

        Raises:
            ValueError: If a number is below 1, or ``initial`` is no law over the K tokens.

        >>> import jax
        >>> chain = MarkovChain.from_transition_matrix([[0.0, 1.0], [1.0, 0.0]])
        >>> chain.sample(jax.random.key(0), 4, initial=[1.0, 0.0]).tolist()
        [[0, 1, 0, 1]]
        """
        _validate.check_key(key)
        num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
        num_trajectories = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
        if initial is None:
            law = self.stationary()
        else:
            if _validate.is_concrete(initial):
                initial = _validate.probability_vector(initial, "initial")
            law = jnp.asarray(initial, self.transition_matrix.dtype)
            if law.shape != (self.num_tokens,):
                raise ValueError(f"initial: expected shape ({self.num_tokens},), got {law.shape}")
        seeds = _random.replicate_seeds(key, jnp.arange(num_trajectories), "chain")
        return _walk(self.transition_matrix, law, seeds, num_steps)

    def __repr__(self) -> str:
        """The size, and the stationary law and entropy rate where they exist."""
        if not isinstance(self.transition_matrix, jax.Array) or not _validate.is_concrete(
            self.transition_matrix
        ):
            return f"MarkovChain(transition_matrix={self.transition_matrix})"
        try:
            law = np.asarray(self.stationary())
        except ValueError:
            return f"MarkovChain(num_tokens={self.num_tokens}, no unique stationary law)"
        shown = np.array2string(law, precision=3, threshold=8, edgeitems=3)
        rate = float(self.entropy_rate())
        return (
            f"MarkovChain(num_tokens={self.num_tokens}, stationary={shown}, "
            f"entropy_rate={rate:.3f} nats)"
        )


@partial(jax.jit, static_argnames="num_steps")
def _walk(p: jax.Array, law: jax.Array, seeds: jax.Array, num_steps: int) -> jax.Array:
    # The first token is drawn as from an extra state K, whose row is the initial law.
    table = _random.fixed_table(jnp.concatenate([p, law[None]]))

    def step(last: jax.Array, bits: _random.Words) -> tuple[jax.Array, jax.Array]:
        token = _random.lookup(table, bits, last)
        return token, token

    start = jnp.full(seeds.shape[1], p.shape[0], jnp.int32)
    return _random.scan_steps(step, start, seeds, num_steps)[1].T


@jax.jit
def _gth(p: jax.Array) -> jax.Array:
    """Stationary law of an irreducible P by elimination of states K-1, K-2, ..., 1."""
    size = p.shape[0]
    below = jnp.arange(size)

    def eliminate(i: jax.Array, a: jax.Array) -> jax.Array:
        k = size - 1 - i
        row = jnp.where(below < k, a[k], 0)
        column = jnp.where(below < k, a[:, k], 0) / row.sum()
        return (a + column[:, None] * row).at[:, k].set(jnp.where(below < k, column, a[:, k]))

    def expand(k: jax.Array, x: jax.Array) -> jax.Array:
        return x.at[k].set(jnp.where(below < k, x * a[:, k], 0).sum())

    a = jax.lax.fori_loop(0, size - 1, eliminate, p)
    x = jax.lax.fori_loop(1, size, expand, jnp.zeros(size, p.dtype).at[0].set(1))
    return x / x.sum()


def _closed_classes(p: np.ndarray) -> list[np.ndarray]:
    """The closed communicating classes of a transition matrix, each as a sorted array."""
    from scipy.sparse import csgraph, csr_array

    number, label = csgraph.connected_components(csr_array(p > 0), connection="strong")
    leaves = np.zeros(number, bool)
    rows, columns = np.nonzero(p)
    leaves[label[rows[label[rows] != label[columns]]]] = True
    return [np.flatnonzero(label == c) for c in np.flatnonzero(~leaves)]
