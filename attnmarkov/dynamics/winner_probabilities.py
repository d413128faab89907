"""Which winners a prompt leads to, by Monte Carlo over very long generations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov._intervals import share_intervals
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.dynamics.drift import check_power
from attnmarkov.dynamics.equilibria import equilibria
from attnmarkov.dynamics.passage import as_prompts, check_level
from attnmarkov.dynamics.urn_law import is_urn, urn_winners
from attnmarkov.model import CCMC, AttentionHead, FullContext, Sampling
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import rollout

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.model import SelfAttention

_STEPS = 2**17  # if not given: seconds for a thousand trajectories
_URN_STEPS = 10**9  # an urn draws them at once
_STEPPED = 2**20  # steps up to which stepping is faster than skipping


@dataclass(frozen=True, eq=False)
class Winners:
    """What can win from a prompt that holds the given tokens.

    Attributes:
        sets: Tokens of each winner set: the supports of stable equilibria of the tokens present,
            and of continua that attract (tokens with equal rows, say): there any shares remain.
        occupancy: (S, K) their shares there; NaN where any shares of the set are possible.
    """

    sets: tuple[tuple[int, ...], ...]
    occupancy: Float[np.ndarray, "set token"]

    def distances(self, shares: np.ndarray) -> Float[np.ndarray, "... set"]:
        """Total variation from (..., K) shares; from a free set, what others have."""
        free = np.isnan(self.occupancy).any(axis=1)
        gap = 0.5 * abs(shares[..., None, :] - np.nan_to_num(self.occupancy)).sum(axis=-1)
        inside = np.array([np.isin(np.arange(shares.shape[-1]), s) for s in self.sets], bool)
        others = (shares[..., None, :] * ~inside).sum(axis=-1) if self.sets else gap
        return np.where(free, others, gap)

    def decide(self, shares: np.ndarray, tolerance: float) -> Int[np.ndarray, ...]:
        """The nearest set, or -1 where none is within ``tolerance``."""
        if not self.sets:
            return np.full(shares.shape[:-1], -1)
        distance = self.distances(shares)
        return np.where(distance.min(axis=-1) <= tolerance, distance.argmin(axis=-1), -1)


def winners_among(
    model: CCMC, counts: np.ndarray, exponent: float = 1.0, temperature: float = 1.0
) -> Winners:
    """The winner sets of generations from a prompt with these (K,) counts.

    Tokens that the prompt does not hold never come, so that winners are those of the model
    without them.
    """
    tokens, size = np.flatnonzero(counts), model.num_tokens
    if _is_plain(exponent, temperature) and is_urn(model):
        chosen, _ = urn_winners(model, counts)
        occupancy = np.full((1, size), np.nan)
        if len(chosen) == 1:
            occupancy = np.eye(size)[chosen]
        return Winners((tuple(chosen.tolist()),), occupancy)
    part = CCMC.from_logits(np.asarray(model.logits)[np.ix_(tokens, tokens)])
    found = equilibria(part, exponent=exponent, temperature=temperature)
    kept = [e for e in found if e.attracting]
    occupancy = np.zeros((len(kept), size))
    for row, e in zip(occupancy, kept, strict=True):
        inside = list(e.support)
        row[tokens[inside]] = e.occupancy[inside] if e.isolated else np.nan
    return Winners(tuple(tuple(tokens[list(e.support)].tolist()) for e in kept), occupancy)


@dataclass(frozen=True, eq=False)
class WinnerProbabilities:
    """How often each winner set took a generation over.

    Attributes:
        sets: Tokens of each possible winner set, in the order of ``equilibria``; once for each
            stable equilibrium of the set, of which powers other than 1 may have several.
        decided: (R,) index of the set each trajectory ended near; -1 if undecided.
        shares: (R, K) shares of the whole history at the end; of an ``AttentionHead`` (R, S),
            of the tokens that the prompt holds.
        num_steps: Steps of each trajectory.
        tolerance: Total variation within which a trajectory is decided.
        level: Probability that all intervals hold the truth at once.
        tokens: Token ids of the columns of ``shares``, increasing.
    """

    sets: tuple[tuple[int, ...], ...]
    decided: Int[np.ndarray, " replicate"]
    shares: Float[np.ndarray, "replicate token"]
    num_steps: int
    tolerance: float
    level: float
    tokens: Int[np.ndarray, " token"]

    @property
    def hits(self) -> Int[np.ndarray, " set"]:
        """(S,) trajectories decided for each set."""
        return np.bincount(self.decided[self.decided >= 0], minlength=len(self.sets))

    @property
    def num_undecided(self) -> int:
        """Trajectories that ended near none."""
        return int((self.decided < 0).sum())

    @property
    def probabilities(self) -> Float[np.ndarray, " set"]:
        """(S,) share of all trajectories decided for each set; they sum to 1 if all are."""
        return self.hits / self.decided.size

    @property
    def intervals(self) -> Float[np.ndarray, "end set"]:
        """(2, S) ends of intervals that all hold at once with ``level``.

        Clopper and Pearson's, by Bonferroni. Undecided trajectories may still go to any set:
        lower ends count them for none, upper ends for each.
        """
        ends = share_intervals(self.hits, self.num_undecided, self.decided.size, 1 - self.level)
        return np.stack(ends)

    def __repr__(self) -> str:
        """A line for each set, and one for the undecided."""
        head = f"WinnerProbabilities({self.decided.size} trajectories of {self.num_steps} steps"
        rows = zip(self.sets, self.probabilities, *self.intervals, strict=True)
        lines = [
            "  {" + ", ".join(map(str, s)) + f"}}  {p:.3f} [{low:.3f}, {high:.3f}]"
            for s, p, low, high in rows
        ]
        lines += [f"  undecided: {self.num_undecided}"] * (self.num_undecided > 0)
        return "\n".join([head, *lines]) + ")"


def winner_probabilities(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    prompt: Any,
    num_trajectories: int = 1000,
    num_steps: int | None = None,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    tolerance: float = 0.1,
    level: float = 0.99,
    first_replicate: int = 0,
) -> WinnerProbabilities:
    """Probabilities that each winner set takes over a generation from a prompt.

    Generations are run for long: step by step, by skip-ahead from a million steps on, or, if all
    rows of ``P`` are equal, by the urn. One is decided for the winner set whose stable
    equilibrium is nearest to its shares of the whole history, if it is within ``tolerance`` in
    total variation; for a token alone that is a share of at least ``1 − tolerance``. Where a
    winner set has a continuum of equilibria, its joint share decides. Others are
    counted as undecided: shares of losers fall as ``t**(λ − 1)`` only. That a decided one may
    still change sides is not in the intervals: the longer the run, the rarer that is.

    Args:
        model: As :func:`attnmarkov.rollout`. Of an ``AttentionHead`` only the logits between
            tokens of the prompt are made.
        key: As there.
        prompt: (L,) token ids, or :class:`~attnmarkov.Prompts` of one prompt.
        num_trajectories: As there.
        num_steps: Steps of each trajectory; 131,072 if None (10**9 for an urn). Past a million
            they are skipped, at a cost that goes with ``T**λ`` of the losers: 10**9 steps are
            for models that collapse fast.
        exponent: Reinforcement exponent, as ``FullContext(exponent=...)``. With powers other
            than 1 generation is stepped, however long.
        temperature: As ``Sampling(temperature=...)``.
        tolerance: In (0, 1).
        level: Probability that all intervals hold the truth at once, in (0, 1).
        first_replicate: As there.

    Returns:
        :class:`WinnerProbabilities`.

    Raises:
        ValueError: If an argument is out of range, or as :func:`attnmarkov.rollout`.

    References:
        [CCMC], on winner-takes-all; Benaïm and Tarrès (2011): limits are stable equilibria.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.3, 0.7]])
    >>> found = winner_probabilities(model, jax.random.key(0), [0, 1, 0], 200, 10_000)
    >>> found.sets, bool(found.intervals[0, 0] > 0.5)
    (((0,), (1,)), True)
    """
    prompts = as_prompts(prompt, model.num_tokens)
    if len(prompts) != 1:
        raise ValueError(f"prompt: expected one prompt, got {len(prompts)}; see basins for many")
    check_rule(tolerance, level)
    check_power(exponent, temperature)
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    ccmc, ids = on_tokens(model, counts, last)
    law = exponent, temperature
    winners = winners_among(ccmc, counts[0, ids], *law)
    steps = default_steps(ccmc, *law) if num_steps is None else num_steps
    held = Prompts(jnp.asarray(counts[:, ids]), jnp.asarray(np.searchsorted(ids, last)))
    shares = final_shares(ccmc, key, held, steps, num_trajectories, first_replicate, *law)
    decided = winners.decide(shares, tolerance)
    sets = tuple(tuple(ids[list(s)].tolist()) for s in winners.sets)
    return WinnerProbabilities(sets, decided, shares, steps, tolerance, level, ids)


def on_tokens(
    model: CCMC | SelfAttention | AttentionHead, counts: np.ndarray, last: np.ndarray
) -> tuple[CCMC, Int[np.ndarray, " token"]]:
    """The CCMC and the ids of its tokens; of an attention head on those of the prompts alone."""
    if isinstance(model, AttentionHead):
        return model.restrict(np.union1d(np.flatnonzero(counts.any(axis=0)), last))
    ccmc = as_ccmc(model)
    return ccmc, np.arange(ccmc.num_tokens)


def default_steps(model: CCMC, exponent: float = 1.0, temperature: float = 1.0) -> int:
    """Steps of a trajectory if they are not given."""
    return _URN_STEPS if _is_plain(exponent, temperature) and is_urn(model) else _STEPS


def _is_plain(exponent: float, temperature: float) -> bool:
    return exponent == 1 and temperature == 1


def check_rule(tolerance: float, level: float) -> None:
    """Raise unless both lie strictly between 0 and 1."""
    if not 0 < _validate.finite(tolerance, "tolerance") < 1:
        raise ValueError(f"tolerance: must lie strictly between 0 and 1, got {tolerance}")
    check_level(level)


def final_shares(
    model: CCMC,
    key: Any,
    prompts: Prompts,
    num_steps: int,
    num: int,
    first: int,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> Float[np.ndarray, "replicate token"]:
    """Shares of the whole history after ``num_steps``."""
    num_steps = _validate.integer(num_steps, "num_steps", minimum=1)
    engine = "auto"
    if _is_plain(exponent, temperature):
        engine = "urn" if is_urn(model) else "auto" if num_steps <= _STEPPED else "skip_ahead"
    plain = Prompts(jnp.asarray(prompts.counts), jnp.asarray(prompts.last))
    trajectory = rollout(
        model,
        key,
        plain,
        num_steps,
        num,
        engine,
        record="counts",
        context=FullContext(exponent=exponent),
        decoder=Sampling(temperature=temperature),
        first_replicate=first,
    )
    counts = np.asarray(trajectory.counts[:, -1], np.float64)
    return counts / counts.sum(axis=1, keepdims=True)
