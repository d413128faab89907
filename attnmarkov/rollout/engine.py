"""What an engine is: a way to advance a batch of generating lanes by the same number of steps."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Float, Int, Key

    from attnmarkov.prompts import Prompts


@dataclass(frozen=True)
class Engine(abc.ABC):
    """Simulates lanes of one CCMC; lane ``r`` draws from ``keys[r]`` alone.

    Attributes:
        max_lanes: The most lanes worth running in one call; :func:`attnmarkov.rollout` splits
            larger batches.
        max_context: The longest context, prompt included, that its counts can hold.
    """

    max_lanes: int = 2048
    max_context: int = 2**31 - 1

    @abc.abstractmethod
    def counts(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        at: np.ndarray,
    ) -> np.ndarray | Int[Array, "lane record token"]:
        """The whole context's counts after each of ``at`` steps (increasing)."""

    def tokens(
        self,
        logits: Float[Array, "token token"],
        keys: Key[Array, " lane"],
        prompts: Prompts,
        num_steps: int,
    ) -> Int[Array, "lane step"]:
        """The tokens drawn at steps ``0..num_steps-1``; engines that count only raise."""
        raise ValueError(
            f"engine: {type(self).__name__} draws counts, not tokens; pass record='counts' or "
            "engine='scan'"
        )
