"""What a rollout returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from attnmarkov import _validate
from attnmarkov.rollout.summary import Summaries

if TYPE_CHECKING:
    import xarray as xr
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Trajectory:
    """A batch of generated trajectories, as tokens, or counts or summaries at recorded steps.

    Attributes:
        num_tokens: Vocabulary size K.
        engine: Name of the engine that made it.
        values: What was recorded; read it as :attr:`tokens`, :attr:`counts` or :attr:`summary`.
        at: (len(at),) int64, the numbers of steps of the records; None for tokens.
    """

    num_tokens: int = field(metadata={"static": True})
    engine: str = field(metadata={"static": True})
    values: Int[Array, "replicate ..."] | Summaries
    at: np.ndarray | None = None

    @property
    def tokens(self) -> Int[Array, "replicate step"]:
        """(R, num_steps), the token drawn at each step after the prompt.

        In the narrowest signed integer type that holds the vocabulary.

        Raises:
            ValueError: If the rollout recorded something else.
        """
        if self.at is not None or isinstance(self.values, Summaries):
            raise ValueError(f"tokens: this rollout recorded {self._kind}; pass record='tokens'")
        return self.values

    @property
    def counts(self) -> Int[Array, "replicate record token"]:
        """(R, len(at), K), the whole history's token counts, prompt included.

        int32 on the device, or int64 on the host from the engines that count past 2**31.

        Raises:
            ValueError: If the rollout recorded something else.
        """
        if self.at is None or isinstance(self.values, Summaries):
            raise ValueError(f"counts: this rollout recorded {self._kind}; pass record='counts'")
        return self.values

    @property
    def summary(self) -> Summaries:
        """The streaming summaries.

        Raises:
            ValueError: If the rollout recorded something else.
        """
        if not isinstance(self.values, Summaries):
            raise ValueError(f"summary: this rollout recorded {self._kind}; pass record='summary'")
        return self.values

    @property
    def _kind(self) -> str:
        if isinstance(self.values, Summaries):
            return "a summary"
        return "tokens" if self.at is None else "counts"

    @property
    def frequencies(self) -> Float[Array, "replicate record token"]:
        """Shares of the context, ``counts / counts.sum(-1)``; raises as :attr:`counts`."""
        return self.counts / self.counts.sum(-1, keepdims=True)

    def to_dataset(self) -> xr.Dataset:
        """The same as an ``xarray.Dataset`` with dims ``replicate``, ``step`` and ``token``.

        Transition counts have dims ``replicate``, ``query`` and ``token``.
        """
        import xarray as xr

        attrs: dict[str, Any] = {"engine": self.engine}
        if self.at is None:
            tokens = np.asarray(self.tokens)
            return xr.Dataset({"tokens": (("replicate", "step"), tokens)}, attrs=attrs)
        coords = {"step": np.asarray(self.at)}
        if isinstance(self.values, Summaries):
            attrs["share"] = float(self.values.share)
            return xr.Dataset(self.values.labelled(), coords, attrs)
        coords["token"] = np.arange(self.num_tokens)
        counts = np.asarray(self.counts)
        return xr.Dataset({"counts": (("replicate", "step", "token"), counts)}, coords, attrs)

    def __repr__(self) -> str:
        """The sizes and, of counts, how concentrated the last record is."""
        values = self.values
        if isinstance(values, Summaries):
            if not _validate.is_concrete(values):
                return f"Trajectory(values={values})"
            steps = len(np.asarray(self.at))
            return f"Trajectory({values} at {steps} times, engine={self.engine!r})"
        if not isinstance(values, jax.Array | np.ndarray) or not _validate.is_concrete(values):
            return f"Trajectory(values={values})"
        head = f"Trajectory({values.shape[0]} trajectories of {self.num_tokens} tokens"
        if self.at is None:
            return f"{head}, {values.shape[1]} steps, engine={self.engine!r})"
        top = np.median(np.asarray(self.frequencies[:, -1]).max(axis=-1))
        return (
            f"{head}, counts at {values.shape[1]} times up to step {int(self.at[-1])}, "
            f"median top share {top:.3f} at the end, engine={self.engine!r})"
        )
