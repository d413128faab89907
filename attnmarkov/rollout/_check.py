"""Checks of a whole rollout: its memory, and whether its model can answer the prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.rollout import _devices
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.law import SPREAD
from attnmarkov.rollout.rejection import Rejection
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.summary import Summary
from attnmarkov.rollout.urn import Urn

if TYPE_CHECKING:
    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout._plan import Plan
    from attnmarkov.rollout.engine import Engine
    from attnmarkov.rollout.law import Law


def memory(plan: Plan, num_steps: int | None = None) -> None:
    """Raise if the record would not fit in the devices' memory, and say what to ask for."""
    size, many = plan.law.num_tokens, plan.num_trajectories
    steps = plan.num_steps if num_steps is None else num_steps
    dtype = np.dtype(smallest_dtype(size))
    if isinstance(plan.record, Summary):
        need = many * size**2 * 4 * plan.record.transitions
        what = f"transition counts of {many} x {size} x {size} int32"
        instead = "Summary(transitions=False), or fewer trajectories at a time (first_replicate)"
    elif plan.record == "counts":
        wide = 4 if plan.engine.max_context < 2**31 else 8
        need = many * len(plan.at) * size * wide
        what = f"counts of {many} x {len(plan.at)} x {size} int{8 * wide}"
        instead = "fewer steps in `at`, record='summary', or fewer trajectories at a time"
        if plan.engine.keeps_history:
            need += min(many, plan.engine.lanes(plan.law)) * steps * 4
            what += f" and histories of {steps} steps"
            instead = "engine='scan', which keeps no history, or fewer trajectories at a time"
    else:
        need, what = many * steps * dtype.itemsize, f"tokens of {many} x {steps} {dtype}"
        instead = "a shorter chunk"
        if num_steps is None:
            instead = "record='counts' or 'summary', or rollout_chunks"
    if isinstance(plan.engine, Rejection):
        need += plan.engine.tables(plan.law)
        what += f" and tables of {size} x {size}"
    room = _devices.memory()
    if room is not None and 2 * need > room:  # parts are put together in a second copy
        raise ValueError(
            f"record: {what} take {need / 2**30:,.1f} GiB, and as much again to put them "
            f"together, but there are {room / 2**30:,.1f}; ask for {instead} instead"
        )


def spread(law: Law, prompts: Prompts, engine: Engine) -> None:
    """Raise if float32 weights relative to a row's largest would vanish on a whole context."""
    if not isinstance(engine, SkipAhead | Urn) or law.fits_float32:
        return
    logits = np.asarray(law.logits, np.float64)
    below = logits - logits.max(axis=1, keepdims=True)
    for support in np.unique(np.asarray(prompts.counts) > 0, axis=0):
        best = below[:, support].max(axis=1)
        row = int(np.where(np.isfinite(best), best, 0).argmin())
        if np.isfinite(best[row]) and best[row] < -SPREAD:
            raise ValueError(
                f"model: after token {row}, the likeliest token of the context has a logit "
                f"{-best[row]:.0f} below the row's largest; engine='scan' can hold that"
            )


def reachable(law: Law, prompts: Prompts) -> None:
    """Raise if a reachable token has nothing to attend."""
    if not law.masks:
        return
    counts = np.asarray(prompts.counts)
    attends = np.isfinite(np.asarray(law.logits))
    rows = np.unique(np.column_stack([counts > 0, np.asarray(prompts.last)]), axis=0)
    for row in rows:
        support, last = row[:-1].astype(bool), int(row[-1])
        seen, front = set(), {last}
        while front:
            k = front.pop()
            seen.add(k)
            nxt = np.flatnonzero(attends[k] & support)
            if nxt.size == 0:
                raise ValueError(
                    f"model: token {k} can be reached from the prompt, but attends no token of it "
                    f"(P[{k}, j] = 0 for every j in {np.flatnonzero(support).tolist()})"
                )
            front |= set(nxt.tolist()) - seen
