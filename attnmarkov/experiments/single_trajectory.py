"""Single trajectory: what a collapsing generation still teaches, and what restarts add."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.estimate import fit
from attnmarkov.estimate.budget import BudgetComparison, learn_with_budget
from attnmarkov.estimate.information_growth import InformationGrowth, information_growth
from attnmarkov.estimate.information_rollout import rollout_information
from attnmarkov.estimate.learnable import LearnableContrasts, learnable_contrasts
from attnmarkov.estimate.trajectory import trajectory_prompts
from attnmarkov.experiments._statistics import binomial_interval, quantile_interval
from attnmarkov.model import CCMC
from attnmarkov.rollout import log_spaced, rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), single trajectory"
_SCALING = f"{_SOURCE}; the exponent by a scaling argument"
_WINNER = 0
_ALPHA = 1e-4  # how often an interval may miss
_NEAR_ZERO = 0.05  # exponents nearer to 0 than this get no verdict on their sign


@dataclass(frozen=True, kw_only=True)
class SingleTrajectory(Experiment):
    """Rollouts from a prompt that holds every token equally often, all won by token 0.

    A random matrix is drawn by its exponents: row 0 is proportional to 1 at token 0 and to the
    given ``λ_j`` elsewhere. In the other rows token 0 has 1 and the others 0.4 to 0.8, so that
    no other token can win. A replicate is one long trajectory whose information is summed, one
    shorter trajectory whose prefixes are fitted, and one comparison at equal budgets.
    """

    name: ClassVar[str] = "single-trajectory"
    summary: ClassVar[str] = (
        "one trajectory teaches row a's contrast (w, j) at the rate t^(λa+λj-1)"
    )
    block_size: ClassVar[int] = 256
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "exponents": (0.35, 0.5, 0.65),
            "num_matrices": 2,
            "num_steps": 10_000_000,
            "fit_steps": 32_768,
            "num_replicates": 256,
        }
    }

    exponents: tuple[float, ...] = (0.4, 0.6)
    """Growth exponents of the losers, inside (0, 1); one each."""
    num_matrices: int = 1
    """Random matrices with these exponents."""
    copies: int = 4
    """How often each token stands in the prompt."""
    num_steps: int = 1_000_000
    """Generated tokens of the trajectories whose information is summed."""
    num_records: int = 61
    """Log-spaced steps at which it is recorded."""
    fit_steps: int = 8192
    """Generated tokens of the trajectories that are fitted, and of every budget."""
    num_segments: int = 16
    """Segments of the restarted and the refreshed trajectories."""
    prior: float = 1.0
    """Precision of the Gaussian prior of the fits at equal budgets; the others have none."""
    num_replicates: int = 192
    """Replicates per matrix."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.exponents or not all(0 < x < 1 for x in self.exponents):
            raise ValueError(f"exponents: expected numbers inside (0, 1), got {self.exponents}")
        if not 10_000 <= self.num_steps <= 2**60:
            raise ValueError(
                f"num_steps: slopes need at least 10000 steps, and counts end at 2**62; "
                f"got {self.num_steps}"
            )
        if self.num_records < 20:
            raise ValueError(f"num_records: slopes need at least 20, got {self.num_records}")
        for name in ("num_matrices", "copies", "num_segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.fit_steps < 256 or self.fit_steps % (16 * self.num_segments):
            raise ValueError(
                f"fit_steps: expected a multiple of 16 num_segments = {16 * self.num_segments} "
                f"from 256 on, got {self.fit_steps}"
            )
        if not self.prior > 0:
            raise ValueError(f"prior: must be above 0, got {self.prior}")

    @property
    def size(self) -> int:
        """Vocabulary size K."""
        return len(self.exponents) + 1

    @property
    def horizons(self) -> np.ndarray:
        """Numbers of steps after which the shorter trajectories are fitted."""
        return self.fit_steps // np.array([16, 1])

    def configs(self) -> list[dict[str, Any]]:
        """One config per matrix."""
        return [{"matrix": i} for i in range(self.num_matrices)]

    def layout(self) -> Layout:
        """Gains and counts at the recorded steps, errors of prefixes, errors at equal budgets."""
        return {
            "gain": (("step", "row", "token"), "float32"),
            "counts": (("step", "token"), "int64"),
            "error": (("horizon", "token"), "float32"),
            "effective": (("horizon", "token"), "float32"),
            "squared_error": (("scheme", "row"), "float32"),
            "excess_risk": (("scheme",), "float32"),
            "learned": (("scheme", "row"), "int8"),
        }

    def coords(self) -> dict[str, np.ndarray]:
        """Steps, horizons, tokens, rows and the names of the schemes."""
        return {
            "step": log_spaced(self.num_steps, self.num_records),
            "horizon": self.horizons,
            "row": np.arange(self.size),
            "token": np.arange(self.size),
            "scheme": np.array(BudgetComparison.schemes),
        }

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a config: it depends on the seed, the exponents and the matrix alone."""
        key = jax.random.fold_in(jax.random.key(self.seed), int(config["matrix"]))
        shape = (self.size, self.size)
        p = np.array(jax.random.uniform(key, shape, minval=0.4, maxval=0.8), np.float64)
        p[_WINNER, 1:] = self.exponents
        p[:, _WINNER] = 1
        return CCMC.from_transition_matrix(p / p.sum(axis=1, keepdims=True))

    def contrasts(self, config: dict[str, Any]) -> LearnableContrasts:
        """The predicted exponents."""
        return learnable_contrasts(self.model(config), _WINNER)

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Simulate the given replicates, which are consecutive."""
        model, first, number = self.model(config), int(replicates[0]), len(replicates)
        prompt = np.tile(np.arange(self.size), self.copies)
        long, short, budget = (jax.random.fold_in(key, i) for i in range(3))
        growth, counts = rollout_information(
            model, long, prompt, self.coords()["step"], number, first_replicate=first
        )
        trajectory = rollout(model, short, prompt, self.fit_steps, number, first_replicate=first)
        prefixes = information_growth(model, trajectory, prompt, self.horizons)
        error = _winner_errors(
            model.logits, trajectory.tokens, jnp.asarray(prompt), jnp.asarray(self.horizons)
        )
        compared = learn_with_budget(
            budget,
            model,
            prompt,
            self.fit_steps,
            self.num_segments,
            number,
            prior=self.prior,
            first_replicate=first,
        )
        by_replicate = partial(np.moveaxis, source=1, destination=0)
        return {
            "gain": np.asarray(growth.gain[:, :, :, _WINNER]),
            "counts": counts,
            "error": np.asarray(error),
            "effective": np.asarray(prefixes.effective(_WINNER)[:, :, _WINNER]),
            "squared_error": by_replicate(np.asarray(compared.squared_error)),
            "excess_risk": by_replicate(np.asarray(compared.excess_risk)),
            "learned": by_replicate(np.asarray(compared.learned, np.int8)),
        }

    def slopes(self, dataset: xr.Dataset) -> xr.Dataset:
        """Growth exponents of the information on contrasts with the winner, two last decades.

        A trajectory counts if token 0 has over 90 % of it at the end. Measured is the median
        over trajectories of :meth:`InformationGrowth.exponents`. The exponent tends to
        ``λ_a + λ_j − 1`` as the losers' shares vanish; at a finite time the mean field gives
        ``1 + d/dτ log(ν_a p_a(w) p_a(j))`` along ``dm/dτ = ν(m) − m``, whose average along each
        trajectory is what the slope is held against.

        Returns:
            Dataset along ``group`` = (config, row, loser) with the ``limit``, the median
            ``predicted`` along the trajectories, the ``median`` slope with the ends ``lower``
            and ``upper`` of its 99.99 % interval, and ``late``, the median share of all
            information that the last decade brought.
        """
        import xarray as xr

        rows: list[tuple] = []
        steps = dataset["step"].values
        for i, config in enumerate(self.configs()):
            part = _finished(dataset, i)
            counts = part["counts"].values.astype(float)
            won = counts[:, -1, _WINNER] > 0.9 * counts[:, -1].sum(-1)
            if won.sum() < 40:
                continue
            growth = _growth(steps, part["gain"].values[won])
            measured, predicted = (
                growth.exponents(_WINNER),
                self._on_the_way(config, growth, counts[won]),
            )
            limits = np.asarray(self.contrasts(config).exponents)
            gain = growth.gain[:, :, :, _WINNER]
            with np.errstate(invalid="ignore"):
                late = gain[:, steps > steps[-1] / 10].sum(1) / gain.sum(1)
            for a in range(self.size):
                for j in range(1, self.size):
                    slope = measured[:, a, j]
                    slope = np.where(np.isnan(slope), -np.inf, slope)
                    values = (
                        limits[a, j],
                        np.median(predicted[:, a, j]),
                        np.median(slope),
                        *quantile_interval(slope, 0.5, _ALPHA),
                        np.median(late[:, a, j]),
                    )
                    rows.append((i, a, j, *values))
        names = ["config", "row", "loser", "limit", "predicted", "median", "lower", "upper", "late"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({n: ("group", c) for n, c in zip(names, columns, strict=True)})
        return table.assign_coords({name: table[name].astype(int) for name in names[:3]})

    def _on_the_way(
        self, config: dict[str, Any], growth: InformationGrowth, counts: np.ndarray
    ) -> np.ndarray:
        """Mean-field exponents averaged along trajectories, (R, K, K).

        The slope between the gains of two neighbouring decades weighs log times by a triangle.
        """
        start, _ = growth.halves(2.0)
        log_time = np.log(growth.at[start:].astype(float))
        middle = (log_time[0] + log_time[-1]) / 2
        weight = np.ptp(log_time) / 2 - abs(log_time - middle)
        p = np.asarray(self.model(config).transition_matrix, float)
        local = _mean_field_exponents(p, counts[:, start:])
        weighted = np.trapezoid(local * weight[:, None, None], log_time, axis=1)
        return weighted / np.trapezoid(weight, log_time)

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """How information grows, whether errors follow it, and what restarts change."""
        out: list[Claim] = []
        slopes = self.slopes(dataset)
        for i in range(len(self.configs())):
            label = f"matrix {i}"
            group = slopes.isel(group=np.flatnonzero(slopes["config"] == i))
            if group.sizes["group"]:
                for a in range(self.size):
                    row = group.isel(group=np.flatnonzero(group["row"] == a))
                    out.append(self._exponent_claim(label, row))
                out.append(self._sign_claim(label, group))
            part = _finished(dataset, i)
            if part.sizes["replicate"] < 2:
                continue
            out.append(self._coverage_claim(label, part))
            out += [self._error_claim(label, part, j) for j in range(1, self.size)]
            out += [
                self._budget_claim(label, part, scheme, variable)
                for scheme in BudgetComparison.schemes[1:]
                for variable in ("squared_error", "excess_risk")
            ]
        return out

    def _exponent_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Every interval of a row within 0.01 of the prediction; the worst one is shown."""
        half = (group["upper"] - group["lower"]).values / 2
        excess = abs(group["median"] - group["predicted"]).values - half
        excess = np.where(np.isfinite(excess), excess, -np.inf)
        worst = int(excess.argmax())
        verdict = "pass" if half.max() <= 0.05 else "inconclusive"
        if excess[worst] > 0.01:
            verdict = "fail"
        shown = group.isel(group=worst)
        a, j = int(shown["row"]), int(shown["loser"])
        claim = (
            f"{label}, row {a}: exponent of the information on contrast ({_WINNER}, {j}), on the "
            f"way to λ_{a} + λ_{j} - 1 = {round(float(shown['limit']), 2) + 0:.2f} (± 0.01)"
        )
        predicted, measured = float(shown["predicted"]), float(shown["median"])
        return Claim(self.name, claim, _SCALING, predicted, measured, float(half[worst]), verdict)

    def _sign_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Intervals of the exponents wholly on the predicted side of 0."""
        sign = np.sign(group["limit"].values)
        judged = abs(group["limit"].values) >= _NEAR_ZERO
        right = judged & (np.where(sign > 0, group["lower"], -group["upper"]) > 0)
        wrong = judged & (np.where(sign > 0, -group["upper"], group["lower"]) > 0)
        verdict = "fail" if wrong.any() else "pass" if (right == judged).all() else "inconclusive"
        if not judged.any():
            verdict = "inconclusive"
        late = group["late"].values
        shares = [
            f"{late[judged & which].mean():.0%} where {word}"
            for which, word in ((sign > 0, "learnable"), (sign < 0, "not"))
            if (judged & which).any()
        ]
        claim = (
            f"{label}: contrasts whose information per decade rises or falls as λ_a + λ_j is above "
            f"or below 1 ({int((~judged).sum())} at 1 left out; the last decade brings "
            f"{', '.join(shares)})"
        )
        return Claim(self.name, claim, _SCALING, int(judged.sum()), int(right.sum()), None, verdict)

    def _coverage_claim(self, label: str, part: xr.Dataset) -> Claim:
        """Share of 95 % intervals of the winner's row that hold the truth, within 0.02."""
        error = part["error"].values[:, -1, 1:]
        z = abs(error) * np.sqrt(part["effective"].values[:, -1, 1:])
        hits = (z <= 1.959964).sum(0)  # of each contrast: those of one trajectory are dependent
        number = len(z)
        ends = np.array([binomial_interval(int(h), number, _ALPHA) for h in hits])
        half = (ends[:, 1] - ends[:, 0]) / 2
        off = np.maximum(ends[:, 0] - 0.95, 0.95 - ends[:, 1])
        worst = int(off.argmax())
        verdict = "fail" if off[worst] > 0.02 else "pass" if half.max() <= 0.1 else "inconclusive"
        claim = (
            f"{label}, row {_WINNER}: share of maximum-likelihood errors within 1.96 / "
            f"sqrt(information), contrast ({_WINNER}, {worst + 1}), t = {self.fit_steps} (± 0.02)"
        )
        measured = float(hits[worst] / number)
        return Claim(self.name, claim, _SOURCE, 0.95, measured, float(half[worst]), verdict)

    def _error_claim(self, label: str, part: xr.Dataset, j: int) -> Claim:
        """Median exponent of the squared error within 0.05 of one over the information's."""
        decay = np.log(self.horizons[-1] / self.horizons[0])
        error, known = (part[name].values[:, :, j].astype(float) for name in ("error", "effective"))
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = 2 * np.log(abs(error[:, -1] / error[:, 0])) / decay
        slope = np.where(np.isnan(slope), np.inf, slope)  # no finite maximum at either horizon
        predicted = -float(np.median(np.log(known[:, -1] / known[:, 0]))) / decay
        measured, (low, high) = float(np.median(slope)), quantile_interval(slope, 0.5, _ALPHA)
        verdict = "pass" if low - 0.05 <= predicted <= high + 0.05 else "fail"
        if not high - low <= 0.8:
            verdict = "inconclusive"
        claim = (
            f"{label}, row {_WINNER}: exponent of the squared error of contrast ({_WINNER}, {j}) "
            f"in t, from {self.horizons[0]} to {self.horizons[-1]} tokens, on the way to "
            f"-λ_{j} = {-self.exponents[j - 1]:.2f} (± 0.05)"
        )
        half = (high - low) / 2
        return Claim(self.name, claim, _SCALING, predicted, measured, half, verdict)

    def _budget_claim(self, label: str, part: xr.Dataset, scheme: str, variable: str) -> Claim:
        """The interval of the ratio of medians wholly above 1."""
        values = part[variable].sum("row") if "row" in part[variable].dims else part[variable]
        one, other = values.sel(scheme="one").values, values.sel(scheme=scheme).values
        (low, high), (low2, high2) = (quantile_interval(x, 0.5, _ALPHA / 2) for x in (one, other))
        ratio = float(np.median(one) / np.median(other))
        ends = low / high2, high / low2
        verdict = "pass" if ends[0] > 1 else "fail" if ends[1] < 1 else "inconclusive"
        learned = part["learned"].values.mean(axis=(0, 2))
        k = BudgetComparison.schemes.index(scheme)
        claim = (
            f"{label}: median {variable.replace('_', ' ')} (prior {self.prior:g}) of one "
            f"trajectory of {self.fit_steps} tokens over that of {self.num_segments} "
            f"{'restarts' if scheme == 'restarts' else 'segments from fresh prompts'} "
            f"({ends[0]:.2g} to {ends[1]:.2g}); without a prior {learned[0]:.0%} and "
            f"{learned[k]:.0%} of rows are learned"
        )
        half = (ends[1] - ends[0]) / 2
        return Claim(self.name, claim, _SOURCE, "above 1", ratio, half, verdict)

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Information over time, row by row, and errors at equal budgets."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        figures: dict[str, Figure] = {}
        part = _finished(dataset, 0)
        if part.sizes["replicate"] == 0:
            return figures
        width = 3.6 * self.size + 0.8
        information = Figure(figsize=(width, 3.9), layout="constrained")
        growth = _growth(dataset["step"].values, part["gain"].values)
        information.suptitle(
            "information about contrasts (winner, token): median and quartiles of "
            f"{part.sizes['replicate']} trajectories",
            fontsize=10,
        )
        axes = information.subplots(1, self.size, squeeze=False, sharey=True)[0]
        for a, ax in enumerate(axes):
            plot.information(growth, self.contrasts({"matrix": 0}), a, ax=ax, first=a == 0)
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low, high * (high / low) ** 0.25)  # room for the legends
        information.set_label(
            "Information about each row's contrasts with the winner against the number of "
            "generated tokens: medians and quartiles over trajectories, and dashed lines that go "
            "on from two decades before the end with the predicted exponents."
        )
        figures["information"] = information
        figures["budget"] = Figure(figsize=(9.5, 4.0), layout="constrained")
        left, right = figures["budget"].subplots(1, 2, width_ratios=(2, 1))
        plot.budget_errors(part, ax=left)
        plot.budget_risks(part, ax=right)
        figures["budget"].suptitle(
            f"{self.fit_steps} generated tokens, in one trajectory or {self.num_segments} "
            f"segments; prior of precision {self.prior:g}; medians and quartiles",
            fontsize=10,
        )
        figures["budget"].set_label(
            "Squared error of every row (left) and excess risk (right) after one trajectory, "
            "restarts, and refreshed prompts with the same number of generated tokens."
        )
        return figures


def _finished(dataset: xr.Dataset, i: int) -> xr.Dataset:
    """A config's finished replicates."""
    part = dataset.isel(config=i)
    return part.isel(replicate=np.flatnonzero(part["counts"].values[:, 0].min(axis=-1) >= 0))


def _growth(steps: np.ndarray, gain: np.ndarray) -> InformationGrowth:
    """Gains of pairs with the winner (R, step, K, K) as an :class:`InformationGrowth`."""
    whole = np.zeros((*gain.shape, gain.shape[-1]))
    whole[..., _WINNER, :] = gain
    whole[..., :, _WINNER] = gain
    return InformationGrowth(steps, whole, np.zeros(gain.shape[:3]))


def _mean_field_exponents(p: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``1 + d/dτ log(ν_a p_a(w) p_a(j))`` at the shares of (..., K) counts, (..., K, K)."""
    step = 1e-5
    m = counts / counts.sum(axis=-1, keepdims=True)
    visits, log_rate = _log_rate(p, m)
    later = m + step * (visits - m)
    return 1 + (_log_rate(p, later)[1] - log_rate) / step


def _log_rate(p: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``ν(m)``, by a thousand powers of ``M``, and ``log(ν_a p_a(w) p_a(j))``."""
    law = m[..., None, :] * p / (m @ p.T)[..., None]
    visits = np.linalg.matrix_power(law, 1024)[..., 0, :]
    return visits, np.log(visits[..., None] * law[..., _WINNER, None] * law)


@jax.jit
def _winner_errors(
    logits: jax.Array, tokens: jax.Array, prompt: jax.Array, horizons: jax.Array
) -> jax.Array:
    """(R, horizon, K) errors of ``S[w, w] − S[w, j]``, infinite without a finite maximum.

    The winner's row is fitted by itself: rows are separate problems, and the others, of which
    many are separated, would go on to the iteration limit.
    """
    size = logits.shape[0]

    def one(tokens: jax.Array) -> jax.Array:
        prompts, y = trajectory_prompts(tokens, prompt, size)

        def prefix(horizon: jax.Array) -> jax.Array:
            counted = (jnp.arange(len(y)) < horizon) & (prompts.last == _WINNER)
            found = fit(prompts, y, weights=counted.astype(logits.dtype), max_iterations=40)
            finite = (found.components[_WINNER] == 0).all() & ~found.separated[_WINNER]
            gap = found.model.logits[_WINNER] - logits[_WINNER]
            return jnp.where(finite, gap[_WINNER] - gap, jnp.inf)

        return jax.vmap(prefix)(horizons)

    return jax.vmap(one)(tokens)
