"""Maximum likelihood of every row by choix, for Luce's choice model."""

from __future__ import annotations

from typing import Literal

import choix  # pyright: ignore[reportMissingImports]
import numpy as np


def rows(tokens: np.ndarray, y: np.ndarray, size: int) -> list[list[tuple[int, list[int]]]]:
    """For each last token its choices: the label, and the other positions of the prompt."""
    data: list[list[tuple[int, list[int]]]] = [[] for _ in range(size)]
    for prompt, label in zip(tokens.tolist(), y.tolist(), strict=True):
        losers = list(prompt)
        losers.remove(label)
        data[prompt[-1]].append((label, losers))
    return data


def fit(
    data: list[list[tuple[int, list[int]]]], method: Literal["mm_top1", "ilsr_top1"]
) -> np.ndarray:
    """(K, K) logits, rows centred: all rows by ``choix.mm_top1`` or ``choix.ilsr_top1``."""
    size = len(data)
    solve = getattr(choix, method)
    return np.array([solve(size, choices, max_iter=10_000) for choices in data])
