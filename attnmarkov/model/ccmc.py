"""The context-conditioned Markov chain: the law that one-layer self-attention samples from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.model.maps import centre_logits, logits_from_transition_matrix, scores

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike

    from attnmarkov.model.attention_head import AttentionHead
    from attnmarkov.prompts import Prompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class CCMC:
    """A context-conditioned Markov chain on tokens ``0..K-1`` ([CCMC], definition of the CCMC).

    After a prompt with token counts ``n`` and last token ``k``, token ``j`` comes next with
    probability ``n_j P[k, j] / Σ_i n_i P[k, i]``. Only tokens of the prompt can come.

    Build one with :meth:`from_transition_matrix` or :meth:`from_logits`.

    Attributes:
        logits: (K, K) ``S``, rows summing to zero over their finite entries; ``S[k, j]`` is the
            score of attended token ``j`` under query ``k``, minus infinity where masked.
    """

    logits: Float[Array, "token token"]

    @classmethod
    def from_transition_matrix(cls, transition_matrix: ArrayLike) -> CCMC:
        """The CCMC with base transition matrix ``P``.

        Args:
            transition_matrix: (K, K), non-negative, rows summing to 1; zeros mean that the
                query never attends the token, whatever the context.

        Raises:
            ValueError: If the matrix is not square, holds a negative, NaN or infinite entry, or
                has a row that does not sum to 1 within 1e-5 (the row and its sum are named).

        >>> print(CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]]).logits.round(2))
        [[ 0.    0.  ]
         [-0.55  0.55]]
        """
        if _validate.is_concrete(transition_matrix):
            p = _validate.stochastic_matrix(transition_matrix, "transition_matrix")
            with np.errstate(divide="ignore"):
                logits = np.log(p)
            return cls._from_float64(logits)
        return cls(logits_from_transition_matrix(jnp.asarray(transition_matrix)))

    @classmethod
    def from_logits(cls, logits: ArrayLike) -> CCMC:
        """The CCMC with attention scores ``S``, any gauge; rows are centred here.

        Args:
            logits: (K, K) real scores; minus infinity masks a token for a query.

        Raises:
            ValueError: If the array is not square, holds NaN or plus infinity, or masks a whole
                row.

        >>> CCMC.from_logits([[3.0, 1.0], [0.0, 0.0]]).logits.tolist()
        [[1.0, -1.0], [0.0, 0.0]]
        """
        if _validate.is_concrete(logits):
            s = _validate.finite(logits, "logits", allow_minus_inf=True)
            _validate.square(s, "logits")
            empty = np.flatnonzero(np.isneginf(s).all(axis=1))
            if empty.size:
                raise ValueError(f"logits: row {empty[0]} is minus infinity throughout")
            return cls._from_float64(s)
        return cls(centre_logits(jnp.asarray(logits)))

    @staticmethod
    def from_attention_head(
        embedding: ArrayLike,
        query_weight: ArrayLike,
        key_weight: ArrayLike,
        scale: float | None = None,
    ) -> AttentionHead:
        """An :class:`AttentionHead`: the CCMC of ``S = (E W_Q)(E W_K)ᵀ · scale``, kept low-rank.

        Multiplied on the host in float64. The (K, K) logits are never made unless asked for
        (:meth:`AttentionHead.to_ccmc`), so that a vocabulary of 50,000 tokens will do;
        :func:`attnmarkov.rollout` takes what is returned.

        Args:
            embedding: (K, d) ``E``, any rank; row ``k`` embeds token ``k``.
            query_weight: (d, r) ``W_Q``.
            key_weight: (d, r) ``W_K``.
            scale: Factor of the scores; ``1 / sqrt(r)``, as transformers have it, if None.

        Raises:
            ValueError: If shapes disagree or an entry is not finite.

        >>> import jax, jax.numpy as jnp, attnmarkov as am
        >>> e, w_q, w_k = (jax.random.normal(jax.random.key(i), (n, 8)) for i, n in
        ...                enumerate((50_000, 8, 8)))
        >>> head = CCMC.from_attention_head(e, w_q, w_k)
        >>> head
        AttentionHead(num_tokens=50000, rank=8)
        >>> am.rollout(head, jax.random.key(0), [49_999, 7, 7], 100).tokens.shape
        (1, 100)
        """
        from attnmarkov.model.attention_head import AttentionHead

        return AttentionHead.from_weights(embedding, query_weight, key_weight, scale)

    @classmethod
    def _from_float64(cls, s: np.ndarray) -> CCMC:
        finite = np.isfinite(s)
        mean = np.where(finite, s, 0).sum(axis=1, keepdims=True) / finite.sum(axis=1, keepdims=True)
        return cls(jnp.asarray(s - mean, jnp.result_type(float)))

    @property
    def transition_matrix(self) -> Float[Array, "token token"]:
        """``P = softmax(S)`` by rows, (K, K)."""
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.logits.shape[-1]

    def log_next_token_probs(self, counts: ArrayLike, last: ArrayLike) -> Float[Array, "*b token"]:
        """Logarithm of :meth:`next_token_probs`; minus infinity where a token cannot come."""
        counts, last = check_context(counts, last, self.num_tokens)
        return jax.nn.log_softmax(scores(self.logits, counts, last), axis=-1)

    def next_token_probs(self, counts: ArrayLike, last: ArrayLike) -> Float[Array, "*b token"]:
        """The law of the next token ([CCMC], definition of the CCMC).

        Args:
            counts: (..., K) how often each token stands in the context; any non-negative
                weights will do.
            last: (...) the query token. It need not stand in the context (cross-attention).

        Returns:
            (..., K) probabilities; NaN where every token of the context is masked.

        Raises:
            ValueError: On concrete inputs, if shapes disagree, a count is negative or not
                finite, a context is empty, or ``last`` is no token id.

        >>> model = CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
        >>> model.next_token_probs([3, 1], 0).tolist()
        [0.75, 0.25]
        """
        return jnp.exp(self.log_next_token_probs(counts, last))

    def log_prob(self, prompts: Prompts, y: ArrayLike) -> Float[Array, " prompt"]:
        """Log-probability of each label after its prompt, in nats.

        Args:
            prompts: ``n`` prompts over this vocabulary.
            y: (n,) labels.

        Returns:
            (n,); minus infinity where the label does not stand in its prompt.

        Raises:
            ValueError: If sizes disagree or a label is no token id.

        >>> import attnmarkov as am
        >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
        >>> prompts = am.Prompts.from_tokens([[0, 0, 1], [1, 1, 0]], 2)
        >>> [round(float(v), 4) for v in model.log_prob(prompts, [1, 1])]
        [-0.5108, -0.4055]
        """
        self._check_vocabulary(prompts)
        if np.shape(y) != (prompts.num_prompts,):
            raise ValueError(f"y: expected shape ({prompts.num_prompts},), got {np.shape(y)}")
        if _validate.is_concrete(y):
            labels = _validate.integer_array(y, "y", ndim=(1,))
            _validate.token_range(labels, "y", self.num_tokens)
        law = jax.nn.log_softmax(scores(self.logits, prompts.counts, prompts.last), axis=-1)
        return jnp.take_along_axis(law, jnp.asarray(y)[:, None], axis=-1)[:, 0]

    def sample(self, key: Key[Array, ""], prompts: Prompts) -> Int[Array, " prompt"]:
        """Draw a label for every prompt, exactly down to probability 1e-9.

        Label ``i`` depends on ``(key, i)`` alone, however many prompts there are.

        Returns:
            (n,) int32 token ids; -1 where every token of the prompt is masked.

        Raises:
            ValueError: If the vocabularies differ or ``key`` is no typed key.
        """
        _validate.check_key(key)
        self._check_vocabulary(prompts)
        return _sample(self.logits, key, prompts.counts, prompts.last)

    def _check_vocabulary(self, prompts: Prompts) -> None:
        if prompts.num_tokens != self.num_tokens:
            raise ValueError(
                f"prompts: over {prompts.num_tokens} tokens, but the model has {self.num_tokens}"
            )

    def __repr__(self) -> str:
        """The size and the base transition matrix."""
        if not isinstance(self.logits, jax.Array) or not _validate.is_concrete(self.logits):
            return f"CCMC(logits={self.logits})"
        p = np.array2string(
            np.asarray(self.transition_matrix), precision=3, suppress_small=True, threshold=64
        )
        return f"CCMC(num_tokens={self.num_tokens}, transition_matrix=\n{p})"


@jax.jit
def _sample(s: jax.Array, key: jax.Array, counts: jax.Array, last: jax.Array) -> jax.Array:
    seeds = _random.replicate_seeds(key, jnp.arange(counts.shape[0]), "labels")
    weights = scores(s, counts, last)
    weights = jnp.exp(weights - weights.max(-1, keepdims=True))
    return _random.draw(weights, _random.words(seeds, 0))


def check_context(
    counts: ArrayLike, last: ArrayLike, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """``counts`` (..., K) and query tokens ``last`` (...) as arrays; or a ``ValueError``."""
    if np.shape(counts)[-1:] != (num_tokens,):
        raise ValueError(
            f"counts: expected {num_tokens} entries on the last axis, got shape {np.shape(counts)}"
        )
    if _validate.is_concrete(last):
        ids = _validate.integer_array(last, "last", ndim=tuple(range(np.ndim(last) + 1)))
        _validate.token_range(ids, "last", num_tokens)
    if _validate.is_concrete(counts):
        n = _validate.finite(counts, "counts")
        for bad, word in (((n < 0).any(-1), "a negative entry"), (n.sum(-1) == 0, "no token")):
            if bad.any():
                where = [int(i) for i in np.argwhere(bad)[0]]
                at = f"context {where}" if where else "the context"
                raise ValueError(f"counts: {at} has {word}")
    contexts, queries = np.shape(counts)[:-1], np.shape(last)
    try:
        np.broadcast_shapes(contexts, queries)
    except ValueError:
        raise ValueError(f"last: shape {queries} disagrees with contexts {contexts}") from None
    return jnp.asarray(counts), jnp.asarray(last)
