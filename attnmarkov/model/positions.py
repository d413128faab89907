"""The context of absolute positions: learned ones, and the full additive encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import _leaves
from attnmarkov.model.contexts import Context

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from numpy.typing import ArrayLike

    from attnmarkov.model.attention import SelfAttention
    from attnmarkov.prompts import Prompts

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply in bf16 or tf32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class PositionContext(Context):
    """Absolute positions: log-weights for every position and length of the history.

    With position vectors ``u_i`` added to the embeddings, the score of position ``i`` under the
    token ``x_L`` at position ``L`` is ``(x_i + u_i)ᵀ W (x_L + u_L)``. Its four terms are the
    model's ``S``, and the three arrays below. Of ``bias``, a constant per column changes no law.

    Attributes:
        bias: (N, N), ``bias[i, L - 1] = u_iᵀ W u_L``, the log-weight of position ``i`` in a
            history of ``L`` tokens; minus infinity masks it. Entries with ``i >= L`` are unused.
        query_bias: (N, K), ``u_iᵀ W e_q``, added to it under query token ``q``; None for none.
        token_bias: (K, N), ``token_bias[j, L - 1] = e_jᵀ W u_L``, a shift of token ``j``'s logit
            that :attr:`exponent` does not multiply; None for none.
        exponent: As :class:`Context`.

    >>> import attnmarkov as am, numpy as np
    >>> prompts = am.Prompts.from_tokens([[0, 0, 1], [1, 0]], 2)
    >>> PositionContext(np.log([[1.0, 2, 4], [1, 3, 5], [1, 1, 6]])).weighted_counts(prompts)
    Array([[9., 6.],
           [3., 2.]], dtype=float32)
    """

    bias: ArrayLike
    query_bias: ArrayLike | None = None
    token_bias: ArrayLike | None = None

    @classmethod
    def from_embeddings(
        cls, positions: ArrayLike, weight: ArrayLike, *, exponent: float = 1.0
    ) -> PositionContext:
        """Learned absolute positions: ``b(i, L) = u_iᵀ W u_L``, apart from the tokens.

        Args:
            positions: (N, d) vectors ``u_i``; histories hold up to N tokens.
            weight: (d, d) combined key-query matrix ``W`` of the positions.
            exponent: As the attribute.

        Raises:
            ValueError: If shapes disagree or an entry is not finite.

        >>> PositionContext.from_embeddings([[1.0], [2.0]], [[0.5]]).bias.tolist()
        [[0.5, 1.0], [1.0, 2.0]]
        """
        u, w = _matrix(positions, "positions"), _matrix(weight, "weight")
        if w.shape != (u.shape[1], u.shape[1]):
            raise ValueError(f"weight: expected shape {(u.shape[1],) * 2}, got {w.shape}")
        return cls(_bilinear(u, w, u), exponent=exponent)

    @classmethod
    def from_attention(
        cls, attention: SelfAttention, positions: ArrayLike, *, exponent: float = 1.0
    ) -> PositionContext:
        """The full additive encoding, for use with the model ``attention.to_ccmc()``.

        Together they have the law of attention with scores ``(x_i + u_i)ᵀ W (x_L + u_L)`` whose
        head reads the token that stands at a position. Tokens that ``attention`` masks stay masked
        in the model.

        Args:
            attention: Self-attention of width d.
            positions: (N, d) vectors ``u_i``; histories hold up to N tokens.
            exponent: As the attribute.

        Raises:
            ValueError: If the widths disagree or an entry is not finite.
        """
        u, e, w = _matrix(positions, "positions"), attention.embedding, attention.weight
        if u.shape[1] != e.shape[-1]:
            raise ValueError(
                f"positions: have width {u.shape[1]}, but the attention has {e.shape[-1]}"
            )
        bias, by_query, by_token = _bilinear(u, w, u), _bilinear(u, w, e), _bilinear(e, w, u)
        return cls(bias, by_query, by_token, exponent=exponent)

    @property
    def max_length(self) -> int:
        """The most tokens that a context can hold, N."""
        return np.shape(self.bias)[0]

    def check(self) -> None:
        """See :meth:`Context.check`; arrays as the attributes say."""
        super().check()
        bias = _leaves.finite(self.bias, "bias", allow_minus_inf=True)
        _validate.square(bias, "bias")
        room = self.max_length
        if isinstance(bias, np.ndarray):
            masked = np.isneginf(bias) | np.tri(room, k=-1, dtype=bool)  # i >= L is no history
            if masked.all(axis=0).any():
                length = int(masked.all(axis=0).argmax()) + 1
                raise ValueError(f"bias: masks every position of a history of {length} tokens")
        sizes = {}
        for name, axis in (("query_bias", 0), ("token_bias", 1)):
            if getattr(self, name) is None:
                continue
            shape = np.shape(_leaves.finite(getattr(self, name), name))
            if len(shape) != 2 or shape[axis] != room:
                layout = ("(N, K)", "(K, N)")[axis]
                raise ValueError(f"{name}: expected shape {layout} with N = {room}, got {shape}")
            sizes[name] = shape[1 - axis]
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"token_bias: is for {sizes['token_bias']} tokens, but query_bias is for "
                f"{sizes['query_bias']}"
            )

    def check_prompts(self, prompts: Prompts, num_steps: int = 1) -> None:
        """See :meth:`Context.check_prompts`; the biases must be for the same vocabulary."""
        super().check_prompts(prompts, num_steps)
        for name, axis in (("query_bias", 1), ("token_bias", 0)):
            array = getattr(self, name)
            if array is not None and np.shape(array)[axis] != prompts.num_tokens:
                raise ValueError(
                    f"{name}: is for {np.shape(array)[axis]} tokens, but the prompts are over "
                    f"{prompts.num_tokens}"
                )

    def position_log_weights(
        self, tokens: ArrayLike, length: ArrayLike, query: ArrayLike
    ) -> Float[Array, "... position"]:
        """See :meth:`Context.position_log_weights`; nothing is seen past :attr:`max_length`."""
        positions = jnp.arange(np.shape(tokens)[-1])
        length = jnp.asarray(length)[..., None]
        bias = jnp.asarray(self.bias, float)
        out = bias.at[positions, length - 1].get(mode="fill", fill_value=-jnp.inf)
        if self.query_bias is not None:
            out = (
                out + jnp.asarray(self.query_bias, float)[positions, jnp.asarray(query)[..., None]]
            )
        return jnp.where(positions < length, out, -jnp.inf)

    def token_shift(self, length: ArrayLike) -> Float[Array, "... token"] | None:
        """See :meth:`Context.token_shift`."""
        if self.token_bias is None:
            return None
        return jnp.asarray(self.token_bias, float).T[jnp.asarray(length) - 1]


def _matrix(array: ArrayLike, name: str) -> jax.Array:
    array = _leaves.finite(array, name)
    if np.ndim(array) != 2 or np.size(array) == 0:
        raise ValueError(f"{name}: expected a matrix, got shape {np.shape(array)}")
    return jnp.asarray(array, float)


def _bilinear(a: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(jnp.matmul(a, w, precision=_HIGHEST), b.T, precision=_HIGHEST)
