"""Priors on the logits of every row: Gaussian, Dirichlet, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float
    from numpy.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, kw_only=True)
class Prior:
    """What is believed of a CCMC before the data are seen. Rows are independent.

    The penalty of row ``k`` is minus the log-density at its centred logits,

        precision / 2 · ‖S[k]‖²  −  Σ_j pseudo_counts[k, j] · log P[k, j],

    up to a constant. The first term is a Gaussian. The second is a Dirichlet law of ``P[k]`` (as
    a density on logits): it acts like further prompts that hold every token once and were
    followed by ``j`` ``pseudo_counts[k, j]`` times, so it pulls ``P[k]`` towards their shares.
    Either one makes every row identified and its maximum finite.

    Attributes:
        precision: () precision τ >= 0 of the Gaussian, per squared nat; 0 for none.
        pseudo_counts: () or (K,) or (K, K) positive numbers ``α``, one for all tokens, one per
            token, or one per row and token; or None for no Dirichlet part.

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 1, 0]] * 3, 2)
    >>> am.fit(prompts, [0, 0, 0]).status.name
    'separated'
    >>> fit = am.fit(prompts, [0, 0, 0], prior=Prior(pseudo_counts=1.0))
    >>> fit.status.name, fit.model.transition_matrix[1].round(2).tolist()
    ('converged', [0.5, 0.5])
    """

    precision: float | Float[Array, ""] = 0.0
    pseudo_counts: ArrayLike | None = None

    def check(self, num_tokens: int) -> None:
        """Raise unless the numbers are in range; traced ones are not looked at.

        Raises:
            ValueError: If ``precision`` is negative or no number, or ``pseudo_counts`` has
                another shape or an entry that is not positive and finite.
        """
        precision = _leaves.number(self.precision, "prior")
        if precision is not None and not (np.isfinite(precision) and precision >= 0):
            raise ValueError(f"prior: must be a finite precision of at least 0, got {precision}")
        if self.pseudo_counts is None:
            return
        shape = np.shape(self.pseudo_counts)
        if shape not in ((), (num_tokens,), (num_tokens, num_tokens)):
            raise ValueError(
                f"pseudo_counts: expected shape (), ({num_tokens},) or "
                f"{(num_tokens, num_tokens)}, got {shape}"
            )
        if _validate.is_concrete(self.pseudo_counts):
            values = np.asarray(self.pseudo_counts, np.float64)
            good = np.isfinite(values) & (values > 0)
            if not good.all():
                place = [int(i) for i in np.argwhere(~good)[0]]
                raise ValueError(
                    f"pseudo_counts: must be positive and finite, got {values[~good][0]:g}"
                    + (f" at {place}" if place else "")
                )

    def over(self, num_tokens: int, dtype: Any) -> Prior:
        """The same prior with arrays of ``dtype``, ``pseudo_counts`` (K, K) or None."""
        alpha = self.pseudo_counts
        if alpha is not None:
            alpha = jnp.broadcast_to(jnp.asarray(alpha, dtype), (num_tokens, num_tokens))
        return Prior(precision=jnp.asarray(self.precision, dtype), pseudo_counts=alpha)

    @property
    def is_proper(self) -> Bool[Array, ""]:
        """Whether the prior alone identifies every row and keeps its maximum finite."""
        proper = jnp.asarray(self.precision) > 0
        if self.pseudo_counts is None:
            return proper
        return proper | (jnp.asarray(self.pseudo_counts) > 0).all()

    def penalty(self, logits: Float[Array, "row token"]) -> Float[Array, " row"]:
        """Minus the log-density of every row, up to a constant, (K,)."""
        out = self.precision / 2 * (logits**2).sum(-1)
        if self.pseudo_counts is None:
            return out
        return out - (jnp.asarray(self.pseudo_counts) * jax.nn.log_softmax(logits)).sum(-1)

    def gradient(self, logits: Float[Array, "row token"]) -> Float[Array, "row token"]:
        """Gradient of :meth:`penalty`, (K, K)."""
        out = self.precision * logits
        if self.pseudo_counts is None:
            return out
        alpha = jnp.asarray(self.pseudo_counts)
        return out + alpha.sum(-1, keepdims=True) * jax.nn.softmax(logits) - alpha

    def laplacian(self, logits: Float[Array, "row token"]) -> Array | float:
        """The Dirichlet part of the Hessian of :meth:`penalty`, (K, K, K), or 0 if there is none.

        What :attr:`precision` adds to it is ``precision`` times the identity.
        """
        if self.pseudo_counts is None:
            return 0.0
        total = jnp.asarray(self.pseudo_counts).sum(-1)[:, None, None]
        p = jax.nn.softmax(logits)
        off_diagonal = total * p[:, :, None] * p[:, None, :] * (1 - jnp.eye(p.shape[-1]))
        diagonal = off_diagonal.sum(-1)[..., None] * jnp.eye(p.shape[-1])
        return (diagonal - off_diagonal).astype(p.dtype)


def as_prior(value: Any) -> Prior:
    """A :class:`Prior` from what :func:`attnmarkov.fit` accepts: None, a precision, a prior."""
    if isinstance(value, Prior):
        return value
    return Prior(precision=0.0 if value is None else value)
