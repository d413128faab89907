"""The information that trajectories gather on every contrast over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import trajectory as _trajectory
from attnmarkov.estimate.laplacian import eliminate
from attnmarkov.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.model.ccmc import CCMC

_BLOCK = 256  # steps whose laws are held at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class InformationGrowth:
    """Information that R trajectories have gathered at recorded steps.

    Attributes:
        at: (len(at),) int64, the numbers of steps of the records.
        gain: (R, len(at), K, K, K); ``[r, i, a, b, c]`` is the sum of ``p(b) p(c)`` over the
            steps after query ``a`` that came since the record before, ``p`` the model's law of
            the next token, and 0 for ``b = c``. Gains are kept, not sums, since a late gain may
            be far below the rounding of the sum.
        visits: (R, len(at), K), how many steps came after query ``a`` since the record before.
    """

    at: np.ndarray
    gain: Float[Array | np.ndarray, "replicate record row token token"]
    visits: Float[Array | np.ndarray, "replicate record row"]

    @property
    def information(self) -> np.ndarray:
        """(R, len(at), K, K, K) float64 Fisher information about ``S`` of all steps so far.

        A sum over steps: ``at`` times what :func:`attnmarkov.fisher_information` averages.
        """
        weight = np.cumsum(np.asarray(self.gain, np.float64), axis=1)
        return weight.sum(-1)[..., None] * np.eye(weight.shape[-1]) - weight

    def effective(self, winner: int) -> Float[Array, "replicate record row token"]:
        """Information on every contrast with the winner when all else is unknown too.

        Returns:
            (R, len(at), K, K); ``[r, i, a, j] = 1 / ((e_w − e_j)ᵀ I_a⁺ (e_w − e_j))``, one over
            the asymptotic variance of the estimate of ``S[a, w] − S[a, j]``; infinite for
            ``j = w``. At least ``gain`` summed.

        Raises:
            ValueError: If ``winner`` is no token id.
        """
        size = self.gain.shape[-1]
        winner = _winner(winner, size)
        flat = jnp.asarray(self.information.reshape(-1, size, size), jnp.result_type(float))
        return _effective(flat, winner).reshape(*self.gain.shape[:2], size, size)

    def exponents(self, winner: int, decades: float = 2.0) -> np.ndarray:
        """Growth exponents of the information on every contrast with the winner.

        The gains of the two halves (in log time) of the last ``decades`` are compared per unit of
        log time. A power law has the same exponent in its gains as in its sum, and also a sum
        that converges shows how fast.

        Returns:
            (R, K, K) float64; ``[r, a, j]`` for row ``a`` and contrast ``(w, j)``. Infinite or
            NaN where nothing was gained in one half or both, and NaN for ``j = w``.

        Raises:
            ValueError: If ``winner`` is no token id, or the records do not reach back so far or
                are too coarse to cut there.
        """
        winner = _winner(winner, self.gain.shape[-1])
        start, middle = self.halves(decades)
        log_at = np.log(np.maximum(np.asarray(self.at, float), 1e-9))
        gain = np.asarray(self.gain, np.float64)[:, :, :, winner]
        early, late = gain[:, start + 1 : middle + 1].sum(1), gain[:, middle + 1 :].sum(1)
        width, width2 = log_at[middle] - log_at[start], log_at[-1] - log_at[middle]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            apart = np.log(late / early)
            slope = apart * 2 / (width + width2)
            for _ in range(20):  # the halves are not quite equal: a power law's gains tell how
                found = (apart - _log_gain(slope, width2) + _log_gain(slope, width)) * 2
                found = found / (width + width2)
                slope = np.where(np.isfinite(apart), found, apart)
        return slope

    def halves(self, decades: float) -> tuple[int, int]:
        """Records nearest to the start and to the middle (in log time) of the last decades."""
        at = np.asarray(self.at, float)
        log_at = np.log10(np.maximum(at, 1e-9))
        start, middle = (
            int(abs(log_at - (log_at[-1] - back)).argmin()) for back in (decades, decades / 2)
        )
        if not (at[0] <= at[-1] / 10**decades * 1.3 and start < middle < len(at) - 1):
            raise ValueError(
                f"decades: the records {at[0]:g} to {at[-1]:g} can't be cut into halves of their "
                f"last {decades:g} decades"
            )
        return start, middle

    def __repr__(self) -> str:
        """The sizes, and the median visits of every row."""
        gain = self.gain
        if not isinstance(gain, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"InformationGrowth(gain={gain})"
        visits = np.median(np.asarray(self.visits, np.float64).sum(1), axis=0)
        rows = ", ".join(f"{v:.0f}" for v in visits[:10]) + (", ..." if len(visits) > 10 else "")
        return (
            f"InformationGrowth({gain.shape[0]} trajectories of {gain.shape[-1]} tokens at "
            f"{gain.shape[1]} times up to step {int(self.at[-1])}, median visits of rows [{rows}])"
        )


def information_growth(
    model: CCMC,
    trajectory: Trajectory | Iterable[Trajectory],
    prompt: Any,
    at: ArrayLike | None = None,
) -> InformationGrowth:
    """The information about ``model`` that given trajectories gather over time.

    Reads the tokens once, in blocks of 256 steps: O(K³) time per token, and beside the tokens
    O(R·(len(at)·K³ + 256·K²)) memory. With the chunks of :func:`attnmarkov.rollout_chunks` in
    place of a trajectory the tokens are never held together. :func:`rollout_information` draws
    trajectories and their information to much longer horizons.

    Args:
        model: The CCMC at which the information is evaluated.
        trajectory: A rollout with ``record="tokens"``, or its chunks, one after the other.
        prompt: The prompt given to :func:`attnmarkov.rollout`, or one per trajectory.
        at: Increasing numbers of steps at which information is recorded, from 0 on; the number
            of steps if None (needed with chunks). Steps beyond the last are not read.

    Raises:
        ValueError: If tokens were not recorded, ``at`` does not increase or goes beyond the
            trajectory, or as :func:`trajectory_prompts`.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.6, 0.4]])
    >>> traj = am.rollout(model, jax.random.key(0), [0, 1], 1000, 8)
    >>> growth = information_growth(model, traj, [0, 1], at=[10, 100, 1000])
    >>> growth.information.shape, growth.visits[0].sum(-1).tolist()
    ((8, 3, 2, 2, 2), [10.0, 90.0, 900.0])
    """
    if at is None:
        if not isinstance(trajectory, Trajectory):
            raise ValueError("at: must be given with chunks, whose number of steps is not known")
        at = [_trajectory.check_recorded(trajectory).shape[1]]
    steps = record_steps(at)
    chunks = [trajectory] if isinstance(trajectory, Trajectory) else trajectory
    if not isinstance(chunks, Iterable):
        _trajectory.check_recorded(chunks)
    state, done = None, 0
    for chunk in chunks:
        tokens = _trajectory.check_recorded(chunk)[:, : int(steps[-1]) - done]
        if tokens.shape[1] == 0:
            break
        tokens, start = _trajectory.check_tokens(tokens, prompt, model.num_tokens)
        lanes, size = tokens.shape[0], model.num_tokens
        if state is None:
            counts = jnp.broadcast_to(start.counts, (lanes, size))
            last = jnp.broadcast_to(start.last, lanes)
            gain = jnp.zeros((len(steps), lanes, size, size, size))
            state = counts, last, gain, jnp.zeros((len(steps), lanes, size))
        blocks = _cut(steps, done, tokens.shape[1])
        state = _gather(model.logits, tokens, blocks, *state)
        done += tokens.shape[1]
    if state is None and steps[-1] == 0:
        raise ValueError("at: no step is asked for")
    if state is None or done < steps[-1]:
        raise ValueError(f"at: {steps[-1]} is beyond the {done} steps of the trajectory")
    _, _, gain, visits = state
    apart = gain * (1 - jnp.eye(model.num_tokens))
    return InformationGrowth(steps, jnp.moveaxis(apart, 1, 0), jnp.moveaxis(visits, 1, 0))


def record_steps(at: Any) -> np.ndarray:
    """``at`` as increasing int64 numbers of steps."""
    steps = _validate.integer_array(at, "at", ndim=(0, 1)).reshape(-1).astype(np.int64)
    if steps.size == 0:
        raise ValueError("at: is empty")
    if steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise ValueError(f"at: must increase from 0 or above, got {steps.tolist()[:20]}")
    return steps


def _log_gain(exponent: np.ndarray, width: float) -> np.ndarray:
    """Logarithm of ``∫ exp(exponent · x) dx`` over an interval around 0."""
    x = np.where(exponent == 0, 1e-9, exponent) * width / 2
    return np.log(width * np.sinh(x) / x)


def _winner(winner: Any, size: int) -> int:
    winner = _validate.integer(winner, "winner", minimum=0)
    if winner >= size:
        raise ValueError(f"winner: {winner} is outside 0..{size - 1}")
    return winner


def _cut(steps: np.ndarray, done: int, number: int) -> np.ndarray:
    """(3, blocks): start in the chunk, length and record of each; padded to a number that the
    sizes alone decide.
    """
    edges = np.union1d(np.arange(0, number, _BLOCK), steps - done)
    edges = np.union1d(edges[(edges >= 0) & (edges < number)], [0])
    lengths = np.diff(np.append(edges, number))
    record = np.searchsorted(steps, edges + done, side="right")
    blocks = np.stack([edges, lengths, np.minimum(record, len(steps) - 1)])
    room = -(-number // _BLOCK) + len(steps)
    return np.pad(blocks, ((0, 0), (0, room - blocks.shape[1]))).astype(np.int32)


@jax.jit
def _gather(
    logits: jax.Array,
    tokens: Int[Array, "lane step"],
    blocks: Int[Array, "3 block"],
    counts: Int[Array, "lane token"],
    last: Int[Array, " lane"],
    gain: Float[Array, "record lane row token token"],
    visits: Float[Array, "record lane row"],
):
    """Add the products of the laws, block by block; then the state after the last step."""
    lanes, size = counts.shape
    padded = jnp.pad(tokens, ((0, 0), (0, _BLOCK)))

    def add(state, block):
        counts, last, gain, visits = state
        start, length, record = block
        part = jax.lax.dynamic_slice(padded, (jnp.zeros_like(start), start), (lanes, _BLOCK))
        valid = jnp.arange(_BLOCK) < length
        drawn = (part[..., None] == jnp.arange(size)) & valid[:, None]
        after = counts[:, None] + jnp.cumsum(drawn.astype(jnp.int32), axis=1)
        before = jnp.concatenate([counts[:, None], after[:, :-1]], axis=1)
        query = jnp.concatenate([last[:, None], part[:, :-1]], axis=1)
        law = jax.nn.softmax(logits[query] + jnp.log(before.astype(logits.dtype)))
        asked = ((query[..., None] == jnp.arange(size)) & valid[:, None]).astype(law.dtype)
        products = jnp.einsum(
            "lsa,lsb,lsc->labc", asked, law, law, precision=jax.lax.Precision.HIGHEST
        )
        ended = jnp.take_along_axis(query, jnp.full((lanes, 1), length), axis=1, mode="clip")
        whole = part[:, -1]  # what follows a whole block is its last token
        last = jnp.where(length == _BLOCK, whole, jnp.where(length > 0, ended[:, 0], last))
        gain = gain.at[record].add(products.astype(gain.dtype))
        visits = visits.at[record].add(asked.sum(1).astype(visits.dtype))
        return (after[:, -1], last, gain, visits), None

    return jax.lax.scan(add, (counts, last, gain, visits), blocks.T)[0]


@jax.jit
def _effective(information: jax.Array, winner: jax.Array) -> jax.Array:
    """One over the resistance between the winner and every other token of each row."""
    elimination = eliminate(information)
    visits, pivot = elimination
    parts = elimination.components
    gap = (visits - visits[:, winner][:, None]) ** 2
    tied = (pivot > 0)[:, None, :]
    resistance = jnp.where(tied, gap / jnp.where(tied, pivot[:, None, :], 1), 0).sum(-1)
    joined = parts == parts[:, winner][:, None]
    return jnp.where(joined, 1 / resistance, 0)
