"""Winner takes all: a generating CCMC collapses on one token, and the others fade as predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import dynamics
from attnmarkov.experiments._statistics import binomial_interval, median_interval
from attnmarkov.model import CCMC
from attnmarkov.rollout import Trajectory, log_spaced, rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), single trajectory"


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
    num_matrices: int = 1
    """Random matrices per vocabulary size."""
    exponents: tuple[float, float] = (0.45, 0.65)
    """Range of the losers' growth exponents, inside (0, 1)."""
    num_steps: int = 1_000_000
    """Generated tokens per trajectory."""
    num_records: int = 61
    """Log-spaced steps at which counts are kept."""
    num_replicates: int = 1024
    """Trajectories per matrix."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.num_tokens or min(self.num_tokens) < 2:
            raise ValueError(f"num_tokens: expected sizes of at least 2, got {self.num_tokens}")
        if not 0 < self.exponents[0] <= self.exponents[1] < 1:
            raise ValueError(f"exponents: expected 0 < low <= high < 1, got {self.exponents}")
        if not 1000 <= self.num_steps < 2**31 - max(self.num_tokens):
            raise ValueError(
                f"num_steps: slopes need at least 1000 steps, and counts end at 2**31; "
                f"got {self.num_steps}"
            )
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

        The slope tends to ``λ_j = P[w, j] / P[w, w]`` as the losers' shares vanish; at a finite
        time the mean field gives ``λ_j(m) = Σ_k ν_k P[k, j] / Σ_i m_i P[k, i]`` at shares ``m``
        with ``ν`` the stationary law of ``M[k, j] ∝ m_j P[k, j]``. Its average in log time
        along each trajectory is what the slope is held against.

        Returns:
            Dataset along ``group`` = (config, winner, loser) with the exponents in the ``limit``
            and ``predicted`` (median along the trajectories), and ``median`` slopes with
            ``lower`` and ``upper`` ends of a 99.99 % interval.
        """
        import xarray as xr

        rows: list[tuple] = []
        steps = dataset["step"].values
        first = int(np.searchsorted(steps, steps[-1] / 100))
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            model = self.model(config)
            won, top = _winners(counts)
            log_time = np.log(steps[first:] + size)
            for w in range(size):
                group = counts[won & (top == w)][:, first:]
                if len(group) < 40:
                    continue
                limits = np.asarray(dynamics.winner_exponents(model, w))
                local = _mean_field_exponents(np.asarray(model.transition_matrix, float), group)
                mean = np.trapezoid(local, log_time, axis=1) / np.ptp(log_time)
                for j in set(range(size)) - {w}:
                    if np.median(group[:, 0, j]) < 50:
                        continue
                    slope = np.log(group[:, -1, j] / group[:, 0, j]) / np.ptp(log_time)
                    medians = np.median(mean[:, j]), np.median(slope)
                    rows.append((i, size, w, j, limits[j], *medians, *median_interval(slope, 1e-4)))
        names = ["config", "num_tokens", "winner", "loser", "limit", "predicted", "median"]
        names += ["lower", "upper"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({names[i]: ("group", column) for i, column in enumerate(columns)})
        return table.assign_coords({name: table[name].astype(int) for name in names[:4]})

    def winners(self, dataset: xr.Dataset) -> xr.Dataset:
        """How many finished trajectories each token has won, 90 % of the context, at each step.

        Returns:
            Dataset with ``won`` over (config, step, token) and ``trajectories`` over config.
        """
        import xarray as xr

        steps, tokens = dataset["step"].values, dataset["token"].values
        won = np.zeros((len(self.configs()), len(steps), len(tokens)), int)
        number = np.zeros(len(won), int)
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            number[i] = len(counts)
            shares = counts > 0.9 * counts.sum(axis=-1, keepdims=True)
            won[i, :, :size] = shares.sum(axis=0)
        return xr.Dataset(
            {"won": (("config", "step", "token"), won), "trajectories": ("config", number)},
            {"step": steps, "token": tokens},
        )

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Whether one token takes over, which ones do, and how fast the losers grow."""
        out: list[Claim] = []
        slopes, winners = self.slopes(dataset), self.winners(dataset)
        for i, config in enumerate(self.configs()):
            number = int(winners["trajectories"][i])
            if number == 0:
                continue
            label = f"K={config['num_tokens']}, matrix {config['matrix']}"
            won = winners["won"].values[i]
            out.append(self._collapse_claim(label, won.sum(axis=-1), number))
            out.append(self._winner_claim(label, won[-1], self.model(config)))
            part = slopes.isel(group=np.flatnonzero(slopes["config"] == i))
            for w in np.unique(part["winner"]):
                group = part.isel(group=np.flatnonzero(part["winner"] == w))
                out.append(self._exponent_claim(f"{label}, winner {w}", group))
        return out

    def _collapse_claim(self, label: str, won: np.ndarray, number: int) -> Claim:
        """Trajectories without a winner die out: clearly fewer than two decades before."""
        early = int(np.searchsorted(self.coords()["step"], self.num_steps / 100))
        left, before = number - int(won[-1]), number - int(won[early])
        low, high = binomial_interval(left, number, 1e-4)
        falls = left == 0 or high < binomial_interval(before, number, 1e-4)[0]
        verdict = "pass" if falls else "fail" if low > 0.1 else "inconclusive"
        claim = (
            f"{label}: share without a winner at t = {self.num_steps:.0e}, tends to 0 "
            f"(two decades before: {before / number:.3f})"
        )
        return Claim(self.name, claim, _SOURCE, 0.0, left / number, (high - low) / 2, verdict)

    def _winner_claim(self, label: str, won: np.ndarray, model: CCMC) -> Claim:
        """No winner has P[w, j] >= P[w, w]; judged on at least 100 trajectories with one."""
        possible = np.asarray(dynamics.possible_winners(model))
        number, wrong = int(won.sum()), int(won[: possible.size][~possible].sum())
        verdict = "fail" if wrong else "pass" if number >= 100 else "inconclusive"
        tally = ", ".join(f"{n} by {w}" for w, n in enumerate(won) if n)
        claim = f"{label}: share of winners with some P[w,j] >= P[w,w] ({tally or 'none'})"
        upper = binomial_interval(wrong, number, 1e-4)[1] if number else 1.0
        return Claim(self.name, claim, _SOURCE, 0.0, wrong / max(number, 1), upper, verdict)

    def _exponent_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Every loser's interval within 0.01 of the prediction; the worst one is shown."""
        half = (group["upper"] - group["lower"]).values / 2
        excess = abs(group["median"] - group["predicted"]).values - half
        worst = int(excess.argmax())
        verdict = "pass" if half.max() <= 0.05 else "inconclusive"
        if excess[worst] > 0.01:
            verdict = "fail"
        shown = group.isel(group=worst)
        claim = (
            f"{label}: growth exponent of token {int(shown['loser'])} on the way to "
            f"{float(shown['limit']):.3f} (± 0.01)"
        )
        predicted, measured = float(shown["predicted"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

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
            trajectory = Trajectory(size, "scan", jnp.asarray(counts), dataset["step"].values)
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


def _mean_field_exponents(p: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``λ_j(m)`` at the shares of (..., K) counts, by a thousand powers of ``M``."""
    m = counts / counts.sum(axis=-1, keepdims=True)
    pull = m @ p.T  # Σ_i m_i P[k, i]
    walk = np.linalg.matrix_power(m[..., None, :] * p / pull[..., None], 1024)
    visits = walk[..., 0, :]
    return (visits / pull) @ p
