"""Equilibria on given supports, in float64 on the host, batched over supports of one size.

With ``x_k = m_k / Σ_i y_i Q[k, i]`` and ``y = m**a``, stationarity of ``m`` on a support ``A`` is
``Σ_{k∈A} x_k Q[k, j] = m_j**(1 − a)`` for all ``j`` in ``A``. For ``a = 1`` that is one linear
system for ``x``, and then ``m`` is the Perron vector of ``diag(x) Q_AA``, whose columns sum to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attnmarkov.dynamics.drift import reachable

if TYPE_CHECKING:
    from attnmarkov.model import CCMC

RANK = 1e-6  # singular values below this part of the largest are what float32 logits make of 0
_POSITIVE = 1e-10  # smaller x are rounding errors of 0: an equilibrium of a smaller support
_NEWTON_STEPS = 60
LOG_RANGE = 690.0  # numbers below exp(-690) leave the range of float64
_TINY = 1e-14  # in the jacobian, where it is singular: then any step will do


class Found(NamedTuple):
    """Equilibria whose supports have the same size ``s``."""

    supports: np.ndarray  # (n, s) token ids, increasing
    shares: np.ndarray  # (n, s)
    freedom: np.ndarray  # (n,) int, the dimension of the continuum that each is one of


def log_weights(model: CCMC, temperature: float = 1.0) -> np.ndarray:
    """``log Q = log P / temperature`` in float64, (K, K), the largest of every row 0.

    Minus infinity for masked tokens alone: ``Q`` itself underflows at low temperatures.
    """
    logits = np.asarray(model.logits, np.float64) / float(temperature)
    return logits - logits.max(axis=1, keepdims=True)


def underflows(log_q: np.ndarray) -> bool:
    """Whether entries that are not masked are too far below others of their row for float64."""
    return bool(((log_q < -LOG_RANGE) & (log_q > -np.inf)).any())


def linear(log_q: np.ndarray) -> np.ndarray:
    """``Q``, above 0 wherever it is not masked."""
    return np.where(log_q > -np.inf, np.exp(np.maximum(log_q, -LOG_RANGE)), 0)


def submatrices(q: np.ndarray, supports: np.ndarray) -> np.ndarray:
    """(n, s, s) blocks of ``Q``, or of its logarithm, on the supports."""
    return q[supports[:, :, None], supports[:, None, :]]


def connected(log_q: np.ndarray, supports: np.ndarray) -> np.ndarray:
    """(n,) whether all tokens of a support reach one another within it.

    Only then can it hold an equilibrium of one chain: a token that is not come back to gets no
    share, and parts that never reach one another are chains of their own.
    """
    if np.all(log_q > -np.inf):
        return np.ones(len(supports), bool)
    block = submatrices(log_q, supports) > -np.inf
    follows = np.any(block, axis=(1, 2))  # a single token must follow itself
    return np.all(reachable(block), axis=(1, 2)) & follows


def solve_linear(log_q: np.ndarray, supports: np.ndarray) -> Found:
    """All equilibria for power 1 with exactly these supports; of a continuum, one.

    Args:
        log_q: (K, K) rows of ``log P``, each up to a constant.
        supports: (n, s) token ids.
    """
    supports = supports[connected(log_q, supports)]
    block = submatrices(log_q, supports)
    block = block - block.max(axis=2, keepdims=True)
    inside = block.max(axis=1).min(axis=1) > -LOG_RANGE
    supports, block = supports[inside], block[inside]
    if len(supports) == 0:
        return _nothing(supports)
    column = block.max(axis=1)
    # Balanced, so that the rank is that of a matrix whose entries have errors of one size.
    a = np.exp(block - column[:, None, :]).transpose(0, 2, 1)
    b = np.exp(-column)
    u, sigma, vt = np.linalg.svd(a)
    kept = sigma > RANK * sigma[:, :1]
    inverse = np.where(kept, 1 / np.where(kept, sigma, 1), 0)
    x = np.zeros_like(b)
    for _ in range(2):  # once more on what is left over, for the last digits
        rest = b - np.einsum("nij,nj->ni", a, x)
        x = x + np.einsum("nji,nj,nkj,nk->ni", vt, inverse, u, rest, optimize=True)
    rest = b - np.einsum("nij,nj->ni", a, x)
    freedom = (~kept).sum(axis=1)
    solved = abs(rest).max(axis=1) <= np.where(freedom > 0, 1e-5, 1e-8) * b.max(axis=1)
    for i in np.flatnonzero(solved & (freedom > 0) & (x.min(axis=1) <= 0)):
        x[i] = _most_positive(x[i], vt[i, ~kept[i]].T)
    good = solved & (x > _POSITIVE * abs(x).max(axis=1, keepdims=True)).all(axis=1)
    flow = np.where(block[good] > -np.inf, np.log(x[good])[:, :, None] + block[good], -np.inf)
    return Found(supports[good], _perron(flow), freedom[good])


def _most_positive(x: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The point of ``x + span(directions)`` whose smallest entry is largest."""
    from scipy.optimize import linprog

    size, free = directions.shape
    found = linprog(
        np.append(np.zeros(free), -1),
        A_ub=np.column_stack([-directions, np.ones(size)]),
        b_ub=x,
        bounds=[(None, None)] * free + [(None, 1)],
    )
    return x + directions @ found.x[:-1] if found.status == 0 else x


