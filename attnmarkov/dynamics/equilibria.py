"""Where a long generation can come to rest: the equilibria of the mean field, by supports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import comb
from typing import TYPE_CHECKING, overload

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import _supports
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.dynamics.drift import check_power, power_of
from attnmarkov.dynamics.stable import flow_ends, supports_of

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

    from attnmarkov.model import CCMC, SelfAttention

_NEUTRAL = 1e-6  # rates nearer to 0 than this are 0 to the precision of float32 logits
_EVERY_SUPPORT = 2**12 - 1  # supports gone through: all of them for K <= 12
_EVERY_SUPPORT_NEWTON = 2**8 - 1  # and for powers other than 1
_RANDOM_STARTS = 8  # for each support, and their mirrors


@dataclass(frozen=True, eq=False, repr=False)
class Equilibrium:
    """Shares ``m`` with ``ν(m) = m``.

    Attributes:
        support: Ids of the tokens with a positive share, increasing.
        occupancy: (K,) the shares ``m``.
        growth_exponents: (K,) ``λ_j``, with which counts grow near it: 1 on the support. NaN for
            a token that may come but attends none of the support (masked): then it depends on
            other rare tokens. For power ``a > 1`` 0 off the support: such tokens stop coming;
            for ``a < 1`` infinite: they always come back.
        jacobian_eigenvalues: (K - 1,) complex, of the drift: those along the face of the
            support, then ``λ_j - 1`` of each token off it.
        dimension: 0, or the dimension of the continuum of equilibria with this support that
            this is one of (the others have other shares, eigenvalues and exponents).
        stable: Whether it is isolated and all eigenvalues have negative real parts, so that
            generations stay near with positive probability; one of a continuum is never
            ``stable``, but may be ``attracting``. Eigenvalues within 1e-6 of 0 are beyond the
            precision of the model, and do not count as negative: such a case linearisation
            does not decide.
    """

    support: tuple[int, ...]
    occupancy: Float[np.ndarray, " token"]
    growth_exponents: Float[np.ndarray, " token"]
    jacobian_eigenvalues: Complex[np.ndarray, " direction"]
    dimension: int
    stable: bool

    @property
    def isolated(self) -> bool:
        """Whether no equilibria with the same support are near: False on a continuum."""
        return self.dimension == 0

    @property
    def attracting(self) -> bool:
        """Whether it is stable or, of a continuum, all eigenvalues across it are negative.

        Generations then come with positive probability to some point of the continuum near it,
        which one depends on chance. Eigenvalues along the continuum, as many as its dimension,
        are 0 and do not count.
        """
        inner = self.jacobian_eigenvalues[: len(self.support) - 1]
        across = inner[np.argsort(abs(inner))[self.dimension :]]
        every = np.concatenate([across, self.jacobian_eigenvalues[len(inner) :]])
        return bool((np.real(every) < -_NEUTRAL).all())

    @property
    def is_winner_set(self) -> bool:
        """Whether its tokens can take over: attracting, and some token fades.

        Where it is not ``isolated`` they share the context at random, as in an urn.
        """
        return self.attracting and len(self.support) < len(self.occupancy)

    @property
    def relaxation_rate(self) -> float:
        """``-max Re`` of the eigenvalues: shares come as ``t**-rate`` (negative: they leave).

        Infinite where there is one token only.
        """
        if self.jacobian_eigenvalues.size == 0:
            return np.inf
        return float(-np.real(self.jacobian_eigenvalues).max())

    def __repr__(self) -> str:
        """Its support, kind, shares and exponents."""
        return (
            f"Equilibrium(support={self.support}, {_kind(self)}, "
            f"occupancy={_show(self.occupancy)}, growth_exponents={_show(self.growth_exponents)})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Equilibria(Sequence[Equilibrium]):
    """The equilibria found, stable ones first, then by the size of their support.

    Attributes:
        items: The equilibria.
        num_tokens: Vocabulary size K.
        complete: Whether there can be no others (but for the rest of a continuum).
    """

    items: tuple[Equilibrium, ...]
    num_tokens: int
    complete: bool

    @property
    def stable(self) -> tuple[Equilibrium, ...]:
        """The stable ones: what generations can come to."""
        return tuple(e for e in self.items if e.stable)

    @property
    def winner_sets(self) -> tuple[tuple[int, ...], ...]:
        """The supports that can take over, other than the whole vocabulary.

        Those of stable equilibria first, then those of attracting continua.
        """
        return tuple(e.support for e in self.items if e.is_winner_set)

    def at(self, support: int | Iterable[int]) -> tuple[Equilibrium, ...]:
        """Those with exactly the given tokens as their support."""
        tokens = {support} if isinstance(support, int | np.integer) else set(support)
        return tuple(e for e in self.items if set(e.support) == tokens)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Equilibrium: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Equilibrium, ...]: ...
    def __getitem__(self, index: int | slice) -> Equilibrium | tuple[Equilibrium, ...]:
        return self.items[index]

    def __repr__(self) -> str:
        """A table: who stays, whether it is stable, shares, and how the others grow."""
        known = "complete" if self.complete else "there may be others"
        head = (
            f"Equilibria({len(self)} of a mean field of {self.num_tokens} tokens, "
            f"{len(self.stable)} stable; {known}"
        )
        if not self.items:
            return head + ")"
        shown = self.items[:16]
        names = [
            "{" + ", ".join(map(str, e.support[:8])) + ", ..." * (len(e.support) > 8) + "}"
            for e in shown
        ]
        kinds = [_kind(e) for e in shown]
        shares = [_show(e.occupancy) for e in shown]
        wide = [max(map(len, column)) for column in (names, kinds, shares)]
        lines = [
            f"  {name:<{wide[0]}}  {kind:<{wide[1]}}  shares {share:<{wide[2]}}  "
            f"growth {_show(e.growth_exponents)}"
            for name, kind, share, e in zip(names, kinds, shares, shown, strict=True)
        ]
        return "\n".join([head, *lines, *["  ..."] * (len(self) > 16)]) + ")"


def equilibria(
    model: CCMC | SelfAttention,
    *,
    exponent: float = 1.0,
    temperature: float = 1.0,
    num_starts: int = 512,
    seed: int = 0,
) -> Equilibria:
    """The equilibria of the mean field: shares at which the chain's visits keep the shares.

    For power ``a = exponent / temperature = 1`` (so for plain generation) stationarity with
    support ``A`` is a linear system, ``Σ_{k∈A} x_k P[k, j] = 1`` for ``j`` in ``A`` with
    ``x_k = m_k / (P m)_k``, so that there is at most one equilibrium on each support unless
    ``P_AA`` is singular. All supports are gone through if K <= 12: the list is complete. Where
    ``P_AA`` is singular (to the precision of float32), either there is none or a continuum, of
    which one with its ``dimension`` is listed; it is not ``isolated`` and never ``stable``,
    but may be ``attracting``, and then its support is a winner set.

    For larger K, supports are gone through up to the size that keeps them below 4,096, and the
    stable equilibria are sought further by the flow from many random starts. For other powers
    Newton's method runs from many starts on every support if K <= 8. Every equilibrium
    listed is checked; that there are no others is not proven (``complete`` is False).

    Mixtures of tokens that never reach one another because of masks are left out: no generation
    mixes them. At temperatures so low that entries of ``P**(1 / temperature)`` differ by more
    than float64 holds (1e300 in a row), equilibria that depend on the smaller ones may be missing,
    and ``complete`` is False.

    Args:
        model: The CCMC, or self-attention, that generates.
        exponent: Reinforcement exponent of the context, as ``FullContext(exponent=...)``.
        temperature: As ``Sampling(temperature=...)``.
        num_starts: Random starts of the flow, where supports are too many.
        seed: Seed of the random starts.

    Returns:
        An :class:`Equilibria`, a sequence of :class:`Equilibrium` that prints as a table.

    Raises:
        ValueError: If a parameter is out of range, the model has a NaN or +inf among its logits
            or is no concrete one (inside jit or vmap).

    References:
        [CCMC], on winner-takes-all; Pemantle (1992), Benaïm (1997) for reinforced walks.

    >>> import attnmarkov as am
    >>> equilibria(am.CCMC.from_transition_matrix([[0.8, 0.2], [0.4, 0.6]]))
    Equilibria(3 of a mean field of 2 tokens, 2 stable; complete
      {0}     stable, winner set  shares [1. 0.]        growth [1.   0.25]
      {1}     stable, winner set  shares [0. 1.]        growth [0.667 1.   ]
      {0, 1}  unstable            shares [0.143 0.857]  growth [1. 1.])
    """
    check_power(exponent, temperature)
    num_starts = _validate.integer(num_starts, "num_starts", minimum=1)
    rng = np.random.default_rng(_validate.seed(seed))
    model = as_ccmc(model)
    if not _validate.is_concrete(model, exponent, temperature):
        raise ValueError("model: equilibria are found on the host; call this outside jit and vmap")
    _validate.finite(model.logits, "model.logits", allow_minus_inf=True)
    log_q, a = _supports.log_weights(model, temperature), power_of(exponent, temperature)
    limit = _EVERY_SUPPORT if a == 1 else _EVERY_SUPPORT_NEWTON
    size, largest = len(log_q), _largest(len(log_q), limit)
    found = [_on_all(log_q, a, s, rng) for s in range(1, largest + 1)]
    if largest < size:
        found += _by_flow(log_q, a, largest, num_starts, rng)
    items = list(chain.from_iterable(_describe(log_q, a, f) for f in found))
    if largest < size:
        items = [e for e in items if e.attracting or len(e.support) <= largest]
    items.sort(
        key=lambda e: (
            not e.stable,
            not e.attracting,
            len(e.support),
            e.support,
            tuple(-e.occupancy),
        )
    )
    complete = a == 1 and largest == size and not _supports.underflows(log_q)
    return Equilibria(tuple(items), size, complete)


def _largest(size: int, limit: int) -> int:
    """The largest ``s`` for which supports of up to ``s`` tokens are at most ``limit``."""
    total = 0
    for s in range(1, size + 1):
        total += comb(size, s)
        if total > limit:
            return max(s - 1, 1)
    return size


def _on_all(log_q: np.ndarray, a: float, s: int, rng: np.random.Generator) -> _supports.Found:
    """Equilibria on all supports of ``s`` tokens."""
    supports = np.array(list(combinations(range(len(log_q)), s)))
    if a == 1 or s == 1:  # a single token that follows itself is one for every power
        return _supports.solve_linear(log_q, supports)
    starts = _starts(s, rng)
    each = np.repeat(supports, len(starts), axis=0)
    return _supports.solve_newton(log_q, each, np.tile(starts, (len(supports), 1)), a)


def _starts(s: int, rng: np.random.Generator) -> np.ndarray:
    """Logarithms of shares of ``s`` tokens: near to every vertex, and random ones with mirrors."""
    near = [-distance * (1 - np.eye(s)) for distance in (2.0, 8.0, 25.0)]
    random = rng.normal(size=(_RANDOM_STARTS, s)) * np.resize([1.0, 4.0], (_RANDOM_STARTS, 1))
    return np.concatenate([*near, random, -random])


def _by_flow(
    log_q: np.ndarray, a: float, largest: int, num_starts: int, rng: np.random.Generator
) -> list[_supports.Found]:
    """Equilibria with larger supports near to where the flow ends."""
    ends = flow_ends(_supports.linear(log_q), a, num_starts, rng)
    found = []
    for supports in supports_of(ends):
        if supports.shape[1] <= largest:
            continue
        if a == 1:
            found.append(_supports.solve_linear(log_q, supports))
        else:
            rows = np.repeat(np.arange(len(ends)), len(supports))
            each = np.tile(supports, (len(ends), 1))
            starts = np.log(ends[rows[:, None], each])
            found.append(_supports.solve_newton(log_q, each, starts, a))
    return found


def _describe(log_q: np.ndarray, a: float, found: _supports.Found) -> Iterable[Equilibrium]:
    if len(found.supports) == 0:
        return
    inner = _supports.face_eigenvalues(log_q, found, a)
    growth = _supports.growth(log_q, found, a)
    for support, shares, freedom, eigenvalues, exponents in zip(
        found.supports, found.shares, found.freedom, inner, growth, strict=True
    ):
        occupancy = np.zeros(len(log_q))
        occupancy[support] = shares
        outer = np.delete(exponents, support) - 1
        every = np.concatenate([eigenvalues, outer])
        ids = tuple(int(j) for j in support)
        one = Equilibrium(ids, occupancy, exponents, every, int(freedom), stable=False)
        yield replace(one, stable=one.isolated and one.attracting)


def _kind(e: Equilibrium) -> str:
    if not e.isolated:
        word = "attracting, winner set; " if e.is_winner_set else "attracting; " * e.attracting
        return f"{word}one of a continuum (dimension {e.dimension})"
    if e.stable:
        return "stable, winner set" if e.is_winner_set else "stable"
    return "neutral" if abs(e.relaxation_rate) <= _NEUTRAL else "unstable"


def _show(values: np.ndarray) -> str:
    return np.array2string(
        values, precision=3, threshold=8, edgeitems=3, suppress_small=True, max_line_width=200
    )
