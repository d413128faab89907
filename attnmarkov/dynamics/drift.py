"""The drift of shares: where the chain goes while the counts stand still."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.chains import MarkovChain
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.model import FullContext, Sampling

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC, SelfAttention

_SAME_POWER = 1e-6  # powers nearer to 1 than this are 1 but for rounding


def stationary_law(
    model: CCMC | SelfAttention,
    shares: ArrayLike,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> Float[Array, "*batch token"]:
    """The law ``ν(m)`` of the tokens that come while the shares of the context are held at ``m``.

    It is the stationary law of ``M[k, j] ∝ m_j**a Q[k, j]`` with ``a = exponent / temperature``
    and ``Q = P ** (1 / temperature)``, the law that is drawn from with ``FullContext(exponent)``
    and ``Sampling(temperature)``. (A repetition penalty ``rho`` is a temperature ``1 / rho``.)
    Every entry has a small relative error, however near to a face of the simplex ``m`` lies.

    Args:
        model: The CCMC, or self-attention, that generates.
        shares: (..., K) shares ``m``, or counts: only their ratios matter. Tokens with 0 are
            absent and never come; so are those with less than 1.2e-38 of the largest, the
            smallest normal number of float32 (2.2e-308 with x64).
        exponent: Reinforcement exponent of the context.
        temperature: Temperature of the decoder, positive.

    Returns:
        (..., K) probabilities; 0 for absent tokens. Inside jit or vmap, NaN where masked tokens
        split the context into parts that are never left.

    Raises:
        ValueError: If ``shares`` has another number of tokens, a negative or infinite entry, or
            no positive one; if a parameter is out of range; if masked tokens split
            the context into parts that are never left, so that the law is not unique; or if the
            power is so high or the temperature so low that the chances to leave tokens underflow.

    References:
        Benaïm (1997), Benaïm and Tarrès (2011), for the mean field of reinforced walks.

    >>> import attnmarkov as am, numpy as np
    >>> model = am.CCMC.from_transition_matrix([[0.75, 0.25], [0.5, 0.5]])
    >>> print(np.asarray(stationary_law(model, [0.5, 0.5])).round(3))
    [0.667 0.333]
    """
    log_q, power = sharpened(model, exponent, temperature)
    m = check_shares(shares, "shares", model.num_tokens)
    return _known(_laws(log_q, power, jnp.log(m), closed_tokens(log_q, m, "shares")), power)


def drift(
    model: CCMC | SelfAttention,
    shares: ArrayLike,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> Float[Array, "*batch token"]:
    """``ν(m) − m``: how the shares of a long generation move per unit of ``log t``.

    Arguments, and what is raised, as :func:`stationary_law`; shares are normalised first.

    Returns:
        (..., K), summing to 0.

    >>> import attnmarkov as am, numpy as np
    >>> model = am.CCMC.from_transition_matrix([[0.75, 0.25], [0.5, 0.5]])
    >>> print(np.asarray(drift(model, [0.5, 0.5])).round(3))
    [ 0.167 -0.167]
    """
    m = check_shares(shares, "shares", model.num_tokens)
    return stationary_law(model, m, exponent=exponent, temperature=temperature) - m


def growth_exponents(
    model: CCMC | SelfAttention,
    shares: ArrayLike,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> Float[Array, "*batch token"]:
    """``d log n_j / d log t = ν_j(m) / m_j``: the slope of each token's count at shares ``m``.

    At an equilibrium it is 1 for the tokens that stay and ``λ_j`` for the others. On the way there
    it is what the local slope of a log-log plot of counts tends to. For absent tokens it is the
    slope that a very rare one would have: ``Σ_k ν_k P[k, j] / Σ_i m_i P[k, i]`` for power 1;
    0 above, and infinite below it.

    Arguments, and what is raised, as :func:`stationary_law`.

    Returns:
        (..., K) exponents.

    >>> import attnmarkov as am, numpy as np
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.5, 0.5]])
    >>> print(np.asarray(growth_exponents(model, [[0.5, 0.5], [1.0, 0.0]])).round(3))
    [[1.429 0.571]
     [1.    0.25 ]]
    """
    log_q, power = sharpened(model, exponent, temperature)
    m = check_shares(shares, "shares", model.num_tokens)
    return _known(_growths(log_q, power, jnp.log(m), closed_tokens(log_q, m, "shares")), power)


def sharpened(
    model: CCMC | SelfAttention, exponent: float, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """``log Q`` (K, K), rows up to a constant, and the power ``a`` of the shares.

    Raises:
        ValueError: If ``exponent`` or ``temperature`` is out of range.
    """
    check_power(exponent, temperature)
    logits = as_ccmc(model).logits
    most = jnp.max(logits, axis=1, keepdims=True)
    centred = logits - jnp.where(most > -jnp.inf, most, 0)
    if _validate.is_concrete(exponent, temperature):
        return centred / temperature, jnp.asarray(power_of(exponent, temperature), logits.dtype)
    power = jnp.asarray(exponent / temperature, logits.dtype)
    return centred / temperature, jnp.where(abs(power - 1) < _SAME_POWER, 1, power)


def power_of(exponent: float, temperature: float) -> float:
    """``a = exponent / temperature``; exactly 1 where it is within 1e-6 of it.

    >>> power_of(0.1 + 0.2, 0.3)
    1.0
    """
    power = float(exponent) / float(temperature)
    return 1.0 if abs(power - 1) < _SAME_POWER else power


def _known(values: jax.Array, power: jax.Array) -> jax.Array:
    """The values, unless they are concrete and NaN."""
    if _validate.is_concrete(values) and np.isnan(np.asarray(values)).any():
        raise ValueError(
            f"temperature: at power {float(power):g} the chances to leave some tokens underflow, "
            "so that the law that visits follow is not known; take a higher temperature or a "
            "lower exponent"
        )
    return values


def check_power(exponent: float, temperature: float) -> None:
    """Raise ``ValueError`` if either is no number or out of range."""
    FullContext(exponent=exponent).check()
    Sampling(temperature=temperature).check()


def check_shares(shares: ArrayLike, name: str, num_tokens: int) -> jax.Array:
    """(..., K) shares that sum to 1, from shares or counts; 0 for those that underflow."""
    if np.shape(shares)[-1:] != (num_tokens,):
        raise ValueError(
            f"{name}: expected {num_tokens} entries on the last axis, got shape {np.shape(shares)}"
        )
    if _validate.is_concrete(shares):
        m = _validate.finite(shares, name)
        for bad, word in (((m < 0).any(-1), "a negative entry"), ((m <= 0).all(-1), "no token")):
            if bad.any():
                where = [int(i) for i in np.argwhere(bad)[0]]
                row = f"row {where}" if where else "the vector"
                raise ValueError(f"{name}: {row} has {word}: {m[tuple(where)]}")
        m = m / m.max(-1, keepdims=True)  # sums of very small or large counts stay finite
        dtype = jnp.result_type(float)
        m = np.where(m < np.finfo(dtype).tiny, 0, m)
        return jnp.asarray(m / m.sum(-1, keepdims=True), dtype)
    m = jnp.asarray(shares, jnp.result_type(float))
    return m / m.sum(-1, keepdims=True)


def closed_tokens(log_q: jax.Array, shares: jax.Array, name: str) -> Bool[Array, "*batch token"]:
    """The tokens that go on coming for ever, all that are present unless some are masked.

    Raises:
        ValueError: If they fall into two or more classes that never reach one another.
    """
    present = shares > 0
    if not _validate.is_concrete(log_q, shares) or np.isfinite(np.asarray(log_q)).all():
        return present
    allowed = np.isfinite(np.asarray(log_q))
    flat = np.asarray(present).reshape(-1, present.shape[-1])
    kinds, index = np.unique(flat, axis=0, return_inverse=True)
    closed = np.stack([_closed(allowed, kind, name) for kind in kinds])
    return jnp.asarray(closed[index.reshape(-1)].reshape(present.shape))


def _closed(allowed: np.ndarray, present: np.ndarray, name: str) -> np.ndarray:
    tokens = np.flatnonzero(present)
    reach = reachable(allowed[np.ix_(tokens, tokens)])
    recurrent = (reach <= reach.T).all(axis=1)  # whatever it reaches, reaches it
    classes = np.unique(reach[recurrent], axis=0)
    if len(classes) > 1:
        shown = " and ".join(str(tokens[c].tolist()) for c in classes)
        raise ValueError(
            f"{name}: masked tokens keep {shown} apart: a generation stays in one of them, and "
            "the mean field is that of its tokens alone"
        )
    closed = np.zeros(len(present), bool)
    closed[tokens[recurrent]] = True
    return closed


def reachable(allowed: np.ndarray) -> np.ndarray:
    """(..., K, K) bool, whether each token can be followed by each, in any number of steps >= 0."""
    size = allowed.shape[-1]
    reach = allowed | np.eye(size, dtype=bool)
    for _ in range(max(size - 1, 1).bit_length()):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return reach


def frozen_law(
    log_q: Float[Array, "token token"],
    power: Float[Array, ""],
    log_m: Float[Array, " token"],
    closed: Bool[Array, " token"],
) -> tuple[Float[Array, " token"], Float[Array, "token token"]]:
    """``ν(m)`` and ``log Q[k, j] − log Σ_i (m_i / max m)**a Q[k, i]``. For use inside jit.

    States are eliminated from the rarest on (Grassmann, Taksar and Heyman 1985): what is divided
    by is then the chance to go to more frequent ones, which does not vanish near a face.
    """
    present = log_m > -jnp.inf
    most = jnp.max(log_m)  # large powers of it would leave no digits
    log_y = jnp.where(present, power * jnp.where(present, log_m - most, 0), -jnp.inf)
    scores = log_q + log_y
    total = jax.scipy.special.logsumexp(scores, axis=1, keepdims=True)
    order = jnp.lexsort((-jnp.where(present, log_m, -jnp.inf), ~closed))
    lost = jnp.arange(len(log_m)) == order[0]  # rows of absent tokens that attend no other
    law = jnp.where(total > -jnp.inf, jnp.exp(scores - jnp.where(total > -jnp.inf, total, 0)), lost)
    visits = MarkovChain(law[order][:, order]).stationary()
    return jnp.zeros_like(log_m).at[order].set(visits), log_q - total


@jax.jit
def _laws(log_q: jax.Array, power: jax.Array, log_m: jax.Array, closed: jax.Array) -> jax.Array:
    law = jnp.vectorize(lambda m, c: frozen_law(log_q, power, m, c)[0], signature="(k),(k)->(k)")
    return law(log_m, closed)


def growths(
    log_q: Float[Array, "token token"],
    power: Float[Array, ""],
    log_m: Float[Array, " token"],
    closed: Bool[Array, " token"],
) -> Float[Array, " token"]:
    """``ν_j(m) / m_j``, from the other tokens' pull so that no share is too small. For jit."""
    visits, relative = frozen_law(log_q, power, log_m, closed)
    came = visits > 0
    most = jnp.max(log_m)  # relative has power * most in it: (a - 1) log m_j is what is missing
    boost = jnp.where(power == 1, 0, (power - 1) * jnp.where(power == 1, 0, log_m - most)) - most
    possible = came[:, None] & (relative > -jnp.inf)
    each = jnp.exp(jnp.where(possible, jnp.where(possible, relative, 0) + boost, -jnp.inf))
    return jnp.matmul(jnp.where(came, visits, 0), each, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _growths(log_q: jax.Array, power: jax.Array, log_m: jax.Array, closed: jax.Array) -> jax.Array:
    growth = jnp.vectorize(partial(growths, log_q, power), signature="(k),(k)->(k)")
    return growth(log_m, closed)
