"""One-layer self-attention with linear head, evaluated by softmax over positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import maps
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float
    from numpy.typing import ArrayLike

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SelfAttention:
    """One-layer self-attention: ``f(X) = Xᵀ softmax(X W x_L)``, next-token law ``C f(X)``.

    Since ``C Eᵀ = I`` the law of token ``j`` is the attention that the positions holding ``j``
    receive together, which is how it is computed; :meth:`attend` and ``head`` give the same
    through the embedding space. ([CCMC], definition of the model.)

    Build one with :meth:`from_weights` or :meth:`from_ccmc`.

    Attributes:
        embedding: (K, d) ``E`` of rank K; row ``k`` embeds token ``k``.
        weight: (d, d) combined key-query matrix ``W``.
        head: (K, d) ``C`` with ``C Eᵀ = I``.
        allowed: (K, K) bool, True where query ``k`` may attend token ``j``; None allows all.
    """

    embedding: Float[Array, "token d"]
    weight: Float[Array, "d d"]
    head: Float[Array, "token d"]
    allowed: Bool[Array, "token token"] | None = None

    @classmethod
    def from_weights(
        cls,
        embedding: ArrayLike,
        weight: ArrayLike,
        head: ArrayLike | None = None,
        allowed: ArrayLike | None = None,
    ) -> SelfAttention:
        """Build self-attention from its matrices.

        Args:
            embedding: (K, d), rank K (so K <= d).
            weight: (d, d).
            head: (K, d) with ``head @ embedding.T = I``; the pseudo-inverse's if None.
            allowed: (K, K) bool mask over (query, attended token); None allows all.

        Raises:
            ValueError: If shapes disagree, an entry is not finite, the embedding lacks full row
                rank, the head is not dual to it, or a query may attend nothing.
        """
        e = _full_row_rank(embedding)
        num_tokens, d = e.shape
        w = _validate.finite(weight, "weight")
        if w.shape != (d, d):
            raise ValueError(f"weight: expected shape ({d}, {d}), got {w.shape}")
        if head is None:
            c = np.linalg.pinv(e).T
        else:
            c = _validate.finite(head, "head")
            if c.shape != e.shape:
                raise ValueError(f"head: expected shape {e.shape}, got {c.shape}")
            off = np.abs(c @ e.T - np.eye(num_tokens)).max()
            if off > 1e-4:
                raise ValueError(
                    f"head: head @ embedding.T must be the identity, but is off by {off:.3g}"
                )
        dtype = jnp.result_type(float)
        mask = None
        if allowed is not None:
            try:
                mask = np.asarray(allowed, bool)
            except ValueError:
                raise ValueError("allowed: rows have different lengths") from None
            if mask.shape != (num_tokens, num_tokens):
                raise ValueError(
                    f"allowed: expected shape ({num_tokens}, {num_tokens}), got {mask.shape}"
                )
            if not mask.any(axis=1).all():
                raise ValueError(f"allowed: query {mask.any(axis=1).argmin()} may attend nothing")
            mask = jnp.asarray(mask)
        return cls(jnp.asarray(e, dtype), jnp.asarray(w, dtype), jnp.asarray(c, dtype), mask)

    @classmethod
    def from_ccmc(cls, model: CCMC, embedding: ArrayLike) -> SelfAttention:
        """The self-attention that samples from ``model``, with ``W`` unique in ``S_E``.

        Masked entries (zeros of ``P``) become an attention mask; their score in ``W`` is that
        of an average token (``S = 0``). Solved on the host in float64; stored in float32,
        ``W`` loses accuracy as the embedding's condition number grows (widths d well above K
        keep it small).

        Args:
            model: A CCMC on K tokens.
            embedding: (K, d) of rank K.

        Raises:
            ValueError: If the embedding does not have K rows or lacks full row rank.

        >>> import jax.numpy as jnp
        >>> model = CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
        >>> attention = SelfAttention.from_ccmc(model, jnp.eye(2, 3))
        >>> [round(float(p), 3) for p in attention([0, 0, 1])]
        [0.4, 0.6]
        """
        e = _full_row_rank(embedding)
        if e.shape[0] != model.num_tokens:
            raise ValueError(
                f"embedding: has {e.shape[0]} rows, but the model has {model.num_tokens} tokens"
            )
        s = np.asarray(model.logits, np.float64)
        allowed = np.isfinite(s)
        weight = maps.attention_weight(np.where(allowed, s, 0), e)
        return cls.from_weights(e, weight, allowed=None if allowed.all() else allowed)

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.embedding.shape[-2]

    def to_ccmc(self) -> CCMC:
        """The CCMC with the same next-token laws: ``S[k, j] = e_jᵀ W e_k``, rows centred."""
        keys = jnp.matmul(self.embedding, self.weight, precision=_HIGHEST)
        scores = jnp.matmul(self.embedding, keys.T, precision=_HIGHEST)  # [k, j] = e_k · Wᵀ e_j
        if self.allowed is not None:
            scores = jnp.where(self.allowed, scores, -jnp.inf)
        return CCMC(maps.centre_logits(scores))

    def attention(
        self, tokens: ArrayLike, query: ArrayLike | None = None
    ) -> Float[Array, " position"]:
        """Attention over positions, ``softmax(X W x_L)``.

        Args:
            tokens: (L,) context, L >= 1.
            query: Token id of the query; the last token of the context if None. Given apart it
                need not stand in the context (cross-attention).

        Returns:
            (L,) weights summing to 1; NaN where every position is masked.

        Raises:
            ValueError: If the context is empty or a token id is out of range.
        """
        tokens, query = self._context(tokens, query)
        keys = jnp.matmul(self.embedding[tokens], self.weight, precision=_HIGHEST)
        scores = jnp.matmul(keys, self.embedding[query], precision=_HIGHEST)
        if self.allowed is not None:
            scores = jnp.where(self.allowed[query, tokens], scores, -jnp.inf)
        return jax.nn.softmax(scores)

    def attend(self, tokens: ArrayLike, query: ArrayLike | None = None) -> Float[Array, " d"]:
        """The layer's output ``f(X) = Xᵀ softmax(X W x_L)``, (d,); arguments as above."""
        weights = self.attention(tokens, query)
        return jnp.matmul(weights, self.embedding[jnp.asarray(tokens)], precision=_HIGHEST)

    def __call__(self, tokens: ArrayLike, query: ArrayLike | None = None) -> Float[Array, " token"]:
        """The law of the next token after ``tokens``, (K,); arguments as :meth:`attention`."""
        weights = self.attention(tokens, query)
        return jnp.zeros(self.num_tokens, weights.dtype).at[jnp.asarray(tokens)].add(weights)

    def _context(self, tokens: ArrayLike, query: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
        if np.shape(tokens) == (0,):
            raise ValueError("tokens: the prompt is empty")
        if np.ndim(tokens) != 1:
            raise ValueError(f"tokens: expected shape (L,), got {np.shape(tokens)}")
        for array, name, ndim in ((tokens, "tokens", 1), (query, "query", 0)):
            if array is not None and _validate.is_concrete(array):
                ids = _validate.integer_array(array, name, ndim=(ndim,))
                _validate.token_range(ids, name, self.num_tokens)
        context = jnp.asarray(tokens)
        return context, context[-1] if query is None else jnp.asarray(query)

    def __repr__(self) -> str:
        """The sizes, and whether tokens are masked."""
        if not hasattr(self.embedding, "shape"):
            return "SelfAttention(...)"
        masked = "" if self.allowed is None else ", masked"
        return f"SelfAttention(num_tokens={self.num_tokens}, d={self.embedding.shape[-1]}{masked})"


def _full_row_rank(embedding: ArrayLike) -> np.ndarray:
    e = _validate.finite(embedding, "embedding")
    if e.ndim != 2 or e.size == 0:
        raise ValueError(f"embedding: expected a (K, d) array, got shape {e.shape}")
    given = np.asarray(embedding).dtype
    precision = np.finfo(given if given.kind == "f" else np.float64).eps
    rank = int(np.linalg.matrix_rank(e, rtol=max(e.shape) * precision))
    if rank < e.shape[0]:
        raise ValueError(
            f"embedding: needs full row rank {e.shape[0]}, but has rank {rank} (shape {e.shape})"
        )
    return e
