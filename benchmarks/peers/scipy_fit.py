"""Maximum likelihood of every row by SciPy's L-BFGS-B with analytic gradients, in float64."""

from __future__ import annotations

import numpy as np
from scipy import optimize


def fit(counts: np.ndarray, last: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, K) logits that maximise the likelihood, rows centred.

    One problem of K variables for each last token; its prompts are gathered once.
    """
    size = counts.shape[1]
    logits = np.zeros((size, size))
    for k in range(size):
        chosen = last == k
        held = counts[chosen].astype(np.float64)
        emitted = np.bincount(y[chosen], minlength=size).astype(np.float64)
        number = max(len(held), 1)

        def loss(s: np.ndarray, held=held, emitted=emitted, number=number):
            top = s.max()
            weights = np.exp(s - top)
            total = held @ weights
            value = np.log(total).sum() + len(held) * top - emitted @ s
            slope = weights * (held.T @ (1 / total)) - emitted
            return value / number, slope / number

        options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-7}
        found = optimize.minimize(
            loss, np.zeros(size), jac=True, method="L-BFGS-B", options=options
        )
        logits[k] = found.x - found.x.mean()
    return logits
