"""Which logits a set of prompts can teach, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.graphs import contrast_basis, cooccurrence_components
from attnmarkov.estimate.laplacian import eliminate, largest_variance
from attnmarkov.estimate.likelihood import curvature, laws
from attnmarkov.estimate.result import name_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.model.ccmc import CCMC
    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Coverage:
    """What prompts identify: all of ``S`` if and only if every row is connected.

    Attributes:
        components: (K, K) int32; ``[k, a]`` is the least token in the component of token ``a``
            in the co-occurrence graph ``G_k``.
        algebraic_connectivity: (K,) second smallest eigenvalue of the information about each
            row, per sample; exactly 0 where the row is not connected, infinity if K = 1. A
            squared error of row ``k`` is at most about ``(K − 1) / (n · value)``.
    """

    components: Int[Array, "row token"]
    algebraic_connectivity: Float[Array, " row"]

    @property
    def connected(self) -> Bool[Array, " row"]:
        """(K,) whether all tokens of a row can be compared."""
        return (self.components == 0).all(-1)

    @property
    def contrasts(self) -> Float[Array, "row token token"]:
        """An orthonormal basis of the identifiable contrasts of every row, (K, K, K).

        ``contrasts[k, a] @ S[k]`` compares token ``a`` with the mean of the lesser tokens of its
        component (Helmert's contrasts). It is 0 where ``a`` is the least, so that the rows that
        are not 0 number :attr:`num_identifiable` in all, and span what the prompts can teach.

        >>> from attnmarkov.prompts.batch import Prompts
        >>> (coverage(Prompts.from_tokens([[0, 1]], 2)).contrasts[1] * 2**0.5).round(3).tolist()
        [[0.0, 0.0], [-1.0, 1.0]]
        """
        return contrast_basis(self.components)

    @property
    def num_components(self) -> Int[Array, " row"]:
        """(K,) how many components each row has."""
        return (self.components == jnp.arange(self.components.shape[-1])).sum(-1)

    @property
    def num_identifiable(self) -> int | Int[Array, "*batch"]:
        """``r = Σ_k (K − #components of G_k)``, the number of identifiable parameters."""
        number = self.components.shape[-1] ** 2 - self.num_components.sum(-1)
        return int(number) if _validate.is_concrete(number) and number.ndim == 0 else number

    def __repr__(self) -> str:
        """How much is identified, and which rows are not."""
        concrete = isinstance(self.components, jax.Array | np.ndarray) and _validate.is_concrete(
            self
        )
        if not concrete or self.components.ndim != 2:
            return (
                f"Coverage(components={self.components}, "
                f"algebraic_connectivity={self.algebraic_connectivity})"
            )
        size = self.components.shape[-1]
        whole = f"{self.num_identifiable} of {size * (size - 1)} contrasts identifiable"
        rows = np.flatnonzero(~np.asarray(self.connected))
        if rows.size == 0:
            weakest = int(np.argmin(self.algebraic_connectivity))
            value = float(self.algebraic_connectivity[weakest])
            return (
                f"Coverage({whole}, all {size} rows connected, "
                f"weakest row {weakest} with connectivity {value:.3g})"
            )
        lines = [f"Coverage({whole}, {rows.size} of {size} rows not identifiable:"]
        lines += [f"  row {k}: {_parts(np.asarray(self.components[k]))}" for k in rows[:5]]
        if rows.size > 5:
            lines.append(f"  and rows {name_rows(rows[5:])}")
        return "\n".join(lines) + ")"


def _parts(labels: np.ndarray) -> str:
    roots, sizes = np.unique(labels, return_counts=True)
    groups = [np.flatnonzero(labels == r) for r in roots[sizes > 1]]
    alone = np.flatnonzero(np.isin(labels, roots[sizes == 1]))
    text = [f"tokens {name_rows(g)} compare with each other" for g in groups[:4]]
    if len(groups) > 4:
        text.append(f"{len(groups) - 4} more groups")
    if alone.size:
        text.append(f"tokens {name_rows(alone)} with nothing")
    return "; ".join(text)


def coverage(
    prompts: Prompts,
    model: CCMC | None = None,
    *,
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> Coverage:
    """What prompts can teach about a CCMC, whatever the labels will be.

    Tokens ``a`` and ``b`` are joined in ``G_k`` if some prompt that ends in ``k`` holds both.
    Consistent estimation of all of ``P`` needs every ``G_k`` connected ([CCMC], consistency). The
    Fisher information about row ``k`` is a weighted Laplacian of ``G_k``; its algebraic
    connectivity says how well the worst contrast is covered. Works under jit and vmap.

    Args:
        prompts: n prompts over K tokens.
        model: Where the information is evaluated; uniform attention if None. The components do
            not depend on it, not even where it masks tokens.
        weights: (n,) how often each prompt counts, as in :func:`attnmarkov.fit`.
        context: How positions are weighed, as in :func:`attnmarkov.fit`.

    Raises:
        ValueError: If there is no prompt, the vocabularies differ, or ``weights`` or ``context``
            do not fit the prompts.

    >>> from attnmarkov.prompts.batch import Prompts
    >>> coverage(Prompts.from_tokens([[0, 1], [2, 1, 0], [0, 2]], 3))
    Coverage(4 of 6 contrasts identifiable, 2 of 3 rows not identifiable:
      row 1: tokens [0, 1] compare with each other; tokens [2] with nothing
      row 2: tokens [0, 2] compare with each other; tokens [1] with nothing)
    """
    _check.prompts(prompts)
    if model is None:
        logits = jnp.zeros((prompts.num_tokens, prompts.num_tokens))
    else:
        _check.vocabulary(prompts, model, "model")
        logits = model.logits
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    data = prompts.counts, prompts.last, None, weights, log_counts
    return _coverage(logits, *_check.shared_shape(*data))


@jax.jit
def _coverage(
    logits: jax.Array,
    counts: jax.Array,
    last: jax.Array,
    y: None,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
) -> Coverage:
    blocks = blocks_of(counts, last, y, weights, log_counts)
    components = cooccurrence_components(blocks)
    if blocks.num_tokens == 1:
        return Coverage(components, jnp.full(1, jnp.inf, logits.dtype))
    information = curvature(blocks, laws(blocks, logits)[0]) / blocks.labels_per_row().sum()
    widest = largest_variance(eliminate(information), components)
    return Coverage(components, jnp.where((components == 0).all(-1), 1 / widest, 0))
