"""Streaming summaries: what a rollout can tell of itself without keeping its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import Context, LagContext, WindowContext, _leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from attnmarkov.prompts import Prompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Summary:
    """What ``record=Summary(...)`` asks for; ``record="summary"`` is ``Summary()``.

    Attributes:
        share: The share, in (0, 1], of the whole history whose first passage is timed.
        transitions: Whether to count transitions, which takes K² integers a trajectory.
    """

    share: float | Float[Array, ""] = 0.5
    transitions: bool = field(default=True, metadata={"static": True})

    def check(self) -> None:
        """Raise unless the share lies in (0, 1].

        Raises:
            ValueError: Naming the attribute and its value.
        """
        _leaves.fraction(self.share, "share")
        if not isinstance(self.transitions, bool):
            raise ValueError(f"transitions: expected True or False, got {self.transitions!r}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Summaries:
    """Summaries of R trajectories, at the recorded steps ``at`` or over all steps to the last.

    Attributes:
        entropy: (R, len(at)) entropy in nats of the tokens' shares of the whole history.
        distinct: (R, len(at)) int32, different tokens drawn since the prompt.
        recent: (R, len(at)) int32, different tokens drawn since the record before (or the
            prompt): how varied generation still is.
        transitions: (R, K, K) int32, ``transitions[r, k, j]`` steps that drew ``j`` after query
            ``k``; None if not asked for.
        passage_time: (R,) int32, the first number of steps after which some token's share of
            the whole history is at least ``share``; -1 if none was.
        absorption_time: (R,) int32, the first number of steps after which the context (the
            window; the M last tokens under lag weights; else the whole history) holds one single
            token, so that nothing else can come; -1 if it never did.
        share: The share that ``passage_time`` is about.
    """

    entropy: Float[Array, "replicate record"]
    distinct: Int[Array, "replicate record"]
    recent: Int[Array, "replicate record"]
    transitions: Int[Array, "replicate token token"] | None
    passage_time: Int[Array, " replicate"]
    absorption_time: Int[Array, " replicate"]
    share: Float[Array, ""] | float

    def labelled(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Every array with its dims, as ``xarray.Dataset`` takes them."""
        dims = {
            "entropy": ("replicate", "step"),
            "distinct": ("replicate", "step"),
            "recent": ("replicate", "step"),
            "transitions": ("replicate", "query", "token"),
            "passage_time": ("replicate",),
            "absorption_time": ("replicate",),
        }
        arrays = ((name, getattr(self, name)) for name in dims)
        return {name: (dims[name], np.asarray(x)) for name, x in arrays if x is not None}

    def __repr__(self) -> str:
        """How many passed the share, and how many were absorbed."""
        if not _validate.is_concrete(self):
            return f"Summaries(entropy={self.entropy})"
        passed = np.asarray(self.passage_time) >= 0
        absorbed = np.asarray(self.absorption_time) >= 0
        return (
            f"Summaries({passed.size} trajectories: {passed.sum()} passed a share of "
            f"{float(self.share):g}, {absorbed.sum()} absorbed in one token, median entropy "
            f"{np.median(np.asarray(self.entropy)[:, -1]):.3f} nats at the end)"
        )


class Watch(NamedTuple):
    """What is carried along a rollout to be summarised, lanes first."""

    length: Int[Array, " lane"]  # of the whole history
    run: Int[Array, " lane"]  # equal tokens at its end
    tail: Int[Array, " lane"]  # the last of them
    passage: Int[Array, " lane"]
    absorption: Int[Array, " lane"]
    transitions: Int[Array, "lane pair"] | None


def watch(summary: Summary, context: Context, prompts: Prompts) -> Watch:
    """The state after the prompt."""
    lanes, size = prompts.counts.shape
    length = prompts.counts.sum(1)
    top = prompts.counts.max(1)
    if prompts.tokens is None or prompts.lengths is None:
        tail = prompts.counts.argmax(1).astype(jnp.int32)
        run = jnp.where(top == length, length, 0)  # a run over the whole history is all it needs
    else:
        tail = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
        place = jnp.arange(prompts.tokens.shape[1])
        other = (prompts.tokens != tail) & (place < prompts.lengths[:, None])
        run = prompts.lengths - 1 - jnp.where(other, place, -1).max(1)
        tail = tail[:, 0]
    never = jnp.full(lanes, -1, jnp.int32)
    return Watch(
        length,
        run,
        tail,
        jnp.where(_passes(summary, top, length), 0, never),
        jnp.where(run >= jnp.minimum(_reach(context), length), 0, never),
        jnp.zeros((lanes, size * size), jnp.int32) if summary.transitions else None,
    )


def observe(
    summary: Summary,
    context: Context,
    seen: Watch,
    last: Int[Array, " lane"],
    token: Int[Array, " lane"],
    count: Int[Array, " lane"],
    step: Int[Array, ""],
) -> Watch:
    """The state after ``token``, whose count is now ``count``, was drawn after query ``last``."""
    drawn = token >= 0
    now = step.astype(jnp.int32) + 1
    length = seen.length + drawn
    run = jnp.where(drawn, jnp.where(token == seen.tail, seen.run + 1, 1), seen.run)
    passed = drawn & _passes(summary, count, length)
    absorbed = run >= jnp.minimum(_reach(context), length)
    transitions = seen.transitions
    if transitions is not None:
        size = round(transitions.shape[1] ** 0.5)
        pair = jnp.where(drawn, last * size + token, size * size)
        transitions = transitions.at[jnp.arange(len(token)), pair].add(1, mode="drop")
    return Watch(
        length,
        run,
        jnp.where(drawn, token, seen.tail),
        jnp.where((seen.passage < 0) & passed, now, seen.passage),
        jnp.where((seen.absorption < 0) & absorbed, now, seen.absorption),
        transitions,
    )


def at_record(
    start: Int[Array, "lane token"],
    before: Int[Array, "lane token"],
    counts: Int[Array, "lane token"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Entropy, distinct and recent tokens of every lane.

    From the counts at the prompt, at the record before, and now.
    """
    share = counts / counts.sum(1, keepdims=True)
    entropy = jax.scipy.special.entr(share).sum(1)
    return (
        entropy,
        (counts > start).sum(1, dtype=jnp.int32),
        (counts > before).sum(1, dtype=jnp.int32),
    )


def _passes(summary: Summary, count: jax.Array, length: jax.Array) -> jax.Array:
    """Whether ``count`` is at least the share of ``length``; equality within 2**-22 passes.

    In float32 ``0.09 * 300`` is above 27.
    """
    return count >= summary.share * (1 - 2.0**-22) * length


def _reach(context: Context) -> int:
    """Length of history that the context sees, for those that see an end of it."""
    if isinstance(context, WindowContext):
        return min(context.size, np.iinfo(np.int32).max)
    if isinstance(context, LagContext):
        return np.shape(context.weights)[0]
    return np.iinfo(np.int32).max
