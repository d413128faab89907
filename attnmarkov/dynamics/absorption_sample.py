"""Collapse of contexts that forget, by Monte Carlo: windows, lags and decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate
from attnmarkov._intervals import share_intervals
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.dynamics._windows import checked_decoder, reach
from attnmarkov.dynamics.passage import PassageTimes, as_prompts, check_level, in_chunks
from attnmarkov.model import (
    AttentionHead,
    DecayContext,
    LagContext,
    Sampling,
    WindowContext,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.model import CCMC, Context, Decoder, SelfAttention
    from attnmarkov.prompts import Prompts

_NEVER = np.iinfo(np.int64).max // 4


@dataclass(frozen=True, eq=False, repr=False)
class AbsorptionSample(PassageTimes):
    """Times at which R trajectories were absorbed in one token, and in which.

    Attributes:
        winners: (R,) int64 the token; -1 where the time is.
        run: (K,) int64 how many times in a row each token has to come. With a ``DecayContext`` of
            an ``AttentionHead`` 0 for tokens that no prompt holds: those never come.
    """

    winners: Int[np.ndarray, " replicate"]
    run: Int[np.ndarray, " token"]

    @property
    def winner_probabilities(self) -> Float[np.ndarray, " token"]:
        """(K,) share of all trajectories that each token has absorbed."""
        return self._hits / self.times.size

    @property
    def intervals(self) -> Float[np.ndarray, "end token"]:
        """(2, K) ends of intervals of the probabilities that all hold at once with ``level``.

        Clopper and Pearson's, by Bonferroni. Censored trajectories may still go to any token:
        lower ends count them for none, upper ends for each.
        """
        ends = share_intervals(self._hits, self.num_censored, self.times.size, 1 - self.level)
        return np.stack(ends)

    @property
    def _hits(self) -> np.ndarray:
        return np.bincount(self.winners[self.winners >= 0], minlength=self.run.size)

    def __repr__(self) -> str:
        """The winners, then as times."""
        p = np.array2string(self.winner_probabilities, precision=3, suppress_small=True)
        return super().__repr__()[:-1] + f", winner_probabilities={p})"


def absorption_monte_carlo(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    prompt: Any,
    context: int | Context,
    num_trajectories: int = 1000,
    num_steps: int = 1_000_000,
    decoder: Decoder | None = None,
    *,
    return_probability: float = 1e-3,
    level: float = 0.99,
    first_replicate: int = 0,
) -> AbsorptionSample:
    """Times and tokens of absorption, by rollouts that stop when all are absorbed.

    Of windows and lag weights the times are those of ``rollout(..., record="summary")`` to the
    unit, and :func:`attnmarkov.dynamics.absorption` is their law. Decaying weights never end;
    with them a token has *collapsed* the generation once it has come so often in a row that the
    probability of any other token ever coming back is below ``return_probability``: while it
    goes on, weights of others fade as ``gamma ** lag``, so that probability is at most
    ``Σ_i Σ_j (P[w, j] / P[w, w])**p (q gamma**i)**a``, ``q = gamma**L / (1 − gamma**L)`` after
    ``L`` times, ``p`` the decoder's power and ``a = exponent p``. The least such ``L`` is the run
    that is waited for (its time is counted at its end).

    Args:
        model: As :func:`attnmarkov.rollout`.
        key: As there.
        prompt: As there; token ids must be known.
        context: A window size, ``WindowContext``, ``LagContext`` or ``DecayContext``.
        num_trajectories: As there.
        num_steps: Steps after which a trajectory is censored.
        decoder: As there; with a ``DecayContext`` a ``Sampling``.
        return_probability: For a ``DecayContext``, in (0, 1).
        level: Probability that intervals hold the truth, in (0, 1).
        first_replicate: As there.

    Returns:
        An :class:`AbsorptionSample`; what is censored is in it, and counted.

    Raises:
        ValueError: If an argument is out of range; if the context sees the whole history, or a
            ``DecayContext`` has ``gamma`` 1 or no positive exponent; or as there.

    References:
        [CCMC], on winner-takes-all; Press, Smith and Lewis (2022), for decaying weights.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
    >>> sample = absorption_monte_carlo(model, jax.random.key(0), [0, 1], 2, 4000)
    >>> low, high = sample.intervals[:, 0]
    >>> bool(low < 1 / 7 < high)
    True
    """
    check_level(level)
    decoder = checked_decoder(decoder)
    is_head = isinstance(model, AttentionHead)
    ccmc = model if is_head else as_ccmc(model)
    if isinstance(context, int | np.integer) and not isinstance(context, bool):
        context = WindowContext(int(context))
    prompts = as_prompts(prompt, ccmc.num_tokens)
    if is_head and isinstance(context, DecayContext):
        counts = np.asarray(prompts.counts)
        small, ids = model.restrict(np.union1d(np.flatnonzero(counts.any(axis=0)), prompts.last))
        run = np.zeros(ccmc.num_tokens, np.int64)
        run[ids] = _run(small, context, decoder, return_probability)
    else:
        run = _run(ccmc, context, decoder, return_probability)
    assert not isinstance(context, int | np.integer)
    context.check_prompts(prompts)
    chunks = in_chunks(
        ccmc, key, prompts, num_steps, num_trajectories, context, decoder, first_replicate
    )
    tail, length = _tails(prompts, num_trajectories)
    whole = np.broadcast_to(np.asarray(prompts.counts).sum(axis=1), length.shape)
    alone = (length >= whole) | (length >= run[tail])  # nothing else in the context
    times = np.where(alone, 0, -1).astype(np.int64)
    winners = np.where(alone, tail, -1).astype(np.int64)
    for start, tokens in chunks:
        if (times >= 0).all():
            break
        place = np.arange(tokens.shape[1])
        before = np.concatenate([tail[:, None], tokens[:, :-1]], axis=1)
        since = np.maximum.accumulate(np.where(tokens == before, -1, place), axis=1)
        runs = np.where(since < 0, length[:, None] + place + 1, place - since + 1)
        hit = (runs >= run[tokens]) & (tokens >= 0)
        first = hit.argmax(axis=1)
        new = (times < 0) & hit.any(axis=1)
        times[new], winners[new] = start + first[new] + 1, tokens[new, first[new]]
        tail, length = tokens[:, -1], runs[:, -1]
    return AbsorptionSample(times, num_steps, level, winners, run)


def _tails(prompts: Prompts, num_trajectories: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) the last token of each history, and how often it stands at its end in a row."""
    ids, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    tail = np.take_along_axis(ids, lengths[:, None] - 1, axis=1)
    place = np.arange(ids.shape[1])
    other = (ids != tail) & (place < lengths[:, None])
    run = lengths - 1 - np.where(other, place, -1).max(axis=1)
    shape = (num_trajectories,)
    return np.broadcast_to(tail[:, 0], shape), np.broadcast_to(run.astype(np.int64), shape)


