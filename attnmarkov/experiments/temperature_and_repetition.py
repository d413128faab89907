"""Temperature and repetition: one power of the shares decides whether generation collapses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from attnmarkov.dynamics.decoding import DecodingPrediction, predict_decoding, staying_probability
from attnmarkov.experiments._decoding import poisson_binomial_test, random_winner_model
from attnmarkov.experiments._statistics import INTERVAL_99_99
from attnmarkov.model import FullContext, Sampling
from attnmarkov.rollout import rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from attnmarkov.model import CCMC

_SOURCE = "Mean field of reinforced walks with powers (Pemantle 1992, Benaïm 1997, Volkov 2006)"
_ALPHA = 1e-4  # how often a claim may miss
_NEAR = 0.05  # the most that a finite time may add to a share that is judged
_SLOW = 0.4  # relaxation rates below this leave too much of the beginning
_DECADES = 3  # before the end, that are recorded


@dataclass(frozen=True, kw_only=True)
class TemperatureAndRepetition(Experiment):
    """Rollouts over temperature ``T`` and repetition penalty ``ρ``, and exponents ``α``.

    The decoded law is a power ``a = α ρ / T`` of the shares times ``Q = P**(ρ/T)``. Matrices are
    random, such that every token can win at ``a = 1``; prompts hold every token once. Counts
    and last tokens are kept at half decades. At those the chance is known exactly that one token
    alone comes in the next decade, whatever the regime.
    """

    name: ClassVar[str] = "temperature-and-repetition"
    summary: ClassVar[str] = "temperature and repetition penalty as one power: who collapses, how"
    block_size: ClassVar[int] = 1024
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": (2, 3, 4, 8),
            "num_steps": 100_000,
            "num_replicates": 1024,
        },
    }

    num_tokens: tuple[int, ...] = (2, 4)
    """Vocabulary sizes K, one random matrix each."""
    temperatures: tuple[float, ...] = (0.5, 0.8, 1.0, 1.25, 2.0)
    """Temperatures T, all of which are combined with all penalties, at exponent 1."""
    penalties: tuple[float, ...] = (0.5, 0.8, 1.0, 1.25)
    """Repetition penalties ρ."""
    others: tuple[tuple[float, float, float], ...] = (
        (0.5, 1.0, 1.0),
        (2.0, 2.0, 1.0),
        (2.0, 1.0, 0.5),
    )
    """Further settings (α, T, ρ)."""
    relative_weights: tuple[float, float] = (0.3, 0.6)
    """Range of the weights off the diagonal of ``P``, relative to those on it; inside (0, 1)."""
    num_steps: int = 10_000
    """Generated tokens per trajectory."""
    num_replicates: int = 512
    """Trajectories per setting."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.num_tokens or not 2 <= min(self.num_tokens) <= max(self.num_tokens) <= 8:
            raise ValueError(f"num_tokens: expected sizes of 2 to 8, got {self.num_tokens}")
        for name in ("temperatures", "penalties"):
            values = getattr(self, name)
            if not values or not all(0.1 <= x <= 10 for x in values):
                raise ValueError(f"{name}: expected numbers from 0.1 to 10, got {values}")
        for other in self.others:
            if len(other) != 3 or not all(0.1 <= x <= 10 for x in other):
                raise ValueError(f"others: expected (α, T, ρ) from 0.1 to 10, got {other}")
        low, high = self.relative_weights
        if not 0 < low <= high < 1:
            raise ValueError(
                f"relative_weights: expected 0 < low <= high < 1, got {self.relative_weights}"
            )
        if not 10_000 <= self.num_steps < 2**30:
            raise ValueError(f"num_steps: expected 10000 to 2**30, got {self.num_steps}")

    def configs(self) -> list[dict[str, Any]]:
        """One config per vocabulary size and setting."""
        grid = [(1.0, t, r) for t in self.temperatures for r in self.penalties]
        return [
            {"num_tokens": k, "exponent": a, "temperature": t, "penalty": r}
            for k in self.num_tokens
            for a, t, r in (*grid, *self.others)
        ]

    def layout(self) -> Layout:
        """Counts and last token at the records; tokens past a config's vocabulary count 0."""
        return {"counts": (("step", "token"), "int32"), "last": (("step",), "int32")}

    def coords(self) -> dict[str, np.ndarray]:
        """The recorded steps, two a decade over three decades, and token ids."""
        back = np.arange(-2 * _DECADES, 1) / 2
        steps = np.rint(self.num_steps * 10.0**back).astype(np.int64)
        return {"step": steps, "token": np.arange(max(self.num_tokens))}

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a config: it depends on the seed and the vocabulary size alone."""
        return random_winner_model(self.seed, config["num_tokens"], self.relative_weights)

    def setting(self, config: dict[str, Any]) -> dict[str, float]:
        """Exponent, temperature and penalty as :func:`predict_decoding` takes them."""
        return {
            "exponent": config["exponent"],
            "temperature": config["temperature"],
            "repetition_penalty": config["penalty"],
        }

    def prediction(self, config: dict[str, Any]) -> DecodingPrediction:
        """What generation comes to at a config."""
        return _prediction(
            self.seed, config["num_tokens"], self.relative_weights, *self.setting(config).values()
        )

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        steps, size = self.coords()["step"], config["num_tokens"]
        out = rollout(
            self.model(config),
            key,
            np.arange(size),
            int(steps[-1]),
            len(replicates),
            record="counts",
            at=np.stack([steps - 1, steps], axis=1).ravel(),
            context=FullContext(exponent=config["exponent"]),
            decoder=Sampling(
                temperature=config["temperature"], repetition_penalty=config["penalty"]
            ),
            first_replicate=int(replicates[0]),
        )
        counts = np.asarray(out.counts).reshape(len(replicates), len(steps), 2, size)
        padded = np.zeros((len(replicates), len(steps), max(self.num_tokens)), np.int32)
        padded[..., :size] = counts[:, :, 1]
        last = np.diff(counts, axis=2)[:, :, 0].argmax(axis=-1)
        return {"counts": padded, "last": last.astype(np.int32)}

    def outcomes(self, dataset: xr.Dataset) -> xr.Dataset:
        """What was measured and predicted at every finished setting.

        Returns:
            Dataset along ``point`` with the parameters, the ``power``, numbers of
            ``trajectories``, the mean ``top_share`` and its standard error ``top_error`` and mean
            ``distinct`` tokens of the last decade; over (point, decade), ``start`` of the decade
            being a coordinate, the share ``alone`` of trajectories in which one token
            alone came, the share ``alone_predicted`` from the counts at its start, and the
            ``alone_p_value`` of the exact test of the one against the other.
        """
        import xarray as xr

        steps, rows, alone = self.coords()["step"], [], []
        for i, config in enumerate(self.configs()):
            counts, last = self._finished(dataset, i, config)
            if len(counts) == 0:
                continue
            new = counts[:, -1] - counts[:, -3]
            top = new.max(axis=-1) / new.sum(axis=-1)
            distinct = (new > 0).sum(axis=-1)
            rows.append(
                (
                    *config.values(),
                    config["exponent"] * config["penalty"] / config["temperature"],
                    len(counts),
                    top.mean(),
                    top.std() / np.sqrt(len(top)),
                    distinct.mean(),
                )
            )
            for start in range(0, len(steps) - 2, 2):
                came = ((counts[:, start + 2] - counts[:, start]) > 0).sum(axis=-1) == 1
                chance = staying_probability(
                    self.model(config),
                    counts[:, start],
                    last[:, start],
                    int(steps[start + 2] - steps[start]),
                    **self.setting(config),
                ).sum(axis=-1)
                p_value = poisson_binomial_test(int(came.sum()), chance)
                alone.append((came.mean(), chance.mean(), p_value))
        names = [*self.configs()[0], "power", "trajectories", "top_share", "top_error", "distinct"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({n: ("point", c) for n, c in zip(names, columns, strict=True)})
        kept = np.array(alone, float).reshape(len(rows), _DECADES, 3)
        over = ("point", "decade")
        return table.assign(
            alone=(over, kept[..., 0]),
            alone_predicted=(over, kept[..., 1]),
            alone_p_value=(over, kept[..., 2]),
        ).assign_coords(start=("decade", steps[:-2:2]))

    def shares(self, dataset: xr.Dataset) -> xr.Dataset:
        """Mean shares at the end where all tokens keep one, beside the equilibrium.

        Only settings with a single stable equilibrium. To first order the mean distance from it
        falls as ``t**-rate``, so that what is left of it at the end is at most the
        root-mean-square distance of the trajectories at a hundredth of the time, times
        ``100**-rate``: the ``allowance``.

        Returns:
            Dataset along ``share`` with the parameters, ``token``, ``predicted``, ``mean``,
            ``error`` (standard), ``rate`` and ``allowance``.
        """
        import xarray as xr

        rows = []
        for i, config in enumerate(self.configs()):
            counts, _ = self._finished(dataset, i, config)
            found = self.prediction(config)
            if len(counts) < 2 or found.power >= 1 or len(found.shares) != 1:
                continue
            m = counts / counts.sum(axis=-1, keepdims=True)
            early = np.sqrt(((m[:, -5] - found.shares[0]) ** 2).sum(axis=-1).mean())
            allowance = early * 100.0 ** -found.relaxation_rates[0]
            error = m[:, -1].std(axis=0, ddof=1) / np.sqrt(len(m))
            for j, predicted in enumerate(found.shares[0]):
                mean = m[:, -1, j].mean()
                rate = found.relaxation_rates[0]
                rows.append((*config.values(), j, predicted, mean, error[j], rate, allowance))
        names = [*self.configs()[0], "token", "predicted", "mean", "error", "rate"]
        names += ["allowance"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        return xr.Dataset({n: ("share", c) for n, c in zip(names, columns, strict=True)})

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Shares below power 1, fixation above it, one law for one power, what penalties do."""
        out: list[Claim] = []
        outcomes, shares = self.outcomes(dataset), self.shares(dataset)
        for size in self.num_tokens:
            part = shares.isel(share=np.flatnonzero(shares["num_tokens"] == size))
            if part.sizes["share"]:
                out.append(self._share_claim(part, size))
            points = outcomes.isel(point=np.flatnonzero(outcomes["num_tokens"] == size))
            power = points["power"].values.round(9)
            for which, name in ((power > 1, "a > 1"), (power == 1, "a = 1"), (power < 1, "a < 1")):
                if which.any():
                    out.append(self._alone_claim(points.isel(point=which), size, name))
            if (power > 1).any():
                out.append(self._fixation_claim(points.isel(point=power > 1), size))
            out += self._law_claim(dataset, size)
            out += self._penalty_claim(points, size)
        return out

    def _share_claim(self, part: xr.Dataset, size: int) -> Claim:
        from scipy import stats

        fast = part["rate"].values >= _SLOW
        shown = part.isel(share=fast if fast.any() else slice(None))
        allowance = shown["allowance"].values
        half = stats.norm.isf(_ALPHA / 2 / len(allowance)) * shown["error"].values
        off = abs(shown["mean"] - shown["predicted"]).values
        worst = int((off - half - allowance).argmax())
        verdict = "fail" if (off > half + allowance).any() else "pass"
        unsure = verdict == "pass" and max(allowance.max(), half.max()) > _NEAR
        if not fast.any() or unsure:
            verdict = "inconclusive"
        at = shown.isel(share=worst)
        claim = (
            f"K={size}, a < 1: mean share of token {int(at['token'])} at {_name(at)}, the worst of "
            f"{len(allowance)} (finite-time allowance ± {float(at['allowance']):.3f}; "
            f"{int((~fast).sum())} relax too slowly to be judged)"
        )
        predicted, measured = float(at["predicted"]), float(at["mean"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def _alone_claim(self, points: xr.Dataset, size: int, name: str) -> Claim:
        """The exact test over settings and decades, Bonferroni; the worst is shown."""
        p_values = points["alone_p_value"].values
        point, decade = np.unravel_index(int(p_values.argmin()), p_values.shape)
        verdict = "fail" if p_values.min() < _ALPHA / p_values.size else "pass"
        if points["trajectories"].values.min() < 100:
            verdict = "inconclusive" if verdict == "pass" else verdict
        at = points.isel(point=int(point))
        start = int(points["start"][int(decade)])
        predicted = float(at["alone_predicted"][int(decade)])
        measured = float(at["alone"][int(decade)])
        claim = (
            f"K={size}, {name}: share of trajectories in which one token alone came from t = "
            f"{start:,} to {10 * start:,} at {_name(at)}, the worst of {p_values.size}; predicted "
            f"from the counts at its start"
        )
        half = INTERVAL_99_99 * np.sqrt(predicted * (1 - predicted) / float(at["trajectories"]))
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half), verdict)

    def _fixation_claim(self, points: xr.Dataset, size: int) -> Claim:
        """At the largest power nearly all trajectories are on one token, ever more of them."""
        from attnmarkov.experiments._statistics import binomial_interval

        at = points.isel(point=int(points["power"].values.argmax()))
        number = int(at["trajectories"])
        first, end = (round(float(at["alone"][d]) * number) for d in (0, -1))
        low, high = binomial_interval(end, number, _ALPHA)
        before = binomial_interval(first, number, _ALPHA)
        verdict = "pass" if low > 0.9 or low > before[1] else "inconclusive"
        if high < before[0]:
            verdict = "fail"
        claim = (
            f"K={size}, a > 1: share of trajectories fixed on one token for the last decade at "
            f"{_name(at)}, tends to 1 ({first / number:.3f} two decades before)"
        )
        return Claim(self.name, claim, _SOURCE, 1.0, end / number, (high - low) / 2, verdict)

    def _law_claim(self, dataset: xr.Dataset, size: int) -> list[Claim]:
        """Two-sample Kolmogorov-Smirnov tests, exact, of settings with the same a and Q."""
        from scipy import stats

        groups: dict[tuple[float, float], list[np.ndarray]] = {}
        for i, config in enumerate(self.configs()):
            counts, _ = self._finished(dataset, i, config)
            if config["num_tokens"] != size or len(counts) == 0:
                continue
            ratio = config["penalty"] / config["temperature"]
            law = round(ratio * config["exponent"], 9), round(ratio, 9)
            groups.setdefault(law, []).append(counts[:, -1, 0] / counts[:, -1].sum(axis=-1))
        found: list[tuple[float, float, int, int]] = []
        for group in groups.values():
            for x, y in combinations(group, 2):
                test: Any = stats.ks_2samp(x, y, method="exact")
                found.append((float(test.pvalue), float(test.statistic), len(x), len(y)))
        if not found:
            return []
        p_value, distance, n, m = min(found)
        alpha = _ALPHA / len(found)
        verdict = "fail" if p_value < alpha else "pass" if min(n, m) >= 100 else "inconclusive"
        half = float(np.sqrt(np.log(2 / alpha) / 2 * (n + m) / (n * m)))
        claim = (
            f"K={size}: largest distance between the laws of token 0's final share in settings "
            f"(α, T, ρ) with the same a = α ρ / T and ρ / T ({len(found)} pairs; p = "
            f"{p_value:.2g})"
        )
        return [Claim(self.name, claim, _SOURCE, 0.0, distance, half, verdict)]

    def _penalty_claim(self, points: xr.Dataset, size: int) -> list[Claim]:
        """At T = 1, the top share of the last decade grows with the penalty."""
        plain = (points["temperature"] == 1) & (points["exponent"] == 1) & (points["penalty"] >= 1)
        group = points.isel(point=np.flatnonzero(plain)).sortby("penalty")
        if group.sizes["point"] < 2 or float(group["penalty"][0]) != 1:
            return []
        gain = float(group["top_share"][-1] - group["top_share"][0])
        half = INTERVAL_99_99 * float(np.hypot(group["top_error"][-1], group["top_error"][0]))
        verdict = "pass" if gain > half else "fail" if gain < -half else "inconclusive"
        claim = (
            f"K={size}: a repetition penalty of {float(group['penalty'][-1]):g} makes collapse "
            "faster: gain in the mean top share of the last decade over no penalty"
        )
        return [Claim(self.name, claim, _SOURCE, "above 0", gain, half, verdict)]

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """The measured top share over T and ρ, and in how many trajectories losers still come."""
        from matplotlib.figure import Figure

        from attnmarkov.plot.decoding import decoding_phases, losers_by_decade

        outcomes = self.outcomes(dataset)
        sizes = [k for k in self.num_tokens if (outcomes["num_tokens"] == k).any()]
        if not sizes:
            return {}
        phases = Figure(figsize=(1 + 4.2 * len(sizes), 4), layout="constrained")
        fading = Figure(figsize=(1 + 4.2 * len(sizes), 4), layout="constrained")
        axes = phases.subplots(1, len(sizes), squeeze=False)[0]
        fading_axes = fading.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
        for k, ax, fading_ax in zip(sizes, axes, fading_axes, strict=True):
            points = outcomes.isel(point=np.flatnonzero(outcomes["num_tokens"] == k))
            decoding_phases(points, ax=ax).set_title(f"K = {k}", fontsize=10)
            losers_by_decade(points, ax=fading_ax).set_title(f"K = {k}", fontsize=10)
            legend = fading_ax.get_legend()
            if k != sizes[-1] and legend is not None:
                legend.remove()
        phases.set_label(
            "Mean share of the most frequent token among the last decade of "
            f"{self.num_steps:,} tokens, over temperature and repetition penalty at exponent 1. "
            "Dashed: the predicted boundary, a = ρ / T = 1; above it tokens fix in finite time, "
            "below it all keep a share."
        )
        fading.set_label(
            "Share of trajectories in which more than one token came between t and 10 t (solid, "
            "dots), and as predicted from the counts at t (dashed), at repetition penalty 1."
        )
        return {"phases": phases, "losers": fading}

    def _finished(
        self, dataset: xr.Dataset, index: int, config: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Counts (R, step, K) and last tokens (R, step) of the replicates that are done."""
        part = dataset.isel(config=index)
        done = part["done"].values
        return part["counts"].values[done][..., : config["num_tokens"]], part["last"].values[done]


def _name(point: xr.Dataset) -> str:
    """The setting of a point."""
    values = (float(point[n]) for n in ("exponent", "temperature", "penalty"))
    return "α = {:g}, T = {:g}, ρ = {:g}".format(*values)


@lru_cache(maxsize=256)
def _prediction(
    seed: int,
    size: int,
    weights: tuple[float, float],
    exponent: float,
    temperature: float,
    penalty: float,
) -> DecodingPrediction:
    return predict_decoding(
        random_winner_model(seed, size, weights),
        exponent=exponent,
        temperature=temperature,
        repetition_penalty=penalty,
    )
