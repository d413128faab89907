"""Times at which rollouts get somewhere: measured with their censoring, and by the mean field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnmarkov import _validate
from attnmarkov._intervals import quantile_interval
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.dynamics.mean_field import mean_field
from attnmarkov.model import AttentionHead, _leaves
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import Summary, rollout, rollout_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import jax
    from jaxtyping import Array, Int, Key

    from attnmarkov.model import CCMC, Context, Decoder, SelfAttention

_CHUNK = 2**21  # tokens of all trajectories that are looked at together
_NEAR = 1 - 2.0**-22  # as in rollouts: 0.09 * 300 is above 27 in float32


class Estimate(NamedTuple):
    """A number, with the ends of its interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class PassageTimes:
    """Times of R trajectories, some of them perhaps not seen: censored at the last step.

    Attributes:
        times: (R,) int64 numbers of steps; -1 if it did not come within ``num_steps``.
        num_steps: Steps of each trajectory.
        level: Probability that an interval holds the truth.
    """

    times: Int[np.ndarray, " replicate"]
    num_steps: int
    level: float

    @property
    def num_censored(self) -> int:
        """Trajectories in which it did not come."""
        return int((self.times < 0).sum())

    def quantile(self, q: float) -> Estimate:
        """A quantile of the time, with a distribution-free interval from order statistics.

        Censored times count as later than all others: the value, or its upper end, is infinite
        where they are too many.

        Raises:
            ValueError: If ``q`` is not strictly between 0 and 1.
        """
        if not 0 < q < 1:
            raise ValueError(f"q: must lie strictly between 0 and 1, got {q}")
        times = np.where(self.times < 0, np.inf, self.times)
        lower, upper = quantile_interval(times, q, 1 - self.level)
        value = np.sort(times)[max(int(np.ceil(q * times.size)) - 1, 0)]
        return Estimate(float(value), max(lower, 0.0), upper)

    @property
    def median(self) -> Estimate:
        """The quantile at 1/2."""
        return self.quantile(0.5)

    @property
    def mean(self) -> Estimate:
        """The mean time, with a normal interval.

        If some are censored the value is the mean of ``min(time, num_steps)``, a lower bound of
        the truth, and the upper end is infinite.
        """
        from scipy import stats

        times = np.where(self.times < 0, self.num_steps, self.times).astype(float)
        half = np.inf
        if times.size > 1:
            z = stats.norm.isf((1 - self.level) / 2)
            half = float(z * times.std(ddof=1) / np.sqrt(times.size))
        value = float(times.mean())
        return Estimate(
            value, max(value - half, 0.0), np.inf if self.num_censored else value + half
        )

    def __repr__(self) -> str:
        """The median, and how many are censored."""
        value, lower, upper = self.median
        return (
            f"{type(self).__name__}({self.times.size} trajectories, median {value:g} "
            f"[{lower:g}, {upper:g}], {self.num_censored} not seen in {self.num_steps} steps)"
        )


def time_to_share(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    prompt: Any,
    share: float = 0.9,
    token: int | None = None,
    num_trajectories: int = 1000,
    num_steps: int = 100_000,
    context: Context | None = None,
    decoder: Decoder | None = None,
    *,
    level: float = 0.99,
    first_replicate: int = 0,
) -> PassageTimes:
    """First numbers of steps after which a token has a share of the whole history.

    Args:
        model: As :func:`attnmarkov.rollout`.
        key: As there.
        prompt: As there.
        share: The share, in (0, 1].
        token: The token whose share it is; any token if None.
        num_trajectories: As there.
        num_steps: Steps after which a trajectory is censored. The time of one token stops early
            when all trajectories have got there.
        context: As there; shares are of the whole history in any case.
        decoder: As there.
        level: Probability that each interval holds the truth, in (0, 1).
        first_replicate: As there.

    Returns:
        :class:`PassageTimes`, of the trajectories that ``rollout`` with the same key makes.

    Raises:
        ValueError: If an argument is out of range, or as :func:`attnmarkov.rollout`.

    References:
        [CCMC], on winner-takes-all.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.7, 0.3]])
    >>> times = time_to_share(model, jax.random.key(0), [0, 1], 0.9, token=0, num_steps=1000)
    >>> times.num_censored < 100
    True
    """
    check_level(level)
    _leaves.fraction(share, "share")
    ccmc = model if isinstance(model, AttentionHead) else as_ccmc(model)
    if token is None:
        record = Summary(share, transitions=False)
        trajectory = rollout(
            ccmc,
            key,
            prompt,
            num_steps,
            num_trajectories,
            record=record,
            context=context,
            decoder=decoder,
            first_replicate=first_replicate,
        )
        times = np.asarray(trajectory.summary.passage_time, np.int64)
        return PassageTimes(times, num_steps, level)
    token = _validate.integer(token, "token", minimum=0)
    if token >= ccmc.num_tokens:
        raise ValueError(f"token: {token} is outside 0..{ccmc.num_tokens - 1}")
    prompts = as_prompts(prompt, ccmc.num_tokens)
    counts = np.asarray(prompts.counts)
    held = np.broadcast_to(counts[:, token], num_trajectories).astype(np.int64)
    length = np.broadcast_to(counts.sum(axis=1), num_trajectories).astype(np.int64)
    times = np.where(held >= share * _NEAR * length, 0, -1)
    chunks = in_chunks(
        ccmc, key, prompts, num_steps, num_trajectories, context, decoder, first_replicate
    )
    for start, tokens in chunks:
        seen = held[:, None] + (tokens == token).cumsum(axis=1)
        grown = length[:, None] + (tokens >= 0).cumsum(axis=1)
        there = seen >= share * _NEAR * grown
        first = np.where(there.any(axis=1), start + there.argmax(axis=1) + 1, -1)
        times = np.where(times < 0, first, times)
        held, length = seen[:, -1], grown[:, -1]
        if (times >= 0).all():
            break
    return PassageTimes(times, num_steps, level)


