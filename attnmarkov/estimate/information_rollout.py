"""Information over very long rollouts: whole runs of one token at once, exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate, _wide
from attnmarkov._wide import Wide
from attnmarkov.estimate.information_growth import InformationGrowth, record_steps
from attnmarkov.prompts.batch import Prompts
from attnmarkov.rollout.skip_ahead import WORDS, grow, next_stay

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, UInt32
    from numpy.typing import ArrayLike

    from attnmarkov.model.ccmc import CCMC

_DIRECT = 8  # terms of a run that are summed one by one
_SPREAD = 60.0  # nats between entries of a row of P that float32 can hold beside counts


def rollout_information(
    model: CCMC,
    key: Key[Array, ""],
    prompt: Any,
    at: ArrayLike,
    num_trajectories: int = 1,
    *,
    first_replicate: int = 0,
) -> tuple[InformationGrowth, np.ndarray]:
    """Draw trajectories by whole runs, and sum the information of every step of each run.

    While a trajectory stays on token ``k``, ``n_k`` alone changes: after ``i`` stays the law is
    ``p(k) = (n_k + i) / (n_k + i + c)`` and the others share ``c / (n_k + i + c)`` in fixed
    proportions. So the products of the law sum over a run of any length in closed form, up to
    the tail of Euler's summation formula (relative error below 1e-5), and a trajectory to time
    ``T`` costs about ``Σ_j T**λ_j`` draws, as with ``engine="skip_ahead"``.

    Trajectory ``r`` depends on ``(key, first_replicate + r)``, the model and its prompt alone, not
    on ``at``. Sums are kept in float32, record by record: visits and gains have its precision.

    Args:
        model: The CCMC that generates, and at which the information is evaluated.
        key: A typed JAX key.
        prompt: As :func:`attnmarkov.rollout`.
        at: Increasing numbers of steps at which information is recorded, up to 2**62 − L.
        num_trajectories: Number of trajectories R.
        first_replicate: Replicate id of the first.

    Returns:
        The :class:`InformationGrowth`, and the (R, len(at), K) int64 counts of the whole history
        at the records.

    Raises:
        ValueError: If a size is out of range, ``at`` does not increase, the prompt is no prompt
            of the model, or entries of a row of ``P`` differ by more than ``exp(60)``.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.6, 0.4]])
    >>> growth, counts = rollout_information(model, jax.random.key(0), [0, 1], [10**3, 10**9], 4)
    >>> counts.sum(-1)[0].tolist(), int(growth.visits[0].sum(-1)[0])
    ([1002, 1000000002], 1000)
    """
    _validate.check_key(key)
    steps = record_steps(at)
    number = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    first = _validate.integer(first_replicate, "first_replicate", minimum=0)
    spread = np.ptp(np.asarray(model.logits, np.float64), axis=1).max()
    if not spread <= _SPREAD:
        raise ValueError(
            f"model: entries of a row of P must differ by less than exp({_SPREAD:.0f}), got "
            f"logits {spread:g} apart"
        )
    prompts = (
        prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, model.num_tokens)
    )
    if prompts.num_tokens != model.num_tokens:
        raise ValueError(
            f"prompt: over {prompts.num_tokens} tokens, but the model has {model.num_tokens}"
        )
    if len(prompts) not in (1, number):
        raise ValueError(
            f"prompt: {len(prompts)} prompts for {number} trajectories; give one, or one for each"
        )
    if int(steps[-1]) + int(np.asarray(prompts.counts).sum(-1).max()) > 2**62:
        raise ValueError(f"at: the history must stay below 2**62 tokens, got {steps[-1]}")
    ids = jnp.arange(first, first + number, dtype=jnp.uint32)
    seeds = _random.replicate_seeds(key, ids, "information")
    counts = jnp.broadcast_to(prompts.counts, (number, model.num_tokens))
    last = jnp.broadcast_to(prompts.last, number)
    gain, visits, wide = _run(model.logits.astype(jnp.float32), seeds, counts, last, Wide.of(steps))
    return InformationGrowth(steps, gain, visits), wide.numpy()


class _State(NamedTuple):
    counts: Wide  # (token, lane), at step `begin`
    last: jax.Array  # (lane,) token stayed on
    begin: Wide  # (lane,) steps done that have been summed
    end: Wide  # (lane,) steps done when the stay ends
    fresh: jax.Array  # (lane,) whether the length of the stay is still to be drawn
    attempt: jax.Array  # (lane,) uint32, numbers the calls on the generator
    record: jax.Array  # (lane,) next record to write
    out: Wide  # (record, token, lane)
    gain: jax.Array  # (lane, record, row, token, token)
    visits: jax.Array  # (lane, record, row)


@jax.jit
def _run(
    logits: Float[Array, "token token"],
    seeds: UInt32[Array, "2 lane"],
    counts: Int[Array, "lane token"],
    last: Int[Array, " lane"],
    at: Wide,
) -> tuple[jax.Array, jax.Array, Wide]:
    """The loop of the skip-ahead engine, which also sums over each part of a stay."""
    (lanes, size), records = counts.shape, at.low.shape[0]
    p = jnp.exp(logits - logits.max(axis=1, keepdims=True)).T  # (token, query)
    tokens = jnp.arange(size, dtype=jnp.int32)[:, None]
    index = jnp.arange(lanes)

    def turn(s: _State) -> _State:
        due = jax.tree.map(lambda x: x[jnp.minimum(s.record, records - 1)], at)
        active = s.record < records
        write = active & ~s.fresh & (due <= s.end)
        go = active & ~write
        leave = go & ~s.fresh
        here = tokens == s.last
        # 1. Sum over the stay up to the record, or over the stay and the step that ends it.
        stop = _wide.where(write, due, s.end)
        whole = stop - s.begin
        steps = jnp.where(write | leave, whole.to_float() + leave, 0)
        weighted = s.counts.to_float() * p[:, s.last]
        others = jnp.where(here, 0, weighted)
        total = others.sum(0)
        own = jnp.where(here, p[:, s.last], 0).sum(0)
        held = jnp.where(here, s.counts.to_float(), 0).sum(0)
        with_own, without = _sum_run(held, own, total, steps)
        share = others / jnp.where(total > 0, total, 1)
        cross = with_own * here[:, None] * share
        products = cross + cross.swapaxes(0, 1) + without * share[:, None] * share
        place = s.gain.at[index, s.record, s.last]
        gain = place.add(products.transpose(2, 0, 1), mode="drop")
        visits = s.visits.at[index, s.record, s.last].add(steps, mode="drop")
        # 2. Go there; write the record.
        grown = grow(s.counts, (write | leave) & here, whole)
        slot = jnp.where(write, s.record, records)
        out = jax.tree.map(lambda o, r: o.at[slot, :, index].set(r.T, mode="drop"), s.out, grown)
        # 3. A lane that ends its stay emits the token that ends it, and draws its next stay; if
        # rejected, again at the next turn.
        bits = [w for i in range(WORDS // 2) for w in _random.words(seeds, s.attempt, i)]
        token = _random.draw(others, (bits[0], bits[1]), axis=0)
        counts = grow(grown, leave & (tokens == token), Wide.one())
        last = jnp.where(leave, token, s.last)
        begin = _wide.where(write, due, _wide.where(leave, s.end + Wide.one(), s.begin))
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
            gain,
            visits,
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
        gain=jnp.zeros((lanes, records, size, size, size), jnp.float32),
        visits=jnp.zeros((lanes, records, size), jnp.float32),
    )
    final = jax.lax.while_loop(lambda s: (s.record < records).any(), turn, start)
    out = jax.tree.map(lambda o: o.transpose(2, 0, 1), final.out)
    return final.gain * (1 - jnp.eye(size, dtype=jnp.float32)), final.visits, out


def _sum_run(
    n: Float[Array, " lane"],
    own: Float[Array, " lane"],
    others: Float[Array, " lane"],
    steps: Float[Array, " lane"],
) -> tuple[Float[Array, " lane"], Float[Array, " lane"]]:
    """``Σ q (1 − q)`` and ``Σ (1 − q)²`` over ``steps`` stays, ``q = n p / (n p + others)``.

    ``n`` grows by 1 at every step. The first eight terms one by one, the rest by Euler's formula
    ``Σ f(x) = ∫ f + (f(a) − f(b)) / 2 + (f'(b) − f'(a)) / 12``, each term a sum of parts that do
    not cancel.
    """
    crossed, apart = jnp.zeros_like(n), jnp.zeros_like(n)
    possible = others > 0
    others = jnp.where(possible, others, 1)
    for i in range(_DIRECT):
        weight = (n + i) * own
        q, rest = weight / (weight + others), others / (weight + others)
        crossed += jnp.where(i < steps, q * rest, 0)
        apart += jnp.where(i < steps, rest * rest, 0)
    left = jnp.where(own > 0, jnp.maximum(steps - _DIRECT, 0), 0)
    # In x = n + c, 1 − q = c / x; from a to b = a + left.
    c = others / jnp.where(own > 0, own, 1)
    n = n + _DIRECT
    a = n + c
    b = a + left
    ca, cb, na, nb = c / a, c / b, n / a, (n + left) / b  # 1 − q and q at both ends
    tail = _crossed_integral(left / a, c, na) + (na * ca - nb * cb) / 2
    tail += (cb * (cb - nb) / b - ca * (ca - na) / a) / 12
    crossed += jnp.where(left > 0, tail, 0)
    tail = ca * cb * left + (ca**2 - cb**2) / 2 + (ca**2 / a - cb**2 / b) / 6
    apart += jnp.where(left > 0, tail, 0)
    return jnp.where(possible, crossed, 0), jnp.where(possible, apart, 0)


def _crossed_integral(u: jax.Array, c: jax.Array, na: jax.Array) -> jax.Array:
    """``∫ c (x − c) / x²`` from ``a`` to ``a (1 + u)``, with ``na = (a − c) / a``."""
    small = jnp.minimum(u, 0.25)
    series = jnp.zeros_like(u)  # log(1 + u) − u / (1 + u) = u²/2 − 2u³/3 + 3u⁴/4 − …
    for power in range(12, 1, -1):
        series = series * small + (-1) ** power * (power - 1) / power
    tail = jnp.where(u < 0.25, series * small**2, jnp.log1p(u) - u / (1 + u))
    return c * tail + c * na * (u / (1 + u))
