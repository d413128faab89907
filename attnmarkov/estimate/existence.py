"""Whether the likelihood has a finite maximum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from attnmarkov.estimate import _check
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate.graphs import cooccurrence_components, has_finite_maximum

if TYPE_CHECKING:
    from jaxtyping import Array, Bool
    from numpy.typing import ArrayLike

    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts


def maximum_exists(
    prompts: Prompts,
    y: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> Bool[Array, "row token"]:
    """Whether the likelihood of a CCMC has a finite maximum on the component of each token.

    In row ``k`` let ``a → b`` if ``b`` was emitted after a prompt that ends in ``k`` and holds
    ``a`` (within its context, where one is given). The maximum exists and is unique on a component
    of the co-occurrence graph if and only if this win graph is strongly connected on it (Ford 1957;
    Hunter 2004, assumption 1); else the data are separated there and some logits run to infinity.
    Exact: a matter of reachability, decided without solving anything. :func:`attnmarkov.fit`
    reports the same as ``separated``, by row. Works under jit and vmap; sweeps of O(nK).

    Args:
        prompts: n prompts over K tokens.
        y: (n,) integer labels; each stands in its prompt.
        weights: (n,) as in :func:`attnmarkov.fit`; only whether they are above 0 matters.
        context: How positions are weighed, as in :func:`attnmarkov.fit`. What matters is which
            tokens a prompt is left with: a window may cut some off, and separate the data.

    Returns:
        (K, K) bool, rows by last token; True for a token alone in its component.

    Raises:
        ValueError: If there is no prompt, or labels or weights do not fit the prompts, or the
            context can't take them.

    >>> from attnmarkov.prompts.batch import Prompts
    >>> prompts = Prompts.from_tokens([[0, 1, 2, 0]] * 3, 3)
    >>> maximum_exists(prompts, [0, 1, 0])[0].tolist()  # token 2 never won
    [False, False, False]
    >>> maximum_exists(prompts, [0, 1, 2])[0].tolist()
    [True, True, True]
    """
    _check.prompts(prompts)
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    labels = _check.labels(prompts, y, weights, log_counts)
    data = prompts.counts, prompts.last, labels, weights, log_counts
    return _exists(*_check.shared_shape(*data))


@jax.jit
def _exists(
    counts: jax.Array,
    last: jax.Array,
    y: jax.Array,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
) -> jax.Array:
    blocks = blocks_of(counts, last, y, weights, log_counts)
    return has_finite_maximum(blocks, cooccurrence_components(blocks))
