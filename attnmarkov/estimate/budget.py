"""One long trajectory against many short ones, at the same number of generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _random, _validate
from attnmarkov.estimate.fit import fit
from attnmarkov.estimate.prior import as_prior
from attnmarkov.estimate.risk import excess_risk
from attnmarkov.estimate.trajectory import trajectory_prompts
from attnmarkov.model.ccmc import CCMC
from attnmarkov.prompts import uniform
from attnmarkov.prompts.batch import Prompts
from attnmarkov.rollout import rollout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Key

    from attnmarkov.estimate.prior import Prior
    from attnmarkov.estimate.result import Fit

_TEST_PROMPTS = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BudgetComparison:
    """What is learned from the same number of tokens, generated in three ways.

    The first axis of every array is the scheme, in the order of :attr:`schemes`: ``"one"``
    trajectory; ``"restarts"``, equal segments from the same prompt; ``"refreshing"``, equal
    segments from prompts drawn anew. The second is the replicate.

    Attributes:
        fits: The fits, a :class:`Fit` with leading axes (3, R).
        learned: (3, R, K) bool, whether the row's tokens are all compared by the data and the
            likelihood has a finite maximum in it.
        squared_error: (3, R, K) squared error of the row's centred logits; without a prior
            infinite where the row is not learned.
        excess_risk: (3, R) in nats per token on the test prompts; without a prior infinite where
            some row is not learned.
    """

    fits: Fit
    learned: Bool[Array, "scheme replicate row"]
    squared_error: Float[Array, "scheme replicate row"]
    excess_risk: Float[Array, "scheme replicate"]

    schemes: ClassVar[tuple[str, ...]] = ("one", "restarts", "refreshing")

    @property
    def share_learned(self) -> Float[Array, "scheme row"]:
        """(3, K) share of replicates in which a row has a finite maximum."""
        return self.learned.mean(1)

    def __repr__(self) -> str:
        """Medians of the errors and the shares learned, by scheme."""
        known = isinstance(self.squared_error, jax.Array | np.ndarray)
        if not known or not _validate.is_concrete(self) or self.squared_error.ndim != 3:
            return f"BudgetComparison(squared_error={self.squared_error})"
        error = np.median(np.asarray(self.squared_error).sum(-1), axis=1)
        risk = np.median(np.asarray(self.excess_risk), axis=1)
        share = np.asarray(self.learned).mean((1, 2))
        lines = [
            f"  {name:<10} {e:>20.3g} {r:>18.3g} {s:>12.0%}"
            for name, e, r, s in zip(self.schemes, error, risk, share, strict=True)
        ]
        head = f"  {'':<10} {'median squared error':>20} {'median excess risk':>18}"
        number = self.excess_risk.shape[1]
        title = f"BudgetComparison({number} replicates"
        return "\n".join([title, head + f" {'rows learned':>12}", *lines]) + ")"


def learn_with_budget(
    key: Key[Array, ""],
    model: CCMC,
    prompt: Any,
    budget: int,
    num_segments: int = 16,
    num_replicates: int = 64,
    *,
    fresh: Prompts | None = None,
    test: Prompts | None = None,
    prior: float | Prior | None = None,
    first_replicate: int = 0,
) -> BudgetComparison:
    """Fit a model to ``budget`` tokens that it generated, in one go, restarted, or refreshed.

    A long trajectory collapses and says ever less per token. Remedies at the same cost are to
    start again from the same prompt, and to start again from another. A replicate depends on
    ``(key, first_replicate + r)`` and the other arguments, not on the batch it stands in.
    Memory is O(R·budget·K).

    Args:
        key: A typed JAX key.
        model: The CCMC that generates.
        prompt: (L,) tokens, the prompt of the one trajectory and of the restarts.
        budget: Generated tokens of every replicate under every scheme; a multiple of
            ``num_segments``.
        num_segments: Segments M of the restarts and of the refreshed trajectories.
        num_replicates: Replicates R.
        fresh: Prompts that refreshed segments draw theirs from, each equally likely; if None
            they draw uniform prompts of L tokens.
        test: Prompts on which the excess risk is measured; 1024 uniform prompts of L tokens if
            None.
        prior: As :func:`fit`. Without one an error is infinite where the likelihood has no
            finite maximum: compare medians, or :attr:`BudgetComparison.share_learned`.
        first_replicate: Replicate id of the first.

    Raises:
        ValueError: If a size is below 1, ``num_segments`` does not divide ``budget``, ``prompt``
            is no single prompt, or vocabularies differ.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.6, 0.4]])
    >>> found = learn_with_budget(jax.random.key(0), model, [0, 1], 512, 16, 32)
    >>> found.squared_error.shape, found.share_learned.shape
    ((3, 32, 2), (3, 2))
    """
    _validate.check_key(key)
    budget = _validate.integer(budget, "budget", minimum=1)
    segments = _validate.integer(num_segments, "num_segments", minimum=1)
    number = _validate.integer(num_replicates, "num_replicates", minimum=1)
    first = _validate.integer(first_replicate, "first_replicate", minimum=0)
    if budget % segments:
        raise ValueError(f"budget: {budget} tokens can't be cut into {segments} equal segments")
    size = model.num_tokens
    start = prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, size)
    if len(start) != 1:
        raise ValueError(f"prompt: expected a single prompt, got {len(start)}")
    start = Prompts(start.counts, start.last)
    length = int(np.asarray(start.counts).sum())
    keys = [jax.random.fold_in(key, i) for i in range(5)]
    if test is None:
        test = uniform(keys[3], _TEST_PROMPTS, length, size)
    for name, batch in (("prompt", start), ("fresh", fresh), ("test", test)):
        if batch is not None and batch.num_tokens != size:
            raise ValueError(f"{name}: over {batch.num_tokens} tokens, but the model has {size}")
    # Segment s of replicate r is lane r·M + s.
    lanes, begin = number * segments, first * segments
    cut = budget // segments
    one = rollout(model, keys[0], start, budget, number, first_replicate=first)
    again = rollout(model, keys[1], start, cut, lanes, first_replicate=begin)
    refreshed = _fresh(keys[4], fresh, begin, lanes, length, size)
    other = rollout(model, keys[2], refreshed, cut, lanes, first_replicate=begin)
    prior = as_prior(prior)
    prior.check(size)
    prior = prior.over(size, jnp.result_type(float))

    found = [
        _learn(
            model.logits, *_pool(tokens.reshape(number, -1, tokens.shape[-1]), held), test, prior
        )
        for tokens, held in (
            (one.tokens, _spread(start, number, 1)),
            (again.tokens, _spread(start, number, segments)),
            (other.tokens, _spread(refreshed, number, segments)),
        )
    ]
    fits, learned, error, risk = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return BudgetComparison(fits, learned, error, risk)


def _spread(prompts: Prompts, number: int, segments: int) -> Prompts:
    """(R, M) prompts, one for every segment of every replicate."""

    def shape(x: jax.Array) -> jax.Array:
        whole = jnp.broadcast_to(x, (number * segments, *x.shape[1:]))
        return whole.reshape(number, segments, *x.shape[1:])

    return jax.tree.map(shape, prompts)


def _fresh(
    key: jax.Array, pool: Prompts | None, first: int, lanes: int, length: int, size: int
) -> Prompts:
    """The prompt of every refreshed segment: it depends on the key and the lane's id alone."""
    if pool is None:
        tokens = _uniform_tokens(key, jnp.arange(first, first + lanes), length, size)
        drawn = Prompts.from_tokens(tokens, size)
    else:
        seeds = _random.replicate_seeds(key, jnp.arange(first, first + lanes), "fresh prompts")
        drawn = pool[_random.below(_random.words(seeds, 0), jnp.uint32(len(pool)))]
    return Prompts(drawn.counts, drawn.last)


