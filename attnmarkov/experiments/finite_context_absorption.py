"""Finite contexts: generation ends in one token, at times and in tokens that are known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from attnmarkov._intervals import quantile_interval, share_intervals
from attnmarkov.dynamics.absorption import Absorption, absorption
from attnmarkov.dynamics.absorption_sample import absorption_monte_carlo
from attnmarkov.experiments._statistics import INTERVAL_99_99, weighted_line
from attnmarkov.model import CCMC, DecayContext, WindowContext
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import jax
    import xarray as xr
    from matplotlib.figure import Figure

    from attnmarkov.sweep import Verdict

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), winner-takes-all in a finite context"
_ALPHA = 1e-4  # how often an interval may miss
_PROMPTS = ("mixed", "nearly one")


@dataclass(frozen=True, kw_only=True)
class FiniteContextAbsorption(Experiment):
    """Rollouts with windows and with decaying weights, in two regimes.

    Row ``k`` of ``P`` has about ``stay`` at ``k`` and the rest elsewhere, unevenly. Where that is
    the row's largest entry (collapse), every token can win with the whole history; where it is
    the smallest (mixing), none can, and only the end of the window makes an end. Prompts hold
    all tokens in turns ("mixed"), or one token and, at the end, another ("nearly one").
    """

    name: ClassVar[str] = "finite-context-absorption"
    summary: ClassVar[str] = "a window ends in one token: when, and in which, is known exactly"
    block_size: ClassVar[int] = 2048
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "windows": (2, 3, 4, 6, 8, 10, 12, 14),
            "windows_of_three": (2, 3, 4, 6, 8, 10),
            "memories": (1.5, 2.0, 3.0, 4.0, 5.0, 6.0),
            "num_replicates": 20_000,
        }
    }

    windows: tuple[int, ...] = (2, 4, 6, 8, 10)
    """Window sizes for two tokens, increasing."""
    windows_of_three: tuple[int, ...] = (2, 4, 6)
    """Window sizes for three tokens, increasing."""
    memories: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0)
    """Total weights 1/(1 - gamma) of decaying contexts of two tokens, increasing."""
    stay_collapse: float = 0.6
    """Probability to stay where tokens can win."""
    stay_mixing: float = 0.25
    """Probability to stay where they cannot."""
    return_probability: float = 1e-3
    """Probability of another token coming back below which a decaying context has collapsed."""
    exact_to: int = 14
    """Window of two tokens up to which the exact means are shown; of three tokens two thirds."""
    max_steps: int = 1_000_000
    """Steps after which a trajectory is censored."""
    num_replicates: int = 2000
    """Trajectories per grid point."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        for name, least in (("windows", 2), ("windows_of_three", 2), ("memories", 1.01)):
            values = getattr(self, name)
            if len(values) < 2 or min(values) < least or list(values) != sorted(set(values)):
                raise ValueError(
                    f"{name}: expected two or more increasing sizes from {least} on, got {values}"
                )
        if not 2 <= self.exact_to <= 18:
            raise ValueError(f"exact_to: must lie in 2..18, got {self.exact_to}")
        if not 0.5 < self.stay_collapse < 0.95:
            raise ValueError(
                f"stay_collapse: must lie between 0.5 and 0.95, got {self.stay_collapse}"
            )
        if not 0.05 < self.stay_mixing < 0.3:
            raise ValueError(f"stay_mixing: must lie between 0.05 and 0.3, got {self.stay_mixing}")
        if not 0 < self.return_probability < 1:
            raise ValueError(
                f"return_probability: must lie between 0 and 1, got {self.return_probability}"
            )
        if not 1000 <= self.max_steps < 2**30:
            raise ValueError(f"max_steps: must lie in 1000..2**30, got {self.max_steps}")

    def configs(self) -> list[dict[str, Any]]:
        """Windows by vocabulary, regime and prompt; decaying contexts by regime."""
        out: list[dict[str, Any]] = []
        for regime in ("collapse", "mixing"):
            for size, windows in ((2, self.windows), (3, self.windows_of_three)):
                out += [
                    _config("window", regime, size, float(w), prompt)
                    for w in windows
                    for prompt in _PROMPTS
                ]
            out += [_config("decay", regime, 2, m, "mixed") for m in self.memories]
        return out

    def layout(self) -> Layout:
        """Time (-1 if censored) and token of absorption."""
        return {"time": ((), "int32"), "winner": ((), "int8")}

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a config: staying a little more likely for higher tokens, rows uneven."""
        size = int(config["num_tokens"])
        stay = self.stay_collapse if config["regime"] == "collapse" else self.stay_mixing
        p = np.zeros((size, size))
        for k in range(size):
            others = [(k + i) % size for i in range(1, size)]
            p[k, k] = stay + 0.04 * k / (size - 1)
            p[k, others] = (1 - p[k, k]) * np.linspace(1, 1.4, size - 1) / (size - 1)
        return CCMC.from_transition_matrix(p / p.sum(axis=1, keepdims=True))

    def context(self, config: dict[str, Any]) -> WindowContext | DecayContext:
        """The context of a config."""
        memory = float(config["memory"])
        if config["context"] == "window":
            return WindowContext(int(memory))
        return DecayContext(1 - 1 / memory)

    def prompt(self, config: dict[str, Any]) -> np.ndarray:
        """The prompt of a config."""
        size = int(config["num_tokens"])
        length = int(config["memory"]) if config["context"] == "window" else 8
        mixed = np.resize(np.arange(size), max(length, size))
        if config["prompt"] == "mixed":
            return mixed
        return np.append(np.zeros(len(mixed) - 1, int), 1)

    def exact(self, config: dict[str, Any]) -> Absorption:
        """The exact law of a config with a window."""
        return _exact(self, tuple(config.items()))

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        sample = absorption_monte_carlo(
            self.model(config),
            key,
            self.prompt(config),
            self.context(config),
            len(replicates),
            self.max_steps,
            return_probability=self.return_probability,
            first_replicate=int(replicates[0]),
        )
        return {"time": sample.times.astype(np.int32), "winner": sample.winners.astype(np.int8)}

    def times(self, dataset: xr.Dataset) -> xr.Dataset:
        """Measured and exact times of every config that has finished replicates.

        Returns:
            Along ``config``: what defines it, ``number`` of trajectories and ``censored`` ones,
            ``mean`` (censored times as ``max_steps``: then a lower bound) with the
            ``half``-width of its 99.99 % interval, ``exact`` mean and ``deviation`` (NaN for
            decay), ``median`` with ``lower`` and ``upper``.
        """
        import xarray as xr

        rows: list[dict[str, Any]] = []
        for i, config in enumerate(self.configs()):
            times, _ = _finished(dataset, i)
            if times.size < 2:
                continue
            row: dict[str, Any] = {**config, "row": i, "number": times.size}
            row["censored"] = int((times < 0).sum())
            row["exact"] = row["deviation"] = np.nan
            seen = np.where(times < 0, np.inf, times)
            lasted = np.where(times < 0, self.max_steps, times)
            row["mean"], spread = float(lasted.mean()), float(lasted.std(ddof=1))
            if config["context"] == "window":
                law = self.exact(config)
                row["exact"], spread = law.mean_time, float(np.sqrt(law.variance))
                row["deviation"] = spread
            row["half"] = INTERVAL_99_99 * spread / np.sqrt(times.size)
            row["median"] = float(np.median(seen))
            row["lower"], row["upper"] = quantile_interval(seen, 0.5, _ALPHA)
            rows.append(row)
        names = list(rows[0]) if rows else ["row", "context"]
        return xr.Dataset({n: ("config", np.array([row[n] for row in rows])) for n in names})

    def winners(self, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of the winners of windows, and their exact probabilities.

        Returns:
            Along ``group`` = (config, token): ``row``, ``num_tokens``, ``token``, ``exact``,
            ``measured``, and the ends ``lower`` and ``upper`` of intervals that hold at once for
            all windows, prompts and tokens of a regime and vocabulary with 99.99 %.
        """
        import xarray as xr

        names = ["row", "num_tokens", "token", "exact", "measured", "lower", "upper"]
        rows: list[tuple] = []
        alike = len(_PROMPTS) * max(len(self.windows), len(self.windows_of_three))
        for i, config in enumerate(self.configs()):
            _, won = _finished(dataset, i)
            if config["context"] != "window" or won.size == 0:
                continue
            size = int(config["num_tokens"])
            hits = np.bincount(won[won >= 0], minlength=size)
            low, high = share_intervals(hits, int((won < 0).sum()), won.size, _ALPHA / alike)
            exact = self.exact(config).winner_probabilities
            rows += [
                (i, size, j, exact[j], hits[j] / won.size, low[j], high[j]) for j in range(size)
            ]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({n: ("group", c) for n, c in zip(names, columns, strict=True)})
        return table.assign_coords({n: table[n].astype(int) for n in names[:3]})

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Times and winners against the exact law, how times grow, and that decay collapses."""
        times, winners = self.times(dataset), self.winners(dataset)
        if times.sizes["config"] == 0:
            return []
        out: list[Claim] = []
        for size in (2, 3):
            for regime in ("collapse", "mixing"):
                which = (times["context"] == "window") & (times["regime"] == regime)
                which &= times["num_tokens"] == size
                part = times.isel(config=np.flatnonzero(which)).sortby("memory")
                if part.sizes["config"] == 0:
                    continue
                label = f"{regime}, K={size}"
                out.append(self._time_claim(label, part))
                group = np.flatnonzero(np.isin(winners["row"], part["row"]))
                out.append(self._winner_claim(label, winners.isel(group=group)))
                mixed = part.isel(config=np.flatnonzero(part["prompt"] == "mixed"))
                if mixed.sizes["config"] >= 2:
                    out.append(self._growth_claim(label, mixed))
        decays = times.isel(config=np.flatnonzero(times["context"] == "decay"))
        out += self._decay_claims(decays)
        return out

    def _time_claim(self, label: str, part: xr.Dataset) -> Claim:
        """Every interval holds the exact mean; the window that is furthest off is shown."""
        from scipy import stats

        z = stats.norm.isf(_ALPHA / 2 / part.sizes["config"])  # they all hold at once
        half = part["half"].values * z / INTERVAL_99_99
        off = abs(part["mean"] - part["exact"]).values / half
        worst = int(np.nanargmax(np.where(np.isfinite(off), off, -1)))
        verdict: Verdict = "pass" if off.max() <= 1 else "fail"
        if part["censored"].sum() or part["number"].min() < 200:  # fewer are not normal
            verdict = self._if_censored(part)
        shown = part.isel(config=worst)
        claim = (
            f"{label}: mean steps to absorption, {part.sizes['config']} windows and prompts "
            f"(w={int(shown['memory'])}, {shown['prompt'].values!s} prompt shown)"
        )
        exact, mean = float(shown["exact"]), float(shown["mean"])
        return Claim(self.name, claim, _SOURCE, exact, mean, float(half[worst]), verdict)

    def _if_censored(self, part: xr.Dataset) -> Verdict:
        """Fail if more trajectories are censored than the exact law allows; else no verdict.

        By Cantelli's inequality no more than ``v / (v + (max_steps − mean)²)`` are, ``v`` being
        the variance, so that the test is sharp where ``max_steps`` is well above the mean.
        """
        from scipy import stats

        gap = np.maximum(self.max_steps - part["exact"].values, 0)
        variance = part["deviation"].values ** 2
        most = np.where(gap > 0, variance / (variance + gap**2), 1.0)
        left, number = part["censored"].values, part["number"].values
        chance = stats.binom.sf(left - 1, number, most)
        return "fail" if (chance < _ALPHA / part.sizes["config"]).any() else "inconclusive"

    def _winner_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Every interval holds the exact probability; the one that is furthest off is shown."""
        half = (group["upper"] - group["lower"]).values / 2
        off = abs(group["measured"] - group["exact"]).values / half
        worst = int(off.argmax())
        shown = group.isel(group=worst)
        inside = (group["lower"] <= group["exact"]) & (group["exact"] <= group["upper"])
        verdict = "fail" if not inside.all() else "pass" if half.max() < 0.1 else "inconclusive"
        config = self.configs()[int(shown["row"])]
        claim = (
            f"{label}: probability to end in each token, {len(np.unique(group['row']))} windows "
            f"and prompts (token {int(shown['token'])}, w={config['memory']:g}, "
            f"{config['prompt']} prompt shown)"
        )
        exact, measured = float(shown["exact"]), float(shown["measured"])
        return Claim(self.name, claim, _SOURCE, exact, measured, float(half[worst]), verdict)

    def _growth_claim(self, label: str, part: xr.Dataset) -> Claim:
        """Slope of log mean time in ``w`` (mixing) or ``log w`` (collapse), against the exact."""
        exponential = "mixing" in label
        w, half = part["memory"].values, part["half"].values
        x = w if exponential else np.log(w)
        error = half / INTERVAL_99_99 / part["exact"].values
        measured, errors = weighted_line(x, np.log(part["mean"].values), error)
        exact, _ = weighted_line(x, np.log(part["exact"].values), error)
        width = INTERVAL_99_99 * float(errors[1])
        verdict: Verdict = "pass" if abs(measured[1] - exact[1]) <= width else "fail"
        if part["censored"].sum() or part["number"].min() < 200:
            verdict = self._if_censored(part)
        what = "d log(mean time) / dw" if exponential else "d log(mean time) / d log w"
        claim = f"{label}: {what}, w = {w[0]:g} to {w[-1]:g}"
        return Claim(self.name, claim, _SOURCE, exact[1], measured[1], width, verdict)

    def _decay_claims(self, times: xr.Dataset) -> list[Claim]:
        """All collapse; medians grow faster with memory where the whole history mixes."""
        out, rates = [], {}
        for regime in ("collapse", "mixing"):
            part = times.isel(config=np.flatnonzero(times["regime"] == regime)).sortby("memory")
            if part.sizes["config"] == 0:
                continue
            left, number = int(part["censored"].sum()), int(part["number"].sum())
            (lower,), (upper,) = share_intervals(np.array([left]), 0, number, _ALPHA)
            claim = f"{regime}, decay: share not collapsed in {self.max_steps:.0e} steps"
            verdict = "pass" if left == 0 and upper < 0.05 else "inconclusive"
            verdict = "fail" if lower > 0.05 else verdict
            out.append(Claim(self.name, claim, _SOURCE, 0.0, left / number, float(upper), verdict))
            ends = part.isel(config=[0, -1])
            span = float(np.ptp(ends["memory"].values))
            low, high = np.log(ends["lower"].values), np.log(ends["upper"].values)
            middle = np.log(ends["median"].values)
            if span > 0:
                rates[regime] = (
                    (low[1] - high[0]) / span,
                    (middle[1] - middle[0]) / span,
                    (high[1] - low[0]) / span,
                )
        if len(rates) == 2:
            (_, slow, slow_high), (fast_low, fast, _) = rates["collapse"], rates["mixing"]
            gap, least = fast - slow, fast_low - slow_high
            verdict = "pass" if least > 0 else "inconclusive"
            if gap + (gap - least) < 0:
                verdict = "fail"
            claim = (
                "decay: d log(median time) / d(1/(1-γ)) where the whole history mixes, "
                f"less where it collapses ({slow:.3f})"
            )
            out.append(Claim(self.name, claim, _SOURCE, "above 0", gap, gap - least, verdict))
        return out

    def _curves(self, size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Exact means of windows past those that are simulated, by regime and prompt."""
        most = self.exact_to if size == 2 else self.exact_to * 2 // 3
        curves = {}
        for regime in ("collapse", "mixing"):
            for prompt in _PROMPTS:
                configs = [
                    _config("window", regime, size, float(w), prompt) for w in range(2, most + 1)
                ]
                means = np.array([self.exact(config).mean_time for config in configs])
                curves[f"{regime}, {prompt}"] = (np.arange(2, most + 1), means)
        return curves

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Mean times by window, winners on exact, and windows beside decay."""
        from matplotlib.figure import Figure

        from attnmarkov.plot.absorption import absorption_times, absorption_winners, collapse_times

        times, winners = self.times(dataset), self.winners(dataset)
        figures: dict[str, Figure] = {}
        windows = times.isel(config=np.flatnonzero(times["context"] == "window"))
        if windows.sizes["config"]:
            figures["absorption-times"] = Figure(figsize=(9, 4), layout="constrained")
            panels = figures["absorption-times"].subplots(1, 2, sharey=True)
            for ax, size in zip(panels, (2, 3), strict=True):
                which = windows["num_tokens"] == size
                part = windows.isel(config=np.flatnonzero(which))
                pairs = zip(part["regime"].values, part["prompt"].values, strict=True)
                names = np.array([f"{regime}, {prompt}" for regime, prompt in pairs])
                absorption_times(part.assign(regime=("config", names)), self._curves(size), ax=ax)
                ax.set_title(f"K = {size}", fontsize=10)
            figures["absorption-winners"] = Figure(figsize=(5, 4.6), layout="constrained")
            absorption_winners(winners, ax=figures["absorption-winners"].subplots())
            pairs = (times["num_tokens"] == 2) & (times["prompt"] == "mixed")
            both = times.isel(config=np.flatnonzero(pairs))
            figures["windows-and-decay"] = Figure(figsize=(6, 4.2), layout="constrained")
            collapse_times(both, ax=figures["windows-and-decay"].subplots())
            texts = {
                "absorption-times": "Where tokens can win, a longer window delays the end little; "
                "where none can, each further token multiplies the time.",
                "absorption-winners": "Every point is a token, a window and a prompt.",
                "windows-and-decay": "Contexts of equal total weight: with decaying weights the "
                "run that ends a generation is waited for, too.",
            }
            for name, text in texts.items():
                figures[name].set_label(text)
        return figures


def _config(context: str, regime: str, size: int, memory: float, prompt: str) -> dict[str, Any]:
    return {
        "context": context,
        "regime": regime,
        "num_tokens": size,
        "memory": memory,
        "prompt": prompt,
    }


@cache
def _exact(experiment: FiniteContextAbsorption, items: tuple[tuple[str, Any], ...]) -> Absorption:
    config = dict(items)
    return absorption(experiment.model(config), experiment.prompt(config), int(config["memory"]))


def _finished(dataset: xr.Dataset, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) times and winners of a config's finished replicates."""
    done = dataset["done"].isel(config=i).values.astype(bool)
    part = dataset.isel(config=i)
    return part["time"].values[done].astype(np.int64), part["winner"].values[done].astype(int)
