"""Who won over whom: the comparisons that labels make, and the directions that respect them.

On the host, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from attnmarkov.estimate._embedding import Coordinates

_NOTHING = 1e-9  # below this share of its length a feature counts as zero


class Comparisons(NamedTuple):
    """The distinct comparisons of labelled prompts, and the strong components they make.

    Attributes:
        row: (m,) the last token of the prompts that make the comparison.
        winner: (m,) the label.
        loser: (m,) another token of a prompt.
        components: (K, K); ``[k, a]`` is the least token of the strong component of ``a`` in the
            win graph of row ``k``: each of its tokens has won, by a chain, over each other.
    """

    row: Int[np.ndarray, " comparison"]
    winner: Int[np.ndarray, " comparison"]
    loser: Int[np.ndarray, " comparison"]
    components: Int[np.ndarray, "row token"]

    @property
    def across(self) -> Bool[np.ndarray, " comparison"]:
        """Comparisons between strong components: won, and never lost by any chain."""
        own = self.components[self.row, self.winner]
        return own != self.components[self.row, self.loser]

    def features(
        self, attended: np.ndarray, query: np.ndarray
    ) -> Float[np.ndarray, "comparison ab"]:
        """``vec((attended_winner − attended_loser) query_rowᵀ)`` of every comparison.

        The margin ``S[k, winner] − S[k, loser]`` is its product with ``vec(B)``.
        """
        return _outer(attended[self.winner] - attended[self.loser], query[self.row])

    def ties(self, attended: np.ndarray, query: np.ndarray) -> Float[np.ndarray, "tie ab"]:
        """Features of each token against the least of its strong component, row by row."""
        row, token = np.nonzero(self.components != np.arange(len(self.components)))
        return _outer(attended[token] - attended[self.components[row, token]], query[row])


def comparisons_of(counts: np.ndarray, last: np.ndarray, y: np.ndarray) -> Comparisons:
    """The comparisons of ``n`` labelled prompts, every label over every other token beside it."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = counts.shape[1]
    prompt, loser = np.nonzero(counts)
    other = loser != y[prompt]
    prompt, loser = prompt[other], loser[other].astype(np.int64)
    code = np.unique((last[prompt].astype(np.int64) * size + y[prompt]) * size + loser)
    row, winner, loser = code // size**2, code // size % size, code % size

    shape = (size * size, size * size)
    ends = (row * size + winner, row * size + loser)
    graph = coo_array((np.ones(len(code), np.int8), ends), shape=shape).tocsr()
    label = connected_components(graph, directed=True, connection="strong")[1]
    least = np.full(label.max() + 1, size)
    np.minimum.at(least, label, np.tile(np.arange(size), size))
    return Comparisons(row, winner, loser, least[label].reshape(size, size))


def separable(comparisons: Comparisons, coordinates: Coordinates) -> bool:
    """Whether some ``W`` has no negative margin and a positive one: no finite maximum exists."""
    return bool(can_be_strict(comparisons, coordinates).any())


def can_be_strict(
    comparisons: Comparisons, coordinates: Coordinates
) -> Bool[np.ndarray, " comparison"]:
    """Which margins are positive under some ``W`` for which none is negative.

    Within a strong component none can be: margins along a cycle sum to zero. Across components
    all can if every ``S`` is possible (an embedding of rank K); with fewer dimensions a linear
    program decides: the largest ``Σ t`` with ``0 <= t <= 1`` and margins of at least ``t`` has
    ``t = 1`` exactly for those.
    """
    from scipy.optimize import linprog

    across = comparisons.across
    attended, query = np.asarray(coordinates.attended), np.asarray(coordinates.query)
    if (query != 0).any(0).sum() == len(query) or not across.any():
        return across
    free = null_space(comparisons.ties(attended, query))
    features = comparisons.features(attended, query)[across] @ free.T
    length = np.linalg.norm(features, axis=1)
    moves = length > _NOTHING  # the others' margins are zero whatever W is
    strict = np.zeros(len(across), bool)
    if not moves.any():
        return strict
    unit = features[moves] / length[moves, None]
    m, p = unit.shape
    found = linprog(
        np.concatenate([np.zeros(p), -np.ones(m)]),
        A_ub=np.hstack([-unit, np.eye(m)]),
        b_ub=np.zeros(m),
        bounds=[(None, None)] * p + [(0, 1)] * m,
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear program of separation failed: {found.message}")
    strict[np.flatnonzero(across)[moves]] = found.x[p:] > 0.5
    return strict


def null_space(features: np.ndarray) -> Float[np.ndarray, "free ab"]:
    """Orthonormal rows that span what is orthogonal to all ``features`` (f, ab)."""
    return _split(features)[1]


def row_space(features: np.ndarray) -> Float[np.ndarray, "tied ab"]:
    """Orthonormal rows that span the ``features``."""
    return _split(features)[0]


def _split(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, sigma, vt = np.linalg.svd(features, full_matrices=True)
    rank = int((sigma > _NOTHING * sigma.max(initial=0)).sum())
    return vt[:rank], vt[rank:]


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), left.shape[1] * right.shape[1])
