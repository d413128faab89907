"""One-layer attention in PyTorch on the CPU, evaluated again over the context at every step.

The same computation as :mod:`benchmarks.peers.attention`: at every step the query ``W x_L``, then
``scaled_dot_product_attention`` of it over the embeddings of the whole context (keys and values
alike, so there is nothing else to cache), then the head and ``multinomial``. The context is a view
of a buffer that was allocated once; nothing is padded. Two threads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch  # pyright: ignore[reportMissingImports]
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    scaled_dot_product_attention,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np


def build(
    embedding: np.ndarray,
    weight: np.ndarray,
    head: np.ndarray,
    prompt: Sequence[int],
    num_steps: int,
    lanes: int,
) -> Callable[[int], np.ndarray]:
    """It returns the tokens (lanes, num_steps)."""
    e, w, c = (torch.tensor(x, dtype=torch.float32) for x in (embedding, weight, head))
    begin, end = len(prompt), len(prompt) + num_steps

    @torch.no_grad()
    def call(seed: int) -> np.ndarray:
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        torch.manual_seed(seed)
        tokens = torch.empty(lanes, end, dtype=torch.long)
        tokens[:, :begin] = torch.as_tensor(prompt)
        x = torch.empty(lanes, end, e.shape[1])
        x[:, :begin] = e[tokens[:, :begin]]
        for length in range(begin, end):
            query = (x[:, length - 1] @ w.T)[:, None, None]
            context = x[:, None, :length]
            mean = scaled_dot_product_attention(query, context, context, scale=1.0)[:, 0, 0]
            drawn = torch.multinomial((mean @ c.T).clamp_min(1e-30), 1)[:, 0]
            tokens[:, length] = drawn
            x[:, length] = e[drawn]
        return tokens[:, begin:].numpy()

    return call
