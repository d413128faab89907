"""QuantEcon's ``MarkovChain.simulate``, a Numba loop on one thread, for the plain Markov chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import quantecon  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


def build(p: np.ndarray, num_steps: int, lanes: int) -> Callable[[int], np.ndarray]:
    """It returns the tokens (lanes, num_steps), the first one uniform."""
    chain = quantecon.MarkovChain(p)
    return lambda seed: chain.simulate(num_steps, num_reps=lanes, random_state=seed)
