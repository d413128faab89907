"""Expected visits of absorbing window chains, solved support by support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from attnmarkov.dynamics._windows import WindowChain

_DIRECT = 300  # states up to which a block is eliminated, not iterated
_CLOSE = 1e-11  # relative change at which an iteration has converged
_MOST = 2000  # iterations; a few tens are usual


def final_states(chain: WindowChain) -> tuple[np.ndarray, np.ndarray]:
    """(S,) which states are dead ends, and which go round for ever among two tokens or more."""
    from scipy.sparse import csgraph

    q = chain.transitions.tocoo()
    stays = np.diff(chain.transitions.indptr) == 0
    number, label = csgraph.connected_components(q, connection="strong")
    leaves = np.zeros(number, bool)
    row, column = q.coords
    leaves[label[row[label[row] != label[column]]]] = True
    leaves[label[stays]] = True
    return stays & ~chain.absorbed, ~leaves[label]


def moments(
    chain: WindowChain, start: Float[np.ndarray, " state"], final: Bool[np.ndarray, " state"]
) -> Float[np.ndarray, "3 state"]:
    """``start N R``, ``start N² R`` and ``start N³ R`` on the final states; zeros elsewhere.

    ``N = (1 − Q)⁻¹`` on the transient states, ``R`` their transitions into final ones. The
    support never grows, so ``Q`` is block triangular, and blocks are done from large supports to
    small. No step subtracts, so all entries have relative precision, however rare leaving is.

    Raises:
        RuntimeError: If the iteration on a large block does not converge.
    """
    flow = np.zeros((3, chain.codes.size))
    flow[0] = start
    for block in _blocks(chain, final):
        rows = chain.transitions[block]
        inside = rows[:, block].T.tocsr()
        outer = np.ones(chain.codes.size)
        outer[block] = 0
        leave = rows @ outer
        onward = rows.T.tocsr()
        labels = np.arange(block.size)
        if block.size > _DIRECT:
            labels = _classes(chain, block)
        visits = np.zeros(block.size)
        for i in range(3):
            visits = _visits(inside, leave, visits + flow[i, block], labels, chain.law.size)
            flow[i] += outer * (onward @ visits)
    return np.where(final, flow, 0)


def _blocks(chain: WindowChain, final: np.ndarray) -> list[np.ndarray]:
    """Transient states by support, from large supports to small."""
    transient = np.flatnonzero(~final)
    support = chain.law.support(chain.codes)
    order = transient[np.argsort(support[transient], kind="stable")]
    cuts = np.flatnonzero(np.diff(support[order])) + 1
    parts = [part for part in np.split(order, cuts) if part.size]
    return sorted(parts, key=lambda part: -int(support[part[0]]).bit_count())


def _classes(chain: WindowChain, block: np.ndarray) -> Int[np.ndarray, " state"]:
    """Windows of equal counts and equal last token, numbered."""
    law, codes = chain.law, chain.codes[block]
    name = law.digits(codes, 0)
    for digit in range(law.base - 1):
        count = sum((law.digits(codes, lag) == digit).astype(np.int64) for lag in range(law.size))
        name = np.unique(name * (law.size + 1) + count, return_inverse=True)[1]
    return np.unique(name, return_inverse=True)[1]


def _visits(
    inside: Any, leave: np.ndarray, start: np.ndarray, labels: np.ndarray, steps: int
) -> np.ndarray:
    """Expected visits ``x = x q + start`` of a block's states, ``inside`` being ``q`` transposed.

    By aggregation and disaggregation (Koury, McAllister and Stewart 1984): classes of states are
    solved with the visits that are known so far as weights, visits are scaled to the solution,
    and a few steps of the chain itself follow.
    """
    from scipy import sparse

    number = int(labels.max()) + 1
    if start.sum() == 0:
        return np.zeros(start.size)
    if number == start.size:
        return _eliminate(inside.T.toarray(), leave, start)
    add = sparse.csr_array((np.ones(labels.size), (labels, np.arange(labels.size))))
    x = start
    for _ in range(2 * steps):
        x = inside @ x + start
    change = np.inf
    for _ in range(_MOST):
        total = add @ x
        share = np.divide(x, total[labels], out=np.zeros_like(x), where=total[labels] > 0)
        parts = sparse.csr_array((share, (np.arange(labels.size), labels)))
        coarse = (add @ (inside @ parts)).toarray().T
        solved = _eliminate(coarse, add @ (share * leave), add @ start)
        scale = np.divide(solved, total, out=np.ones(number), where=total > 0)
        before = x * scale[labels]
        x = inside @ before + start
        change = max(abs(scale - 1).max(), abs(x - before).sum() / x.sum())
        for _ in range(steps - 1):
            x = inside @ x + start
        if change < _CLOSE:
            return x
    raise RuntimeError(
        f"expected visits of {start.size} windows have not converged in {_MOST} iterations "
        f"(relative change {change:.1e})"
    )


def _eliminate(q: np.ndarray, leave: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Dense ``x = x q + start``, where ``leave`` are the probabilities to leave.

    Grassmann, Taksar and Heyman's elimination on the chain that begins anew at ``start`` when it
    leaves. States without way out (never visited) get 0.
    """
    size = leave.size
    total = start.sum()
    a = np.zeros((size + 1, size + 1))
    a[1:, 1:], a[1:, 0], a[0, 1:] = q, leave, start / total
    for k in range(size, 0, -1):
        out = a[k, :k].sum()
        if out > 0:
            a[:k, k] /= out
            a[:k, :k] += a[:k, k, None] * a[k, :k]
        else:
            a[:k, k] = 0
    x = np.zeros(size + 1)
    x[0] = 1
    for k in range(1, size + 1):
        x[k] = x[:k] @ a[:k, k]
    return x[1:] * total
