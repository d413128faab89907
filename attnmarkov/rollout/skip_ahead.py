"""The skip-ahead engine: jumps over whole runs of one token, exactly, to any horizon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate, _wide
from attnmarkov._wide import Wide
from attnmarkov.rollout import _devices
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Float, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law

WORDS = 10  # random words of a turn, two from each stream


@dataclass(frozen=True)
class SkipAhead(Engine):
    """Draws the length of a stay on the last token at once, then the token that ends it.

    While the chain stays on ``k``, it leaves after ``i`` more stays with probability
    ``c / (n_k + i + c)``, ``c = Σ_{j≠k} n_j P[k, j] / P[k, k]``. So the length of the stay is
    beta-geometric: ``p ~ Beta(c, n_k)``, then ``Geometric(p)`` stays, then token ``j ≠ k`` with
    weight ``n_j P[k, j]``. A trajectory to time ``T`` costs about ``Σ_j T**λ_j`` draws.

    Every lane goes at its own pace; gamma variables are drawn by rejection, and a lane that
    rejects tries again at the next turn while the others go on. Counts and times are 64-bit
    pairs, exact to the unit; probabilities have float32 precision, rare tokens included.

    References:
        Marsaglia and Tsang (2000), for the gamma variables.
    """

    max_context: int = 2**62

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> np.ndarray | Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`; int64 on the host (int32 if traced)."""
        wide = _run(law.logits, seeds, prompts.counts, prompts.last, Wide.of(at))
        if _validate.is_concrete(wide):
            return wide.numpy()
        return wide.low.astype(jnp.int32)


class _State(NamedTuple):
    counts: Wide  # (token, lane), when the current stay begins
    last: jax.Array  # (lane,) token stayed on
    begin: Wide  # (lane,) steps done when the stay begins
    end: Wide  # (lane,) steps done when it ends
    fresh: jax.Array  # (lane,) whether the length of the stay is still to be drawn
    attempt: jax.Array  # (lane,) uint32, numbers the calls on the generator
    record: jax.Array  # (lane,) next record to write
    out: Wide  # (record, token, lane)


@jax.jit
def _run(logits: jax.Array, seeds: jax.Array, counts: jax.Array, last: jax.Array, at: Wide) -> Wide:
    first, whole = _devices.FIRST, _devices.WHOLE
    specs = (whole, _devices.SECOND, first, first, whole)
    skip = _devices.over_lanes(_skip, last.shape[0], specs, local=True)
    return skip(logits, seeds, counts, last, at)


