"""The maximum of the likelihood when it lies at infinity: where the data send it, and what stays.

Along every edge ``a → b`` of a win graph between two strong components the likelihood rises to
its supremum as ``S[b] − S[a] → ∞``. In that limit a prompt keeps only the tokens of its label's
strong component, and what is left has one finite maximum per strong component. Whether a
contrast is finite, infinite or not determined is therefore a matter of reachability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from attnmarkov.estimate.newton import newton
from attnmarkov.estimate.prior import Prior

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from attnmarkov.estimate._blocks import Blocks

_TOLERANCE = {"float32": 4e-8, "float64": 1e-10}  # of the gradient per label
_MAX_ITERATIONS = 100


class Maximum(NamedTuple):
    """Where the likelihood has its supremum.

    Attributes:
        logits: Maximum of the limit: they compare within strong components.
        reach: ``[k, a, b]``: row ``k``'s win graph leads from ``a`` to ``b`` (or ``a`` is ``b``).
        blocks: The prompts, each cut down to the strong component of its label.
        converged: Whether the solver reached the maximum.
    """

    logits: Float[Array, "row token"]
    reach: Bool[Array, "row token token"]
    blocks: Blocks
    converged: Bool[Array, ""]

    @property
    def mutual(self) -> Bool[Array, "row token token"]:
        """Whether two tokens of a row are in one strong component."""
        return self.reach & self.reach.swapaxes(-1, -2)

    def contrast(self, contrasts: Int[Array, "contrast 3"]) -> Float[Array, " contrast"]:
        """``S[k, a] − S[k, b]``; infinite where one beats the other, NaN where neither does."""
        row, a, b = contrasts.T
        above, below = self.reach[row, b, a], self.reach[row, a, b]
        limit = jnp.where(above, jnp.inf, jnp.where(below, -jnp.inf, jnp.nan))
        return jnp.where(above & below, self.logits[row, a] - self.logits[row, b], limit)


def maximum(blocks: Blocks) -> Maximum:
    """Find the supremum. Time O(nK²) per iteration and O(K⁴ log K), memory O(nK + K³)."""
    reach = reachability(blocks)
    mutual = reach & reach.swapaxes(-1, -2)
    kept = restrict(blocks, mutual)
    dtype = blocks.weight.dtype
    least = jnp.argmax(mutual, axis=-1).astype(jnp.int32)
    solution = newton(
        kept,
        least,
        Prior().over(blocks.num_tokens, dtype),
        jnp.asarray(_TOLERANCE[str(dtype)], dtype),
        jnp.asarray(_MAX_ITERATIONS, jnp.int32),
    )
    return Maximum(solution.logits, reach, kept, solution.converged)


def reachability(blocks: Blocks) -> Bool[Array, "row token token"]:
    """``[k, a, b]``: whether row ``k``'s win graph leads from ``a`` to ``b``; True for a = b."""
    size = blocks.num_tokens
    beaten = jnp.zeros((size, size, size), jnp.int8)
    held = blocks.support.astype(jnp.int8)
    beaten = beaten.at[blocks.row[:, None], blocks.labels].max(held)
    reach = (beaten.swapaxes(-1, -2) > 0) | jnp.eye(size, dtype=bool)
    for _ in range((size - 1).bit_length()):  # paths of twice the length
        steps = reach.astype(jnp.float32)
        reach = jnp.matmul(steps, steps) > 0
    return reach


def restrict(blocks: Blocks, together: Bool[Array, "row token token"]) -> Blocks:
    """Every prompt less the tokens that are not ``together`` with its label."""
    kept = together[blocks.row[:, None], blocks.labels]
    return blocks._replace(log_counts=jnp.where(kept, blocks.log_counts, -jnp.inf), counts=None)
