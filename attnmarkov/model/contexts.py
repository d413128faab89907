"""Contexts: how the history becomes the weights that tokens are drawn with.

A context gives position ``i`` of a history of ``L`` tokens the weight ``exp b(i, L)``. Adding
``b`` to the attention scores is the same as replacing the count ``n_j`` of a token by the
**position-weighted count**, the sum of the weights of its positions ([CCMC]). The law of the
next token after query ``q`` is then proportional to ``n_j ** exponent * P[q, j]``, where exponent
1 is attention and others make the generating chain a more or less strongly reinforced walk.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.prompts import Prompts

_MOST = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False, repr=False)
class Context(abc.ABC):
    """How the positions of a history are weighed; see the classes below it.

    A pytree, whose numbers may be traced: a grid of them shares one compilation.

    Attributes:
        exponent: Reinforcement exponent, between ±1e6: weights are ``n_j ** exponent``.
            At 0 all tokens present weigh alike, below 0 frequent ones are repelled; a token
            with ``n_j = 0`` never comes, whatever the exponent.
    """

    exponent: float | Float[Array, ""] = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        # A list is one array, not a pytree of numbers; what is no array is left for check().
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, list | tuple | range):
                with contextlib.suppress(TypeError, ValueError):
                    object.__setattr__(self, each.name, np.asarray(value, float))

    @property
    def max_length(self) -> int | None:
        """The most tokens that a context can hold; None if there is no bound."""
        return None

    def check(self) -> None:
        """Raise unless the values are valid. Traced ones are not looked at.

        Raises:
            ValueError: If a parameter has the wrong shape or lies outside its range.
        """
        exponent = _leaves.number(self.exponent, "exponent")
        if exponent is not None and not abs(exponent) <= 1e6:
            raise ValueError(f"exponent: must lie between -1e6 and 1e6, got {exponent:g}")

    def check_prompts(self, prompts: Prompts, num_steps: int = 1) -> None:
        """Raise unless ``num_steps`` tokens can be drawn after each of the prompts.

        Raises:
            ValueError: If positions are weighed but only counts are known, or if a history
                would outgrow :attr:`max_length` before its last draw.
        """
        if prompts.tokens is None or prompts.lengths is None:
            raise ValueError(
                f"context: {type(self).__name__} weighs positions, so it needs token ids, but "
                "only the counts of these prompts are known"
            )
        if self.max_length is not None and _validate.is_concrete(prompts.lengths):
            longest = int(np.max(np.asarray(prompts.lengths))) + num_steps - 1
            if longest > self.max_length:
                raise ValueError(
                    f"context: holds {self.max_length} positions, but the last draw is made "
                    f"from {longest} tokens"
                )

    @abc.abstractmethod
    def position_log_weights(
        self, tokens: ArrayLike, length: ArrayLike, query: ArrayLike
    ) -> Float[Array, "... position"]:
        """Log-weight ``b(i, L)`` of every position. No checks: for use inside jit.

        Args:
            tokens: (..., N) token ids, right-padded; N is the room, not the length.
            length: (...) number ``L`` of valid tokens. The last has lag 0.
            query: (...) query tokens; only :class:`PositionContext` looks at them.

        Returns:
            (..., N); minus infinity from ``length`` on, and outside the context.
        """

    def token_shift(self, length: ArrayLike) -> Float[Array, "... token"] | None:
        """Shift of every token's logit at this length, (..., K); None if there is none."""
        return None

    def token_log_weights(
        self,
        tokens: ArrayLike,
        length: ArrayLike,
        query: ArrayLike,
        num_tokens: int,
    ) -> Float[Array, "... token"]:
        """``exponent * log n_j`` of every token, plus its shift. No checks: for use inside jit.

        Summed relative to each token's largest weight, so that ``gamma ** lag`` far below the
        smallest float32 keeps its logarithm. Arguments as :meth:`position_log_weights`.

        Returns:
            (..., K); minus infinity for tokens that are not in the context.

        >>> import jax.numpy as jnp
        >>> tokens = jnp.array([1] + 999 * [0])
        >>> print(DecayContext(0.5).token_log_weights(tokens, 1000, 0, 3).round(1))
        [   0.7 -692.5   -inf]
        """
        positions = self.position_log_weights(tokens, length, query)
        add_up = jnp.vectorize(partial(_add_up, num_tokens), signature="(n),(n)->(k)")
        log_n = add_up(positions, jnp.asarray(tokens))
        present = log_n > -jnp.inf  # 0 times minus infinity would be NaN
        out = jnp.where(present, self.exponent * jnp.where(present, log_n, 0), -jnp.inf)
        shift = self.token_shift(length)
        return out if shift is None else out + shift

    def weighted_counts(self, prompts: Prompts) -> Float[Array, "prompt token"]:
        """``n_j ** exponent``, times ``exp`` of the token's shift: counts as this context has them.

        ``model.next_token_probs(context.weighted_counts(prompts), prompts.last)`` is the law of
        the next token under this context.

        Returns:
            (n, K) float32, zero for tokens outside the context. Weights below 1e-38 are lost
            and those above 3e38 infinite; :meth:`token_log_weights` holds both.

        Raises:
            ValueError: As :meth:`check` and :meth:`check_prompts`.

        >>> import attnmarkov as am
        >>> prompts = am.Prompts.from_tokens([[0, 1, 0, 2], [1, 1]], 3)
        >>> DecayContext(0.5).weighted_counts(prompts).tolist()
        [[0.625, 0.25, 1.0], [0.0, 1.5, 0.0]]
        """
        return jnp.exp(self.log_weighted_counts(prompts))

    def log_weighted_counts(self, prompts: Prompts) -> Float[Array, "prompt token"]:
        """Logarithms of :meth:`weighted_counts`, which neither overflow nor underflow.

        Returns:
            (n, K) float32; minus infinity for tokens outside the context.

        Raises:
            ValueError: As :meth:`check` and :meth:`check_prompts`.
        """
        self.check()
        self.check_prompts(prompts)
        return _log_weighted_counts(self, prompts)

    def __repr__(self) -> str:
        """The parameters, arrays by their shape."""
        return _leaves.show(self)


