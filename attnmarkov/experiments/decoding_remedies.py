"""Decoding remedies: which settings keep generation from collapsing, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.dynamics.decoding import DecodingPrediction, predict_decoding
from attnmarkov.dynamics.drift import growth_exponents
from attnmarkov.experiments._decoding import likelihoods, random_winner_model
from attnmarkov.experiments._remedy_claims import (
    ALPHA,
    NAME,
    SOURCE,
    cheaper_claim,
    falling_claim,
    limit_claim,
    own_claim,
    remedy_claim,
)
from attnmarkov.experiments._statistics import INTERVAL_99_99, binomial_interval
from attnmarkov.model import Context, DecayContext, FullContext, Sampling, WindowContext
from attnmarkov.rollout import rollout
from attnmarkov.sweep import Claim, Experiment, Layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from attnmarkov.model import CCMC

_CUTS = "Cut tokens (Holtzman et al. 2020) in From Self-Attention to Markov Models (ICML 2024)"
_FEWEST = 50  # occurrences of a loser where its growth is measured from
_GROWTH = 0.03  # what growth exponents may differ by
_SURE = 1e-6  # beyond top-p, so that rounding cannot decide


@dataclass(frozen=True, kw_only=True)
class DecodingRemedies(Experiment):
    """Rollouts of one random model under many decoders and contexts.

    The **cost** of a setting is the mean, over the tokens it emits in a span, of ``-log p``, with
    ``p`` the model's own law of that token: plain attention to the same whole history. **Own** is
    the mean entropy of that law along the same histories. Under plain sampling both are equal in
    expectation; a setting whose tokens the model finds unlikely costs more than its own entropy.

    The last decade of tokens, and the decade before, are what is measured.
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "which decoders and contexts avoid collapse, and their likelihood cost"
    block_size: ClassVar[int] = 256
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {"num_steps": 100_000, "num_replicates": 1024}
    }

    num_tokens: int = 4
    """Vocabulary size K."""
    relative_weights: tuple[float, float] = (0.3, 0.6)
    """Range of the weights off the diagonal of ``P``, relative to those on it; inside (0, 1)."""
    temperatures: tuple[float, ...] = (0.7, 1.3, 2.0)
    """Temperatures, one setting each."""
    penalties: tuple[float, ...] = (0.8, 1.2)
    """Repetition penalties, one setting each."""
    exponents: tuple[float, ...] = (0.5,)
    """Reinforcement exponents, one setting each."""
    top_k: int = 2
    """Tokens that top-k keeps."""
    top_p: float = 0.9
    """Mass that top-p keeps."""
    window: int = 16
    """Tokens that the window sees."""
    gamma: float = 0.9
    """Factor per step of the decaying context."""
    num_steps: int = 10_000
    """Generated tokens per trajectory."""
    num_replicates: int = 256
    """Trajectories per setting."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not 2 <= self.num_tokens <= 8:
            raise ValueError(f"num_tokens: must lie in 2..8, got {self.num_tokens}")
        low, high = self.relative_weights
        if not 0 < low <= high < 1:
            raise ValueError(
                f"relative_weights: expected 0 < low <= high < 1, got {self.relative_weights}"
            )
        for name in ("temperatures", "penalties", "exponents"):
            values = getattr(self, name)
            if not all(0.1 <= x <= 10 and x != 1 for x in values):
                raise ValueError(f"{name}: expected numbers from 0.1 to 10, not 1, got {values}")
        if not 2 <= self.top_k < self.num_tokens:
            raise ValueError(f"top_k: must lie in 2..{self.num_tokens - 1}, got {self.top_k}")
        for name in ("top_p", "gamma"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: must lie in (0, 1), got {getattr(self, name)}")
        if not 2 <= self.window <= 128:
            raise ValueError(f"window: must lie in 2..128, got {self.window}")
        if not 1000 <= self.num_steps <= 10**6:
            raise ValueError(f"num_steps: must lie in 1000..10**6, got {self.num_steps}")

    def powers(self) -> dict[str, dict[str, float]]:
        """Settings that are a power of the shares, as :func:`predict_decoding` takes them."""
        return {
            "plain": {},
            **{f"T = {t:g}": {"temperature": t} for t in self.temperatures},
            **{f"ρ = {r:g}": {"repetition_penalty": r} for r in self.penalties},
            **{f"α = {a:g}": {"exponent": a} for a in self.exponents},
        }

    def settings(self) -> dict[str, tuple[Context, Sampling]]:
        """Context and decoder of every setting, by name."""
        out: dict[str, tuple[Context, Sampling]] = {}
        for name, values in self.powers().items():
            heat, penalty = values.get("temperature", 1.0), values.get("repetition_penalty", 1.0)
            decoder = Sampling(temperature=heat, repetition_penalty=penalty)
            out[name] = FullContext(exponent=values.get("exponent", 1.0)), decoder
        out[f"top-k {self.top_k}"] = FullContext(), Sampling(top_k=self.top_k)
        out[f"top-p {self.top_p:g}"] = FullContext(), Sampling(top_p=self.top_p)
        out[f"window {self.window}"] = WindowContext(self.window), Sampling()
        out[f"decay {self.gamma:g}"] = DecayContext(self.gamma), Sampling()
        return out

    def configs(self) -> list[dict[str, Any]]:
        """One config per setting."""
        return [{"setting": name} for name in self.settings()]

    def layout(self) -> Layout:
        """Counts at the records; cost and own entropy by decade; absorption under top-p.

        ``absorbed`` is the step after which the model's law gives the last token ``top_p`` or
        more after itself, -1 if that was never so, and ``others`` how many other tokens came then.
        """
        return {
            "counts": (("step", "token"), "int32"),
            "cost": (("decade",), "float32"),
            "own": (("decade",), "float32"),
            "absorbed": ((), "int32"),
            "others": ((), "int32"),
        }

    def coords(self) -> dict[str, np.ndarray]:
        """Recorded steps, the decades before the end (the last is 1), and token ids."""
        steps = np.rint(self.num_steps * 10.0 ** np.array([-2, -1, -0.5, 0])).astype(np.int64)
        return {"step": steps, "decade": np.arange(2), "token": np.arange(self.num_tokens)}

    @property
    def model(self) -> CCMC:
        """The CCMC that generates: it depends on the seed and K alone."""
        return random_winner_model(self.seed, self.num_tokens, self.relative_weights)

    def prediction(self, name: str) -> DecodingPrediction | None:
        """What a power setting comes to; None for the others."""
        values = self.powers().get(name)
        if values is None:
            return None
        return _prediction(self.seed, self.num_tokens, self.relative_weights, tuple(values.items()))

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Roll out the given replicates, which are consecutive."""
        context, decoder = self.settings()[config["setting"]]
        model, steps = self.model, self.coords()["step"]
        tokens = rollout(
            model,
            key,
            np.arange(self.num_tokens),
            self.num_steps,
            len(replicates),
            context=context,
            decoder=decoder,
            first_replicate=int(replicates[0]),
        ).tokens
        cost, own, absorbed, others = likelihoods(
            model.logits, tokens, jnp.asarray(steps[[0, 1]]), jnp.float32(self.top_p + _SURE)
        )
        spans = np.diff(steps[[0, 1, 3]])
        drawn, counts = np.asarray(tokens), []
        held = np.ones((len(replicates), self.num_tokens), np.int32)  # the prompt
        for start, stop in zip([0, *steps[:-1]], steps, strict=True):
            part = drawn[:, start:stop, None] == np.arange(self.num_tokens)
            held = held + part.sum(axis=1, dtype=np.int32)
            counts.append(held)
        cut = decoder.top_p is not None
        return {
            "counts": np.stack(counts, axis=1),
            "cost": (np.asarray(cost) / spans).astype(np.float32),
            "own": (np.asarray(own) / spans).astype(np.float32),
            "absorbed": np.asarray(absorbed) if cut else np.full(len(replicates), -1, np.int32),
            "others": np.asarray(others) if cut else np.zeros(len(replicates), np.int32),
        }

    def outcomes(self, dataset: xr.Dataset) -> xr.Dataset:
        """What every finished setting kept and what it cost, measured and predicted.

        Returns:
            Dataset along ``setting``, means over trajectories of the last decade: ``entropy`` of
            the shares, ``top_share``, ``distinct`` tokens, ``cost`` and ``own``, and of the
            ``gain`` of cost from one decade to the next; their standard errors as
            ``*_error``; numbers of ``trajectories``; ``entropy_predicted`` and
            ``cost_predicted`` in the limit (means over the nearest equilibria where there are
            several); and for powers below 1 the ``rate`` at which it is come to and the
            ``entropy_allowance`` and ``cost_allowance`` for a finite time: the
            root-mean-square distance a decade before, times ``10**-rate``.
        """
        import xarray as xr

        rows, names = [], []
        for i, name in enumerate(self.settings()):
            part = dataset.isel(config=i)
            part = part.isel(replicate=part["done"].values)
            if part.sizes["replicate"] < 2:
                continue
            names.append(name)
            rows.append(self._row(name, part))
        if not rows:
            return xr.Dataset(coords={"setting": np.array([], str)})
        table = {key: ("setting", np.array([row[key] for row in rows])) for key in rows[0]}
        return xr.Dataset(table, {"setting": names})

    def _row(self, name: str, part: xr.Dataset) -> dict[str, float]:
        counts, cost = part["counts"].values, part["cost"].values.astype(np.float64)
        new = np.stack([counts[:, 1] - counts[:, 0], counts[:, 3] - counts[:, 1]], axis=1)
        shares = new / new.sum(axis=-1, keepdims=True)
        entropy = _entropy(shares)
        values = {
            "entropy": entropy[:, 1],
            "top_share": shares[:, 1].max(axis=-1),
            "distinct": (new[:, 1] > 0).sum(axis=-1),
            "cost": cost[:, 1],
            "own": part["own"].values[:, 1].astype(np.float64),
            "gain": cost[:, 1] - cost[:, 0],
            "excess": cost[:, 1] - part["own"].values[:, 1],
        }
        row = {}
        for key, x in values.items():
            row[key], row[f"{key}_error"] = x.mean(), x.std(ddof=1) / np.sqrt(len(x))
        row |= {"trajectories": len(counts), "power": np.nan, "rate": np.nan}
        row |= {"entropy_predicted": 0.0, "cost_predicted": 0.0}
        row |= {"entropy_allowance": np.nan, "cost_allowance": np.nan}
        found = self.prediction(name)
        if found is not None:
            end = counts[:, -1] / counts[:, -1].sum(axis=-1, keepdims=True)
            near = np.abs(end[:, None] - found.shares).sum(axis=-1).argmin(axis=1)
            limits = {"entropy": found.entropies[near], "cost": found.costs[near]}
            before = {"entropy": entropy[:, 0], "cost": cost[:, 0]}
            row["power"] = found.power
            row["rate"] = rate = found.relaxation_rates[near].min()
            for key, limit in limits.items():
                row[f"{key}_predicted"] = limit.mean()
                early = np.sqrt(((before[key] - limit) ** 2).mean())
                row[f"{key}_allowance"] = early * 10.0**-rate
        return row

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """What each kind of setting keeps, what it costs, and when it is absorbed."""
        table = self.outcomes(dataset)
        if table.sizes["setting"] == 0:
            return []
        power = table["power"].values.round(9)
        flat = table.isel(setting=power < 1)
        out: list[Claim] = []
        if flat.sizes["setting"]:
            out += [limit_claim(flat, key) for key in ("entropy", "cost")]
        collapsing = table.isel(setting=~(power < 1))
        out.append(falling_claim(collapsing))
        if "plain" in table["setting"]:
            plain = table.sel(setting="plain")
            out.append(own_claim(plain))
            if flat.sizes["setting"]:
                out.append(remedy_claim(flat, plain))
        out += cheaper_claim(table, self.exponents)
        out += self._growth_claim(dataset)
        return out + self._cut_claims(dataset)

    def _growth_claim(self, dataset: xr.Dataset) -> list[Claim]:
        """Under plain sampling losers grow with the mean field's exponents.

        Losers that came often enough by the start of the last decade, all but the most frequent
        token then, of all trajectories; standard errors are over trajectories.
        """
        index = list(self.settings()).index("plain")
        part = dataset.isel(config=index)
        counts = part["counts"].values[part["done"].values][:, 1:]
        if len(counts) == 0:
            return []
        judged = counts[:, 0] >= _FEWEST
        judged[np.arange(len(counts)), counts[:, 0].argmax(axis=-1)] = False
        some = judged.any(axis=-1)
        if some.sum() < 40:
            return []
        counts, judged = counts[some], judged[some]
        log_time = np.log(self.coords()["step"][1:] + self.num_tokens)
        slope = np.log(counts[:, -1] / counts[:, 0]) / np.ptp(log_time)
        local = np.asarray(growth_exponents(self.model, counts), np.float64)
        expected = np.trapezoid(local, log_time, axis=1) / np.ptp(log_time)
        each = judged.sum(axis=-1)
        slopes, predictions = ((x * judged).sum(axis=-1) / each for x in (slope, expected))
        off = slopes - predictions
        half = INTERVAL_99_99 * off.std(ddof=1) / np.sqrt(len(off))
        verdict = "pass" if abs(off.mean()) <= _GROWTH and half <= _GROWTH else "inconclusive"
        if abs(off.mean()) - half > _GROWTH:
            verdict = "fail"
        claim = (
            f"plain sampling: mean growth exponent of losers over the last decade, of those with "
            f"{_FEWEST} or more occurrences at its start (mean field's, ± {_GROWTH:g}; "
            f"{len(off)} trajectories)"
        )
        means = float(predictions.mean()), float(slopes.mean())
        return [Claim(self.name, claim, SOURCE, *means, float(half), verdict)]

    def _cut_claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Top-p absorbs exactly; top-k leaves k tokens; short contexts leave one."""
        out: list[Claim] = []
        most = {f"top-k {self.top_k}": self.top_k, f"top-p {self.top_p:g}": 1}
        most |= {f"window {self.window}": 1, f"decay {self.gamma:g}": 1}
        for name, tokens in most.items():
            part = dataset.isel(config=list(self.settings()).index(name))
            part = part.isel(replicate=part["done"].values)
            number = part.sizes["replicate"]
            if number == 0:
                continue
            if name.startswith("top-p"):
                out.append(self._absorption_claim(part))
            counts = part["counts"].values
            before, last = (
                ((counts[:, stop] - counts[:, start]) > 0).sum(axis=-1) <= tokens
                for start, stop in ((0, 1), (1, 3))
            )
            few = int(last.sum())
            low, high = binomial_interval(few, number, ALPHA)
            won, lost = int((last & ~before).sum()), int((before & ~last).sum())
            moved = _sign_test(won, lost) < ALPHA
            verdict = "pass" if low > 0.9 or (moved and won > lost) else "inconclusive"
            if moved and won < lost:
                verdict = "fail"
            kept = "one token" if tokens == 1 else f"at most {tokens} tokens"
            claim = (
                f"{name}: share of trajectories with {kept} in the last decade, tends to 1 "
                f"({before.mean():.3f} in the decade before)"
            )
            measured, half = few / number, (high - low) / 2
            out.append(Claim(self.name, claim, _CUTS, 1.0, measured, half, verdict))
        return out

    def _absorption_claim(self, part: xr.Dataset) -> Claim:
        """No other token comes after the law gives the last one ``top_p`` after itself."""
        absorbed = part["absorbed"].values >= 0
        others = int(part["others"].values[absorbed].sum())
        verdict = "fail" if others else "pass" if absorbed.any() else "inconclusive"
        claim = (
            f"top-p {self.top_p:g}: other tokens drawn once the winner's probability had reached "
            f"{self.top_p:g} ({int(absorbed.sum())} of {absorbed.size} trajectories, after "
            f"{np.median(part['absorbed'].values[absorbed]) if absorbed.any() else np.nan:.0f} "
            "tokens in the median)"
        )
        return Claim(self.name, claim, _CUTS, 0.0, others, 0.0, verdict)

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Entropy kept against cost, a point for every setting."""
        from matplotlib.figure import Figure

        from attnmarkov.plot.decoding import decoding_costs

        table = self.outcomes(dataset)
        if table.sizes["setting"] == 0:
            return {}
        keeps = table["power"].values.round(9) < 1
        panels = [
            (which, title, scale)
            for which, title, scale in (
                (~keeps, "settings that collapse", "symlog"),
                (keeps, "settings in which all tokens keep a share", "linear"),
            )
            if which.any()
        ]
        figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for (which, title, scale), ax in zip(panels, axes, strict=True):
            decoding_costs(table.isel(setting=which), scale=scale, ax=ax)
            ax.set_title(title, fontsize=10)
        figure.set_label(
            f"Entropy of the tokens of the last decade (t = {self.num_steps // 10:,} to "
            f"{self.num_steps:,}) and their mean negative log-likelihood under plain attention to "
            "the same history, by decoding setting. Open squares: the limits predicted; settings "
            "that collapse go to the origin."
        )
        return {"costs": figure}


@lru_cache(maxsize=64)
def _prediction(
    seed: int,
    size: int,
    weights: tuple[float, float],
    values: tuple[tuple[str, float], ...],
) -> DecodingPrediction:
    return predict_decoding(random_winner_model(seed, size, weights), **dict(values))


def _sign_test(won: int, lost: int) -> float:
    from scipy import stats

    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _entropy(shares: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    return entr(shares).sum(axis=-1)
