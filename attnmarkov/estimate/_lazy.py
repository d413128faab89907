"""What is computed only where it is needed, also in a vmapped batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def unless(needed: jax.Array, found: _T, otherwise: Callable[..., _T], *inputs: object) -> _T:
    """``otherwise(*inputs)`` if ``needed``, a () bool, else what was ``found``.

    In a loop of one turn: unlike ``lax.cond``, which under vmap runs both branches, it is not run
    where no dataset of a batch needs it. The inputs (pytrees of arrays) hang on the loop's own
    flag: what doesn't, the compiler computes before the loop, needed or not.
    """

    def turn(carry: tuple[jax.Array, _T]) -> tuple[jax.Array, _T]:
        gated = jax.tree.map(lambda x: jnp.where(carry[0], x, jnp.zeros_like(x)), inputs)
        return jnp.array(False), otherwise(*gated)

    return jax.lax.while_loop(lambda carry: carry[0], turn, (needed, found))[1]
