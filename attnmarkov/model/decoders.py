"""Decoders: from the model's law of the next token to the law that it is drawn from."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnmarkov import _validate
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from numpy.typing import ArrayLike


class Decoder(abc.ABC):
    """A rule that turns the weights of the next token into the law it is drawn from.

    A pytree, whose numbers may be traced: a grid of them shares one compilation.
    """

    @property
    @abc.abstractmethod
    def is_plain(self) -> bool:
        """Whether the model's law is left as it is; False where that is traced."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise unless the values are valid. Traced ones are not looked at.

        Raises:
            ValueError: If a parameter lies outside its range.
        """

    @abc.abstractmethod
    def log_law(self, log_weights: Float[Array, ...], axis: int = -1) -> Float[Array, ...]:
        """Unnormalised log-weights of the decoded law. No checks: for use inside jit.

        Args:
            log_weights: Unnormalised log-weights of the model's law, such as
                ``S[q, j] + log n_j``; minus infinity for tokens that cannot come.
            axis: The axis of tokens.

        Returns:
            The same shape; minus infinity for tokens that cannot come, or are cut.
        """

    def law(self, log_weights: ArrayLike, axis: int = -1) -> Float[Array, ...]:
        """The decoded law itself: probabilities that sum to 1 along ``axis``.

        Arguments as :meth:`log_law`. NaN where no token can come.
        """
        return jax.nn.softmax(self.log_law(jnp.asarray(log_weights), axis), axis=axis)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Sampling(Decoder):
    """Draw from the model's law, sharpened and cut, in the order of Hugging Face's processors.

    1. Repetition penalty: log-probabilities of tokens that stand in the context are multiplied
       by it. In a CCMC only those can come, so all candidates are penalised alike, and a penalty
       ``rho`` is a temperature ``1 / rho``: larger ones make repetition *more* likely here.
    2. Temperature: ``law ∝ (n_j P) ** (1 / temperature)``. Both together are one power,
       ``repetition_penalty / temperature``.
    3. Top-k: the k most probable tokens, and those tied with the k-th.
    4. Top-p: tokens for which the mass of the strictly more probable ones, after the steps
       before, is below ``top_p`` (Holtzman et al. 2020). Tied tokens stay or go together, so
       that the law does not depend on the order of tokens; Hugging Face breaks ties by its sort.

    At least one token is always kept. Ties are those of float32.

    Attributes:
        temperature: Positive and finite.
        top_k: Integer of at least 1; None keeps all.
        top_p: In (0, 1]; None, and 1, keep all.
        repetition_penalty: Positive and finite; 1 is none.

    >>> import jax.numpy as jnp, numpy as np
    >>> log_law = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    >>> for decoder in (Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.6)):
    ...     print(decoder, np.asarray(decoder.law(log_law), float).round(3))
    Sampling(temperature=0.5) [0.727 0.182 0.045 0.045]
    Sampling(top_k=3) [0.5   0.25  0.125 0.125]
    Sampling(top_p=0.6) [0.667 0.333 0.    0.   ]
    """

    temperature: float | Float[Array, ""] = 1.0
    top_k: int | Int[Array, ""] | None = None
    top_p: float | Float[Array, ""] | None = None
    repetition_penalty: float | Float[Array, ""] = 1.0

    @property
    def is_plain(self) -> bool:
        """True for power 1 and no cuts."""
        if self.top_k is not None or not _validate.is_concrete(self):
            return False
        return bool(
            self.repetition_penalty == self.temperature and (self.top_p is None or self.top_p == 1)
        )

    def check(self) -> None:
        """See :meth:`Decoder.check`; ranges as the attributes say."""
        _leaves.positive(self.temperature, "temperature")
        if self.top_k is not None and _validate.is_concrete(self.top_k):
            _validate.integer(self.top_k, "top_k", minimum=1)
        if self.top_p is not None:
            _leaves.fraction(self.top_p, "top_p")
        _leaves.positive(self.repetition_penalty, "repetition_penalty")

    def log_law(self, log_weights: Float[Array, ...], axis: int = -1) -> Float[Array, ...]:
        """See :meth:`Decoder.log_law`; the largest is 0."""
        top = log_weights.max(axis, keepdims=True)
        power = jnp.asarray(self.repetition_penalty, log_weights.dtype) / self.temperature
        finite = jnp.finfo(power.dtype)  # zero or infinite powers would make NaNs
        z = log_weights - jnp.where(jnp.isfinite(top), top, 0)
        z = z * jnp.clip(power, finite.tiny, finite.max)
        if self.top_k is None and self.top_p is None:
            return z
        kept = z > -jnp.inf
        if self.top_k is not None:
            most = jnp.clip(self.top_k, 1, z.shape[axis])
            kept &= _above_cut(z, kept.astype(jnp.int32), most, axis)
        if self.top_p is not None:
            mass = jnp.where(kept, jnp.exp(z), 0)
            units = jnp.rint(mass * (2.0**30 / mass.sum(axis, keepdims=True))).astype(jnp.int32)
            total = units.sum(axis, keepdims=True)
            limit = jnp.ceil(jnp.asarray(self.top_p, jnp.float32) * total).astype(jnp.int32)
            nucleus = _above_cut(z, units, jnp.maximum(limit, 1), axis)
            kept &= nucleus | (jnp.asarray(self.top_p) >= 1)
        return jnp.where(kept, z, -jnp.inf)

    def __repr__(self) -> str:
        """The parameters that are not at their defaults."""
        return _leaves.show(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Greedy(Decoder):
    """The most probable token, always; of tied ones (in float32) the lowest id.

    >>> import jax.numpy as jnp
    >>> Greedy().law(jnp.array([0.0, 2.0, 2.0])).tolist()
    [0.0, 1.0, 0.0]
    """

    @property
    def is_plain(self) -> bool:
        """False."""
        return False

    def check(self) -> None:
        """Nothing can be wrong."""

    def log_law(self, log_weights: Float[Array, ...], axis: int = -1) -> Float[Array, ...]:
        """See :meth:`Decoder.log_law`; 0 for the token, minus infinity elsewhere."""
        token = jax.lax.broadcasted_iota(jnp.int32, log_weights.shape, axis % log_weights.ndim)
        best = token == jnp.argmax(log_weights, axis, keepdims=True)
        return jnp.where(best & (log_weights > -jnp.inf), 0.0, -jnp.inf).astype(log_weights.dtype)


def _above_cut(z: jax.Array, measure: jax.Array, limit: jax.Array, axis: int) -> jax.Array:
    """Where the integer ``measure`` of all strictly larger ``z`` is below ``limit`` > 0.

    The smallest such ``z <= 0`` is found by bisection on the bits of float32, in 31 passes over
    the tokens, much faster than sorting them on a CPU. Integers add up to the same in
    any order, so that a law does not depend on how tokens lie in memory.
    """
    bits = jax.lax.bitcast_convert_type(z.astype(jnp.float32), jnp.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of z; 0 for z = 0

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + ((high - low) >> 1)
        larger = jnp.where(rank > middle, measure, 0).sum(axis, keepdims=True, dtype=jnp.int32)
        below = larger < limit
        return jnp.where(below, low, middle), jnp.where(below, middle, high)

    top = jnp.zeros_like(rank.max(axis, keepdims=True))
    lowest = jnp.full_like(top, -2139095042)  # one less than minus infinity has
    return rank >= jax.lax.fori_loop(0, 31, halve, (lowest, top))[1]
