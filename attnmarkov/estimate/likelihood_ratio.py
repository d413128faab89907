"""The likelihood-ratio test of nested models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate.result import Fit
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from attnmarkov.prompts.batch import Prompts

_ROUNDING = 1e-3  # of a statistic that should not be negative: logits are known to 1e-6
_ELEMENTS = 2**22  # laws that are held in float64 at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LikelihoodRatioTest:
    """What the data say against a null model that is nested in a full one.

    Attributes:
        statistic: Twice the gain in log-likelihood, in nats.
        df: Degrees of freedom: how many more parameters the full model has.
        p_value: The chance of at least this statistic under the null, by its asymptotic law, χ²
            with ``df`` degrees of freedom.
    """

    statistic: float
    df: int
    p_value: float

    def __repr__(self) -> str:
        """The test in a sentence."""
        return (
            f"LikelihoodRatioTest(twice the log-likelihood ratio is {self.statistic:.4g} on "
            f"{self.df} degree{'s' * (self.df != 1)} of freedom: p = {self.p_value:.3g})"
        )


def likelihood_ratio_test(
    null: Fit | CCMC,
    full: Fit | CCMC,
    prompts: Prompts,
    y: ArrayLike,
    *,
    df: int | None = None,
) -> LikelihoodRatioTest:
    """Test a null model against a full one that contains it (Wilks).

    Both are maximum likelihood fits of these prompts and labels, without a prior; or a
    :class:`~attnmarkov.CCMC`, a model fixed before the data were seen. The p-value is asymptotic:
    it asks for many labels per parameter.

    Runs on the host, in float64, on concrete inputs: the log-ratios of single prompts are summed,
    so that nothing large is subtracted.

    Args:
        null: The smaller model.
        full: The larger one.
        prompts: The n prompts.
        y: (n,) labels.
        df: Degrees of freedom. By default the parameters that the data identify in ``full``
            less those in ``null``; a CCMC has none.

    Raises:
        ValueError: If an input is traced, a fit is separated, did not converge or is not finite
            (it is named), the degrees of freedom are not positive, the full model gives a label
            probability zero, or the null model fits better, by more than rounding: then it is not
            nested in the full one, or a fit is not of these data or has a prior.

    References:
        Wilks, Annals of Mathematical Statistics 9 (1938).

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 1]] * 60, 2)
    >>> y = [0] * 20 + [1] * 40
    >>> even = am.CCMC.from_logits([[0.0, 0.0], [0.0, 0.0]])
    >>> likelihood_ratio_test(even, am.fit(prompts, y), prompts, y)
    LikelihoodRatioTest(twice the log-likelihood ratio is 6.796 on 1 degree of freedom: p = 0.00914)
    """
    from scipy import stats

    if not _validate.is_concrete(null, full, prompts, y):
        raise ValueError("null, full, prompts, y: the test needs concrete inputs, not traced ones")
    _check.prompts(prompts)
    models = [_model(x, name, prompts) for x, name in ((null, "null"), (full, "full"))]
    labels = np.asarray(_check.labels(prompts, y))
    if df is None:
        df = _num_parameters(full) - _num_parameters(null)
        if df < 1:
            raise ValueError(
                f"full: has {_num_parameters(full)} parameters, null has {_num_parameters(null)}: "
                "the full model must have more, or df must be given"
            )
    df = _validate.integer(df, "df", minimum=1)

    statistic = 2 * _log_ratio(models[0], models[1], prompts, labels)
    if np.isnan(statistic) or statistic == -np.inf:
        raise ValueError("full: gives a label probability zero")
    if statistic < -_ROUNDING:
        raise ValueError(
            f"null: has the greater likelihood, by {-statistic / 2:.4g} nats; it is not nested in "
            "the full model, or a fit is not the maximum likelihood of these prompts and labels"
        )
    statistic = max(statistic, 0.0)
    return LikelihoodRatioTest(statistic, df, float(stats.chi2.sf(statistic, df)))


def _model(value: Any, name: str, prompts: Prompts) -> CCMC:
    if not isinstance(value, Fit | CCMC):
        raise ValueError(f"{name}: expected a Fit or a CCMC, got {type(value).__name__}")
    model = value.model if isinstance(value, Fit) else value
    _check.vocabulary(prompts, model, name)
    if isinstance(value, Fit) and value.status.name not in ("converged", "not_identified"):
        raise ValueError(f"{name}: is {value.status.name.replace('_', ' ')}. {value.status}")
    return model


def _num_parameters(value: Fit | CCMC) -> int:
    return int(value.num_parameters) if isinstance(value, Fit) else 0


def _log_ratio(null: CCMC, full: CCMC, prompts: Prompts, y: np.ndarray) -> float:
    """``Σ log p_full(y) − log p_null(y)``, prompt by prompt."""
    few, many = (np.asarray(model.logits, np.float64) for model in (null, full))
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    total, step = 0.0, max(1, _ELEMENTS // counts.shape[1])
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        k, label = last[part], y[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_n = np.log(counts[part].astype(np.float64))
            own = many[k, label] - few[k, label]
            total += (own - _log_total(log_n + many[k]) + _log_total(log_n + few[k])).sum()
    return float(total)


def _log_total(scores: np.ndarray) -> np.ndarray:
    top = scores.max(axis=1)
    return top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