def _run(
    ccmc: CCMC | AttentionHead, context: Any, decoder: Decoder, return_probability: float
) -> Int[np.ndarray, " token"]:
    """How often each token must come in a row to have the context for itself."""
    size = ccmc.num_tokens
    if isinstance(context, WindowContext | LagContext):
        context.check()
        return np.full(size, reach(context), np.int64)
    if not isinstance(context, DecayContext):
        raise ValueError(
            "context: expected a window size, a WindowContext, a LagContext or a DecayContext, "
            f"got {context!r}; for the whole history see winner_probabilities"
        )
    context.check()
    gamma, exponent = float(context.gamma), float(context.exponent)
    if gamma == 1:
        raise ValueError("context: gamma 1 forgets nothing; see winner_probabilities")
    if exponent <= 0:
        raise ValueError(
            f"context: with exponent {exponent:g} rare tokens always come back; it must be above 0"
        )
    if not isinstance(decoder, Sampling):
        raise ValueError(f"decoder: with a DecayContext expected Sampling, got {decoder!r}")
    if not 0 < _validate.finite(return_probability, "return_probability") < 1:
        raise ValueError(
            f"return_probability: must lie strictly between 0 and 1, got {return_probability}"
        )
    power = float(decoder.repetition_penalty) / float(decoder.temperature)
    a = exponent * power
    s = np.asarray(ccmc.logits, np.float64)
    own = np.diag(s)
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(power * (s - own[:, None]))
    np.fill_diagonal(ratio, 0)
    # Σ_j r_j n_j**a is at most max r (Σ_j n_j)**a for a >= 1; below that each n_j is bounded.
    others = ratio.max(axis=1) if a >= 1 else ratio.sum(axis=1)
    run = np.ones(size, np.int64)
    for w in np.flatnonzero(others > 0):
        log_q = (np.log(return_probability * -np.expm1(a * np.log(gamma))) - np.log(others[w])) / a
        need = np.logaddexp(0, -log_q) / -np.log(gamma)
        run[w] = max(int(np.ceil(need)), 1) if need < 2**60 else _NEVER
    run[np.isnan(others) | np.isneginf(own)] = _NEVER
    return run
