"""What an experiment states: its grid, its simulation, its claims and its figures."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import jax
import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr
    from jaxtyping import Array, Key
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, DTypeLike

Config = dict[str, int | float | str]
Layout = dict[str, tuple[tuple[str, ...], "DTypeLike"]]
Verdict = Literal["pass", "fail", "inconclusive"]
Json = float | int | str | None
Quantity = Json | np.number


@dataclass(frozen=True)
class Claim:
    """A statement of the theory, what it predicts, and what the simulation measured.

    Attributes:
        experiment: Name of the experiment that checked it.
        claim: The statement, one sentence.
        source: Where it stands: paper and equation or theorem.
        predicted: The value it predicts: a number, or a few words.
        measured: The value found.
        uncertainty: Half-width of the interval of ``measured``, in the same unit.
        verdict: "pass", "fail" or "inconclusive".
    """

    experiment: str
    claim: str
    source: str
    predicted: Quantity
    measured: Quantity
    uncertainty: Quantity
    verdict: Verdict

    def __post_init__(self) -> None:
        _validate.choice(self.verdict, "verdict", ("pass", "fail", "inconclusive"))

    def to_json(self) -> dict[str, Json]:
        """The fields as plain JSON values; a number that is not finite becomes None."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Experiment(abc.ABC):
    """Base class of experiments. Subclasses are frozen dataclasses of parameters.

    Parameters have defaults and are numbers, strings, booleans, or tuples of these, so that a
    run can be stored as JSON and started from the command line. A subclass sets ``name``,
    ``summary`` and ``presets``, and defines :meth:`configs`, :meth:`layout`,
    :meth:`simulate`, :meth:`claims` and :meth:`figures`.

    Attributes:
        seed: Seed of every random draw, 0 to 2**32 - 1.
        num_replicates: Independent replicates of each grid point.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Parameters of "quick" and "full" that differ from the defaults."""
    block_size: ClassVar[int] = 128
    """Replicates simulated at once, at most, unless :func:`attnmarkov.sweep.run` is told."""

    seed: int = 0
    num_replicates: int = 100

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range. Overrides call this one first."""
        _validate.seed(self.seed)
        _validate.integer(self.num_replicates, "num_replicates", minimum=1)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The experiment at a named size: "quick" (a minute or so) or "full"."""
        _validate.choice(name, "preset", ("quick", "full"))
        return cls(**cls.presets.get(name, {}))

    @abc.abstractmethod
    def configs(self) -> list[Config]:
        """The grid points, in order. All have the same keys, which become coordinates."""

    @abc.abstractmethod
    def layout(self) -> Layout:
        """Each result's name with its (dims after ``config`` and ``replicate``, dtype).

        What was never simulated reads as NaN in floats, as -1 in signed integers, as the
        largest value in unsigned ones, and as False in booleans.
        """

    def coords(self) -> Mapping[str, ArrayLike]:
        """Coordinates of the further dims that :meth:`layout` names, all of them."""
        return {}

    @abc.abstractmethod
    def simulate(
        self, config: Config, key: Key[Array, ""], replicates: np.ndarray
    ) -> Mapping[str, ArrayLike]:
        """Simulate some replicates of one grid point.

        Args:
            config: The grid point.
            key: Its key. Replicate ``r`` draws from ``fold_in(key, r)`` and from nothing else,
                so that draws do not depend on how replicates are grouped.
            replicates: Ids of the replicates wanted.

        Returns:
            An array for each name in :meth:`layout`, with a leading axis of ``len(replicates)``.
        """

    @abc.abstractmethod
    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Hold the results against the theory.

        The dataset has a mask ``done`` (config, replicate). If some of it is False, claims are
        shown without a verdict, and a method that raises is taken to need the rest.
        """

    @abc.abstractmethod
    def figures(self, dataset: xr.Dataset) -> Mapping[str, Figure]:
        """The figures by file name (no suffix); ``Figure.set_label`` gives the text beside it."""

    def config_key(self, config: Config) -> Key[Array, ""]:
        """The key of a grid point: a function of the seed and of its parameters alone."""
        return jax.random.fold_in(jax.random.key(self.seed), np.uint32(config_id(config)))

    def spec(self) -> str:
        """The parameters as canonical JSON."""
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_spec(cls, spec: str) -> Self:
        """The experiment whose :meth:`spec` this is.

        Raises:
            ValueError: If there are parameters that this class does not have.
        """
        values = {k: _tuples(v) for k, v in json.loads(spec).items()}
        unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"spec: {cls.name} has no parameter {unknown[0]!r}")
        return cls(**values)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NumPy scalars as numbers, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_number
    )


def config_id(config: Config) -> int:
    """32-bit id of a grid point, from its parameters."""
    return zlib.crc32(canonical_json(config).encode())


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"parameter: {value!r} is not a number, string, boolean or tuple of these")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Json:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
