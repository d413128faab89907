"""Maximum likelihood of every row by SciPy's L-BFGS-B with analytic gradients, in float64."""

from __future__ import annotations

import numpy as np
from scipy import optimize, special


def fit(counts: np.ndarray, last: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, K) logits that maximise the likelihood, rows centred.

    One problem of K variables for each last token; its prompts are gathered once, and an
    evaluation is two products with their counts.
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


def fit_jointly(counts: np.ndarray, last: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The same by one call over all K² logits: the softmax likelihood as it is written down."""
    n, size = counts.shape
    with np.errstate(divide="ignore"):
        log_counts = np.log(counts.astype(np.float64))
    rows, emitted = np.eye(size)[last], np.eye(size)[y]

    def loss(flat: np.ndarray):
        scores = flat.reshape(size, size)[last] + log_counts
        log_probs = special.log_softmax(scores, axis=1)
        value = -log_probs[np.arange(n), y].sum()
        slope = rows.T @ (np.exp(log_probs) - emitted)
        return value / n, slope.ravel() / n

    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-8}
    start = np.zeros(size * size)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    logits = found.x.reshape(size, size)
    return logits - logits.mean(1, keepdims=True)
