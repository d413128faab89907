"""A small experiment for tests of sweeps, reports and the command line: dice are thrown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attnmarkov.sweep import Claim, Experiment, Verdict


@dataclass(frozen=True)
class Dice(Experiment):
    """Throw fair dice whose sides are numbered from 0."""

    name: ClassVar[str] = "dice"
    summary: ClassVar[str] = "the mean of a fair die is half its largest side"
    presets: ClassVar[dict] = {"quick": {"num_replicates": 4}, "full": {"num_replicates": 40}}

    sides: tuple[int, ...] = (2, 6)
    """Sides of each die."""
    color: str = "white"
    """Colour of the dice."""
    num_replicates: int = 10
    """People who throw."""
    verdict: Verdict = "pass"
    """What to say of the claim."""

    def validate(self):
        super().validate()
        if min(self.sides, default=0) < 2:
            raise ValueError(f"sides: a die has at least 2, got {self.sides}")

    def configs(self):
        return [{"num_sides": s, "color": self.color} for s in self.sides]

    def layout(self):
        return {"throws": (("step",), "int32"), "mean": ((), "float32"), "six": ((), "bool")}

    def coords(self):
        return {"step": np.arange(3)}

    def simulate(self, config, key, replicates):
        keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.asarray(replicates))
        throws = jax.vmap(lambda k: jax.random.randint(k, (3,), 0, int(config["num_sides"])))(keys)
        return {"throws": throws, "mean": throws.mean(1), "six": (throws == 5).any(1)}

    def claims(self, dataset):
        mean = dataset["mean"].mean("replicate")
        return [
            Claim(
                self.name,
                f"A {self.color} die of {s} sides has mean {(s - 1) / 2}",
                "Pacioli (1494), <chapter 1>",
                (s - 1) / 2,
                mean.values[i],
                np.float32("nan"),
                self.verdict,
            )
            for i, s in enumerate(self.sides)
        ]

    def figures(self, dataset):
        figure = Figure(figsize=(6, 3))
        ax = figure.subplots()
        ax.plot(dataset["num_sides"], dataset["mean"].mean("replicate"), "o")
        ax.set(xlabel="$sides$", ylabel="mean throw")
        return {"means": figure}