def _skip(
    logits: jax.Array, seeds: jax.Array, counts: jax.Array, last: jax.Array, at: Wide
) -> Wide:
    size, lanes, records = counts.shape[1], counts.shape[0], at.low.shape[0]
    p = jnp.exp(logits - logits.max(axis=1, keepdims=True)).T  # (token, query)
    tokens = jnp.arange(size, dtype=jnp.int32)[:, None]
    index = jnp.arange(lanes)

    def turn(s: _State) -> _State:
        due = jax.tree.map(lambda x: x[jnp.minimum(s.record, records - 1)], at)
        active = s.record < records
        # 1. Write a record that falls in the current stay.
        write = active & ~s.fresh & (due <= s.end)
        row = grow(s.counts, write & (tokens == s.last), due - s.begin)
        slot = jnp.where(write, s.record, records)
        out = jax.tree.map(lambda o, r: o.at[slot, :, index].set(r.T, mode="drop"), s.out, row)
        # 2. A lane with no record there ends its stay, and emits the token that ends it.
        go = active & ~write
        leave = go & ~s.fresh
        bits = [w for i in range(WORDS // 2) for w in _random.words(seeds, s.attempt, i)]
        counts = grow(s.counts, leave & (tokens == s.last), s.end - s.begin)
        weights = jnp.where(tokens == s.last, 0, s.counts.to_float() * p[:, s.last])
        token = _random.draw(weights, (bits[0], bits[1]), axis=0)
        counts = grow(counts, leave & (tokens == token), Wide.one())
        last = jnp.where(leave, token, s.last)
        begin = _wide.where(leave, s.end + Wide.one(), s.begin)
        # 3. And draws the length of its next stay; if rejected, again at the next turn.
        stay, accepted = next_stay(counts, last, p, bits[2:])
        drawn = go & accepted
        return _State(
            counts,
            last,
            begin,
            _wide.where(drawn, begin + stay, s.end),
            (s.fresh | leave) & ~drawn,
            s.attempt + go,
            s.record + write,
            out,
        )

    zero = jnp.zeros(lanes, jnp.uint32)
    blank = jnp.zeros((records, size, lanes), jnp.uint32)
    held = counts.T.astype(jnp.uint32)
    start = _State(
        counts=Wide(jnp.zeros_like(held), held),
        last=last,
        begin=Wide(zero, zero),
        end=Wide(zero, zero),
        fresh=jnp.ones(lanes, bool),
        attempt=zero,
        record=jnp.zeros(lanes, jnp.int32),
        out=Wide(blank, blank),
    )
    final = jax.lax.while_loop(lambda s: (s.record < records).any(), turn, start)
    return jax.tree.map(lambda o: o.transpose(2, 0, 1), final.out)


def grow(counts: Wide, which: jax.Array, by: Wide) -> Wide:
    """``counts`` with ``by`` added where ``which`` holds."""
    return counts + Wide(jnp.where(which, by.high, 0), jnp.where(which, by.low, 0))


def next_stay(
    counts: Wide, last: jax.Array, p: jax.Array, bits: Sequence[jax.Array]
) -> tuple[Wide, jax.Array]:
    """How long each lane stays on its token ``last``, and whether that draw was accepted.

    Counts are (token, lane), ``p[j, k]`` is the weight of ``j`` after ``k``.
    """
    here = jnp.arange(p.shape[0])[:, None] == last
    held, attended = counts.to_float(), p[:, last]
    return _stay(
        jnp.where(here, 0, held * attended).sum(0),
        jnp.where(here, attended, 0).sum(0),
        jnp.where(here, held, 0).sum(0),
        bits,
    )


def _stay(
    others: Float[Array, " lane"],
    own: Float[Array, " lane"],
    n: Float[Array, " lane"],
    bits: Sequence[UInt32[Array, " lane"]],
) -> tuple[Wide, jax.Array]:
    """The length of a stay, and whether the attempt was accepted.

    ``others = Σ_{j≠k} n_j P[k, j]``, ``own = P[k, k]``, ``n = n_k``; 8 words a lane.
    """
    possible = (own > 0) & (n > 0)
    c = jnp.where(possible & (others > 0), others / jnp.where(possible, own, 1), 1)
    small = c < 1
    log_c, ok_c = _log_gamma(c + small, bits[0], bits[1])
    log_c = log_c - jnp.where(small, _exponential(bits[2]) / c, 0)  # Gamma(c+1) U**(1/c)
    log_n, ok_n = _log_gamma(jnp.maximum(n, 1), bits[3], bits[4])
    # p = G_c / (G_c + G_n), so -log(1 - p) = log1p(G_c / G_n); stays = floor(E / -log(1 - p)).
    ratio = jnp.exp(jnp.minimum(log_c - log_n, 80.0))
    length = jnp.where(possible, _exponential(bits[5]) / jnp.log1p(ratio), 0)
    length = jnp.where(others > 0, length, jnp.inf)
    return _wide.from_float(length, (bits[6], bits[7])), (ok_c & ok_n) | ~possible | (others <= 0)


def _exponential(word: UInt32[Array, ...]) -> Float[Array, ...]:
    """A standard exponential variable, of full relative precision down to 1e-10."""
    u = (word.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24))


def _normal(word: UInt32[Array, ...]) -> Float[Array, ...]:
    """A standard normal variable with tails to six standard deviations."""
    half = ((word >> 1).astype(jnp.float32) + 0.5) * 2.0**-32
    return jnp.where(word & 1, 1, -1) * jax.scipy.special.ndtri(half)


def _log_gamma(
    a: Float[Array, ...], normal: UInt32[Array, ...], uniform: UInt32[Array, ...]
) -> tuple[Float[Array, ...], jax.Array]:
    """One attempt at the logarithm of a Gamma(a) variable, a >= 1, and whether it is accepted.

    Marsaglia and Tsang's ``d (1 + δ)**3`` with ``δ = x / sqrt(9 d)``, ``x`` normal. Its log
    acceptance ``x²/2 + d − d v + d log v`` equals ``d f(δ)``, ``f = −3δ⁴/4 + 3δ⁵/5 − …``, which
    float32 can hold for any ``d``.
    """
    d = a - 1 / 3
    x = _normal(normal)
    delta = x / jnp.sqrt(9 * d)
    inside = delta > -1
    delta = jnp.where(inside, delta, 0)
    series = jnp.zeros_like(delta)
    for power in range(12, 3, -1):  # error below 1e-6 of f for |δ| < 0.2
        series = series * delta + 3 * (-1) ** (power + 1) / power
    direct = 3 * jnp.log1p(delta) - 3 * delta + 1.5 * delta**2 - delta**3
    f = jnp.where(jnp.abs(delta) < 0.2, series * delta**4, direct)
    accepted = inside & (-_exponential(uniform) < d * f)
    return jnp.log(d) + 3 * jnp.log1p(delta), accepted
