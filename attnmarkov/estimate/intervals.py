"""Intervals for contrasts of logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from attnmarkov import _validate
from attnmarkov.estimate import _check, _contrasts, _guards
from attnmarkov.estimate._blocks import blocks_of
from attnmarkov.estimate._strong import Maximum, maximum
from attnmarkov.estimate.fisher import score_products
from attnmarkov.estimate.likelihood import curvature, laws
from attnmarkov.estimate.profile import profile_end
from attnmarkov.model import _leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._blocks import Blocks
    from attnmarkov.estimate.result import Fit
    from attnmarkov.model.contexts import Context
    from attnmarkov.prompts.batch import Prompts

METHODS = ("wald", "robust", "profile", "bootstrap")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals for contrasts ``S[k, a] − S[k, b]``, in nats: log-odds at equal counts.

    Attributes:
        contrasts: (m, 3) int32, each a row ``k`` and tokens ``a`` and ``b``.
        estimate: (m,) maximum likelihood; infinite where one token beats the other without
            return, NaN where the data do not compare them.
        standard_error: (m,), NaN where the estimate is not finite.
        low: (m,) lower ends.
        high: (m,) upper ends.
        level: The nominal coverage.
        method: How the ends were found.
    """

    contrasts: Int[Array, "contrast 3"]
    estimate: Float[Array, " contrast"]
    standard_error: Float[Array, " contrast"]
    low: Float[Array, " contrast"]
    high: Float[Array, " contrast"]
    level: float | Float[Array, ""]
    method: str = field(metadata={"static": True})

    def __repr__(self) -> str:
        """A table, cut after ten contrasts."""
        if not isinstance(self.low, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"Intervals(method={self.method!r}, low={self.low}, high={self.high})"
        head = f"Intervals(method={self.method!r}, level={float(np.ravel(self.level)[0]):g}, "
        if np.ndim(self.low) != 1:
            return f"{head}batch={np.shape(self.low)[:-1]}, {np.shape(self.low)[-1]} contrasts)"
        columns = [np.asarray(x) for x in (self.estimate, self.standard_error, self.low, self.high)]
        lines = [f"{head}{len(columns[0])} contrasts"]
        names = ("estimate", "std. error", "low", "high")
        lines.append("  row  contrast   " + "".join(f"{name:>12}" for name in names))
        for i, (k, a, b) in enumerate(np.asarray(self.contrasts)[:_SHOWN]):
            numbers = "".join(f"{x[i]:12.4g}" for x in columns)
            lines.append(f"  {k:>3}  {f'{a} - {b}':<11}{numbers}")
        if len(columns[0]) > _SHOWN:
            lines.append(f"  ... {len(columns[0]) - _SHOWN} more")
        return "\n".join(lines) + ")"


def intervals(
    fit: Fit,
    prompts: Prompts,
    y: ArrayLike,
    contrasts: ArrayLike | None = None,
    *,
    method: str = "wald",
    level: float = 0.95,
    key: Key[Array, ""] | None = None,
    num_replicates: int = 999,
    weights: ArrayLike | None = None,
    context: Context | None = None,
    row_groups: ArrayLike | None = None,
) -> Intervals:
    """Intervals for contrasts ``S[k, a] − S[k, b]`` around a maximum likelihood fit.

    The methods are

    * ``"wald"``: estimate ± quantile × standard error, from the inverse information.
    * ``"robust"``: the same with the sandwich ``H⁺ J H⁺``, ``J`` the summed outer products of
      scores: it holds for prompts drawn at random also when labels do not follow a CCMC (the
      contrast is then that of the CCMC nearest in KL divergence).
    * ``"profile"``: all values at which twice the likelihood, maximised over the other logits,
      falls short of the maximum by no more than the quantile of χ² with one degree. Where one
      token beats another without return, the estimate is infinite and the interval one-sided.
    * ``"bootstrap"``: percentiles of :func:`attnmarkov.estimate.bootstrap`, drawn from ``fit``.

    Whether an estimate or an end is infinite is decided from the win graph (see ``Fit``), not
    from how far a solver ran. A contrast between tokens that the data do not compare has NaN for
    estimate and standard error, NaN ends, and the whole line as its profile interval.

    Weights, context and row groups are those of the fit. Weights count as copies, so that
    standard errors shrink as they grow. On concrete inputs the loss of the fit is computed anew
    from the data, and must be what it says.

    Works under jit and vmap over ``(fit, prompts, y)`` with ``contrasts`` given (concrete, as
    ``row_groups``); where the maximum was not reached, estimates are then NaN. Profiles take
    about ten passes of O(nK² + K⁴) per end and contrast of the row with the most contrasts.

    Args:
        fit: The unpenalised fit of these prompts and labels.
        prompts: The n prompts that were fitted.
        y: (n,) their labels.
        contrasts: (m, 3) integers, a row ``k`` and tokens ``a`` and ``b`` each. By default every
            token against the least token of its component, in every row.
        method: ``"wald"``, ``"robust"``, ``"profile"`` or ``"bootstrap"``.
        level: Nominal coverage, in (0, 1).
        key: A typed JAX key, for the bootstrap.
        num_replicates: Of the bootstrap.
        weights: (n,) as the fit's; whole numbers for the bootstrap.
        context: As the fit's.
        row_groups: (K,) as the fit's.

    Raises:
        ValueError: If an argument is out of range, shapes disagree, the fit ended at its
            iteration limit or is not finite, it has a prior, its loss or its logits are not
            those of the maximum likelihood of these prompts, labels, weights, context and row
            groups, or that maximum could not be computed.

    >>> import attnmarkov as am
    >>> prompts = am.Prompts.from_tokens([[0, 1]] * 60, 2)
    >>> y = [0] * 20 + [1] * 40
    >>> intervals(am.fit(prompts, y), prompts, y, [(1, 1, 0)], method="profile")
    Intervals(method='profile', level=0.95, 1 contrasts
      row  contrast       estimate  std. error         low        high
        1  1 - 0            0.6931      0.2739      0.1692       1.249)
    """
    _validate.choice(method, "method", METHODS)
    _guards.is_fit(fit)
    _check.prompts(prompts)
    _check.vocabulary(prompts, fit.model, "fit")
    weights = _check.sample_weights(prompts, weights)
    log_counts = _check.offsets(prompts, context)
    labels = _check.labels(prompts, y, weights, log_counts)
    tied = _check.row_groups(prompts, row_groups)
    check_level(level)
    if contrasts is None:
        wanted = _contrasts.default(fit.components)
    else:
        wanted = _contrasts.check(contrasts, prompts.num_tokens)
    if _validate.is_concrete(fit) and fit.status.name in ("iteration_limit", "non_finite"):
        raise ValueError(f"fit: did not converge ({fit.status.name}). {fit.status}")

    if _validate.is_concrete(fit, prompts, labels, weights, log_counts):
        _guards.no_prior(fit)
        _guards.same_data(fit, "fit", prompts, np.asarray(labels), weights, log_counts)

    own = _contrasts.in_groups(wanted, tied)
    last = prompts.last if tied is None else tied[prompts.last]
    blocks, top, estimate, errors = _estimates(
        *_check.shared_shape(prompts.counts, last, labels, weights, log_counts),
        _contrasts.grouped(own),
        is_robust=method == "robust",
    )
    if _validate.is_concrete(top.converged) and not np.all(top.converged):
        raise ValueError(
            "fit: the solver that the intervals start from did not reach the maximum of the "
            "likelihood of these prompts and labels, so nothing can be said of its contrasts"
        )
    if _validate.is_concrete(fit, estimate, errors):
        _check_fit(fit, wanted, np.asarray(estimate), np.asarray(errors))
    quantile = normal_quantile(level, estimate.dtype)
    if method == "profile":
        low, high = _profile(blocks, top, *_by_row(own, prompts.num_tokens), quantile)
    elif method == "bootstrap":
        from attnmarkov.estimate.bootstrap import bootstrap

        if key is None:
            raise ValueError("key: the bootstrap needs a key such as jax.random.key(0)")
        fits = bootstrap(
            fit,
            prompts,
            key,
            num_replicates,
            contrasts=wanted,
            weights=weights,
            context=context,
            row_groups=row_groups,
        )
        low, high = fits.interval(level)
        low, high = (jnp.where(jnp.isfinite(estimate), end, jnp.nan) for end in (low, high))
    else:
        low, high = estimate - quantile * errors, estimate + quantile * errors
    return Intervals(jnp.asarray(wanted), estimate, errors, low, high, level, method)


@partial(jax.jit, static_argnames="is_robust")
def _estimates(
    counts: jax.Array,
    last: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    log_counts: jax.Array | None,
    groups: _contrasts.Grouped,
    *,
    is_robust: bool,
) -> tuple[Blocks, Maximum, jax.Array, jax.Array]:
    """The contrasts at the maximum and their standard errors, and what a profile starts from."""
    blocks = blocks_of(counts, last, labels, weights, log_counts)
    top = maximum(blocks)
    estimate = top.contrast(groups.contrasts)
    probs = laws(top.blocks, top.logits)[0]
    score = score_products(top.blocks, probs) if is_robust else None
    variance = _contrasts.variances(curvature(top.blocks, probs), groups, score)
    errors = jnp.where(jnp.isfinite(estimate), jnp.sqrt(variance), jnp.nan)
    return blocks, top, jnp.where(top.converged, estimate, jnp.nan), errors


@jax.jit
def _profile(
    blocks: Blocks,
    top: Maximum,
    first: jax.Array,
    second: jax.Array,
    row: jax.Array,
    turn: jax.Array,
    quantile: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Both ends of every contrast; one end of one contrast of every row at a time."""

    def ends(turn: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        first, second, side = turn
        sides = jnp.full(blocks.num_tokens, side, quantile.dtype)
        return profile_end(blocks, top, first, second, sides, quantile)

    number = first.shape[0]
    turns = (
        jnp.tile(first, (2, 1)),
        jnp.tile(second, (2, 1)),
        jnp.repeat(jnp.array([-1, 1]), number),
    )
    found = jax.lax.map(ends, turns)
    return found[turn, row], found[number + turn, row]


def _by_row(contrasts: np.ndarray, size: int) -> tuple[jax.Array, ...]:
    """Turns in which every row has at most one contrast: (turn, row) tokens, and each's place."""
    row = contrasts[:, 0]
    number = np.bincount(row, minlength=size)
    sort = np.argsort(row, kind="stable")
    turn = np.empty_like(row)
    turn[sort] = np.arange(row.size) - np.repeat(np.cumsum(number) - number, number)
    tokens = np.zeros((2, number.max(initial=0), size), np.int32)
    tokens[:, turn, row] = contrasts[:, 1:].T
    first, second, row, turn = (jnp.asarray(x, jnp.int32) for x in (*tokens, row, turn))
    return first, second, row, turn


def _check_fit(fit: Fit, contrasts: np.ndarray, estimate: np.ndarray, errors: np.ndarray) -> None:
    """Raise where the fit's contrasts are not the maximum's, by a tenth of a standard error."""
    row, a, b = contrasts.T
    logits = np.asarray(fit.model.logits, np.float64)
    usable = np.isfinite(estimate) & ~np.asarray(fit.separated)[row]
    far = usable & (abs(logits[row, a] - logits[row, b] - estimate) > 0.1 * errors)
    if far.any():
        i = int(far.argmax())
        own = logits[row[i], a[i]] - logits[row[i], b[i]]
        raise ValueError(
            f"fit: its contrast {a[i]} - {b[i]} in row {row[i]} is {own:.4g}, but the maximum "
            f"likelihood of these prompts and labels has {estimate[i]:.4g}; intervals are for "
            "maximum likelihood fits of the same data, with the same row groups"
        )


def check_level(level: Any) -> None:
    """Raise unless ``level`` is a number in (0, 1), or traced."""
    value = _leaves.number(level, "level")
    if value is not None and not 0 < value < 1:
        raise ValueError(f"level: must lie in (0, 1), got {value:g}")


def normal_quantile(level: Any, dtype: Any) -> jax.Array:
    """``z`` with ``level`` of the normal law within ±z, whose square is χ²'s quantile."""
    if _validate.is_concrete(level):
        from scipy.special import ndtri as exact

        return jnp.asarray(exact(0.5 + float(level) / 2), dtype)
    return ndtri(0.5 + jnp.asarray(level, dtype) / 2)


_SHOWN = 10
