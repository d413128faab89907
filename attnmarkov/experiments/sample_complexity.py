"""Sample complexity: how the error of the fitted model falls with the number of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import prompts
from attnmarkov.chains import random_transition_matrix
from attnmarkov.estimate import Status, excess_risk, fisher_information, fit, information_trace
from attnmarkov.experiments._statistics import INTERVAL_99_99, weighted_line
from attnmarkov.model import CCMC
from attnmarkov.sweep import Claim, Experiment, Layout, Verdict

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_BAD = 0.01  # share of fits without a unique maximum that spoils a mean
_SOURCE = "From Self-Attention to Markov Models (ICML 2024), sample complexity"


@dataclass(frozen=True, kw_only=True)
class SampleComplexity(Experiment):
    """Teachers with Dirichlet rows, uniform prompts, students fitted by maximum likelihood."""

    name: ClassVar[str] = "sample-complexity"
    summary: ClassVar[str] = "error of the fitted model falls as K(K-1)/2n and tr(I⁺)/n"
    block_size: ClassVar[int] = 100
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": (4, 8, 16),
            "prompts_per_parameter": (64, 128, 256, 512, 1024),
            "num_replicates": 1000,
        }
    }

    num_tokens: tuple[int, ...] = (4, 6, 8)
    """Vocabulary sizes K, each at least 2."""
    prompts_per_parameter: tuple[int, ...] = (48, 120, 300)
    """Numbers of prompts n, in units of the K(K-1) parameters; at least three."""
    length: int = 10
    """Tokens per prompt."""
    concentration: float = 8.0
    """Dirichlet parameter of the teachers' rows."""
    num_teachers: int = 4
    """Teachers per vocabulary size; replicates take turns."""
    num_replicates: int = 600
    """Fits per grid point."""
    num_test_prompts: int = 4096
    """Fresh prompts on which a fit's excess risk is measured."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if not self.num_tokens or min(self.num_tokens) < 2:
            raise ValueError(f"num_tokens: expected sizes of at least 2, got {self.num_tokens}")
        sizes = self.prompts_per_parameter
        if len(set(sizes)) < 3 or min(sizes) < 1:
            raise ValueError(
                f"prompts_per_parameter: expected three or more sizes of at least 1, got {sizes}"
            )
        if not self.concentration > 0:
            raise ValueError(f"concentration: must be above 0, got {self.concentration}")
        if self.length < 2:
            raise ValueError(f"length: one token teaches nothing; at least 2, got {self.length}")
        for name in ("num_teachers", "num_test_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")

    def configs(self) -> list[dict[str, Any]]:
        """One config per vocabulary size and number of prompts."""
        return [
            {"num_tokens": size, "num_prompts": m * size * (size - 1)}
            for size in self.num_tokens
            for m in sorted(set(self.prompts_per_parameter))
        ]

    def layout(self) -> Layout:
        """Errors of each fit, what theory predicts for n times their mean, and its status."""
        names = ("excess_risk", "squared_error", "predicted_excess_risk", "predicted_squared_error")
        return {**dict.fromkeys(names, ((), "float64")), "status": ((), "int32")}

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Fit the given replicates; replicate ``r`` has teacher ``r mod num_teachers``."""
        size = int(config["num_tokens"])
        teachers, traces = _teachers(
            self.seed, size, self.num_teachers, self.concentration, self.length
        )
        risk, error, status = _replicates(
            jnp.asarray(teachers),
            key,
            jnp.asarray(replicates),
            num_prompts=int(config["num_prompts"]),
            length=self.length,
            num_test_prompts=self.num_test_prompts,
        )
        return {
            "excess_risk": np.asarray(risk, np.float64),
            "squared_error": np.asarray(error, np.float64),
            "predicted_excess_risk": np.full(len(replicates), size * (size - 1) / 2),
            "predicted_squared_error": traces[replicates % self.num_teachers],
            "status": np.asarray(status, np.int32),
        }

    def fitted(self, dataset: xr.Dataset, size: int, variable: str) -> dict[str, float]:
        """Constant and exponent of a mean error against n, for one vocabulary size.

        The error over its prediction, ``n·error / constant``, is fitted by ``a + b/n``: ``a``
        is 1 if theory has the constant right, ``b`` takes the next order. The exponent is the
        slope of log mean error against log n, where the next order shows as a few hundredths.

        Returns:
            ``constant``, ``slope`` and their standard errors ``constant_error``, ``slope_error``.
        """
        part = dataset.isel(config=np.flatnonzero(dataset["num_tokens"] == size))
        n = part["num_prompts"].values.astype(float)
        ratio = n[:, None] * part[variable].values / part[f"predicted_{variable}"].values
        known = (~np.isnan(ratio)).sum(axis=1)
        mean = np.nanmean(ratio, axis=1)
        error = np.nanstd(ratio, axis=1, ddof=1) / np.sqrt(known)
        if not (error > 0).all():
            return dict.fromkeys(("constant", "constant_error", "slope", "slope_error"), np.nan)
        (a, _), (a_error, _) = weighted_line(1 / n, mean, error)
        (_, slope), (_, slope_error) = weighted_line(np.log(n), np.log(mean / n), error / mean)
        return {
            "constant": a,
            "constant_error": a_error,
            "slope": slope,
            "slope_error": slope_error,
        }

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Constants and exponents of both errors, for each vocabulary size."""
        out: list[Claim] = []
        words = {
            "excess_risk": "n × excess risk, in units of K(K-1)/2, as n grows",
            "squared_error": "n × squared error of S, in units of tr(I⁺), as n grows",
        }
        for size in self.num_tokens:
            part = dataset.isel(config=np.flatnonzero(dataset["num_tokens"] == size))
            if (~np.isnan(part["excess_risk"].values)).sum(axis=1).min() < 2:
                continue
            bad = float((part["status"].values != Status.CONVERGED).mean())
            note = f"; {bad:.1%} of fits without a unique maximum" if bad else ""
            for variable, claim in words.items():
                found = self.fitted(dataset, size, variable)
                exponent = f"exponent of {variable.replace('_', ' ')} in n (± 0.05, finite n)"
                for what, text, predicted, allowance in (
                    ("constant", claim, 1.0, 0.0),
                    ("slope", exponent, -1.0, 0.05),
                ):
                    half = INTERVAL_99_99 * found[f"{what}_error"]
                    verdict = _verdict(found[what] - predicted, half, allowance)
                    if bad > _BAD:
                        verdict = "inconclusive"
                    text = f"K={size}: {text}{note}"
                    out.append(
                        Claim(self.name, text, _SOURCE, predicted, found[what], half, verdict)
                    )
        return out

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Both errors against n on their predicted lines."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot.learning_curves(dataset, "excess_risk", ax=left)
        plot.learning_curves(dataset, "squared_error", ax=right)
        figure.set_label(
            "Mean excess risk (left) and mean squared error of the logits (right) of maximum-"
            "likelihood fits against the number of prompts, for several vocabulary sizes, on "
            "dashed predicted lines."
        )
        return {"learning-curves": figure}


def _verdict(gap: float, half_width: float, allowance: float) -> Verdict:
    """Pass if the 99.99 % interval comes within the allowance; no verdict past ± 0.1."""
    if not half_width <= 0.1:  # NaN too
        return "inconclusive"
    return "pass" if abs(gap) <= half_width + allowance else "fail"


@lru_cache(maxsize=32)
def _teachers(
    seed: int, size: int, number: int, concentration: float, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Teachers' logits (teacher, K, K) and tr(I⁺) of one sample, on 2**17 uniform prompts."""
    key = jax.random.fold_in(jax.random.key(seed), size)
    logits, traces = [], []
    for i in range(number):
        p = random_transition_matrix(jax.random.fold_in(key, i), size, concentration)
        teacher = CCMC.from_transition_matrix(p)
        sample = prompts.uniform(jax.random.fold_in(key, number + i), 2**17, length, size)
        logits.append(np.asarray(teacher.logits))
        traces.append(float(information_trace(fisher_information(teacher, sample)).trace))
    return np.stack(logits), np.array(traces)


@partial(jax.jit, static_argnames=("num_prompts", "length", "num_test_prompts"))
def _replicates(
    teachers: jax.Array,
    key: jax.Array,
    replicates: jax.Array,
    *,
    num_prompts: int,
    length: int,
    num_test_prompts: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    size = teachers.shape[-1]

    def one(replicate: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        draw, label, test = jax.random.split(jax.random.fold_in(key, replicate), 3)
        teacher = CCMC(teachers[replicate % teachers.shape[0]])
        train = prompts.uniform(draw, num_prompts, length, size)
        student = fit(train, teacher.sample(label, train))
        fresh = prompts.uniform(test, num_test_prompts, length, size)
        risk = excess_risk(teacher, student.model, fresh)
        error = ((student.model.logits - teacher.logits) ** 2).sum()
        return risk, error, student.status.code

    return jax.vmap(one)(replicates)
