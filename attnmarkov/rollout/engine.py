"""What an engine is: a way to advance a batch of generating lanes by the same number of steps."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attnmarkov import _validate
from attnmarkov.model import FullContext

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from jaxtyping import Array, Int, UInt32

    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summaries, Summary


@dataclass(frozen=True)
class Engine(abc.ABC):
    """Simulates lanes of one law; lane ``r`` draws from ``seeds[:, r]`` alone.

    :func:`attnmarkov.rollout` asks :meth:`refusal` first and calls only what is not refused.

    Attributes:
        max_lanes: The most lanes to run in one call; :func:`attnmarkov.rollout` splits larger
            batches. None leaves it to the engine.
        max_context: The longest history, prompt included, that its counts can hold.
    """

    max_lanes: int | None = None
    max_context: int = 2**31 - 1
    keeps_history: ClassVar[bool] = False  # whether it needs the prompts' token ids
    shares_prompt: ClassVar[bool] = False  # whether it takes one prompt for many lanes
    shares_cores: ClassVar[bool] = False  # whether a CPU's cores each take some of the lanes

    def check(self) -> None:
        """Raise unless the attributes are valid.

        Raises:
            ValueError: Naming the attribute and its value.
        """
        if self.max_lanes is not None:
            _validate.integer(self.max_lanes, "max_lanes", minimum=1)
        _validate.integer(self.max_context, "max_context", minimum=1)

    def lanes(self, law: Law) -> int:
        """The most lanes worth running in one call."""
        return self.max_lanes or 2048

    def refusal(self, law: Law, record: str | Summary) -> str | None:
        """Why this engine can't make such a record of such a law, as ``"can't …"``, or None.

        Unless overridden: counts of the plain law of the full context, and nothing else.
        """
        if not isinstance(law.context, FullContext):
            return f"can't take {type(law.context).__name__}, only the full context"
        if not law.is_plain:
            return "can't decode or reinforce: it samples the model's own law, with exponent 1"
        if record != "counts":
            return "can't keep tokens or summaries: it draws counts (record='counts')"
        return None

    @abc.abstractmethod
    def counts(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, at: np.ndarray
    ) -> np.ndarray | Int[Array, "lane record token"]:
        """The whole history's counts after each of ``at`` steps (increasing)."""

    def tokens(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, num_steps: int
    ) -> Int[Array, "lane step"]:
        """The tokens drawn at steps ``0..num_steps-1``."""
        raise NotImplementedError  # an engine that does not say so in refusal()

    def summary(
        self,
        law: Law,
        seeds: UInt32[Array, "2 lane"],
        prompts: Prompts,
        at: np.ndarray,
        summary: Summary,
    ) -> Summaries:
        """The summaries at each of ``at`` steps, and over all steps to the last of them."""
        raise NotImplementedError  # an engine that does not say so in refusal()

    def chunks(
        self, law: Law, seeds: UInt32[Array, "2 lane"], prompts: Prompts, edges: Iterable[int]
    ) -> Iterator[Int[Array, "lane step"]]:
        """The tokens of the steps ``edges[i] .. edges[i+1]-1``, one chunk after the other."""
        raise NotImplementedError  # an engine that does not say so in refusal()
