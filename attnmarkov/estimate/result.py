"""The result of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate.status import Status
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted CCMC, how the fit ended, and how sure the estimate is.

    Under vmap every array has leading batch axes.

    Attributes:
        model: The fitted CCMC. Logits sum to zero over every component of every row (with a
            prior, over every row); without a prior, tokens without data in a row have logit 0.
            Nothing is masked.
        status: How the fit ended, a code; ``str(fit.status)`` is a sentence.
        nll: Mean negative log-likelihood per label, in nats, without the penalty.
        loss: What was minimised, per label: ``nll`` plus the prior's penalty over the number of
            labels.
        iterations: Iterations taken (of the slowest row, for newton).
        standard_errors: (K, K) of ``model.logits``: the square root of the diagonal of the
            pseudo-inverse of the observed information on the identifiable space. NaN for a token
            alone in its component and where the component has no finite maximum. With a prior,
            of the posterior's curvature on centred rows: a logit the data say nothing of gets
            the prior's own spread. Weights count as copies.
        components: (K, K) int32; ``[k, a]`` is the least token in the component of token ``a``
            in the co-occurrence graph of row ``k``. Logits of one row compare only within one.
        separated: (K,) bool, rows whose likelihood has no finite maximum.
        num_parameters: How many parameters the data identify: tokens less components, summed
            over the rows (over the groups of rows that share their logits).
    """

    model: CCMC
    status: Status
    nll: Float[Array, ""]
    loss: Float[Array, ""]
    iterations: Int[Array, ""]
    standard_errors: Float[Array, "row token"]
    components: Int[Array, "row token"]
    separated: Bool[Array, " row"]
    num_parameters: Int[Array, ""]

    def __repr__(self) -> str:
        """How the fit ended, its loss, and the rows to distrust."""
        concrete = _validate.is_concrete(self)
        if not concrete or not isinstance(self.components, jax.Array | np.ndarray):
            return f"Fit(model={self.model}, status={self.status!r}, ...)"
        if self.components.ndim > 2:
            return f"Fit(batch={self.components.shape[:-2]}, {self.status})"
        size = self.components.shape[-1]
        roots = np.asarray(self.components) == np.arange(size)
        number, split = size * size - roots.sum(), np.flatnonzero(roots.sum(-1) > 1)
        text = (
            f"Fit({self.status.name} after {int(self.iterations)} iterations, "
            f"num_tokens={size}, nll={float(self.nll):.4f} nats per label, "
            f"{number} of {size * (size - 1)} contrasts identified"
        )
        if split.size:
            text += f", not all in rows {name_rows(split)}"
        rows = np.flatnonzero(self.separated)
        return text + (f", separated rows {name_rows(rows)})" if rows.size else ")")


def name_rows(rows: np.ndarray, most: int = 10) -> str:
    """``[0, 3, 5]``, cut after ``most``."""
    shown = ", ".join(str(int(r)) for r in rows[:most])
    return f"[{shown}{f', ... {rows.size - most} more' if rows.size > most else ''}]"
