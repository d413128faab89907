"""What a rollout returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    import xarray as xr
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Trajectory:
    """A batch of generated trajectories, as tokens or as counts at recorded steps.

    Attributes:
        num_tokens: Vocabulary size K.
        engine: Name of the engine that made it.
        values: What was recorded; read it as :attr:`tokens` or :attr:`counts`.
        at: (len(at),) int64, the numbers of steps at which counts were recorded; None for tokens.
    """

    num_tokens: int = field(metadata={"static": True})
    engine: str = field(metadata={"static": True})
    values: Int[Array, "replicate ..."]
    at: np.ndarray | None = None

    @property
    def tokens(self) -> Int[Array, "replicate step"]:
        """(R, num_steps) int32, the token drawn at each step after the prompt.

        Raises:
            ValueError: If the rollout recorded counts.
        """
        if self.at is not None:
            raise ValueError("tokens: this rollout recorded counts; pass record='tokens'")
        return self.values

    @property
    def counts(self) -> Int[Array, "replicate record token"]:
        """(R, len(at), K), the whole context's token counts, prompt included.

        int32 on the device, or int64 on the host from the engines that count past 2**31.

        Raises:
            ValueError: If the rollout recorded tokens.
        """
        if self.at is None:
            raise ValueError("counts: this rollout recorded tokens; pass record='counts'")
        return self.values

    @property
    def frequencies(self) -> Float[Array, "replicate record token"]:
        """Shares of the context, ``counts / counts.sum(-1)``; raises as :attr:`counts`."""
        return self.counts / self.counts.sum(-1, keepdims=True)

    def to_dataset(self) -> xr.Dataset:
        """The same as an ``xarray.Dataset`` with dims ``replicate``, ``step`` and ``token``."""
        import xarray as xr

        values, attrs = np.asarray(self.values), {"engine": self.engine}
        if self.at is None:
            return xr.Dataset({"tokens": (("replicate", "step"), values)}, attrs=attrs)
        coords = {"step": np.asarray(self.at), "token": np.arange(self.num_tokens)}
        return xr.Dataset({"counts": (("replicate", "step", "token"), values)}, coords, attrs)

    def __repr__(self) -> str:
        """The sizes and, of counts, how concentrated the last record is."""
        values = self.values
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
