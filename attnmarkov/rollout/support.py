"""Rollouts of an attention head on the tokens of each prompt: no other can come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import CCMC, AttentionHead
from attnmarkov.prompts import Prompts
from attnmarkov.prompts.batch import _pad_ragged
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.summary import Summaries
from attnmarkov.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr
    from jaxtyping import Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class SupportTrajectory(Trajectory):
    """Counts or summaries of a rollout over the S tokens that its prompts hold.

    Axes of tokens have S entries, and ``num_tokens`` is S.

    Attributes:
        support: (S,) int64, the ids of these tokens, increasing.
    """

    support: Int[np.ndarray, " s"] | None = None

    def to_dataset(self) -> xr.Dataset:
        """As :meth:`Trajectory.to_dataset`, labelled with the ids."""
        data = super().to_dataset()
        ids = np.asarray(self.support)
        return data.assign_coords({d: ids for d in ("query", "token") if d in data.dims})


class Part(NamedTuple):
    """Trajectories of an attention head that share a prompt, on the tokens of that prompt.

    Attributes:
        model: The CCMC on these tokens; the last one is repeated to fill up a power of two, so
            that few sizes are compiled, and the repetitions never come.
        prompts: The prompt, over the tokens of that CCMC.
        ids: (S,) int64 ids of the tokens, increasing.
        start: The first of the trajectories.
        number: How many they are.
    """

    model: CCMC
    prompts: Prompts
    ids: Int[np.ndarray, " s"]
    start: int
    number: int


def parts(head: AttentionHead, prompt: Any, num_trajectories: Any) -> list[Part]:
    """The parts of a rollout: consecutive trajectories whose prompts are the same.

    Each prompt has a CCMC of its own tokens, so that a trajectory does not depend on the others.

    Raises:
        ValueError: If the prompt is traced, empty or holds a bad id, or the number of prompts
            is neither one nor that of the trajectories.
    """
    if not _validate.is_concrete(prompt):
        raise ValueError("prompt: must be known when an attention head is rolled out, not traced")
    many = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    if isinstance(prompt, Prompts):
        rows = _rows_of_prompts(prompt, head.num_tokens)
    else:
        rows = _rows_of_tokens(prompt, head.num_tokens)
    if len(rows) not in (1, many):
        raise ValueError(
            f"prompt: {len(rows)} prompts for {many} trajectories; give one, or one for each"
        )
    number = many // len(rows)
    out: list[Part] = []
    for i, (held, prompts) in enumerate(rows):
        if out and _same(prompts, rows[i - 1][1]) and np.array_equal(held, out[-1].ids):
            out[-1] = out[-1]._replace(number=out[-1].number + 1)
            continue
        model, _ = head.restrict(np.pad(held, (0, _size(held) - len(held)), mode="edge"))
        out.append(Part(model, prompts, held, i, number))
    return out


def join(num_tokens: int, supports: list[np.ndarray], found: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of a head with ``num_tokens`` from those of its parts, on their supports."""
    first = found[0]
    engine = "/".join(dict.fromkeys(part.engine for part in found))
    if first.at is None:
        dtype = smallest_dtype(num_tokens)
        mapped = [
            jnp.asarray(np.append(ids, -1), dtype)[part.tokens]  # -1 stays -1
            for ids, part in zip(supports, found, strict=True)
        ]
        return Trajectory(num_tokens, engine, _concatenate(*mapped))
    union = np.unique(np.concatenate(supports))
    records = []
    for ids, part in zip(supports, found, strict=True):
        place = np.searchsorted(ids, union)
        place = np.where(np.isin(union, ids), place, -1)
        values = part.values
        if not isinstance(values, Summaries):
            values = _take(values, place, -1)
        elif values.transitions is not None:
            square = _take(_take(values.transitions, place, -1), place, -2)
            values = replace(values, transitions=square)
        records.append(values)
    if isinstance(records[0], Summaries):
        share = records[0].share
        records = [replace(r, share=np.zeros(0)) for r in records]  # of all, not of a trajectory
        values = replace(jax.tree.map(_concatenate, *records), share=share)
    else:
        values = _concatenate(*records)
    return SupportTrajectory(len(union), engine, values, first.at, union)


def _concatenate(*arrays: Any) -> Any:
    if len(arrays) == 1:
        return arrays[0]
    return (np if isinstance(arrays[0], np.ndarray) else jnp).concatenate(arrays)


def _take(values: Any, place: np.ndarray, axis: int) -> Any:
    """Entries at ``place`` along an axis; zero where that is -1."""
    xp = np if isinstance(values, np.ndarray) else jnp
    empty = xp.zeros_like(xp.take(values, np.array([0]), axis=axis))
    return xp.take(
        xp.concatenate([values, empty], axis=axis), place % (values.shape[axis] + 1), axis
    )


def _same(one: Prompts, other: Prompts) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _size(ids: np.ndarray) -> int:
    return 1 << (len(ids) - 1).bit_length()


def _rows_of_tokens(prompt: Any, num_tokens: int) -> list[tuple[np.ndarray, Prompts]]:
    """For each prompt its tokens, and itself over these."""
    tokens, lengths = _pad_ragged(prompt)
    given = _validate.integer_array(tokens, "tokens", ndim=(1, 2))
    _validate.token_range(given, "tokens", num_tokens)
    if given.size == 0:
        Prompts.from_tokens(given, num_tokens)  # says what is wrong
    rows = []
    for i, row in enumerate(given[None] if given.ndim == 1 else given):
        ids, ranks = np.unique(row if lengths is None else row[: lengths[i]], return_inverse=True)
        rows.append((ids.astype(np.int64), Prompts.from_tokens(ranks, _size(ids))))
    return rows


def _rows_of_prompts(prompts: Prompts, num_tokens: int) -> list[tuple[np.ndarray, Prompts]]:
    if prompts.num_tokens != num_tokens:
        raise ValueError(
            f"prompt: over {prompts.num_tokens} tokens, but the model has {num_tokens}"
        )
    rows = []
    for i in range(len(prompts)):
        n, last = np.asarray(prompts.counts[i]), int(prompts.last[i])
        ids = np.union1d(np.flatnonzero(n), last)  # a query given apart needs its row
        query = [int(np.searchsorted(ids, last))]
        if prompts.tokens is not None and prompts.lengths is not None:
            row = np.asarray(prompts.tokens[i])[: int(prompts.lengths[i])]
            ranks = np.searchsorted(ids, row)
            rows.append((ids, Prompts.from_tokens(ranks, _size(ids), query=query)))
        else:
            few = np.zeros((1, _size(ids)), np.int64)
            few[0, : len(ids)] = n[ids]
            rows.append((ids, Prompts.from_counts(few, query)))
    return rows
