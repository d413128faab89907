"""Stable equilibria by many starts of the flow, where supports are too many to go through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_STEP = 0.1  # of log time
_INNER = 4  # steps of the chain to each of them: the chain is the faster of the two
_CUTS = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-6)  # shares below which a token may not belong


def flow_ends(
    q: np.ndarray, power: float, num_starts: int, rng: np.random.Generator, log_time: float = 60.0
) -> np.ndarray:
    """Shares where the mean field has come to from random shares, (num_starts, K).

    A step of the flow moves the shares towards the law of visits; that law follows by a few steps
    of the (lazy) chain, at ``K**2`` operations each, instead of being solved for at ``K**3``.
    Half of the starts are uniform on the simplex, half have a few large shares.
    """
    size = len(q)
    near = rng.dirichlet(np.ones(size), num_starts - num_starts // 2)
    far = rng.dirichlet(np.full(size, min(1.0, 3.0 / size)), num_starts // 2)
    m = np.maximum(np.concatenate([near, far]), 1e-6)
    m = m / m.sum(axis=1, keepdims=True)
    visits = m.copy()
    for _ in range(round(log_time / _STEP)):
        weight = np.exp(power * np.log(m / m.max(axis=1, keepdims=True)))
        total = np.maximum(weight @ q.T, 1e-290)
        for _ in range(_INNER):
            visits = 0.5 * visits + 0.5 * weight * ((visits / total) @ q)
        m = (1 - _STEP) * m + _STEP * visits / visits.sum(axis=1, keepdims=True)
        m = np.maximum(m, 1e-60)
    return m / m.sum(axis=1, keepdims=True)


def supports_of(shares: np.ndarray) -> Iterator[np.ndarray]:
    """Which tokens may belong to the equilibria near to given shares: (n, s), by size."""
    inside = np.concatenate([shares > cut * shares.max(axis=1, keepdims=True) for cut in _CUTS])
    inside = np.unique(inside, axis=0)
    sizes = inside.sum(axis=1)
    for size in np.unique(sizes):
        yield np.nonzero(inside[sizes == size])[1].reshape(-1, size)
