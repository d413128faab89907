"""Winners when all rows of ``P`` are equal: the exact law of an urn."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.model import CCMC

_TOLERANCE = 1e-5  # logits nearer than this are equal: as the urn engine has it


class UrnWinners(NamedTuple):
    """Which tokens take all, and the law of their limiting shares.

    Attributes:
        tokens: Token ids, increasing: those of the prompt with the largest ``P_j``.
        concentration: The limit of their shares is Dirichlet with these parameters: their
            counts in the prompt.
    """

    tokens: Int[np.ndarray, " winner"]
    concentration: Float[np.ndarray, " winner"]


def urn_winners(model: CCMC, counts: ArrayLike) -> UrnWinners:
    """The winners of a generation whose next token does not depend on the last.

    With equal rows ``n_j P_j`` weighs token ``j`` after any token. In continuous time the counts
    are independent Yule processes of rates ``P_j``, ``exp(−P_j s) n_j(s) → Gamma(n_j(0))``: the
    largest rate in the prompt wins with probability 1, and tokens that tie share the whole in
    proportion to independent gamma variables.

    Args:
        model: A CCMC whose rows of ``P`` are equal, to 1e-5 in the logits.
        counts: (K,) token counts of the prompt.

    Raises:
        ValueError: If two rows differ (they are named), or ``counts`` is no such vector, or if
            no token of the prompt can come.

    References:
        Pólya; Athreya and Karlin (1968).

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.4, 0.4, 0.2]] * 3)
    >>> urn_winners(model, [2, 3, 7])
    UrnWinners(tokens=array([0, 1]), concentration=array([2., 3.]))
    """
    s = np.asarray(model.logits, np.float64)
    gap = row_gaps(s)
    if gap.max() > _TOLERANCE:
        raise ValueError(f"model: rows 0 and {int(gap.argmax())} of P differ; an urn has one row")
    n = _validate.integer_array(counts, "counts", ndim=(1,))
    if n.shape != s.shape[:1] or (n < 0).any() or n.sum() == 0:
        raise ValueError(
            f"counts: expected {len(s)} numbers >= 0 that are not all 0, got {n.tolist()}"
        )
    rate = np.where(n > 0, s[0], -np.inf)
    if np.isneginf(rate).all():
        raise ValueError("counts: no token of the prompt can come (P_j = 0)")
    tokens = np.flatnonzero(rate >= rate.max() - _TOLERANCE)
    return UrnWinners(tokens, n[tokens].astype(float))


def is_urn(model: CCMC) -> bool:
    """Whether all rows of ``P`` are equal, to 1e-5 in the logits."""
    return bool(row_gaps(np.asarray(model.logits, np.float64)).max() <= _TOLERANCE)


def row_gaps(logits: np.ndarray) -> Float[np.ndarray, " row"]:
    """How far each row of logits is from the first, at most."""
    with np.errstate(invalid="ignore"):
        return np.where(logits == logits[0], 0, np.abs(logits - logits[0])).max(axis=1)