def predicted_time_to_share(
    model: CCMC,
    counts: Any,
    share: float = 0.9,
    token: int | None = None,
    log_time: float = 30.0,
) -> float:
    """When the mean field, started at the shares of a prompt, comes to a share.

    The flow is what long histories follow; from a short prompt, chance decides between basins
    early on, and this is one time in the middle of a wide law (see :func:`time_to_share`).

    Args:
        model: The CCMC that generates.
        counts: (K,) counts of the prompt.
        share: The share, in (0, 1].
        token: The token whose share it is; any token if None.
        log_time: Up to where to look: ``L exp(log_time)`` tokens from a prompt of L.

    Returns:
        Number of steps; infinite if the flow does not get there by ``log_time``. It never gets to
            a share of 1 unless the prompt holds one token alone.

    Raises:
        ValueError: As :func:`attnmarkov.dynamics.mean_field`, or if ``share`` or ``token`` is
            out of range.

    References:
        Benaïm (1997), Benaïm and Tarrès (2011), for reinforced walks.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.8, 0.2]])
    >>> round(predicted_time_to_share(model, [5, 5], 0.9))  # n_0 = 5 * 9**(4/3)
    94
    """
    _leaves.fraction(share, "share")
    n = _validate.integer_array(counts, "counts", ndim=(1,))
    flow = mean_field(model, n, log_time, num_points=2001)
    shares = np.asarray(flow.shares, np.float64)[0]
    if token is not None:
        token = _validate.integer(token, "token", minimum=0)
        if token >= shares.shape[1]:
            raise ValueError(f"token: {token} is outside 0..{shares.shape[1] - 1}")
    if (n.max() if token is None else n[token]) >= share * n.sum() * (1 - 1e-12):
        return 0.0
    if share == 1:
        return np.inf
    top = shares.argmax(axis=1) if token is None else np.full(len(shares), token)
    others = np.where(np.arange(shares.shape[1]) == top[:, None], 0, shares).sum(axis=1)
    there = others <= 1 - share  # shares near 1 have lost the digits that others have
    if not there.any():
        return np.inf
    i, tau = int(there.argmax()), np.asarray(flow.log_time, np.float64)
    if i == 0:
        return 0.0
    part = (others[i - 1] - (1 - share)) / (others[i - 1] - others[i])
    return float(n.sum() * np.expm1(tau[i - 1] + part * (tau[i] - tau[i - 1])))


def in_chunks(
    model: CCMC | AttentionHead,
    key: jax.Array,
    prompts: Prompts,
    num_steps: int,
    num_trajectories: int,
    context: Context | None,
    decoder: Decoder | None,
    first_replicate: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens of a rollout, (R, steps) on the host, and the step each chunk begins at."""
    num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
    num_trajectories = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    chunk = 64  # a power of two, so that few sizes are compiled
    while chunk < min(4096, num_steps) and 2 * chunk * num_trajectories <= _CHUNK:
        chunk *= 2
    whole = -(-num_steps // chunk) * chunk  # so that one size is compiled
    chunks = rollout_chunks(
        model,
        key,
        prompts,
        whole,
        num_trajectories,
        context=context,
        decoder=decoder,
        chunk=chunk,
        first_replicate=first_replicate,
    )
    for i, part in enumerate(chunks):
        yield i * chunk, np.asarray(part.tokens)[:, : num_steps - i * chunk]


def as_prompts(prompt: Any, num_tokens: int) -> Prompts:
    """``prompt`` as :class:`~attnmarkov.Prompts`."""
    return prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, num_tokens)


def check_level(level: float) -> None:
    """Raise unless ``level`` lies strictly between 0 and 1."""
    if not 0 < _validate.finite(level, "level") < 1:
        raise ValueError(f"level: must lie strictly between 0 and 1, got {level}")
