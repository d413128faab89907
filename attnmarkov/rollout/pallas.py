"""The Pallas engine: one kernel for the whole horizon, counts kept on chip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnmarkov import _random, _validate
from attnmarkov.rollout import _devices
from attnmarkov.rollout._layout import select
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary

_BACKENDS = ("gpu", "tpu")


@dataclass(frozen=True)
class Pallas(Engine):
    """Runs a block of lanes from the prompt to the horizon without leaving the chip.

    Counts, query and random words of a lane live in registers; only the records are written.
    The random words are those of ``scan``, Threefry of (replicate, step), computed in the
    kernel, and so is the draw: for the same key the two engines draw the same tokens, up to the
    rounding of float32 products.

    Attributes:
        block: Lanes of a block, a power of two.
        max_tokens: The largest vocabulary whose counts fit on chip.
        interpret: Run on any backend, slowly, by Pallas's interpreter (for tests).
    """

    block: int = 128
    max_tokens: int = 32
    interpret: bool = False

    def check(self) -> None:
        """See :class:`~attnmarkov.rollout.Engine`; ``block`` must be a power of two."""
        super().check()
        block = _validate.integer(self.block, "block", minimum=1)
        if block & (block - 1):
            raise ValueError(f"block: must be a power of two, got {block}")

    def lanes(self, law: Law) -> int:
        """See :class:`~attnmarkov.rollout.Engine`: all of them, within 2**30 counts."""
        return self.max_lanes or 2**30 // law.num_tokens

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """See :class:`~attnmarkov.rollout.Engine`."""
        reason = super().refusal(law, "counts")
        if reason is not None:
            return reason
        if record not in ("tokens", "counts"):
            return "can't summarise or cut a run into chunks: one kernel runs to the horizon"
        if law.num_tokens > self.max_tokens:
            many = f"{law.num_tokens} tokens on chip, {self.max_tokens} at most"
            return f"can't keep the counts of {many}"
        if not law.fits_float32:
            return "can't hold logits more than 60 nats below their row's largest"
        backend = jax.default_backend()
        if backend not in _BACKENDS and not self.interpret:
            return f"can't run on the {backend} backend: it needs a GPU or TPU"
        return None

    def tokens(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane step"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        if num_steps == 0:  # no kernel writes an empty block
            return jnp.zeros((len(prompts), 0), smallest_dtype(law.num_tokens))
        run = partial(_launch, num_steps=num_steps, **self._options())
        return run(law.logits, seeds, prompts.counts, prompts.last, jnp.zeros(1, jnp.int32))

    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> Int[Array, "lane record token"]:
        """See :class:`~attnmarkov.rollout.Engine`."""
        run = partial(_launch, num_steps=None, **self._options())
        return run(law.logits, seeds, prompts.counts, prompts.last, jnp.asarray(at, jnp.int32))

    def _options(self) -> dict[str, Any]:
        return {
            "block": self.block,
            "backend": jax.default_backend(),
            "interpret": self.interpret,
        }


@partial(jax.jit, static_argnames=("num_steps", "block", "backend", "interpret"))
def _launch(
    logits: jax.Array,
    seeds: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    at: jax.Array,
    *,
    num_steps: int | None,
    block: int,
    backend: str,
    interpret: bool,
) -> jax.Array:
    """Counts at the steps ``at``; or, if ``num_steps`` is given, the tokens of that many."""
    size = logits.shape[0]

    def run(table: jax.Array, seeds: jax.Array, counts: jax.Array, last: jax.Array, at: jax.Array):
        from jax.experimental import pallas as pl  # takes a third of a second to import

        lanes = last.shape[0]
        blocks = -(-lanes // block)
        wide = ((0, 0), (0, blocks * block - lanes))
        if num_steps is None:
            shape, dtype = (at.shape[0], size), jnp.dtype(jnp.int32)
        else:
            shape, dtype = (num_steps,), jnp.dtype(smallest_dtype(size))
        call = pl.pallas_call(
            partial(_kernel, size=size, num_steps=num_steps, gather=backend != "tpu"),
            grid=(blocks,),
            in_specs=[
                pl.BlockSpec(table.shape, lambda i: (0,)),
                pl.BlockSpec(at.shape, lambda i: (0,)),
                pl.BlockSpec((2, block), lambda i: (0, i)),
                pl.BlockSpec((size, block), lambda i: (0, i)),
                pl.BlockSpec((1, block), lambda i: (0, i)),
            ],
            out_specs=pl.BlockSpec((*shape, block), lambda i: (*(0 for _ in shape), i)),
            out_shape=jax.ShapeDtypeStruct((*shape, blocks * block), dtype),
            compiler_params=_triton() if backend == "gpu" else None,
            interpret=interpret,
        )
        out = call(
            table,
            at,
            jnp.pad(seeds, wide),
            jnp.pad(counts.T, wide),
            jnp.pad(last[None], wide),
        )
        return jnp.moveaxis(out[..., :lanes], -1, 0)

    table = jnp.exp(logits - logits.max(axis=1, keepdims=True)).reshape(-1)
    first, whole = _devices.FIRST, _devices.WHOLE
    specs = (whole, _devices.SECOND, first, first, whole)
    run = _devices.over_lanes(run, last.shape[0], specs)
    return run(table, seeds, counts, last, at)


def _triton() -> Any:
    """Compile through Triton, whose kernels read a table at any lane's index.

    JAX 0.11 calls this backend deprecated and warns. Mosaic GPU, its successor, copies whole
    tiles only, and refuses these kernels.
    """
    from jax.experimental.pallas import triton

    return triton.CompilerParams()


def _kernel(
    table: Any,
    at: Any,
    seeds: Any,
    counts: Any,
    last: Any,
    out: Any,
    *,
    size: int,
    num_steps: int | None,
    gather: bool,
) -> None:
    """One block of lanes; ``table[k * size + j]`` is ``P[k, j]`` relative to its row's largest."""
    key0, key1 = seeds[0, :], seeds[1, :]

    def weights(n: list[jax.Array], query: jax.Array) -> list[jax.Array]:
        if gather:
            p = [table[query * size + j] for j in range(size)]
        else:
            p = [select([table[k * size + j] for k in range(size)], query) for j in range(size)]
        return [c.astype(jnp.float32) * x for c, x in zip(n, p, strict=True)]

    def step(t: jax.Array, state: tuple) -> tuple:
        n, query = state
        step_ = jnp.full(query.shape, t).astype(jnp.uint32)
        words = _random.threefry(key0, key1, step_, jnp.zeros_like(step_))
        token = _random.draw_few(weights(n, jnp.maximum(query, 0)), words)
        token = jnp.where((query < 0) | (token == size), -1, token)
        return [c + (token == j).astype(c.dtype) for j, c in enumerate(n)], token

    def keep(i: jax.Array, state: tuple) -> tuple:
        since = jnp.where(i > 0, at[jnp.maximum(i - 1, 0)], 0)
        state = jax.lax.fori_loop(since, at[i], step, state)
        for j, c in enumerate(state[0]):
            out[i, j, :] = c
        return state

    def emit(t: jax.Array, state: tuple) -> tuple:
        state = step(t, state)
        out[t, :] = state[1].astype(out.dtype)
        return state

    start = [counts[j, :] for j in range(size)], last[0, :]
    if num_steps is None:
        jax.lax.fori_loop(0, at.shape[0], keep, start)
    else:
        jax.lax.fori_loop(0, num_steps, emit, start)
