"""The flow of the mean field: how the shares of a long generation move in log time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics.drift import check_shares, closed_tokens, growths, sharpened

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC, SelfAttention

_MAX_STEPS = 100_000


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MeanField:
    """Solutions of ``dm/dτ = ν(m) − m``.

    Attributes:
        log_time: (points,) ``τ``: a context of ``L`` tokens has ``L exp(τ)`` of them then.
        shares: (B, points, K) shares of the context, rows summing to 1.
    """

    log_time: Float[Array, " point"]
    shares: Float[Array, "start point token"]

    def __repr__(self) -> str:
        """The sizes, and where the first few solutions begin and end."""
        known = isinstance(self.shares, jax.Array) and _validate.is_concrete(self)
        if not known or self.shares.ndim != 3:
            return f"MeanField(log_time={self.log_time}, shares={self.shares})"
        starts, points, size = self.shares.shape
        shares = np.asarray(self.shares)
        lines = [
            f"MeanField({starts} starts of {size} tokens, {points} points up to log time "
            f"{float(self.log_time[-1]):.4g}; shares at the start -> at the end"
        ]
        lines += [f"  {_show(m[0])} -> {_show(m[-1])}" for m in shares[:6]]
        return "\n".join(lines + ["  ..."] * (starts > 6)) + ")"


def mean_field(
    model: CCMC | SelfAttention,
    m0: ArrayLike,
    log_time: float = 20.0,
    num_points: int = 201,
    at: ArrayLike | None = None,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> MeanField:
    """Solve ``dm/dτ = ν(m) − m`` in log time ``τ = log t`` from given shares.

    Long generations follow this flow up to noise, which dies out as they grow. ``log m`` is what
    is integrated (Tsitouras' method of order 5, adaptive), so that a share that decays as
    ``exp((λ − 1) τ)`` keeps its relative accuracy, about 1e-4.

    Args:
        model: The CCMC, or self-attention, that generates.
        m0: (K,) or (B, K) shares at the start, or counts; tokens with 0 stay absent, and so
            do those with less than 1.2e-38 of the largest (2.2e-308 with x64).
        log_time: Where to end; from a context of ``L`` tokens that is ``L exp(log_time)`` tokens.
        num_points: Evenly spaced points from 0 to ``log_time``, at least 2.
        at: Increasing log times >= 0 to use instead of these.
        exponent: Reinforcement exponent of the context, as ``FullContext(exponent=...)``.
        temperature: As ``Sampling(temperature=...)``.

    Returns:
        A :class:`MeanField`, with a leading axis of B (1 for a single start).

    Raises:
        ValueError: As :func:`~attnmarkov.dynamics.stationary_law`; if ``m0`` has more than two
            dimensions; if ``log_time``, ``num_points`` or ``at`` is out of range.
        RuntimeError: If the solver does not get to the end.

    References:
        Benaïm (1997), Benaïm and Tarrès (2011), for reinforced walks; Tsitouras (2011).

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.7, 0.3]])
    >>> mean_field(model, [1, 3], log_time=12.0)
    MeanField(1 starts of 2 tokens, 201 points up to log time 12; shares at the start -> at the end
      [0.25 0.75] -> [9.998e-01 1.507e-04])
    """
    log_q, power = sharpened(model, exponent, temperature)
    if np.ndim(m0) not in (1, 2):
        raise ValueError(f"m0: expected shape (K,) or (B, K), got {np.shape(m0)}")
    m = jnp.atleast_2d(check_shares(m0, "m0", model.num_tokens))
    ts = jnp.asarray(_log_times(log_time, num_points, at), m.dtype)
    closed = closed_tokens(log_q, m, "m0")
    shares, steps_ran_out = _solve(log_q, power, m, closed, ts)
    if _validate.is_concrete(steps_ran_out, shares):
        steps_ran_out = np.asarray(steps_ran_out) | np.isnan(np.asarray(shares)).any((1, 2))
    if _validate.is_concrete(steps_ran_out) and bool(np.any(steps_ran_out)):
        row = int(np.argmax(np.asarray(steps_ran_out)))
        raise RuntimeError(f"m0: the flow from row {row} was not solved in {_MAX_STEPS} steps")
    return MeanField(ts, shares)


def _log_times(log_time: float, num_points: int, at: ArrayLike | None) -> np.ndarray:
    if at is None:
        if not _validate.finite(log_time, "log_time") > 0:
            raise ValueError(f"log_time: must be above 0, got {log_time}")
        return np.linspace(0, log_time, _validate.integer(num_points, "num_points", minimum=2))
    ts = np.atleast_1d(_validate.finite(at, "at"))
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(f"at: expected a non-empty vector of log times, got shape {ts.shape}")
    if ts[0] < 0 or (np.diff(ts) <= 0).any():
        raise ValueError(f"at: log times must increase from at least 0, got {ts}")
    return ts


@jax.jit
def _solve(
    log_q: jax.Array, power: jax.Array, m0: jax.Array, closed: jax.Array, ts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    import diffrax

    def field(_: Any, z: jax.Array, args: tuple[jax.Array, jax.Array]) -> jax.Array:
        present, closed = args
        growth = growths(log_q, power, jnp.where(present, z, -jnp.inf), closed)
        return jnp.where(present, growth - 1, 0)

    def one(m: jax.Array, closed: jax.Array) -> tuple[jax.Array, jax.Array]:
        present = m > 0
        z = jnp.log(jnp.where(present, m, 1))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=jnp.zeros_like(ts[0]),
            t1=jnp.maximum(ts[-1], jnp.finfo(ts.dtype).tiny),
            dt0=None,
            y0=z,
            args=(present, closed),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=diffrax.ForwardMode(),
            max_steps=_MAX_STEPS,
            throw=False,
        )
        path = jnp.where(present, jnp.asarray(solution.ys), -jnp.inf)
        return jax.nn.softmax(path, axis=-1), solution.result != diffrax.RESULTS.successful

    return jax.vmap(one)(m0, closed)


def _show(shares: np.ndarray) -> str:
    return np.array2string(shares, precision=3, threshold=8, edgeitems=3)