def _perron(log_b: np.ndarray) -> np.ndarray:
    """(n, s) probability vectors with ``B m = m`` for irreducible ``B`` whose columns sum to 1.

    By Grassmann, Taksar and Heyman's elimination in logarithms: links may be as weak as they like.
    """
    size, a = log_b.shape[-1], log_b.transpose(0, 2, 1).copy()  # rows sum to 1
    for k in range(size - 1, 0, -1):
        a[:, :k, k] -= np.logaddexp.reduce(a[:, k, :k], axis=1, keepdims=True)
        a[:, :k, :k] = np.logaddexp(a[:, :k, :k], a[:, :k, k, None] + a[:, k, None, :k])
    log_m = np.zeros((len(a), size))
    for k in range(1, size):
        log_m[:, k] = np.logaddexp.reduce(log_m[:, :k] + a[:, :k, k], axis=1)
    m = np.exp(_normalised(log_m))
    return m / m.sum(axis=1, keepdims=True)


def solve_newton(log_q: np.ndarray, supports: np.ndarray, log_m: np.ndarray, power: float) -> Found:
    """Equilibria that Newton's method in ``log m`` reaches from given starts; each once.

    Args:
        log_q: (K, K) rows of ``log Q``, each up to a constant.
        supports: (n, s) token ids; the same support may come with many starts.
        log_m: (n, s) starts, up to a constant.
        power: ``a``.
    """
    good = connected(log_q, supports)
    supports, z = supports[good], np.array(log_m[good], float)
    if len(supports) == 0:
        return _nothing(supports)
    block = submatrices(log_q, supports)
    left, error = np.arange(len(z)), np.full(len(z), np.inf)
    for _ in range(_NEWTON_STEPS):
        z[left] = _normalised(z[left])
        residual, jacobian = _residual(block[left], z[left], power)
        error[left] = abs(residual).max(axis=1)
        go = np.isfinite(error[left]) & (error[left] > 1e-13)
        left, residual, jacobian = left[go], residual[go], jacobian[go]
        if len(left) == 0:
            break
        # Shifting log m changes nothing: adding ones fixes the shift and makes it regular.
        step = np.linalg.solve(
            jacobian + 1 + _TINY * max(1, power) * np.eye(jacobian.shape[-1]), residual[..., None]
        )[..., 0]
        longest = abs(step).max(axis=1, keepdims=True)
        step = step * np.minimum(1, 2 / np.maximum(longest, 1e-300))
        tried = [z[left] - part * step for part in (1.0, 0.3, 0.1)]
        sizes = [abs(_residual(block[left], _normalised(t), power)[0]).max(axis=1) for t in tried]
        best = np.argmin(np.nan_to_num(np.array(sizes), nan=np.inf), axis=0)
        z[left] = np.array(tried)[best, np.arange(len(left))]
    good = error < 1e-10
    supports, m = supports[good], np.exp(z[good])
    m = m / m.sum(axis=1, keepdims=True)
    _, first = np.unique(np.column_stack([supports, np.round(m, 7)]), axis=0, return_index=True)
    chosen: list[int] = []
    for i in first:  # what rounding told apart
        same = [c for c in chosen if (supports[c] == supports[i]).all()]
        if not any(abs(m[c] - m[i]).max() < 1e-6 for c in same):
            chosen.append(int(i))
    return Found(supports[chosen], m[chosen], np.zeros(len(chosen), int))


