"""Which contrasts a trajectory that collapses on one token can teach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import possible_winners, winner_exponents

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from attnmarkov.model.ccmc import CCMC

_ROUNDING = 1e-6  # of a sum of two exponents that were computed from float32 logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LearnableContrasts:
    """What a trajectory of ``t`` tokens teaches once ``winner`` has nearly all of it.

    Attributes:
        winner: Token id ``w``.
        growth: (K,) exponents ``λ_j`` with which the counts grow; ``λ_w = 1``.
        exponents: (K, K); the information on row ``a``'s contrast ``S[a, w] − S[a, j]`` grows as
            ``t`` to the power ``exponents[a, j]``: as ``log t`` where that is 0, and not for
            ever where it is below. NaN for ``j = w``, which is no contrast.
        learnable: (K, K) bool, whether it grows without bound, so that the estimate is
            consistent; True for ``j = w``.
    """

    winner: int = field(metadata={"static": True})
    growth: Float[Array, " token"]
    exponents: Float[Array, "row token"]
    learnable: Bool[Array, "row token"]

    @property
    def error_exponents(self) -> Float[Array, "row token"]:
        """(K, K) exponents of the error: it falls as ``t`` to this power; 0 where it does not."""
        return -jnp.maximum(self.exponents, 0) / 2

    @property
    def rows(self) -> Bool[Array, " row"]:
        """(K,) whether all contrasts of a row can be learned."""
        return self.learnable.all(-1)

    def __repr__(self) -> str:
        """The exponents as a table, those of learnable contrasts marked with a star."""
        known = isinstance(self.growth, jax.Array | np.ndarray) and _validate.is_concrete(self)
        if not known or self.growth.ndim != 1:
            return f"LearnableContrasts(winner={self.winner}, exponents={self.exponents})"
        size, w = len(self.growth), self.winner
        others = [j for j in range(size) if j != w][:10]
        number = int(np.asarray(self.learnable).sum()) - size
        lines = [
            f"LearnableContrasts({number} of {size * (size - 1)} contrasts with winner {w} "
            "learnable (*); information grows as t^",
            "   row  growth" + "".join(f"{f'{w} : {j}':>9}" for j in others),
        ]
        shown = np.round(np.asarray(self.exponents, float), 2) + 0.0  # no minus before zero
        for a in range(min(size, 10)):
            cells = [f"{shown[a, j]:8.2f}{'*' if self.learnable[a, j] else ' '}" for j in others]
            lines.append(f"{a:6d}  {float(self.growth[a]):6.2f}" + "".join(cells).rstrip())
        if size > 10:
            lines.append("   ...")
        return "\n".join(lines) + ")"


def learnable_contrasts(model: CCMC, winner: int) -> LearnableContrasts:
    """Which contrasts are learned from one trajectory, by the rule ``λ_a + λ_j >= 1``.

    Row ``a`` is asked about ``t**λ_a`` times. There the loser ``j`` comes with probability of
    about ``t**(λ_j − 1)``, and the information of one answer is of that order. Summed along the
    trajectory that is ``t**(λ_a + λ_j − 1)`` if the exponent is positive, ``log t`` if it is 0,
    and a finite limit if it is negative. A scaling argument, not a theorem; the experiment
    ``single-trajectory`` holds it against simulations. The contrast of two losers is as hard as
    the harder of theirs with the winner.

    Args:
        model: The CCMC that generates, every entry of ``P`` positive.
        winner: The token ``w`` that takes over.

    Raises:
        ValueError: If ``winner`` is no token id or can't win alone (``P[w, j] >= P[w, w]`` for
            some ``j``), or an entry of ``P`` is 0.

    >>> import attnmarkov as am
    >>> p = [[0.5, 0.35, 0.15], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]
    >>> learnable_contrasts(am.CCMC.from_transition_matrix(p), winner=0)
    LearnableContrasts(5 of 6 contrasts with winner 0 learnable (*); information grows as t^
       row  growth    0 : 1    0 : 2
         0    1.00    0.70*    0.30*
         1    0.70    0.40*    0.00*
         2    0.30    0.00*   -0.40)
    """
    growth = winner_exponents(model, winner)
    if _validate.is_concrete(model):
        if not np.isfinite(np.asarray(model.logits)).all():
            a, j = (int(i) for i in np.argwhere(~np.isfinite(np.asarray(model.logits)))[0])
            raise ValueError(
                f"model: P[{a}, {j}] is 0; the growth of information is only known where every "
                "entry is positive"
            )
        if not possible_winners(model)[winner]:
            j = int(np.argmax(np.where(np.arange(len(growth)) == winner, 0, growth)))
            raise ValueError(
                f"winner: token {winner} cannot win, because P[{winner}, {j}] is not below "
                f"P[{winner}, {winner}]"
            )
    itself = jnp.arange(model.num_tokens) == winner
    total = growth[:, None] + growth - 1
    learnable = (total >= -_ROUNDING) | itself
    return LearnableContrasts(int(winner), growth, jnp.where(itself, jnp.nan, total), learnable)
