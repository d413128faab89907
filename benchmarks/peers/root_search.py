"""Equilibria by a general root finder from random starts on every face of the simplex."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize

if TYPE_CHECKING:
    import attnmarkov as am

_LEAST = -200.0  # log shares below are as far as a search need go
_ALIKE = 1e-6  # shares nearer than this are one equilibrium


def count(model: am.CCMC, num_starts: int, seed: int) -> int:
    """How many different equilibria are found."""
    p = np.asarray(model.transition_matrix, np.float64)
    rng = np.random.default_rng(seed)
    number = 0
    for size in range(1, len(p) + 1):
        for face in combinations(range(len(p)), size):
            number += len(_on_face(p[np.ix_(face, face)], num_starts, rng))
    return number


def _on_face(p: np.ndarray, num_starts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Inner equilibria of the chain on all tokens of ``p``."""
    size = len(p)
    if size == 1:
        return [np.ones(1)]

    def drift(z: np.ndarray) -> np.ndarray:
        m = np.exp(np.maximum(z - z.max(), _LEAST))
        m = m / m.sum()
        law = p * m / (p @ m)[:, None]
        visits = np.linalg.solve(np.eye(size) - law.T + 1, np.ones(size))
        return np.append((np.log(np.maximum(visits, 1e-300)) - np.log(m))[:-1], z.sum())

    found: list[np.ndarray] = []
    for _ in range(num_starts):
        start = rng.normal(size=size)
        solution = optimize.root(drift, start - start.mean())
        m = np.exp(solution.x - solution.x.max())
        m /= m.sum()
        good = solution.success and m.min() > _ALIKE and abs(solution.fun).max() < 1e-8
        if good and all(abs(m - other).max() > _ALIKE for other in found):
            found.append(m)
    return found
