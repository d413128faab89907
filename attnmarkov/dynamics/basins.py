"""Basins: how the winner depends on the counts that a generation starts from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov._intervals import share_intervals
from attnmarkov.dynamics.drift import check_power
from attnmarkov.dynamics.exponents import as_winners
from attnmarkov.dynamics.winner_probabilities import (
    check_rule,
    default_steps,
    final_shares,
    on_tokens,
    winners_among,
)
from attnmarkov.prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC, AttentionHead, SelfAttention


@dataclass(frozen=True, eq=False)
class Basins:
    """How often each winner set took over from each prompt.

    Attributes:
        counts: (n, K) counts of the prompts.
        last: (n,) their last tokens.
        sets: All winner sets, by size and tokens.
        hits: (n, S) trajectories decided for each set.
        num_trajectories: Trajectories from each prompt.
        num_steps: Steps of each trajectory.
        level: Probability that all intervals of one prompt hold the truth at once.
    """

    counts: Int[np.ndarray, "prompt token"]
    last: Int[np.ndarray, " prompt"]
    sets: tuple[tuple[int, ...], ...]
    hits: Int[np.ndarray, "prompt set"]
    num_trajectories: int
    num_steps: int
    level: float

    @property
    def num_undecided(self) -> Int[np.ndarray, " prompt"]:
        """(n,) trajectories near no winner set at the end."""
        return self.num_trajectories - self.hits.sum(axis=1)

    def probability(self, winner: int | Iterable[int]) -> Float[np.ndarray, " prompt"]:
        """(n,) share of the trajectories from each prompt that a winner set took over.

        Raises:
            ValueError: If it is no winner set (those that are, are listed).
        """
        return self.hits[:, self.index(winner)] / self.num_trajectories

    def interval(self, winner: int | Iterable[int]) -> Float[np.ndarray, "end prompt"]:
        """(2, n) ends of its intervals; see ``WinnerProbabilities.intervals``.

        Raises:
            ValueError: As :meth:`probability`.
        """
        i = self.index(winner)
        ends = [
            share_intervals(hits, int(left), self.num_trajectories, 1 - self.level)
            for hits, left in zip(self.hits, self.num_undecided, strict=True)
        ]
        return np.array([[low[i], high[i]] for low, high in ends]).T

    def index(self, winner: int | Iterable[int] | ArrayLike) -> int:
        """The place in ``sets`` of a token id, or of several in any order.

        Raises:
            ValueError: As :meth:`probability`.
        """
        tokens = tuple(as_winners(winner, self.counts.shape[1]).tolist())
        if tokens not in self.sets:
            raise ValueError(f"winner: {tokens} is no winner set; those are {self.sets}")
        return self.sets.index(tokens)

    def __repr__(self) -> str:
        """The sizes and the winner sets."""
        return (
            f"Basins({len(self.counts)} prompts x {self.num_trajectories} trajectories of "
            f"{self.num_steps} steps, winner sets {self.sets}, "
            f"{int(self.num_undecided.sum())} undecided)"
        )


def basins(
    model: CCMC | SelfAttention | AttentionHead,
    key: Key[Array, ""],
    counts: ArrayLike,
    last: ArrayLike | None = None,
    num_trajectories: int = 200,
    num_steps: int | None = None,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    tolerance: float = 0.1,
    level: float = 0.99,
) -> Basins:
    """Winner probabilities from many prompts, all rolled out in one batch.

    Args:
        model: As :func:`attnmarkov.dynamics.winner_probabilities`.
        key: As there.
        counts: (n, K) counts of the prompts, such as :func:`count_grid` and :func:`compositions`
            make. Prompts may lack tokens; those never come.
        last: Last token of all prompts, or (n,) of each; the smallest id that each prompt
            holds if None. One that a prompt does not hold is its first query all the same.
        num_trajectories: Trajectories from each prompt.
        num_steps: As there.
        exponent: As there.
        temperature: As there.
        tolerance: As there.
        level: As there, for each prompt on its own.

    Returns:
        :class:`Basins`. Trajectory ``r`` of prompt ``i`` depends on the key and
        ``i * num_trajectories + r``.

    Raises:
        ValueError: If an argument is out of range, or as :func:`attnmarkov.rollout`.

    References:
        [CCMC], on winner-takes-all.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.3, 0.7]])
    >>> basins(model, jax.random.key(0), [[9, 1], [1, 9]], 0, 64, 1000).probability(0).round()
    array([1., 0.])
    """
    check_rule(tolerance, level)
    check_power(exponent, temperature)
    num = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    n = np.atleast_2d(_validate.integer_array(counts, "counts", ndim=(1, 2)))
    if n.shape[1] != model.num_tokens:
        raise ValueError(f"counts: over {n.shape[1]} tokens, but the model has {model.num_tokens}")
    last = (n > 0).argmax(axis=1) if last is None else last
    last = _validate.integer_array(last, "last", ndim=(0, 1))
    if last.ndim == 1 and last.shape != (len(n),):
        raise ValueError(f"last: expected shape ({len(n)},), got {last.shape}")
    last = np.broadcast_to(last, (len(n),))
    Prompts.from_counts(n, last)  # says what is wrong
    ccmc, ids = on_tokens(model, n, last)
    prompts = Prompts.from_counts(
        np.repeat(n[:, ids], num, axis=0), np.repeat(np.searchsorted(ids, last), num)
    )
    supports, group = np.unique(n[:, ids] > 0, axis=0, return_inverse=True)
    group, law = group.reshape(-1), (exponent, temperature)
    winners = [winners_among(ccmc, support.astype(np.int64), *law) for support in supports]
    sets = tuple(sorted({s for w in winners for s in w.sets}, key=lambda s: (len(s), s)))
    steps = default_steps(ccmc, *law) if num_steps is None else num_steps
    shares = final_shares(ccmc, key, prompts, steps, len(n) * num, 0, *law)
    shares = shares.reshape(len(n), num, -1)
    hits = np.zeros((len(n), len(sets)), np.int64)
    for g, w in enumerate(winners):
        decided = w.decide(shares[group == g], tolerance)
        for i, s in enumerate(w.sets):
            hits[group == g, sets.index(s)] += (decided == i).sum(axis=1)
    sets = tuple(tuple(ids[list(s)].tolist()) for s in sets)
    return Basins(n, last, sets, hits, num, steps, level)


def count_grid(most: int, least: int = 1) -> Int[np.ndarray, "prompt 2"]:
    """All pairs of counts from ``least`` to ``most`` of each of two tokens.

    Raises:
        ValueError: Unless ``0 <= least <= most`` and ``most > 0``.

    >>> count_grid(2).tolist()
    [[1, 1], [1, 2], [2, 1], [2, 2]]
    """
    most = _validate.integer(most, "most", minimum=1)
    least = _validate.integer(least, "least", minimum=0)
    if least > most:
        raise ValueError(f"least: must be at most most = {most}, got {least}")
    pairs = itertools.product(range(least, most + 1), repeat=2)
    return np.array([pair for pair in pairs if sum(pair) > 0])


def compositions(
    total: int, num_tokens: int = 3, least: int = 1
) -> Int[np.ndarray, "prompt token"]:
    """All counts of ``num_tokens`` tokens that add up to ``total``, each at least ``least``.

    Raises:
        ValueError: If there are none, or sizes are out of range.

    >>> compositions(4).tolist()
    [[1, 1, 2], [1, 2, 1], [2, 1, 1]]
    """
    size = _validate.integer(num_tokens, "num_tokens", minimum=2)
    least = _validate.integer(least, "least", minimum=0)
    free = _validate.integer(total, "total", minimum=1) - size * least
    if free < 0:
        raise ValueError(
            f"total: {size} tokens of at least {least} need {size * least}, got {total}"
        )
    bars = np.array(list(itertools.combinations(range(free + size - 1), size - 1)))
    edges = np.column_stack([np.full(len(bars), -1), bars, np.full(len(bars), free + size - 1)])
    return np.diff(edges, axis=1) - 1 + least
