"""Absorption from every window at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import _absorb, _windows
from attnmarkov.dynamics._models import as_ccmc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

    from attnmarkov.model import CCMC, Decoder, LagContext, SelfAttention, WindowContext


@dataclass(frozen=True, eq=False)
class AbsorptionTable:
    """Where each full window ends, and after how many steps on average.

    Attributes:
        windows: (K**w, w) token ids, oldest first, in lexicographic order.
        winner_probabilities: (K**w, K) probability to end with each token alone. What is missing
            to 1 ends in nothing to attend, or goes round for ever: see ``Absorption``.
        mean_times: (K**w,) mean time of absorption given that there is one; NaN if there is none.
    """

    windows: Int[np.ndarray, "state lag"]
    winner_probabilities: Float[np.ndarray, "state token"]
    mean_times: Float[np.ndarray, " state"]

    def row(self, window: Sequence[int]) -> int:
        """The row of a window of token ids, oldest first.

        Raises:
            ValueError: If it has another length, or holds a bad id.
        """
        ids = _validate.integer_array(window, "window", ndim=(1,))
        if ids.shape != self.windows.shape[1:]:
            raise ValueError(f"window: expected {self.windows.shape[1]} tokens, got {len(ids)}")
        size = self.winner_probabilities.shape[1]
        _validate.token_range(ids, "window", size)
        return int(np.ravel_multi_index(tuple(ids.astype(int)), (size,) * len(ids)))

    def __repr__(self) -> str:
        """The size and the slowest window."""
        times = np.nan_to_num(self.mean_times, nan=-1)
        slow = self.windows[times.argmax()].tolist()
        states, size = self.windows.shape
        slowest = f"slowest {slow}: {times.max():.6g} steps"
        return f"AbsorptionTable({states} windows of {size} tokens, {slowest})"


def absorption_table(
    model: CCMC | SelfAttention,
    context: int | WindowContext | LagContext,
    decoder: Decoder | None = None,
    *,
    max_states: int = 20_000,
) -> AbsorptionTable:
    """Absorption probabilities and mean times from every full window of the vocabulary.

    By sparse LU on all windows at once; the relative error is about 1e-16 times the mean time.

    Args:
        model: As :func:`attnmarkov.dynamics.absorption`.
        context: As there.
        decoder: As there.
        max_states: The most windows ``K**w``.

    Raises:
        ValueError: As there.

    References:
        As there.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
    >>> table = absorption_table(model, 2)
    >>> table.mean_times.round(3).tolist(), table.winner_probabilities[table.row([0, 1])].round(3)
    ([0.0, 1.429, 1.714, 0.0], array([0.143, 0.857]))
    """
    from scipy import sparse
    from scipy.sparse import linalg

    context, decoder = _windows.finite_context(context), _windows.checked_decoder(decoder)
    max_states = _validate.integer(max_states, "max_states", minimum=1)
    ccmc = as_ccmc(model)
    size, reach = ccmc.num_tokens, _windows.reach(context)
    law = _windows.window_law(ccmc.logits, np.arange(size), context, decoder, max_states)
    if size**reach > max_states:
        raise ValueError(_windows.refusal(size, reach, max_states))
    chain = _windows.explore(law, np.arange(size**reach), max_states)
    final = chain.absorbed | np.logical_or(*_absorb.final_states(chain))
    p = np.zeros((len(final), size))
    p[np.flatnonzero(chain.absorbed), law.digits(chain.codes[chain.absorbed], 0)] = 1
    times = np.zeros(len(final))
    if not final.all():
        rows = chain.transitions[~final]
        system = sparse.eye_array(int((~final).sum())) - rows[:, ~final]
        solver = linalg.splu(system.tocsc())
        p[~final] = np.clip(solver.solve(rows @ p), 0, 1)
        times[~final] = solver.solve(p[~final].sum(axis=1))
    total = p.sum(axis=1)
    means = np.divide(times, total, out=np.full(len(final), np.nan), where=total > 0)
    windows = np.stack([law.digits(chain.codes, lag) for lag in range(reach)[::-1]], axis=1)
    return AbsorptionTable(windows, p, means)