class _ByLag(Context):
    """A context whose weights depend on the lag alone."""

    @abc.abstractmethod
    def lag_log_weights(self, lag: Int[Array, ...]) -> Float[Array, ...]:
        """Log-weight of a token ``lag`` >= 0 steps behind the last, elementwise."""

    def position_log_weights(
        self, tokens: ArrayLike, length: ArrayLike, query: ArrayLike
    ) -> Float[Array, "... position"]:
        """See :meth:`Context.position_log_weights`."""
        lag = jnp.asarray(length)[..., None] - 1 - jnp.arange(np.shape(tokens)[-1])
        return jnp.where(lag >= 0, self.lag_log_weights(jnp.maximum(lag, 0)), -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class FullContext(_ByLag):
    """The whole history, every position with weight 1: the CCMC of [CCMC].

    The order of the history does not matter, so counts are all it needs of a prompt.

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_counts([[3, 0, 2]], [0])
    >>> FullContext().weighted_counts(prompts).tolist()
    [[3.0, 0.0, 2.0]]
    >>> FullContext(exponent=2.0).weighted_counts(prompts).tolist()
    [[9.0, 0.0, 4.0]]
    """

    def check_prompts(self, prompts: Prompts, num_steps: int = 1) -> None:
        """Any prompt will do."""

    def lag_log_weights(self, lag: Int[Array, ...]) -> Float[Array, ...]:
        """Zeros."""
        return jnp.zeros(lag.shape)

    def weighted_counts(self, prompts: Prompts) -> Float[Array, "prompt token"]:
        """``n_j ** exponent`` from the counts alone; see :meth:`Context.weighted_counts`."""
        self.check()
        counts = jnp.asarray(prompts.counts, float)
        return jnp.where(counts > 0, counts**self.exponent, 0)

    def log_weighted_counts(self, prompts: Prompts) -> Float[Array, "prompt token"]:
        """From the counts alone; see :meth:`Context.log_weighted_counts`."""
        self.check()
        counts = jnp.asarray(prompts.counts, float)
        log_n = jnp.log(jnp.where(counts > 0, counts, 1))
        return jnp.where(counts > 0, self.exponent * log_n, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DecayContext(_ByLag):
    """Weight ``gamma ** lag``: ALiBi with slope ``-log gamma`` (Press, Smith and Lewis 2022).

    Counts forget: each step multiplies them by ``gamma`` and adds the new token. In float32
    ``1 - gamma`` is known within 6e-8, so a memory ``1 / (1 - gamma)`` past 1e6 steps is not
    the one asked for.

    Attributes:
        gamma: Factor per step, in (0, 1]; 1 is :class:`FullContext`.
        exponent: As :class:`Context`.

    >>> import jax.numpy as jnp
    >>> jnp.exp(DecayContext(0.5).position_log_weights(jnp.zeros(4, int), 3, 0)).tolist()
    [0.25, 0.5, 1.0, 0.0]
    """

    gamma: float | Float[Array, ""]

    def check(self) -> None:
        """See :meth:`Context.check`; ``gamma`` must lie in (0, 1]."""
        super().check()
        _leaves.fraction(self.gamma, "gamma")

    def lag_log_weights(self, lag: Int[Array, ...]) -> Float[Array, ...]:
        """``lag * log gamma``."""
        gamma = jnp.asarray(self.gamma, float)
        return lag * jnp.log(jnp.maximum(gamma, jnp.finfo(gamma.dtype).tiny))  # 0 * -inf is NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class WindowContext(_ByLag):
    """The last ``size`` tokens, with weight 1: sliding-window attention.

    A token that leaves the window never comes back, so that generation is absorbed in a window
    of one single token.

    Attributes:
        size: Number of tokens seen, at least 1; part of the compiled program.
        exponent: As :class:`Context`.

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 0, 1, 0]], 2)
    >>> WindowContext(3).weighted_counts(prompts).tolist()
    [[2.0, 1.0]]
    """

    size: int = field(metadata={"static": True})

    def check(self) -> None:
        """See :meth:`Context.check`; ``size`` must be an integer of at least 1."""
        super().check()
        _validate.integer(self.size, "size", minimum=1)

    def lag_log_weights(self, lag: Int[Array, ...]) -> Float[Array, ...]:
        """0 inside the window, minus infinity beyond."""
        return jnp.where(lag < min(self.size, _MOST), 0.0, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class LagContext(_ByLag):
    """Weight ``weights[lag]``, and 0 beyond its end: any causal lag weights.

    A history all of whose positions weigh 0, such as a single token where ``weights[0]`` is 0,
    has nothing to attend.

    Attributes:
        weights: (M,) weights of lags 0 to M - 1, finite, non-negative, not all zero.
        exponent: As :class:`Context`.

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 0, 1, 0]], 2)
    >>> LagContext([0.0, 2.0, 1.0]).weighted_counts(prompts).tolist()
    [[1.0, 2.0]]
    """

    weights: ArrayLike

    def check(self) -> None:
        """See :meth:`Context.check`; ``weights`` as the attribute says."""
        super().check()
        w = _leaves.finite(self.weights, "weights")
        if np.ndim(w) != 1 or np.size(w) == 0:
            raise ValueError(f"weights: expected a non-empty (M,) vector, got shape {np.shape(w)}")
        if not isinstance(w, np.ndarray):
            return
        if (w < 0).any():
            raise ValueError(f"weights: lag {(w < 0).argmax()} has weight {w[w < 0][0]:g}")
        if not (w > 0).any():
            raise ValueError("weights: every lag has weight 0")

    def lag_log_weights(self, lag: Int[Array, ...]) -> Float[Array, ...]:
        """``log weights[lag]``."""
        log_weights = jnp.log(jnp.asarray(self.weights, float))
        return log_weights.at[lag].get(mode="fill", fill_value=-jnp.inf)


def _add_up(num_tokens: int, log_weights: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log of the summed weights of every token, for one history."""
    top = jax.ops.segment_max(log_weights, tokens, num_tokens)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(log_weights - top[tokens])
    return top + jnp.log(jax.ops.segment_sum(weights, tokens, num_tokens))


@jax.jit
def _log_weighted_counts(context: Context, prompts: Prompts) -> jax.Array:
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    return context.token_log_weights(tokens, lengths, prompts.last, prompts.num_tokens)
