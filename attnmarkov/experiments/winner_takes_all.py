"""Winner takes all: a generating CCMC collapses on few tokens, and the others fade as predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import dynamics
from attnmarkov.experiments._statistics import binomial_interval, limit_verdict, quantile_interval
from attnmarkov.model import CCMC
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import Trajectory, log_spaced, rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), single trajectory"
_SETS = "Mean field of reinforced walks (Pemantle 1992, Benaïm 1997)"
_WON = 0.9  # share of the context that a winner, or a set of winners, has
_NEAR = 0.03  # what exponents may differ by
_EXTRA = 1  # more copies, in prompts, of the token that can win alone beside a winner set
_TILT = (500, 10)  # copies of the winner and of each loser in prompts of the longest rollouts


@dataclass(frozen=True, kw_only=True)
class WinnerTakesAll(Experiment):
    """Long rollouts, most from a prompt that holds every token once.

    A random matrix is drawn by its exponents: row ``w`` is proportional to 1 at ``w`` and to
    ``λ_wj``, uniform in a range below 1, elsewhere, so that every such token can win. The last
    row has 2 at token 0 instead, so that the last token cannot. (For two tokens both rows then
    prefer token 0, which takes every trajectory: the two-token theorem.)

    With ``set_sizes`` there are also matrices in which the first few tokens call one another
    rather than themselves, so that together they can win, or the token after them alone, but
    none of them alone. With ``far_steps`` the exponents are followed further, by skip-ahead, from
    prompts that decide the winner beforehand (of the possible ones in turns): an undecided
    trajectory takes a draw for each of its steps.
    """

    name: ClassVar[str] = "winner-takes-all"
    summary: ClassVar[str] = "one token takes over generation, and the others fade as t^(λ-1)"
    block_size: ClassVar[int] = 2048
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"set_sizes": (2,), "far_steps": 10**9, "num_replicates": 1024},
        "full": {
            "num_tokens": (2, 3, 4, 8),
            "num_matrices": 3,
            "num_steps": 10_000_000,
            "num_replicates": 2048,
            "set_sizes": (2, 3),
            "far_steps": 10**9,
        },
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
    set_sizes: tuple[int, ...] = ()
    """Sizes, at least 2, of winner sets that matrices are made with."""
    far_steps: int = 0
    """Generated tokens of the longest rollouts, of the largest K only; 0 for none."""
    far_exponents: tuple[float, float] = (0.25, 0.45)
    """Range of the losers' growth exponents in these."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.num_tokens or min(self.num_tokens) < 2:
            raise ValueError(f"num_tokens: expected sizes of at least 2, got {self.num_tokens}")
        for name in ("exponents", "far_exponents"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 1:
                raise ValueError(f"{name}: expected 0 < low <= high < 1, got {(low, high)}")
        if self.set_sizes and min(self.set_sizes) < 2:
            raise ValueError(f"set_sizes: expected sizes of at least 2, got {self.set_sizes}")
        if self.far_steps and not 100_000 <= self.far_steps < 2**31 - 10_000:
            raise ValueError(
                f"far_steps: expected 0, or 100000 to 2**31 - 10000, got {self.far_steps}"
            )
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
        """One config per vocabulary size and matrix, then per winner set, then the longest."""
        points = [(size, i, "single") for size in self.num_tokens for i in range(self.num_matrices)]
        points += [(s + 2, i, "set") for s in self.set_sizes for i in range(self.num_matrices)]
        points += [(max(self.num_tokens), 0, "far")] * (self.far_steps > 0)
        return [{"num_tokens": k, "matrix": i, "kind": kind} for k, i, kind in points]

    def layout(self) -> Layout:
        """Counts at the recorded steps; tokens past a config's vocabulary have count 0."""
        return {"counts": (("step", "token"), "int32")}

    def coords(self) -> dict[str, np.ndarray]:
        """The recorded steps (of the longest rollouts, see :meth:`steps`) and the token ids."""
        steps = log_spaced(self.num_steps, self.num_records)
        most = max([*self.num_tokens, *(s + 2 for s in self.set_sizes)])
        return {"step": steps, "token": np.arange(most)}

    def steps(self, config: dict[str, Any]) -> np.ndarray:
        """The recorded steps of a config; those of the longest rollouts are others."""
        steps = self.coords()["step"]
        if config["kind"] != "far":
            return steps
        return np.rint(np.geomspace(100, self.far_steps, len(steps))).astype(np.int64)

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a config: it depends on the seed and the config alone."""
        size = int(config["num_tokens"])
        key = jax.random.fold_in(jax.random.key(self.seed), size)
        key = jax.random.fold_in(key, int(config["matrix"]))
        low, high = self.far_exponents if config["kind"] == "far" else self.exponents
        p = np.array(jax.random.uniform(key, (size, size), minval=low, maxval=high), np.float64)
        np.fill_diagonal(p, 1)
        p[-1, 0] = 2
        if config["kind"] == "set":
            s = size - 2  # they follow themselves rarely, so that (P m)_k is about 1 at m = 1/s
            p[:s, :s] = p[:s, :s] / (low + high) + 1
            p[:s, :s] *= s / p[:s, :s].sum(axis=1, keepdims=True)
            p[np.arange(s), np.arange(s)] /= 4
            p[:s, :s] *= s / p[:s, :s].sum(axis=1, keepdims=True)
        return CCMC.from_transition_matrix(p / p.sum(axis=1, keepdims=True))

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        model, steps = self.model(config), self.steps(config)
        prompt, engine = np.arange(model.num_tokens), "auto"
        if config["kind"] == "set":
            prompt = np.append(prompt, [model.num_tokens - 2] * _EXTRA)
        if config["kind"] == "far":
            winners = np.flatnonzero(np.asarray(dynamics.possible_winners(model)))
            winner = winners[replicates % len(winners)]
            held = np.where(np.arange(model.num_tokens) == winner[:, None], *_TILT)
            prompt, engine = Prompts.from_counts(held, winner), "skip_ahead"
        trajectory = rollout(
            model,
            key,
            prompt,
            int(steps[-1]),
            len(replicates),
            engine=engine,
            record="counts",
            at=steps,
            first_replicate=int(replicates[0]),
        )
        counts = np.asarray(trajectory.counts)
        padded = np.zeros((*counts.shape[:2], len(self.coords()["token"])), np.int32)
        padded[..., : model.num_tokens] = counts
        return {"counts": padded}

    def slopes(self, dataset: xr.Dataset) -> xr.Dataset:
        """Median log-log slopes of losers' counts over the last two decades, by winner set.

        Trajectories count for token ``w`` if ``w`` has over 90 % of the context at the end, or for
        a set of possible winners (:func:`attnmarkov.dynamics.equilibria`) if its tokens have, and
        none of them alone. A loser is judged if at least 40 trajectories do and its median count
        is at least 50 where the two decades begin (below that, counts are too coarse to take
        logarithms of).

        The slope tends to ``λ_j = P[w, j] / P[w, w]`` as the losers' shares vanish; at a finite
        time the mean field gives ``λ_j(m) = Σ_k ν_k P[k, j] / Σ_i m_i P[k, i]`` at shares ``m``
        with ``ν`` the stationary law of ``M[k, j] ∝ m_j P[k, j]``. Its average in log time
        along each trajectory is what the slope is held against.

        Returns:
            Dataset along ``group`` = (config, winner, loser), ``winner`` the sum of ``2**w`` over
            the set, with the exponents in the ``limit``
            and ``predicted`` (median along the trajectories), and ``median`` slopes with
            ``lower`` and ``upper`` ends of a 99.99 % interval.
        """
        import xarray as xr

        rows: list[tuple] = []
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            model, steps = self.model(config), self.steps(config)
            first = int(np.searchsorted(steps, steps[-1] / 100))
            local = None  # of all trajectories at once: one shape, compiled once
            for winners, won in self._groups(config, counts[:, -1]).items():
                group = counts[won][:, first:]
                if len(group) < 40:
                    continue
                log_time = np.log(steps[first:] + self._prompt_length(config))
                limits = np.asarray(dynamics.winner_exponents(model, winners))
                if local is None:
                    local = np.asarray(dynamics.growth_exponents(model, counts[:, first:]), float)
                mean = np.trapezoid(local[won], log_time, axis=1) / np.ptp(log_time)
                for j in set(range(size)) - set(winners):
                    if np.median(group[:, 0, j]) < 50:
                        continue
                    slope = np.log(group[:, -1, j] / group[:, 0, j]) / np.ptp(log_time)
                    medians = np.median(mean[:, j]), np.median(slope)
                    code = sum(2**w for w in winners)
                    interval = quantile_interval(slope, 0.5, 1e-4)
                    rows.append((i, size, code, j, limits[j], *medians, *interval))
        names = ["config", "num_tokens", "winner", "loser", "limit", "predicted", "median"]
        names += ["lower", "upper"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({names[i]: ("group", column) for i, column in enumerate(columns)})
        return table.assign_coords({name: table[name].astype(int) for name in names[:4]})

    def _prompt_length(self, config: dict[str, Any]) -> int:
        size = int(config["num_tokens"])
        far = _TILT[0] + (size - 1) * _TILT[1]
        return {"single": size, "set": size + _EXTRA, "far": far}[config["kind"]]

    def _groups(
        self, config: dict[str, Any], counts: np.ndarray
    ) -> dict[tuple[int, ...], np.ndarray]:
        """Which trajectories (R, K) each token, or else each winner set of more, has taken."""
        shares = counts / counts.sum(axis=-1, keepdims=True)
        out: dict[tuple[int, ...], np.ndarray] = {
            (w,): shares[..., w] > _WON for w in range(counts.shape[-1])
        }
        free = ~np.any(list(out.values()), axis=0)
        for winners in dynamics.equilibria(self.model(config)).winner_sets:
            if len(winners) > 1:
                out[winners] = free & (shares[..., list(winners)].sum(axis=-1) > _WON)
                free = free & ~out[winners]
        return out

    def winners(self, dataset: xr.Dataset) -> xr.Dataset:
        """How many finished trajectories each token has won, 90 % of the context, at each step.

        Returns:
            Dataset with ``won`` over (config, step, token), ``won_by_sets`` of two or more tokens
            over (config, step), and ``trajectories`` over config.
        """
        import xarray as xr

        steps, tokens = dataset["step"].values, dataset["token"].values
        won = np.zeros((len(self.configs()), len(steps), len(tokens)), int)
        sets, number = np.zeros(won.shape[:2], int), np.zeros(len(won), int)
        for i, config in enumerate(self.configs()):
            counts, _ = _finished(dataset, i, config)
            number[i] = len(counts)
            for winners, which in self._groups(config, counts).items():
                if len(winners) == 1:
                    won[i, :, winners[0]] = which.sum(axis=0)
                else:
                    sets[i] += which.sum(axis=0)
        return xr.Dataset(
            {
                "won": (("config", "step", "token"), won),
                "won_by_sets": (("config", "step"), sets),
                "trajectories": ("config", number),
            },
            {"step": steps, "token": tokens},
        )

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Whether few tokens take over, which ones do, and how fast the losers grow."""
        out: list[Claim] = []
        slopes, winners = self.slopes(dataset), self.winners(dataset)
        for i, config in enumerate(self.configs()):
            number = int(winners["trajectories"][i])
            if number == 0:
                continue
            label = f"K={config['num_tokens']}, matrix {config['matrix']}"
            won, sets = winners["won"].values[i], winners["won_by_sets"].values[i]
            if config["kind"] == "set":
                label += f" with winner set {set(range(config['num_tokens'] - 2))}"
                out += self._set_claims(label, config, _finished(dataset, i, config)[0][:, -1])
            if config["kind"] == "far":
                label += f", to {self.far_steps:.0e} tokens"
            else:
                out.append(self._collapse_claim(label, won.sum(axis=-1) + sets, number))
                out.append(self._winner_claim(label, won[-1], int(sets[-1]), self.model(config)))
            part = slopes.isel(group=np.flatnonzero(slopes["config"] == i))
            for code in np.unique(part["winner"]):
                group = part.isel(group=np.flatnonzero(part["winner"] == code))
                ids = [w for w in range(int(code).bit_length()) if int(code) >> w & 1]
                name = f"winner {ids[0]}" if len(ids) == 1 else f"winners {set(ids)}"
                out.append(self._exponent_claim(f"{label}, {name}", group))
                if config["kind"] == "far":
                    out.append(self._limit_claim(f"{label}, {name}", group))
        return out

    def _set_claims(self, label: str, config: dict[str, Any], end: np.ndarray) -> list[Claim]:
        """Trajectories that a winner set has taken are at its equilibrium."""
        out: list[Claim] = []
        found = dynamics.equilibria(self.model(config))
        for winners, won in self._groups(config, end).items():
            if len(winners) == 1 or won.sum() < 40:
                continue
            m = found.at(winners)[0].occupancy
            inside = end[won][:, list(winners)]
            share = inside[:, 0] / inside.sum(axis=1)
            low, high = quantile_interval(share, 0.5, 1e-4)
            predicted, measured = float(m[winners[0]]), float(np.median(share))
            off = max(low - predicted, predicted - high)
            verdict = "fail" if off > 0.01 else "pass" if high - low <= 0.04 else "inconclusive"
            claim = (
                f"{label}: median share of token {winners[0]} among the tokens of the set "
                f"({int(won.sum())} of {len(end)} trajectories) at its equilibrium (± 0.01)"
            )
            half = (high - low) / 2
            out.append(Claim(self.name, claim, _SETS, predicted, measured, half, verdict))
        return out

    def _collapse_claim(self, label: str, won: np.ndarray, number: int) -> Claim:
        """Trajectories without a winner die out: clearly fewer than two decades before."""
        early = int(np.searchsorted(self.coords()["step"], self.num_steps / 100))
        left, before = number - int(won[-1]), number - int(won[early])
        low, high = binomial_interval(left, number, 1e-4)
        falls = high < max(binomial_interval(before, number, 1e-4)[0], 0.1 * (left == 0))
        verdict = "pass" if falls else "fail" if low > 0.1 else "inconclusive"
        claim = (
            f"{label}: share without a winner at t = {self.num_steps:.0e}, tends to 0 "
            f"(two decades before: {before / number:.3f})"
        )
        return Claim(self.name, claim, _SOURCE, 0.0, left / number, (high - low) / 2, verdict)

    def _winner_claim(self, label: str, won: np.ndarray, sets: int, model: CCMC) -> Claim:
        """No winner has P[w, j] >= P[w, w]; judged on at least 100 trajectories with one."""
        possible = np.asarray(dynamics.possible_winners(model))
        number, wrong = int(won.sum()) + sets, int(won[: possible.size][~possible].sum())
        verdict = "fail" if wrong else "pass" if number >= 100 else "inconclusive"
        tally = ", ".join(f"{n} by {w}" for w, n in enumerate(won) if n)
        tally += f", {sets} by sets" * (sets > 0)
        claim = f"{label}: share of winners with some P[w,j] >= P[w,w] ({tally or 'none'})"
        upper = binomial_interval(wrong, number, 1e-4)[1] if number else 1.0
        return Claim(self.name, claim, _SOURCE, 0.0, wrong / max(number, 1), upper, verdict)

    def _exponent_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Every loser's median within 0.03 of the prediction, and its interval within 0.01."""
        half = (group["upper"] - group["lower"]).values / 2
        off = abs(group["median"] - group["predicted"]).values
        excess = off - half
        worst = int(excess.argmax())
        verdict = "pass" if half.max() <= _NEAR and off.max() <= _NEAR else "inconclusive"
        if excess[worst] > 0.01:
            verdict = "fail"
        shown = group.isel(group=worst)
        claim = (
            f"{label}: growth exponent of token {int(shown['loser'])} on the way to "
            f"{float(shown['limit']):.3f} (± 0.01)"
        )
        predicted, measured = float(shown["predicted"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def _limit_claim(self, label: str, group: xr.Dataset) -> Claim:
        """Every loser's median slope within 0.03 of ``λ`` itself; the worst one is shown."""
        half, off, verdict = limit_verdict(group, _NEAR)
        worst = int(off.argmax())
        shown = group.isel(group=worst)
        claim = (
            f"{label}: growth exponent of token {int(shown['loser'])} over the last two decades, "
            f"λ itself (± {_NEAR:g})"
        )
        predicted, measured = float(shown["limit"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Shares along trajectories, and exponents measured against predicted."""
        from matplotlib.figure import Figure

        from attnmarkov import plot
        from attnmarkov.plot.winner_sets import winner_set_shares

        configs = enumerate(self.configs())
        chosen = [i for i, c in configs if c["matrix"] == 0 and c["kind"] != "set"]
        shares = Figure(figsize=(4.6 * len(chosen), 4), layout="constrained")
        for ax, i in zip(shares.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=False):
            config = self.configs()[i]
            counts, size = _finished(dataset, i, config)
            if len(counts) == 0:
                ax.set_title("not finished")
                continue
            trajectory = Trajectory(size, "scan", jnp.asarray(counts), self.steps(config))
            plot.frequencies(trajectory, predicted=self.model(config), ax=ax)
            ax.set_title(f"K = {size}: {ax.get_title()}", fontsize=10)
        figures = {"frequencies": shares}
        for i, config in enumerate(self.configs()):
            counts, size = _finished(dataset, i, config)
            winners = tuple(range(size - 2))
            if config["kind"] != "set" or config["matrix"] or len(counts) == 0:
                continue
            if self._groups(config, counts[:, -1]).get(winners, np.zeros(1)).any():
                name = f"winner-set-of-{size - 2}"
                figures[name] = Figure(figsize=(6, 4.2), layout="constrained")
                trajectory = Trajectory(size, "scan", jnp.asarray(counts), self.steps(config))
                winner_set_shares(
                    trajectory, self.model(config), winners, ax=figures[name].subplots()
                )
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
