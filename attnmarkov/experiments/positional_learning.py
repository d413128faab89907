"""Learning positional weights and transition probabilities together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import prompts
from attnmarkov.chains import random_transition_matrix
from attnmarkov.estimate import Status
from attnmarkov.estimate.position_solution import PositionSolution, solve_positions
from attnmarkov.estimate.positions import position_information, window_prompts
from attnmarkov.experiments._statistics import INTERVAL_99_99, weighted_line
from attnmarkov.model import CCMC, LagContext
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import rollout
from attnmarkov.sweep import Claim, Experiment, Layout, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

_BAD = 0.01  # share of fits without a maximum that spoils a mean
_WIDEST = {"excess_risk": 0.1, "weight_error": 0.15}  # half-width of an interval that decides
_TOLERANCE = 1e-5  # of the gradient per label, before the last step that is always taken
_SCHEMES = ("alibi-0.1", "alibi-0.5", "irregular")
_SOURCE = "THEORY: identification of b; From Self-Attention to Markov Models (ICML 2024)"


@dataclass(frozen=True, kw_only=True)
class PositionalLearning(Experiment):
    """Teachers with lag weights; students that learn ``S`` and ``β`` jointly, or ``S`` alone.

    Labels come after independent uniform prompts, or are the tokens of short rollouts that begin
    at such prompts. Risks are exact: means over all prompts of the length, in float64.
    """

    name: ClassVar[str] = "positional-learning"
    summary: ClassVar[str] = (
        "P and lag weights learned together: error r/2n, and what ignoring costs"
    )
    block_size: ClassVar[int] = 50
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": 4,
            "length": 6,
            "prompts_per_parameter": (96, 192, 384, 768),
            "num_replicates": 600,
        }
    }

    num_tokens: int = 3
    """Vocabulary size K, at least 2."""
    length: int = 5
    """Tokens per prompt, all of which the teacher weighs; at least 3."""
    prompts_per_parameter: tuple[int, ...] = (80, 200, 500)
    """Numbers of labels n, in units of the K(K-1) + length - 1 parameters; at least three."""
    schemes: tuple[str, ...] = _SCHEMES
    """Teachers' log-weights: ``alibi-SLOPE``, or ``irregular``."""
    concentration: float = 8.0
    """Dirichlet parameter of the teachers' rows."""
    rollout_steps: int = 4
    """Tokens drawn in each rollout."""
    num_replicates: int = 200
    """Fits per grid point."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        for name, least in (("num_tokens", 2), ("length", 3), ("rollout_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.num_tokens**self.length > 2**16:
            raise ValueError(
                f"length: all {self.num_tokens}**{self.length} prompts are gone through; "
                "at most 2**16"
            )
        sizes = self.prompts_per_parameter
        if len(set(sizes)) < 3 or min(sizes) < 1:
            raise ValueError(
                f"prompts_per_parameter: expected three or more sizes of at least 1, got {sizes}"
            )
        if not self.concentration > 0:
            raise ValueError(f"concentration: must be above 0, got {self.concentration}")
        if not self.schemes:
            raise ValueError("schemes: expected at least one")
        for scheme in self.schemes:
            log_weights(scheme, self.length)

    @property
    def num_parameters(self) -> int:
        """``r = K(K−1) + length − 1``."""
        return self.num_tokens * (self.num_tokens - 1) + self.length - 1

    def configs(self) -> list[dict[str, Any]]:
        """One config per scheme, source of labels, and number of labels."""
        return [
            {"scheme": scheme, "labels": source, "num_prompts": m * self.num_parameters}
            for scheme in self.schemes
            for source in ("prompts", "rollouts")
            for m in sorted(set(self.prompts_per_parameter))
        ]

    def layout(self) -> Layout:
        """Errors of each fit, what theory predicts for n times their means, and its status."""
        names = (
            "excess_risk",
            "weight_error",
            "flat_excess_risk",
            "predicted_excess_risk",
            "predicted_weight_error",
            "predicted_floor",
        )
        return {
            **dict.fromkeys(names, ((), "float64")),
            "log_weights": (("lag",), "float64"),
            "predicted_variance": (("lag",), "float64"),
            "status": ((), "int32"),
        }

    def coords(self) -> Mapping[str, ArrayLike]:
        """The lags."""
        return {"lag": np.arange(self.length)}

    def teacher(self, scheme: str) -> CCMC:
        """The CCMC that draws the labels of a scheme."""
        key = jax.random.fold_in(jax.random.key(self.seed), self.schemes.index(scheme))
        p = random_transition_matrix(key, self.num_tokens, self.concentration)
        return CCMC.from_transition_matrix(p)

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Draw labels and fit the given replicates."""
        n, scheme = int(config["num_prompts"]), str(config["scheme"])
        teacher, beta = self.teacher(scheme), log_weights(scheme, self.length)
        source = str(config["labels"])
        if source == "prompts":
            tokens, y = _from_prompts(
                teacher,
                LagContext(jnp.asarray(np.exp(beta), float)),
                key,
                jnp.asarray(replicates),
                num_prompts=self._most,
                length=self.length,
            )
            data = tokens[:, :n], y[:, :n]
        else:
            data = self._from_rollouts(teacher, beta, key, replicates, n)
        fits = _fits(*data, num_tokens=self.num_tokens)
        logits, flat, learned = (
            np.asarray(x, np.float64)
            for x in (fits.model.logits, fits.flat_model.logits, fits.log_weights)
        )
        known = _facts(self, scheme)
        off, covariance = learned[:, 1:] - beta[1:], known.covariance[source]
        risk = [
            _risk(known.law, known.tokens, *student)
            for student in zip(logits, learned, strict=True)
        ]
        flat_risk = [_risk(known.law, known.tokens, s, np.zeros(self.length)) for s in flat]
        size = len(replicates)
        return {
            "excess_risk": np.array(risk),
            "weight_error": np.einsum("ra,ab,rb->r", off, np.linalg.inv(covariance), off),
            "flat_excess_risk": np.array(flat_risk),
            "predicted_excess_risk": np.full(size, known.risk[source]),
            "predicted_weight_error": np.full(size, self.length - 1.0),
            "predicted_floor": np.full(size, known.floor[source]),
            "log_weights": learned,
            "predicted_variance": np.tile(np.append(0, np.diagonal(covariance)), (size, 1)),
            "status": np.asarray(fits.status.code),
        }

    @property
    def _most(self) -> int:
        """Labels of the largest grid point; fewer are the first of these, from one program."""
        return max(self.prompts_per_parameter) * self.num_parameters

    def _from_rollouts(
        self, teacher: CCMC, beta: np.ndarray, key: jax.Array, replicates: np.ndarray, n: int
    ) -> tuple[jax.Array, jax.Array]:
        """Windows (replicate, n, length) of rollouts from uniform prompts, and what was drawn."""
        most, number = (-(-m // self.rollout_steps) for m in (self._most, n))
        start = _uniform(
            key,
            jnp.asarray(replicates),
            num_prompts=most,
            length=self.length,
            num_tokens=self.num_tokens,
        )
        start = np.asarray(start)[:, :number]
        tokens, labels = [], []
        runs = np.flatnonzero(np.diff(replicates) != 1) + 1
        for run, ids in zip(np.split(replicates, runs), np.split(start, runs), strict=True):
            ids = ids.reshape(-1, self.length)
            drawn = rollout(
                teacher,
                key,
                ids,
                self.rollout_steps,
                len(ids),
                context=LagContext(np.exp(beta)),
                first_replicate=int(run[0]) * number,
            )
            windows, y = window_prompts(drawn, ids, self.length)
            tokens.append(np.asarray(windows.tokens).reshape(len(run), -1, self.length)[:, :n])
            labels.append(np.asarray(y).reshape(len(run), -1)[:, :n])
        return jnp.asarray(np.concatenate(tokens)), jnp.asarray(np.concatenate(labels))

    def fitted(self, dataset: xr.Dataset, source: str, variable: str) -> dict[str, float]:
        """Constant and exponent of a mean error against n, all schemes together.

        As :meth:`attnmarkov.experiments.sample_complexity.SampleComplexity.fitted`: the error
        over its prediction, averaged over the schemes, is fitted by ``a + b/n``.
        """
        part = dataset.isel(config=np.flatnonzero(dataset["labels"] == source))
        sizes = np.unique(part["num_prompts"])
        ratio = part["num_prompts"].values[:, None] * part[variable].values
        ratio = ratio / part[f"predicted_{variable}"].values
        mean, error = _mean(ratio)
        chosen = part["num_prompts"].values == sizes[:, None]
        mean = (chosen * mean).sum(-1) / chosen.sum(-1)
        error = np.sqrt((chosen * error**2).sum(-1)) / chosen.sum(-1)
        if not (error > 0).all():
            return dict.fromkeys(("constant", "constant_error", "slope", "slope_error"), np.nan)
        n = sizes.astype(float)
        (a, _), (a_error, _) = weighted_line(1 / n, mean, error)
        (_, slope), (_, slope_error) = weighted_line(np.log(n), np.log(mean / n), error / mean)
        return {
            "constant": a,
            "constant_error": a_error,
            "slope": slope,
            "slope_error": slope_error,
        }

    def floor(self, dataset: xr.Dataset, scheme: str, source: str) -> tuple[float, float, float]:
        """Predicted and measured excess risk of ignoring positions as n grows, and its error."""
        chosen = (dataset["scheme"] == scheme) & (dataset["labels"] == source)
        part = dataset.isel(config=np.flatnonzero(chosen))
        mean, error = _mean(part["flat_excess_risk"].values)
        predicted = float(part["predicted_floor"].values[0, 0])
        if not (error > 0).all():
            return predicted, np.nan, np.nan
        (a, _), (a_error, _) = weighted_line(1 / part["num_prompts"].values, mean, error)
        return predicted, float(a), float(a_error)

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Constants and exponents of the joint fit for both sources; floors of the other."""
        out: list[Claim] = []
        if (~np.isnan(dataset["excess_risk"].values)).sum(axis=1).min() < 2:
            return out
        r = self.num_parameters
        words = {
            (
                "prompts",
                "excess_risk",
            ): f"n × excess risk of the joint fit, in units of r/2 = {r}/2",
            ("prompts", "weight_error"): "n × squared error of β in the metric of its information, "
            f"in units of its {self.length - 1} numbers",
            ("rollouts", "excess_risk"): "n × excess risk on uniform prompts of the joint fit to "
            "rollouts, in units of tr(I_prompts I_rollouts⁺)/2",
            ("rollouts", "weight_error"): "n × squared error of β from rollouts, in the metric of "
            f"their information, in units of its {self.length - 1} numbers",
        }
        for (source, variable), claim in words.items():
            bad = dataset["status"].values[dataset["labels"].values == source] != Status.CONVERGED
            spoilt = bool(bad.mean() > _BAD)
            note = f"; {bad.mean():.1%} of fits without a maximum" if bad.any() else ""
            found = self.fitted(dataset, source, variable)
            exponent = f"exponent of {variable.replace('_', ' ')} in n, labels from {source}"
            for what, text, predicted, allowance in (
                ("constant", f"{claim}, as n grows", 1.0, 0.0),
                ("slope", f"{exponent} (± 0.05, finite n)", -1.0, 0.05),
            ):
                half = INTERVAL_99_99 * found[f"{what}_error"]
                widest = _WIDEST[variable]
                verdict = _verdict(found[what] - predicted, half, allowance, widest)
                verdict = "inconclusive" if spoilt else verdict
                out.append(
                    Claim(self.name, text + note, _SOURCE, predicted, found[what], half, verdict)
                )
        for scheme, source in itertools.product(self.schemes, ("prompts", "rollouts")):
            predicted, found, error = self.floor(dataset, scheme, source)
            half = INTERVAL_99_99 * error
            text = (
                f"{scheme}: excess risk (nats) of the fit to {source} that ignores positions, as n "
                "grows, against that of its projection"
            )
            verdict = _verdict(found - predicted, half, 0.0, 0.15 * predicted)
            out.append(Claim(self.name, text, _SOURCE, predicted, found, half, verdict))
        return out

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Learned log-weights, and learning curves on their predictions."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        weights = Figure(figsize=(3.4 * len(self.schemes), 3.6), layout="constrained")
        panels = weights.subplots(1, len(self.schemes), sharey=True, squeeze=False)[0]
        for ax, scheme in zip(panels, self.schemes, strict=True):
            chosen = (dataset["scheme"] == scheme) & (dataset["labels"] == "prompts")
            part = dataset.isel(config=np.flatnonzero(chosen))
            plot.log_weights(part, log_weights(scheme, self.length), ax=ax)
            ax.set_title(scheme, fontsize=10)
            ax.label_outer()
        weights.set_label(
            "True log-weights by lag (lines) of several teachers, and the means of those learned "
            "jointly with the transition probabilities, with bars of two standard deviations of a "
            "single fit, and the predicted ones beside them."
        )
        curves = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = curves.subplots(1, 2, sharey=True)
        plot.positional_curves(dataset.isel(config=dataset["labels"].values == "prompts"), ax=left)
        plot.positional_curves(
            dataset.isel(config=dataset["labels"].values == "rollouts"), ax=right
        )
        left.set_title("labels after independent prompts", fontsize=10)
        right.set_title("labels of rollouts", fontsize=10)
        curves.set_label(
            "Mean excess risk against the number of labels, learned from prompts (left) and from "
            "rollouts (right): fits of transition probabilities and log-weights together fall "
            "along the dashed predicted lines, fits that ignore positions level off at the dotted "
            "predicted floors."
        )
        return {"log-weights": weights, "learning-curves": curves}


def log_weights(scheme: str, length: int) -> np.ndarray:
    """``β`` by lag of a named scheme.

    >>> log_weights("alibi-0.5", 4).tolist()
    [0.0, -0.5, -1.0, -1.5]
    """
    lag = np.arange(length)
    if scheme == "irregular":
        return np.where(lag > 0, 0.8 * np.cos(2.4 * lag) + 0.1, 0.0)
    kind, _, slope = scheme.partition("-")
    try:
        value = float(slope) if kind == "alibi" else np.nan
    except ValueError:
        value = np.nan
    if not 0 <= value < np.inf:
        raise ValueError(
            f"schemes: expected 'irregular' or 'alibi-SLOPE' with a slope of at least 0, "
            f"got {scheme!r}"
        )
    return -value * lag + 0.0


class _Facts(NamedTuple):
    """What is known of a scheme's teacher before any label is drawn."""

    tokens: np.ndarray
    law: np.ndarray
    floor: dict[str, float]  # excess risk of the best fit that ignores positions
    risk: dict[str, float]  # n times the excess risk of the joint fit
    covariance: dict[str, np.ndarray]  # n times the covariance of β(1), β(2), ...


@lru_cache(maxsize=16)
def _facts(experiment: PositionalLearning, scheme: str) -> _Facts:
    """Exact for prompts; the information of rollouts is a mean over 2**14 of them."""
    size, length = experiment.num_tokens, experiment.length
    teacher, beta = experiment.teacher(scheme), log_weights(scheme, length)
    tokens = np.array(list(itertools.product(range(size), repeat=length)))
    every = Prompts.from_tokens(tokens, size)
    law = _law(np.asarray(teacher.logits, np.float64), beta, tokens)

    key = jax.random.fold_in(jax.random.key(experiment.seed), 2**31 + 1)
    start = prompts.uniform(key, 2**14, length, size)
    context = LagContext(np.exp(beta))
    drawn = rollout(teacher, key, start, experiment.rollout_steps, 2**14, context=context)
    windows, _ = window_prompts(drawn, start, length)
    information = {
        "prompts": position_information(teacher, beta, every),
        "rollouts": position_information(teacher, beta, windows),
    }
    inverse = {k: np.linalg.pinv(v, rcond=1e-9, hermitian=True) for k, v in information.items()}
    seen = (np.asarray(windows.tokens) @ size ** np.arange(length)[::-1]).astype(int)
    share = {
        "prompts": np.full(len(tokens), 1 / len(tokens)),
        "rollouts": np.bincount(seen, minlength=len(tokens)) / len(seen),
    }
    flat = {k: _projection(law, tokens, v) for k, v in share.items()}
    return _Facts(
        tokens,
        law,
        {k: _risk(law, tokens, v, np.zeros(length)) for k, v in flat.items()},
        {k: float(np.trace(information["prompts"] @ v)) / 2 for k, v in inverse.items()},
        {k: v[size * size :, size * size :] for k, v in inverse.items()},
    )


def _law(logits: np.ndarray, beta: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Next-token laws (prompt, K) after full prompts, in float64."""
    weights = np.exp(beta[::-1])[:, None] * (tokens[..., None] == np.arange(len(logits)))
    scores = np.exp(logits[tokens[:, -1]]) * weights.sum(1)
    return scores / scores.sum(-1, keepdims=True)


def _risk(law: np.ndarray, tokens: np.ndarray, logits: np.ndarray, beta: np.ndarray) -> float:
    """Mean over all prompts of the divergence of a student's law from the teacher's."""
    student = _law(logits, beta, tokens)
    held = law > 0
    return float((law[held] * np.log(law[held] / student[held])).sum() / len(law))


def _projection(law: np.ndarray, tokens: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Logits that come nearest the laws of such a share of prompts, all positions alike."""
    size = law.shape[1]
    logits = np.zeros((size, size))
    for _ in range(60):
        student = _law(logits, np.zeros(tokens.shape[1]), tokens)
        for k in range(size):
            at = tokens[:, -1] == k
            row, weight = student[at], share[at][:, None]
            slope = (weight * (row - law[at])).sum(0)
            curvature = np.diag((weight * row).sum(0)) - row.T @ (weight * row)
            logits[k] -= np.linalg.pinv(curvature, rcond=1e-9, hermitian=True) @ slope
    return logits


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over replicates and their standard errors."""
    known = (~np.isnan(values)).sum(axis=1)
    return np.nanmean(values, axis=1), np.nanstd(values, axis=1, ddof=1) / np.sqrt(known)


def _verdict(gap: float, half_width: float, allowance: float, widest: float) -> Verdict:
    """Pass if the 99.99 % interval comes within the allowance; no verdict if it is too wide."""
    if not half_width <= widest:  # NaN too
        return "inconclusive"
    return "pass" if abs(gap) <= half_width + allowance else "fail"


@partial(jax.jit, static_argnames=("num_prompts", "length"))
def _from_prompts(
    teacher: CCMC,
    context: LagContext,
    key: jax.Array,
    replicates: jax.Array,
    *,
    num_prompts: int,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    """Uniform prompts (replicate, n, length) and their labels."""

    def one(replicate: jax.Array) -> tuple[jax.Array, jax.Array]:
        draw, label = jax.random.split(jax.random.fold_in(key, replicate))
        batch = prompts.uniform(draw, num_prompts, length, teacher.num_tokens)
        weighted = Prompts(context.weighted_counts(batch), batch.last)
        assert batch.tokens is not None
        return batch.tokens, teacher.sample(label, weighted)

    return jax.vmap(one)(replicates)


@partial(jax.jit, static_argnames=("num_prompts", "length", "num_tokens"))
def _uniform(
    key: jax.Array, replicates: jax.Array, *, num_prompts: int, length: int, num_tokens: int
) -> jax.Array:
    def one(replicate: jax.Array) -> jax.Array:
        at = jax.random.fold_in(key, replicate)
        tokens = prompts.uniform(at, num_prompts, length, num_tokens).tokens
        assert tokens is not None
        return tokens

    return jax.vmap(one)(replicates)


@partial(jax.jit, static_argnames="num_tokens")
def _fits(tokens: jax.Array, y: jax.Array, *, num_tokens: int) -> PositionSolution:
    def one(tokens: jax.Array, y: jax.Array) -> PositionSolution:
        batch = Prompts.from_tokens(tokens, num_tokens)
        return solve_positions(batch, y, tolerance=_TOLERANCE, max_iterations=100)

    return jax.vmap(one)(tokens.astype(jnp.int32), y)
