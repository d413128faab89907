"""How a fit ended: a code inside jit, a sentence outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class Solution(NamedTuple):
    """Where a solver stopped."""

    logits: Float[Array, "row token"]
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]


_NAMES = ("converged", "iteration_limit", "separated", "not_identified", "non_finite")
_SENTENCES = (
    "The solver converged to the unique maximum, and the prompts identify every logit.",
    "The solver reached its iteration limit before the gradient was small enough.",
    "The data are separated: the likelihood has no finite maximum, because in some row some "
    "tokens are never chosen over others. Logits of separated rows are where the solver stopped; "
    "a prior makes them finite.",
    "The solver converged, but the prompts do not identify every logit: some tokens never stand "
    "together in a prompt, so logits of different components cannot be compared.",
    "The loss or the logits are not finite: a label is no token or does not stand in its prompt, "
    "or the solver diverged.",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Status:
    """How a fit ended. ``str(status)`` is a sentence.

    Attributes:
        code: () or, after vmap, (...) int32: one of ``Status.CONVERGED``, ``ITERATION_LIMIT``,
            ``SEPARATED``, ``NOT_IDENTIFIED`` and ``NON_FINITE``.

    >>> import jax.numpy as jnp
    >>> status = Status(jnp.array(Status.ITERATION_LIMIT))
    >>> bool(status == Status.CONVERGED), status.name
    (False, 'iteration_limit')
    >>> print(status)
    The solver reached its iteration limit before the gradient was small enough.
    """

    code: Int[Array, "*batch"]

    CONVERGED: ClassVar[int] = 0
    ITERATION_LIMIT: ClassVar[int] = 1
    SEPARATED: ClassVar[int] = 2
    NOT_IDENTIFIED: ClassVar[int] = 3
    NON_FINITE: ClassVar[int] = 4

    @classmethod
    def decide(
        cls, *, finite: jax.Array, solved: jax.Array, separated: jax.Array, identified: jax.Array
    ) -> Status:
        """The code that the facts of one fit give; the gravest wins."""
        code = jnp.where(identified, cls.CONVERGED, cls.NOT_IDENTIFIED)
        code = jnp.where(solved, code, cls.ITERATION_LIMIT)
        code = jnp.where(separated, cls.SEPARATED, code)
        return cls(jnp.where(finite, code, cls.NON_FINITE).astype(jnp.int32))

    @property
    def name(self) -> Any:
        """``"converged"``, ``"separated"``, ...; an array of names for a batch."""
        names = np.array(_NAMES)[np.asarray(self.code)]
        return str(names) if names.ndim == 0 else names

    def __eq__(self, other: object) -> Any:
        """Compare codes, elementwise."""
        return self.code == (other.code if isinstance(other, Status) else other)

    # Equality is elementwise, so there is no hash to agree with it.
    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """A sentence for one fit; how many ended in which way for a batch."""
        if not isinstance(self.code, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"Status({self.code})"
        code = np.asarray(self.code)
        if code.ndim == 0:
            return _SENTENCES[int(code)]
        tally = np.bincount(code.ravel(), minlength=len(_NAMES))
        ways = [f"{m} {w.replace('_', ' ')}" for m, w in zip(tally, _NAMES, strict=True) if m]
        return f"Of {code.size} fits: {', '.join(ways)}."

    def __repr__(self) -> str:
        """The name of the code, or the sentence of a batch."""
        if not isinstance(self.code, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"Status({self.code})"
        return f"Status({self.name})" if np.ndim(self.code) == 0 else f"Status({self})"
