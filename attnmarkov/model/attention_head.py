"""One attention head of many tokens: a CCMC whose logits are kept as queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model.ccmc import CCMC, check_context
from attnmarkov.model.maps import centre_logits

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from numpy.typing import ArrayLike

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class AttentionHead:
    """The CCMC of one attention head, with logits ``S = queries keysᵀ`` of rank ``r``.

    Everything that follows from single rows of ``S`` takes O(K r) memory. Only :meth:`to_ccmc`,
    and :attr:`logits` and :attr:`transition_matrix` that need it, make a (K, K) array.
    :func:`attnmarkov.rollout` and :meth:`restrict` work on the tokens of the context alone: no
    other can come, and the law of the next token does not change by leaving them out.

    Build one with :meth:`CCMC.from_attention_head`.

    Attributes:
        queries: (K, r); row ``k`` is what token ``k`` asks for, scale included.
        keys: (K, r); row ``j`` is what token ``j`` answers to, less the mean of all rows, so
            that every row of ``S`` sums to zero.
    """

    queries: Float[Array, "token r"]
    keys: Float[Array, "token r"]

    @classmethod
    def from_weights(
        cls,
        embedding: ArrayLike,
        query_weight: ArrayLike,
        key_weight: ArrayLike,
        scale: float | None = None,
    ) -> AttentionHead:
        """See :meth:`CCMC.from_attention_head`."""
        shapes = [np.shape(x) for x in (embedding, query_weight, key_weight)]
        if len(shapes[0]) != 2 or 0 in shapes[0]:
            raise ValueError(f"embedding: expected a (K, d) array, got shape {shapes[0]}")
        if len(shapes[1]) != 2 or 0 in shapes[1] or shapes[1][0] != shapes[0][1]:
            raise ValueError(f"query_weight: expected shape ({shapes[0][1]}, r), got {shapes[1]}")
        if shapes[2] != shapes[1]:
            raise ValueError(f"key_weight: expected shape {shapes[1]}, got {shapes[2]}")
        factor = shapes[1][1] ** -0.5 if scale is None else scale
        if np.shape(factor) != ():
            raise ValueError(f"scale: expected a single number, got shape {np.shape(factor)}")
        dtype = jnp.result_type(float)
        if _validate.is_concrete(embedding, query_weight, key_weight, factor):
            e = _validate.finite(embedding, "embedding")
            queries = e @ _validate.finite(query_weight, "query_weight")
            queries *= _validate.finite(factor, "scale")
            keys = e @ _validate.finite(key_weight, "key_weight")
        else:
            e = jnp.asarray(embedding)
            queries = jnp.matmul(e, jnp.asarray(query_weight), precision=_HIGHEST) * factor
            keys = jnp.matmul(e, jnp.asarray(key_weight), precision=_HIGHEST)
        keys = keys - keys.mean(axis=0)
        return cls(jnp.asarray(queries, dtype), jnp.asarray(keys, dtype))

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.keys.shape[-2]

    @property
    def rank(self) -> int:
        """Width ``r`` of queries and keys."""
        return self.keys.shape[-1]

    def logits_of(self, rows: ArrayLike, columns: ArrayLike | None = None) -> Float[Array, ...]:
        """Entries ``S[rows, columns]`` of the logits.

        Args:
            rows: (...) query tokens.
            columns: (J,) attended tokens; all if None.

        Returns:
            (..., J), or (..., K) if ``columns`` is None.

        Raises:
            ValueError: If an id is no token id.
        """
        ids = self._ids(rows, "rows", None)
        keys = self.keys if columns is None else self.keys[self._ids(columns, "columns", (1,))]
        return jnp.matmul(self.queries[ids], keys.T, precision=_HIGHEST)

    def log_next_token_probs(self, counts: ArrayLike, last: ArrayLike) -> Float[Array, "*b token"]:
        """Logarithm of :meth:`next_token_probs`; minus infinity where a token cannot come."""
        counts, last = check_context(counts, last, self.num_tokens)
        logits = jnp.matmul(self.queries[last], self.keys.T, precision=_HIGHEST)
        return jax.nn.log_softmax(logits + jnp.log(counts.astype(logits.dtype)), axis=-1)

    def next_token_probs(self, counts: ArrayLike, last: ArrayLike) -> Float[Array, "*b token"]:
        """The law of the next token; arguments as :meth:`CCMC.next_token_probs`, O(K r) each."""
        return jnp.exp(self.log_next_token_probs(counts, last))

    def __call__(self, tokens: ArrayLike, query: ArrayLike | None = None) -> Float[Array, " token"]:
        """The law of the next token after the context ``tokens``.

        Args:
            tokens: (L,) context, L >= 1.
            query: Token id of the query; the last token of the context if None.

        Returns:
            (K,) probabilities, zero for tokens that the context does not hold.

        Raises:
            ValueError: If the context is empty or a token id is out of range.
        """
        if np.shape(tokens) == (0,):
            raise ValueError("tokens: the prompt is empty")
        context = self._ids(tokens, "tokens", (1,))
        last = context[-1] if query is None else self._ids(query, "query", (0,))
        weights = jax.nn.softmax(self.logits_of(last, context))
        return jnp.zeros(self.num_tokens, weights.dtype).at[context].add(weights)

    def restrict(self, tokens: ArrayLike) -> tuple[CCMC, Int[np.ndarray, " s"]]:
        """The CCMC on some of the tokens, and their ids.

        After a context of these tokens alone it has the law of the whole head.

        Args:
            tokens: (S,) token ids, S >= 1; token ``i`` of the CCMC stands for ``tokens[i]``.

        Returns:
            A CCMC on S tokens, and the (S,) ids. Its logits come from the host in float64, or
            are traced where the head is.

        Raises:
            ValueError: If ``tokens`` is empty, traced, or holds a bad id.
        """
        if not _validate.is_concrete(tokens):
            raise ValueError("tokens: must be known when the head is traced")
        ids = np.asarray(self._ids(tokens, "tokens", (1,)))
        if ids.size == 0:
            raise ValueError("tokens: is empty")
        if not _validate.is_concrete(self):
            return CCMC(centre_logits(self.logits_of(ids, ids))), ids
        queries, keys = (np.asarray(x[ids], np.float64) for x in (self.queries, self.keys))
        return CCMC.from_logits(queries @ keys.T), ids

    def to_ccmc(self, max_bytes: int = 2**30) -> CCMC:
        """The CCMC with its (K, K) logits.

        Raises:
            ValueError: If they would take more than ``max_bytes`` bytes.
        """
        need = self.num_tokens**2 * self.keys.dtype.itemsize
        if need > max_bytes:
            raise ValueError(
                f"to_ccmc: the logits of {self.num_tokens} tokens would take "
                f"{need / 2**30:,.1f} GiB, above max_bytes = {max_bytes / 2**30:,.1f} GiB; "
                "logits_of gives some of their entries. For what starts from a prompt take "
                "head.restrict(np.unique(prompt)): no other tokens can come; the ids that it "
                "returns are those which its CCMC numbers 0, 1, ..."
            )
        logits = jnp.matmul(self.queries, self.keys.T, precision=_HIGHEST)
        return CCMC(centre_logits(logits))

    @property
    def logits(self) -> Float[Array, "token token"]:
        """(K, K) ``S``; raises as :meth:`to_ccmc` if that is too large."""
        return self.to_ccmc().logits

    @property
    def transition_matrix(self) -> Float[Array, "token token"]:
        """(K, K) ``P = softmax(S)`` by rows; raises as :meth:`to_ccmc` if that is too large."""
        return self.to_ccmc().transition_matrix

    def _ids(self, ids: ArrayLike, name: str, ndim: tuple[int, ...] | None) -> jax.Array:
        if _validate.is_concrete(ids):
            ndim = tuple(range(np.ndim(ids) + 1)) if ndim is None else ndim
            known = _validate.integer_array(ids, name, ndim=ndim)
            _validate.token_range(known, name, self.num_tokens)
        return jnp.asarray(ids)

    def __repr__(self) -> str:
        """The sizes."""
        if not hasattr(self.keys, "shape"):
            return "AttentionHead(...)"
        return f"AttentionHead(num_tokens={self.num_tokens}, rank={self.rank})"
