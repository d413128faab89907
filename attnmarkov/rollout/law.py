"""What one step of generation does: scores, context and decoder in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov import _validate
from attnmarkov.model.contexts import Context
from attnmarkov.model.decoders import Decoder
from attnmarkov.rollout._remember import Remembered

if TYPE_CHECKING:
    from jaxtyping import Array, Float


SPREAD = 60.0  # nats; exp(-60) times a count leaves float32 room for rare tokens beside it


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Law:
    """The law of the next token, given the history and the query token ``q``.

    The model's weights are ``n_j ** context.exponent * exp S[q, j]`` with ``n_j`` as the context
    counts the history; the decoder turns them into the law that is drawn from.

    Attributes:
        logits: (K, K) scores ``S`` of the model, rows indexed by the query.
        context: How the history becomes weights.
        decoder: How weights become the law.
    """

    logits: Float[Array, "token token"]
    context: Context
    decoder: Decoder

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K."""
        return self.logits.shape[-1]

    @property
    def is_plain(self) -> bool:
        """Whether a token comes by the sum of its positions' attention: exponent 1, no decoding.

        Decided on concrete values, so before jit; False where they are traced.
        """
        exponent = self.context.exponent
        with jax.ensure_compile_time_eval():  # known values may be used within jit
            return _validate.is_concrete(exponent) and bool(exponent == 1) and self.decoder.is_plain

    @property
    def fits_float32(self) -> bool:
        """Whether products of counts and ``P`` can be formed in float32.

        No finite logit is more than 60 nats below its row's largest, which leaves room for rare
        tokens beside it. True where the logits are traced.
        """
        return not _validate.is_concrete(self.logits) or _depth(self.logits)[0] > -SPREAD

    @property
    def masks(self) -> bool:
        """Whether a query never attends some token. Decided on concrete values."""
        return _depth(self.logits)[1]


@jax.jit
def _deepest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest finite logit relative to its row's largest, and whether any is not finite."""
    below = logits - logits.max(axis=1, keepdims=True)
    finite = jnp.isfinite(below)
    return jnp.where(finite, below, 0).min(), ~finite.all()


def _known_depth(logits: jax.Array) -> tuple[float, bool]:
    deepest, masked = _deepest(logits)
    return float(deepest), bool(masked)


_depth = Remembered(_known_depth, 64)
