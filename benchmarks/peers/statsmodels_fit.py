"""Maximum likelihood of every row by statsmodels' conditional logit with an offset."""

from __future__ import annotations

import warnings

import numpy as np
from statsmodels.discrete.conditional_models import (  # pyright: ignore[reportMissingImports]
    ConditionalLogit,
)


def fit(counts: np.ndarray, last: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, K) logits, rows centred. A prompt is a group whose members are its distinct tokens."""
    size = counts.shape[1]
    logits = np.zeros((size, size))
    for k in range(size):
        prompt, token = np.nonzero(counts * (last == k)[:, None])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # prompts of one token say nothing and are dropped
            model = ConditionalLogit(
                (y[prompt] == token).astype(float),
                np.eye(size)[token][:, 1:],
                groups=prompt,
                offset=np.log(counts[prompt, token]),
            )
            s = np.concatenate([[0.0], model.fit(disp=False).params])
        logits[k] = s - s.mean()
    return logits