@partial(jax.jit, static_argnames=("length", "size"))
def _uniform_tokens(key: jax.Array, ids: jax.Array, length: int, size: int) -> jax.Array:
    seeds = _random.replicate_seeds(key, ids, "fresh prompts")
    bits = _random.words(seeds, jnp.arange(length)[:, None])
    return _random.below(bits, jnp.uint32(size)).T


@jax.jit
def _pool(tokens: jax.Array, start: Prompts) -> tuple[Prompts, jax.Array]:
    """Prompts and labels of every replicate, its segments pooled."""
    size = start.num_tokens
    return jax.vmap(lambda x, p: trajectory_prompts(x, p, size))(tokens, start)


@jax.jit
def _learn(logits: jax.Array, prompts: Prompts, y: jax.Array, test: Prompts, prior: Prior):
    def one(prompts: Prompts, y: jax.Array):
        found = fit(prompts, y, prior=prior)
        learned = (found.components == 0).all(-1) & ~found.separated
        known = learned | prior.is_proper
        error = jnp.where(known, ((found.model.logits - logits) ** 2).sum(-1), jnp.inf)
        risk = excess_risk(CCMC(logits), found.model, test)
        return found, learned, error, jnp.where(known.all(), risk, jnp.inf)

    return jax.vmap(one)(prompts, y)
