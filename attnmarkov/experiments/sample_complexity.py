"""Sample complexity: how the error of the fitted model falls with the number of prompts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from attnmarkov import _validate
from attnmarkov.chains import zipf_law
from attnmarkov.estimate import Status
from attnmarkov.estimate._students import (
    Population,
    Source,
    Teachers,
    draw_teachers,
    fit_students,
    population,
    room_for,
)
from attnmarkov.estimate.teacher_student import learning_groups, ratio_to_prediction
from attnmarkov.experiments._statistics import INTERVAL_99_99, weighted_line
from attnmarkov.sweep import Claim, Experiment, Layout, Verdict

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_BAD = 0.01  # share of fits without a unique maximum that spoils a mean
_SOURCE = "From Self-Attention to Markov Models (ICML 2024), sample complexity"
_ERRORS = ("excess_risk", "squared_error")
_FITTED = ("constant", "constant_error", "slope", "slope_error")
_INFORMATION_PROMPTS = 2**17  # per teacher


@dataclass(frozen=True, kw_only=True)
class SampleComplexity(Experiment):
    """Teachers with Dirichlet rows; students fitted to several kinds of prompts."""

    name: ClassVar[str] = "sample-complexity"
    summary: ClassVar[str] = "error of the fitted model falls as K(K-1)/2n and tr(I⁺)/n"
    block_size: ClassVar[int] = 100
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": (4, 8, 16),
            "prompts_per_parameter": (64, 160, 400),
            "crossed": True,
            "num_replicates": 1000,
        }
    }

    num_tokens: tuple[int, ...] = (4, 6, 8)
    """Vocabulary sizes K, each at least 2."""
    lengths: tuple[int, ...] = (10, 3, 30)
    """Tokens per prompt, each at least 2."""
    distributions: tuple[str, ...] = ("uniform", "zipf", "markov")
    """Of prompts: uniform, zipf, or markov (stretches of the teacher's own chain)."""
    crossed: bool = False
    """Whether lengths and distributions are combined with each other and with every vocabulary
    size. If not, each list is gone through while the other two stay at their first entries."""
    prompts_per_parameter: tuple[int, ...] = (48, 120, 300)
    """Numbers of prompts n, in units of the K(K-1) parameters, for uniform prompts of 10 tokens;
    others get n in proportion to their predicted squared error. At least three."""
    concentration: float = 8.0
    """Dirichlet parameter of the teachers' rows."""
    num_teachers: int = 4
    """Teachers per vocabulary size; replicates take turns."""
    num_replicates: int = 500
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
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(
                f"lengths: one token teaches nothing; expected at least 2, got {self.lengths}"
            )
        if not self.distributions:
            raise ValueError("distributions: expected at least one, got none")
        for each in self.distributions:
            _validate.choice(each, "distributions", _LAWS)
        for name in ("num_teachers", "num_test_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")

    def configs(self) -> list[dict[str, Any]]:
        """One config per vocabulary size, length, distribution and number of prompts."""
        sizes, lengths, laws = self.num_tokens, self.lengths, self.distributions
        if self.crossed:
            groups = list(itertools.product(sizes, lengths, laws))
        else:
            groups = [(size, lengths[0], laws[0]) for size in sizes]
            groups += [(sizes[0], length, laws[0]) for length in lengths]
            groups += [(sizes[0], lengths[0], law) for law in laws]
        return [
            {
                "num_tokens": size,
                "length": length,
                "distribution": law,
                "num_prompts": round(m * size * (size - 1) * effort(size, length, law)),
            }
            for size, length, law in dict.fromkeys(groups)
            for m in sorted(set(self.prompts_per_parameter))
        ]

    def layout(self) -> Layout:
        """Errors of each fit, what theory predicts for their means, and its status."""
        names = (*_ERRORS, *(f"predicted_{v}" for v in _ERRORS))
        return {**dict.fromkeys(names, ((), "float64")), "status": ((), "int32")}

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Fit the given replicates; replicate ``r`` has teacher ``r mod num_teachers``."""
        size, n = int(config["num_tokens"]), int(config["num_prompts"])
        source = Source(str(config["distribution"]), int(config["length"]))
        teachers, known = _teachers(self.seed, size, self.num_teachers, self.concentration, source)
        which = np.asarray(replicates) % self.num_teachers
        found = fit_students(
            teachers,
            known,
            which,
            jax.vmap(lambda r: jax.random.fold_in(key, r))(np.asarray(replicates)),
            source=source,
            num_prompts=n,
            num_test_prompts=self.num_test_prompts,
            room=room_for(n, size, self.num_replicates),
        )
        return {
            **{k: found[k].astype(np.float64) for k in _ERRORS},
            "predicted_excess_risk": known.rank[which] / (2 * n),
            "predicted_squared_error": known.trace[which] / n,
            "status": found["status"].astype(np.int32),
        }

    def fitted(self, part: xr.Dataset, variable: str) -> dict[str, float]:
        """Constant and exponent of a mean error against n, for configs that differ in n alone.

        The error over its prediction is fitted by ``a + b/n``: ``a`` is 1 if theory has the
        constant right, ``b`` takes the next order. The exponent is the slope of log mean error
        against log n, where the next order shows as a few hundredths.

        Returns:
            ``constant``, ``slope`` and their standard errors ``constant_error``, ``slope_error``;
            NaN where a config has fewer than two fits with an error.
        """
        n = part["num_prompts"].values.astype(float)
        ratio = ratio_to_prediction(part, variable)
        known = (~np.isnan(ratio)).sum(axis=1)
        unknown: dict[str, float] = dict.fromkeys(_FITTED, np.nan)
        if known.min() < 2:
            return unknown
        mean = np.nanmean(ratio, axis=1)
        error = np.nanstd(ratio, axis=1, ddof=1) / np.sqrt(known)
        if not (error > 0).all():
            return unknown
        (a, _), (a_error, _) = weighted_line(1 / n, mean, error)
        (_, slope), (_, slope_error) = weighted_line(np.log(n), np.log(mean / n), error / mean)
        return {
            "constant": a,
            "constant_error": a_error,
            "slope": slope,
            "slope_error": slope_error,
        }

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Constants and exponents of both errors, for each size, length and distribution."""
        out: list[Claim] = []
        words = {
            "excess_risk": "n × excess risk, in units of K(K-1)/2, as n grows",
            "squared_error": "n × squared error of S, in units of tr(I⁺), as n grows",
        }
        for shared, index in learning_groups(dataset):
            part = dataset.isel(config=index)
            run = part["status"].values >= 0
            if run.sum(axis=1).min() < 2:  # an unfinished run
                continue
            bad = float((part["status"].values[run] != Status.CONVERGED).mean())
            note = f"; {bad:.1%} of fits without a unique maximum" if bad else ""
            for variable, claim in words.items():
                found = self.fitted(part, variable)
                exponent = f"exponent of {variable.replace('_', ' ')} in n (± 0.05, finite n)"
                for what, text, predicted, allowance in (
                    ("constant", claim, 1.0, 0.0),
                    ("slope", exponent, -1.0, 0.05),
                ):
                    half = INTERVAL_99_99 * found[f"{what}_error"]
                    verdict = _verdict(found[what] - predicted, half, allowance)
                    if bad > _BAD:
                        verdict = "inconclusive"
                    text = f"{self._label(shared)}: {text}{note}"
                    out.append(
                        Claim(self.name, text, _SOURCE, predicted, found[what], half, verdict)
                    )
        return out

    def _label(self, shared: dict[str, Any]) -> str:
        """``K=4``, with the length and the distribution where the experiment has several."""
        label = f"K={shared['num_tokens']}"
        if len(self.lengths) > 1:
            label += f", length {shared['length']}"
        return label if len(self.distributions) == 1 else f"{label}, {shared['distribution']}"

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Both errors against n on their predicted lines, and over their predictions."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        base = (dataset["length"] == self.lengths[0]).values
        base &= (dataset["distribution"] == self.distributions[0]).values
        part = dataset.isel(config=np.flatnonzero(base))
        for variable, ax in zip(_ERRORS, figure.subplots(1, 2), strict=True):
            plot.learning_curves(part, variable, ax=ax)
        figure.set_label(
            "Mean excess risk (left) and mean squared error of the logits (right) of maximum-"
            f"likelihood fits against the number of {self.distributions[0]} prompts of "
            f"{self.lengths[0]} tokens, for several vocabulary sizes, on dashed predicted lines."
        )
        height = 1.6 + 0.45 * len(learning_groups(dataset))
        ratios = Figure(figsize=(10, height), layout="constrained")
        left, right = ratios.subplots(1, 2, sharey=True)
        plot.learning_ratios(dataset, "excess_risk", ax=left)
        plot.learning_ratios(dataset, "squared_error", ax=right)
        ratios.set_label(
            "Mean excess risk (left) and mean squared error (right) over their predictions, for "
            "every vocabulary size, prompt length and distribution; darker for more prompts. "
            "Theory says 1 (dashed) as their number grows."
        )
        return {"learning-curves": figure, "learning-ratios": ratios}


def _verdict(gap: float, half_width: float, allowance: float) -> Verdict:
    """Pass if the 99.99 % interval comes within the allowance; no verdict past ± 0.1."""
    if not half_width <= 0.1:  # NaN too
        return "inconclusive"
    return "pass" if abs(gap) <= half_width + allowance else "fail"


# The law of one token that stands for a distribution when sizes of samples are chosen.
_LAWS = {
    "uniform": lambda size: np.full(size, 1 / size),
    "zipf": lambda size: np.asarray(zipf_law(size), np.float64),
    "markov": lambda size: np.full(size, 1 / size),
}


def effort(num_tokens: int, length: int, distribution: str) -> float:
    """How many prompts say as much as one uniform prompt of 10 tokens, to one decimal.

    ``tr(I⁺)`` over that of uniform prompts of length 10, for a teacher without preferences.

    >>> [effort(4, length, "uniform") for length in (3, 10, 30)]
    [1.6, 1.0, 0.9]
    """
    reference = _indifferent_trace(np.full(num_tokens, 1 / num_tokens), 10)
    trace = _indifferent_trace(_LAWS[distribution](num_tokens), length)
    return round(float(trace / reference), 1)


def _indifferent_trace(law: np.ndarray, length: int) -> float:
    """``tr(I⁺)`` for independent tokens and a teacher with uniform ``P``.

    With ``m = L − 1`` tokens before the last one, ``k``, the entries off the diagonal of its
    information are ``−π_k E[n_a n_b] / L²``, ``E[n_a n_b] = m(m−1) π_a π_b + m (1_{a=k} π_b +
    1_{b=k} π_a)``.
    """
    m, total = length - 1, 0.0
    for k, chance in enumerate(law):
        own = np.eye(len(law))[k]
        products = m * (m - 1) * np.outer(law, law) + m * (np.outer(own, law) + np.outer(law, own))
        weights = chance / length**2 * products * (1 - np.eye(len(law)))
        information = np.diag(weights.sum(1)) - weights
        total += (1 / np.linalg.eigvalsh(information)[1:]).sum()
    return total


@lru_cache(maxsize=64)
def _teachers(
    seed: int, size: int, number: int, concentration: float, source: Source
) -> tuple[Teachers, Population]:
    """The teachers of a size, the same for every source, and what the source can teach of them."""
    key = jax.random.fold_in(jax.random.key(seed), size)
    teachers = draw_teachers(key, number, size, concentration)
    sample = jax.random.fold_in(key, number)
    return teachers, population(teachers, source, None, sample, _INFORMATION_PROMPTS)
