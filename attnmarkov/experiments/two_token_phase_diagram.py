"""Two-token phase diagram: who wins, or both stay, over all two-token models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from attnmarkov.dynamics import TwoTokenPhases, equilibria, growth_exponents, two_token_phases
from attnmarkov.experiments._statistics import binomial_interval, limit_verdict, quantile_interval
from attnmarkov.model import CCMC
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), single trajectory, two tokens"
_ALPHA = 1e-4  # how often an interval may miss
_NEAR = 0.03  # what exponents may differ by
_CLEAR = 0.1  # how far from 1 exponents are held against their limit
_TRANSIENT = 0.05  # how often a token that cannot win may still lead at the end: see _winner_claim
_FEW = 40  # trajectories that a median takes at least
_WON = 0.9  # share of the context that a winner has
_TILT = (500, 10)  # copies of the winner and of the loser in prompts for exponents
_GROWN = 300  # times that the loser's count grows while such a trajectory is followed
_MOST = 10**9


@dataclass(frozen=True, kw_only=True)
class TwoTokenPhaseDiagram(Experiment):
    """Rollouts over a grid of ``P = [[1 − p, p], [q, 1 − q]]``, on the predicted diagram.

    A replicate is one trajectory from the prompt ``0 1``, which shows the regime, and, where a
    token can win, one that begins with 500 copies of it to 10 of the loser, which shows
    how the loser grows: by skip-ahead, to 10⁹ tokens or until its count should be 300 times larger.
    Where either token can win, replicates begin with the one and the other in turns.
    """

    name: ClassVar[str] = "two-token-phase-diagram"
    summary: ClassVar[str] = "two tokens: one wins, either wins, or both stay, as predicted"
    block_size: ClassVar[int] = 2048
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "points": (0.05, 0.15, 0.25, 0.35, 0.4, 0.6, 0.65, 0.75, 0.85, 0.95),
            "num_steps": 1_000_000,
            "num_replicates": 512,
        }
    }

    points: tuple[float, ...] = (0.15, 0.35, 0.65, 0.85)
    """Values of p and of q, all pairs of which are simulated; none within 0.05 of 1/2."""
    num_steps: int = 100_000
    """Generated tokens of the trajectories that show the regime."""
    num_records: int = 9
    """Log-spaced steps of the last two decades at which the loser's count is kept."""
    num_replicates: int = 200
    """Trajectories of either kind per grid point."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.points or not all(0 < x < 1 and abs(x - 0.5) >= 0.05 for x in self.points):
            raise ValueError(
                f"points: expected numbers in (0, 1), none within 0.05 of 1/2, got {self.points}"
            )
        if not 1000 <= self.num_steps < 2**30:
            raise ValueError(f"num_steps: expected 1000 to 2**30, got {self.num_steps}")
        if self.num_records < 3:
            raise ValueError(f"num_records: slopes need at least 3, got {self.num_records}")

    def configs(self) -> list[dict[str, Any]]:
        """One config per pair (p, q)."""
        return [{"p": p, "q": q} for p in self.points for q in self.points]

    def layout(self) -> Layout:
        """Counts at the end, and along the trajectories that begin tilted (0 if there are none)."""
        return {"counts": (("token",), "int64"), "tilted": (("record", "token"), "int64")}

    def coords(self) -> dict[str, np.ndarray]:
        """Numbers of the records and token ids."""
        return {"record": np.arange(self.num_records), "token": np.arange(2)}

    def model(self, config: dict[str, Any]) -> CCMC:
        """The CCMC of a grid point."""
        p, q = config["p"], config["q"]
        return CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])

    def phases(self, config: dict[str, Any]) -> TwoTokenPhases:
        """What is predicted at a grid point."""
        return two_token_phases(config["p"], config["q"])

    def steps(self, config: dict[str, Any]) -> np.ndarray:
        """Recorded steps of the tilted trajectories: the last two decades, log-spaced."""
        phases = self.phases(config)
        fastest = float(phases.growth[phases.can_win].max(initial=0.0))
        last = _MOST
        if fastest > 0:
            last = int(min(_MOST, sum(_TILT) * _GROWN ** min(1 / fastest, 8.0)))
        return np.unique(np.rint(np.geomspace(last / 100, last, self.num_records)).astype(int))

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        model, number = self.model(config), len(replicates)
        first = {"record": "counts", "first_replicate": int(replicates[0])}
        balanced = rollout(
            model, jax.random.fold_in(key, 0), [0, 1], self.num_steps, number, **first
        )
        tilted = np.zeros((number, self.num_records, 2), np.int64)
        winners = np.flatnonzero(self.phases(config).can_win)
        if winners.size:
            winner = winners[replicates % winners.size]
            held = np.where(np.arange(2) == winner[:, None], *_TILT)
            steps = self.steps(config)
            far = rollout(
                model,
                jax.random.fold_in(key, 1),
                Prompts.from_counts(held, winner),
                int(steps[-1]),
                number,
                engine="skip_ahead",
                at=steps,
                **first,
            )
            tilted[:] = np.asarray(far.counts)
        return {"counts": np.asarray(balanced.counts)[:, -1].astype(np.int64), "tilted": tilted}

    def outcomes(self, dataset: xr.Dataset) -> xr.Dataset:
        """How the trajectories ended at every finished grid point.

        Returns:
            Dataset along ``point``: ``p``, ``q``, ``regime`` (predicted), ``won`` (point, token)
            numbers of trajectories in which a token has over 90 % of the context,
            ``trajectories``, and for points where both stay the ``median`` share of token 0 with
            the ends ``lower`` and ``upper`` of its interval beside the ``share`` predicted.
        """
        import xarray as xr

        rows, won = [], []
        for i, config in enumerate(self.configs()):
            counts = dataset["counts"].isel(config=i).values
            counts = counts[counts[:, 0] >= 0]
            if len(counts) == 0:
                continue
            shares, phases = counts / counts.sum(axis=1, keepdims=True), self.phases(config)
            won.append((shares > _WON).sum(axis=0))
            middle = np.median(shares[:, 0]), *quantile_interval(shares[:, 0], 0.5, _ALPHA)
            predicted = phases.shares[0]
            rows.append((config["p"], config["q"], phases.regime, len(counts), predicted, *middle))
        names = ["p", "q", "regime", "trajectories", "share", "median", "lower", "upper"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({n: ("point", c) for n, c in zip(names, columns, strict=True)})
        return table.assign(won=(("point", "token"), np.array(won, int).reshape(-1, 2)))

    def slopes(self, dataset: xr.Dataset) -> xr.Dataset:
        """Median log-log slopes of the loser's count over two decades, by winner.

        Trajectories are grouped by the token that has over 90 % of the context at the end. A
        group of under 40 is left out. ``predicted`` is the mean field's exponent
        ``ν_j(m) / m_j``, averaged in log time along each trajectory (median); ``limit`` is ``λ``.

        Returns:
            Dataset along ``group`` with ``p``, ``q``, ``winner``, ``limit``, ``predicted``,
            ``median`` and the ends ``lower`` and ``upper`` of its interval.
        """
        import xarray as xr

        rows: list[tuple] = []
        for i, config in enumerate(self.configs()):
            counts = dataset["tilted"].isel(config=i).values
            counts = counts[counts[:, 0].sum(axis=-1) > 0]
            if len(counts) == 0:
                continue
            phases, log_time = self.phases(config), np.log(self.steps(config) + sum(_TILT))
            shares = counts / counts.sum(axis=-1, keepdims=True)
            local = np.asarray(growth_exponents(self.model(config), counts), float)
            for w in (0, 1):
                group = shares[:, -1, w] > _WON
                if group.sum() < _FEW:
                    continue
                loser = counts[group][..., 1 - w]
                slope = np.log(loser[:, -1] / loser[:, 0]) / np.ptp(log_time)
                mean = np.trapezoid(local[group][..., 1 - w], log_time, axis=1) / np.ptp(log_time)
                rows.append(
                    (
                        config["p"],
                        config["q"],
                        w,
                        float(phases.growth[w]),
                        np.median(mean),
                        np.median(slope),
                        *quantile_interval(slope, 0.5, _ALPHA),
                    )
                )
        names = ["p", "q", "winner", "limit", "predicted", "median", "lower", "upper"]
        columns = np.array(rows, float).reshape(-1, len(names)).T
        table = xr.Dataset({n: ("group", c) for n, c in zip(names, columns, strict=True)})
        return table.assign_coords(num_tokens=("group", np.full(len(rows), 2)))

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Which tokens win where, the shares at which both stay, and how fast losers grow."""
        out: list[Claim] = []
        outcomes = self.outcomes(dataset)
        for regime, judge in (
            (0, self._winner_claim),
            (1, self._winner_claim),
            (2, self._either_claim),
            (3, self._both_claim),
        ):
            part = outcomes.isel(point=np.flatnonzero(outcomes["regime"] == regime))
            if part.sizes["point"]:
                out.append(judge(part))
        slopes = self.slopes(dataset)
        for w in (0, 1):
            group = slopes.isel(group=np.flatnonzero(slopes["winner"] == w))
            if group.sizes["group"]:
                out.append(self._exponent_claim(group, w))
            clear = group.isel(group=np.flatnonzero(abs(group["limit"] - 1) > _CLEAR))
            if clear.sizes["group"]:
                out.append(self._limit_claim(clear, w))
        return out

    def _winner_claim(self, part: xr.Dataset) -> Claim:
        """The one possible winner has nearly all trajectories, the other token few in any model.

        A token that cannot win may still lead when a trajectory ends: from the prompt ``0 1``
        with a probability below 0.05 for all points and numbers of steps that are allowed (at
        p = 0.45, q = 0.55, an urn, 0.023 after 1,000 steps). It fails where it clearly does
        more often: each model's interval at 1e-4 over the number of models.
        """
        w = int(part["regime"][0])
        number = int(part["trajectories"].sum())
        won = part["won"].values.sum(axis=0)
        low, high = binomial_interval(int(won[w]), number, _ALPHA)
        each = zip(part["won"].values[:, 1 - w], part["trajectories"].values, strict=True)
        alpha = _ALPHA / part.sizes["point"]
        wrong = max(binomial_interval(int(hits), int(n), alpha)[0] for hits, n in each)
        verdict = "fail" if wrong > _TRANSIENT else "pass" if low > 0.95 else "inconclusive"
        side = "p < 1/2 < q" if w == 0 else "q < 1/2 < p"
        claim = (
            f"{side}: share of trajectories that token {w} has taken over at t = "
            f"{self.num_steps:.0e}, tends to 1 ({part.sizes['point']} models; token {1 - w}: "
            f"{int(won[1 - w])} of {number})"
        )
        measured = float(won[w] / number)
        return Claim(self.name, claim, _SOURCE, 1.0, measured, (high - low) / 2, verdict)

    def _either_claim(self, part: xr.Dataset) -> Claim:
        """In every model both tokens win some trajectories; the rest die out slowly."""
        won, number = part["won"].values, part["trajectories"].values
        ends = [
            binomial_interval(int(h), int(n), _ALPHA)
            for row, n in zip(won, number, strict=True)
            for h in row
        ]
        worst = int(np.argmin([e[0] for e in ends]))
        share = (won / number[:, None]).ravel()[worst]
        verdict = "pass" if ends[worst][0] > 0 else "inconclusive"
        if ends[worst][1] < 0.01:
            verdict = "fail"
        left = 1 - won.sum() / number.sum()
        claim = (
            f"p, q < 1/2: either token wins; the smallest share of trajectories won by one of them "
            f"({part.sizes['point']} models; {left:.1%} undecided at t = {self.num_steps:.0e})"
        )
        half = (ends[worst][1] - ends[worst][0]) / 2
        return Claim(self.name, claim, _SOURCE, "above 0", float(share), half, verdict)

    def _both_claim(self, part: xr.Dataset) -> Claim:
        """Median shares near the equilibrium in closed form; the worst one is shown.

        Near is 0.01 and what is left of the start: ``(|m − 1/2| + 1/4) (t / 2)**-rate``, from two
        tokens on at the relaxation rate of the equilibrium. Where that is above 0.03, or
        there are under 40 trajectories, a model is not judged.
        """
        points = zip(part["p"].values, part["q"].values, strict=True)
        slack = 0.01 + np.array([self._left(p, q) for p, q in points])
        judged = (slack <= 0.03) & (part["trajectories"].values >= _FEW)
        chosen = np.flatnonzero(judged) if judged.any() else np.arange(len(slack))
        part, slack = part.isel(point=chosen), slack[chosen]
        half = (part["upper"] - part["lower"]).values / 2
        share = part["share"].values
        off = np.maximum(part["lower"].values - share, share - part["upper"].values) - slack
        worst = int(off.argmax())
        near = (abs(part["median"].values - share) <= np.maximum(slack, half)).all()
        verdict = "pass" if half.max() <= 0.03 and near else "inconclusive"
        if not judged.any():
            verdict = "inconclusive"
        elif off[worst] > 0:
            verdict = "fail"
        shown = part.isel(point=worst)
        claim = (
            f"p, q > 1/2: both stay; median share of token 0 at p = {float(shown['p']):g}, q = "
            f"{float(shown['q']):g}, the worst of {int(judged.sum())} models of {len(judged)} "
            f"that relax in time (± {slack[worst]:.3f})"
        )
        predicted, measured = float(shown["share"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def _left(self, p: float, q: float) -> float:
        """What may be left of the start of a trajectory where both tokens stay."""
        model = self.model({"p": float(p), "q": float(q)})
        end = equilibria(model).at((0, 1))[0]
        start = abs(end.occupancy[0] - 0.5) + 0.25
        return float(start * (self.num_steps / 2) ** -end.relaxation_rate)

    def _limit_claim(self, group: xr.Dataset, w: int) -> Claim:
        """Every median slope within 0.03 of ``λ`` itself; the worst one is shown."""
        half, off, verdict = limit_verdict(group, _NEAR)
        worst = int(off.argmax())
        shown = group.isel(group=worst)
        claim = (
            f"λ of the loser beside winner {w}, over two decades, at p = {float(shown['p']):g}, "
            f"q = {float(shown['q']):g}, the worst of {group.sizes['group']} models with "
            f"|λ − 1| > {_CLEAR:g} (± {_NEAR:g})"
        )
        predicted, measured = float(shown["limit"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def _exponent_claim(self, group: xr.Dataset, w: int) -> Claim:
        """Every median slope within 0.03 of the prediction; the worst one is shown."""
        half = (group["upper"] - group["lower"]).values / 2
        off = abs(group["median"] - group["predicted"]).values
        worst = int(off.argmax())
        verdict = "pass" if (half <= _NEAR).all() and off[worst] <= _NEAR else "inconclusive"
        if (off - half > _NEAR).any():
            verdict = "fail"
        shown = group.isel(group=worst)
        claim = (
            f"growth exponent of the loser beside winner {w} over two decades, on the way to λ = "
            f"{float(shown['limit']):.3f}, at p = {float(shown['p']):g}, q = "
            f"{float(shown['q']):g}, the worst of {group.sizes['group']} models (± {_NEAR:g})"
        )
        predicted, measured = float(shown["predicted"]), float(shown["median"])
        return Claim(self.name, claim, _SOURCE, predicted, measured, float(half[worst]), verdict)

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """The diagram with what was measured on it, and exponents against predictions."""
        from matplotlib.figure import Figure

        from attnmarkov import plot
        from attnmarkov.plot.portraits import two_token_diagram, two_token_wins

        outcomes = self.outcomes(dataset)
        grid = np.linspace(0.0025, 0.9975, 200)
        diagram = Figure(figsize=(7, 4.4), layout="constrained")
        ax = two_token_diagram(two_token_phases(grid[:, None], grid), ax=diagram.subplots())
        if outcomes.sizes["point"]:
            won = outcomes["won"].values / outcomes["trajectories"].values[:, None]
            two_token_wins(outcomes["p"].values, outcomes["q"].values, won, ax=ax)
        diagram.set_label(
            "Predicted regimes of two-token generation on a grid of 200 by 200 models (areas), and "
            f"who had taken over measured trajectories after {self.num_steps:,} tokens (pies)."
        )
        figures = {"phases": diagram}
        slopes = self.slopes(dataset)
        if slopes.sizes["group"]:
            figures["exponents"] = Figure(figsize=(6, 4.2), layout="constrained")
            plot.growth_exponents(slopes, ax=figures["exponents"].subplots())
        return figures
