"""Winner takes all: a generating CCMC collapses on one token, and the others fade as predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import dynamics
from attnmarkov.experiments._statistics import binomial_upper, median_interval
from attnmarkov.model import CCMC
from attnmarkov.rollout import Trajectory, log_spaced, rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), section 5"


@dataclass(frozen=True, kw_only=True)
class WinnerTakesAll(Experiment):
    """Long rollouts from a prompt that holds every token once.

    A random matrix is drawn by its exponents: row ``w`` is proportional to 1 at ``w`` and to
    ``λ_wj``, uniform in a range below 1, elsewhere, so that every such token can win. The last
    row has 2 at token 0 instead, so that the last token cannot.
    """

    name: ClassVar[str] = "winner-takes-all"
    summary: ClassVar[str] = "one token takes over generation, and the others fade as t^(λ-1)"
    block_size: ClassVar[int] = 2048
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": (2, 3, 4, 8),
            "num_matrices": 3,
            "num_steps": 10_000_000,
            "num_replicates": 2048,
        }
    }

    num_tokens: tuple[int, ...] = (2, 3, 4)
    """Vocabulary sizes K, each at least 2."""
    num_matrices: int = 2
    """Random matrices per vocabulary size."""
    exponents: tuple[float, float] = (0.35, 0.65)
    """Range of the losers' growth exponents, inside (0, 1)."""
    num_steps: int = 1_000_000
    """Generated tokens per trajectory."""
    num_records: int = 61
    """Log-spaced steps at which counts are kept."""
    num_replicates: int = 512
    """Trajectories per matrix."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.num_tokens or min(self.num_tokens) < 2:
            raise ValueError(f"num_tokens: expected sizes of at least 2, got {self.num_tokens}")
        if not 0 < self.exponents[0] <= self.exponents[1] < 1:
            raise ValueError(f"exponents: expected 0 < low <= high < 1, got {self.exponents}")
        if self.num_steps < 1000:
            raise ValueError(f"num_steps: slopes need at least 1000 steps, got {self.num_steps}")
        if self.num_records < 8:
            raise ValueError(f"num_records: slopes need at least 8, got {self.num_records}")
        if self.num_matrices < 1:
            raise ValueError(f"num_matrices: must be at least 1, got {self.num_matrices}")

    def configs(self) -> list[dict[str, Any]]:
        """One config per vocabulary size and matrix."""
        return [
            {"num_tokens": size, "matrix": i}
            for size in self.num_tokens
            for i in range(self.num_matrices)
        ]

    def layout(self) -> Layout:
        """Counts at the recorded steps; tokens past a config's vocabulary have count 0."""
        return {"counts": (("step", "token"), "int32")}

    def coords(self) -> dict[str, np.ndarray]:
        """The recorded steps and the token ids."""
        steps = log_spaced(self.num_steps, self.num_records)
        return {"step": steps, "token": np.arange(max(self.num_tokens))}

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a config: it depends on the seed, the size and the matrix number alone."""
        size = int(config["num_tokens"])
        key = jax.random.fold_in(jax.random.key(self.seed), size)
        key = jax.random.fold_in(key, int(config["matrix"]))
        low, high = self.exponents
        p = np.array(jax.random.uniform(key, (size, size), minval=low, maxval=high), np.float64)
        np.fill_diagonal(p, 1)
        p[-1, 0] = 2
        return CCMC.from_transition_matrix(p / p.sum(axis=1, keepdims=True))

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        model = self.model(config)
        trajectory = rollout(
            model,
            key,
            np.arange(model.num_tokens),
            self.num_steps,
            len(replicates),
            record="counts",
            at=self.coords()["step"],
            first_replicate=int(replicates[0]),
        )
        counts = np.asarray(trajectory.counts)
        padded = np.zeros((*counts.shape[:2], max(self.num_tokens)), np.int32)
        padded[..., : model.num_tokens] = counts
        return {"counts": padded}

    def slopes(self, dataset: xr.Dataset) -> xr.Dataset:
        """Median log-log slopes of losers' counts over the last two decades, by winner.

        Trajectories count for token ``w`` if ``w`` has over 90 % of the context at the end. A
        loser is judged if at least 40 trajectories do and its median count is at least 50 where
        the two decades begin (below that, counts are too coarse to take logarithms of).

        Returns:
            Dataset along ``group`` = (config, winner, loser) with ``predicted`` exponents, and
            ``median`` slopes with ``lower`` and ``upper`` ends of a 99.99 % interval.
        """
        import xarray as xr

        rows: list[tuple] = []
        steps = dataset["step"].values
        first = int(np.searchsorted(steps, steps[-1] / 100))
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            exponents = [
                np.asarray(dynamics.winner_exponents(self.model(config), w)) for w in range(size)
            ]
            won, top = _winners(counts)
            for w in range(size):
                group = counts[won & (top == w)]
                for j in set(range(size)) - {w}:
                    if len(group) < 40 or np.median(group[:, first, j]) < 50:
                        continue
                    begin = np.log(steps[first] + size), np.log(group[:, first, j])
                    end = np.log(steps[-1] + size), np.log(group[:, -1, j])
                    slope = (end[1] - begin[1]) / (end[0] - begin[0])
                    lower, upper = median_interval(slope, 1e-4)
                    rows.append((i, size, w, j, exponents[w][j], np.median(slope), lower, upper))
        columns = np.array(rows, float).reshape(-1, 8).T
        names = ["config", "num_tokens", "winner", "loser", "predicted", "median", "lower", "upper"]
        table = xr.Dataset({names[i]: ("group", column) for i, column in enumerate(columns)})
        return table.assign_coords({name: table[name].astype(int) for name in names[:4]})

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Who wins, whether one token takes over, and how fast the losers grow."""
        out: list[Claim] = []
        slopes = self.slopes(dataset)
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            if len(counts) == 0:
                continue
            label = f"K={size}, matrix {config['matrix']}"
            possible = np.asarray(dynamics.possible_winners(self.model(config)))
            out.append(self._winner_claim(label, counts, possible))
            part = slopes.isel(group=np.flatnonzero(slopes["config"] == i))
            for w in np.unique(part["winner"]):
                group = part.isel(group=np.flatnonzero(part["winner"] == w))
                out.append(self._exponent_claim(f"{label}, winner {w}", group))
        return out

    def _winner_claim(self, label: str, counts: np.ndarray, possible: np.ndarray) -> Claim:
        """No winner has P[w, j] >= P[w, w]; judged on at least 100 trajectories with one."""
        won, top = _winners(counts)
        number, wrong = int(won.sum()), int((~possible[top[won]]).sum())
        verdict = "fail" if wrong else "pass" if number >= 100 else "inconclusive"
        claim = f"{label}: share of winners with some P[w,j] >= P[w,w]"
        upper = binomial_upper(wrong, number, 1e-4)
        return Claim(self.name, claim, _SOURCE, 0.0, wrong / max(number, 1), upper, verdict)

    def _exponent_claim(self, label: str, group: xr.Dataset) -> Claim:
        """The worst loser's slope is at most 0.03, for the finite horizon, off its interval."""
        worst = group.isel(group=int(abs(group["median"] - group["predicted"]).values.argmax()))
        predicted, measured = float(worst["predicted"]), float(worst["median"])
        half = float(worst["upper"] - worst["lower"]) / 2
        verdict = "pass" if abs(measured - predicted) <= 0.03 + half else "fail"
        claim = f"{label}: growth exponent of token {int(worst['loser'])} (± 0.03, finite time)"
        if half > 0.1:
            verdict = "inconclusive"
        return Claim(self.name, claim, _SOURCE, predicted, measured, half, verdict)

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Shares along trajectories, and exponents measured against predicted."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        chosen = [i for i, c in enumerate(self.configs()) if c["matrix"] == 0]
        shares = Figure(figsize=(4.6 * len(chosen), 4), layout="constrained")
        for ax, i in zip(shares.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=False):
            config = self.configs()[i]
            counts, size = _finished(dataset, i, config)
            if len(counts) == 0:
                ax.set_title("not finished")
                continue
            trajectory = Trajectory(
                size, "scan", jnp.asarray(counts), jnp.asarray(dataset["step"].values)
            )
            plot.frequencies(trajectory, predicted=self.model(config), ax=ax)
            ax.set_title(f"K = {size}: {ax.get_title()}", fontsize=10)
        figures = {"frequencies": shares}
        slopes = self.slopes(dataset)
        if slopes.sizes["group"]:
            figures["exponents"] = Figure(figsize=(6, 4.2), layout="constrained")
            plot.growth_exponents(slopes, ax=figures["exponents"].subplots())
        return figures


def _finished(dataset: xr.Dataset, i: int, config: dict[str, Any]) -> tuple[np.ndarray, int]:
    """(replicate, step, token) counts of a config's finished replicates, and its K."""
    size = int(config["num_tokens"])
    counts = dataset["counts"].isel(config=i).values[..., :size]
    return counts[counts[:, 0].min(axis=-1) >= 0], size


def _winners(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which trajectories have a token with over 90 % of the context at the end, and which."""
    end = counts[:, -1]
    return end.max(axis=-1) > 0.9 * end.sum(axis=-1), end.argmax(axis=-1)
