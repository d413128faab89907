"""The likelihood-ratio test of nested models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check, _guards
from attnmarkov.estimate.result import Fit
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts

_ROUNDING = 1e-3  # of a statistic that should not be negative: logits are known to 1e-6


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
    weights: ArrayLike | None = None,
    context: Context | None = None,
) -> LikelihoodRatioTest:
    """Test a null model against a full one that contains it (Wilks).

    Both are maximum likelihood fits of these prompts and labels, with these weights and in this
    context, without a prior (``row_groups`` may tie rows of either); or a
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
        weights: (n,) the weights of both fits; as everywhere they count as copies.
        context: The context of both fits.

    Raises:
        ValueError: If an input is traced, a fit is separated, did not converge or is not finite
            (it is named), has a prior or another loss on these data than it had when it was
            fitted, the degrees of freedom are not positive, the full model gives a label
            probability zero, or the null model fits better, by more than rounding: then it is not
            nested in the full one.

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

    if not _validate.is_concrete(null, full, prompts, y, weights, context):
        raise ValueError("null, full, prompts, y: the test needs concrete inputs, not traced ones")
    _check.prompts(prompts)
    models = [_model(x, name, prompts) for x, name in ((null, "null"), (full, "full"))]
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    data = prompts, np.asarray(_check.labels(prompts, y, weights, log_counts)), weights, log_counts
    for value, name in ((null, "null"), (full, "full")):
        if isinstance(value, Fit):
            _guards.no_prior(value, name)
            _guards.same_data(value, name, *data)
    if df is None:
        df = _num_parameters(full) - _num_parameters(null)
        if df < 1:
            raise ValueError(
                f"full: has {_num_parameters(full)} parameters, null has {_num_parameters(null)}: "
                "the full model must have more, or df must be given"
            )
    df = _validate.integer(df, "df", minimum=1)

    (few, weight, _), (many, _, _) = (_guards.log_probs(model, *data) for model in models)
    with np.errstate(invalid="ignore"):
        statistic = 2 * float(weight @ (many - few))
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