def _normalised(z: np.ndarray) -> np.ndarray:
    """Logarithms of shares that sum to 1 and do not underflow."""
    z = np.maximum(z - z.max(axis=1, keepdims=True), -690)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _residual(log_q: np.ndarray, z: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """``log Σ_k x_k Q[k, j] + (a − 1) log m_j`` (n, s), and its derivative by ``log m``."""
    most = z.max(axis=1, keepdims=True)
    scores = log_q + (power * (z - most))[:, None, :]
    total = np.logaddexp.reduce(scores, axis=2, keepdims=True)
    law = np.exp(scores - total)
    pull = z[:, :, None] - total + log_q
    arrived = np.logaddexp.reduce(pull, axis=1)
    residual = arrived + (power - 1) * (z - most) - most
    # (j, k): where a visit of j came from
    back = np.exp(pull - arrived[:, None, :]).transpose(0, 2, 1)
    jacobian = back - power * back @ law + (power - 1) * np.eye(z.shape[1])
    return residual, jacobian


def face_eigenvalues(log_q: np.ndarray, found: Found, power: float) -> np.ndarray:
    """(n, s - 1) complex eigenvalues of the drift's derivative at equilibria, within their faces.

    From ``dν (I − M) = m dM`` the derivative of ``ν(m) − m`` is
    ``a Zᵀ (I − Mᵀ D M D⁻¹) − I`` with ``D = diag(m)`` and ``Z`` the inverse of ``L = I − M`` on
    vectors that sum to 0. In terms of ``L``, whose diagonal is a sum, nothing is
    subtracted: tokens may almost never leave one another.
    """
    block, z = submatrices(log_q, found.supports), np.log(found.shares)
    size = z.shape[1]
    if size == 1:
        return np.zeros((len(z), 0), complex)
    scores = block + power * z[:, None, :]
    scores = scores - np.logaddexp.reduce(scores, axis=2, keepdims=True)
    leave = -_off_diagonal(scores)
    turned = -_off_diagonal(scores + z[:, :, None] - z[:, None, :])  # D L D^-1 but its diagonal
    diagonal = np.arange(size)
    leave[:, diagonal, diagonal] = turned[:, diagonal, diagonal] = -leave.sum(axis=2)
    back = leave.transpose(0, 2, 1)
    basis = np.linalg.svd(np.ones((1, size)))[2][1:]  # orthonormal, orthogonal to ones
    inner = basis @ back @ basis.T
    change = basis @ (back + turned - back @ turned) @ basis.T
    try:
        solved = np.linalg.solve(inner, change)
    except np.linalg.LinAlgError:  # links so weak beside others that they are rounded off
        solved = np.linalg.pinv(inner) @ change
    return np.linalg.eigvals(power * solved - np.eye(size - 1)).astype(complex)


def _off_diagonal(logs: np.ndarray) -> np.ndarray:
    """Exponentials, above 0 where they are not masked, and 0 on the diagonal."""
    return linear(logs) * (1 - np.eye(logs.shape[-1]))


def growth(log_q: np.ndarray, found: Found, power: float) -> np.ndarray:
    """(n, K) growth exponents at equilibria: 1 on the support, ``λ_j`` elsewhere.

    NaN, for power 1, for a token that can come but does not attend the support: how it grows
    depends on the other rare tokens. For powers above 1 rare tokens come finitely often (0);
    below 1 they are pulled back at an infinite rate.
    """
    n = len(found.shares)
    rows = log_q[found.supports]  # (n, s, K)
    inside = np.zeros((n, len(log_q)), bool)
    inside[np.arange(n)[:, None], found.supports] = True
    z = np.log(found.shares)
    scores = submatrices(log_q, found.supports) + power * z[:, None, :]
    log_x = z - np.logaddexp.reduce(scores, axis=2)
    with np.errstate(over="ignore"):  # infinite at very low temperatures
        rate = np.exp(np.logaddexp.reduce(log_x[:, :, None] + rows, axis=1))
    if power > 1:
        rate = np.zeros_like(rate)
    elif power < 1:
        rate = np.where((rows > -np.inf).any(axis=1), np.inf, 0)
    else:
        back = np.stack([(log_q[:, s] > -np.inf).any(axis=1) for s in found.supports])
        rate = np.where((rate > 0) & ~back, np.nan, rate)
    return np.where(inside, 1.0, rate)


def _nothing(supports: np.ndarray) -> Found:
    return Found(supports[:0], np.zeros((0, supports.shape[1])), np.zeros(0, int))
