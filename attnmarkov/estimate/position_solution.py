"""A CCMC and its positional weights under jit and vmap: the solver, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._position_solver import design_of, maximise
from attnmarkov.estimate.status import Status
from attnmarkov.model.ccmc import CCMC

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.prompts.batch import Prompts

MAX_ITERATIONS = {"newton": 200, "lbfgs": 500}
TOLERANCE = {"float32": 4e-8, "float64": 1e-10}
_LONGEST_ABSOLUTE = 64
_SENTENCES = {
    Status.CONVERGED: "The solver converged to a maximum, and the prompts identify every logit and "
    "every log-weight.",
    Status.SEPARATED: "The data are separated: the likelihood has no finite maximum, because in "
    "some row some tokens are never chosen over others, or because it is largest where some "
    "positions have weight zero. Logits of separated rows are where the solver stopped; a prior "
    "makes everything finite.",
    Status.NOT_IDENTIFIED: "The solver converged, but the prompts do not identify everything: some "
    "tokens never stand together in view, or some log-weights can be traded against others or "
    "against logits. The standard errors of these are NaN.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class PositionStatus(Status):
    """How a fit with positions ended; the codes are those of :class:`Status`.

    The likelihood is not concave in logits and log-weights together, so that "converged" speaks
    of a maximum, found from the best fit without positions, and not of the only one.
    """

    # Equality is elementwise, so there is no hash to agree with it.
    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """A sentence."""
        code = self.code
        if not isinstance(code, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return super().__str__()
        return super().__str__() if code.ndim else _SENTENCES.get(int(code), super().__str__())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PositionSolution:
    """A CCMC and positional weights, as the solver left them.

    Attributes:
        model: The CCMC. Logits sum to zero over every component of every row.
        log_weights: As :attr:`attnmarkov.estimate.PositionFit.log_weights`, all finite, relative
            to the last token; those that run to infinity are where the solver stopped.
        nll: Mean negative log-likelihood per label, in nats, without the penalty.
        status: How the fit ended, as far as can be told here.
        components: (K, K) int32, as in :class:`~attnmarkov.estimate.Fit`.
        separated: (K,) bool, rows whose likelihood has no finite maximum.
        unbounded: Like ``log_weights``, bool: positions that are seen and never hold the label,
            so that their weight is best at zero. All False of ``"decay"`` and with a prior.
        flat_model: The best CCMC with all visible positions weighing alike.
        flat_nll: Its mean negative log-likelihood.
        iterations: Iterations taken.
        positions: ``"lag"``, ``"decay"`` or ``"absolute"``.
    """

    model: CCMC
    log_weights: Float[Array, ...]
    nll: Float[Array, ""]
    status: PositionStatus
    components: Int[Array, "row token"]
    separated: Bool[Array, " row"]
    unbounded: Bool[Array, ...]
    flat_model: CCMC
    flat_nll: Float[Array, ""]
    iterations: Int[Array, ""]
    positions: str = field(metadata={"static": True})

    def __repr__(self) -> str:
        """How it ended and its loss; how many ended in which way for a batch."""
        if not isinstance(self.nll, jax.Array | np.ndarray) or not _validate.is_concrete(self):
            return f"PositionSolution(positions={self.positions!r}, model={self.model}, ...)"
        if self.nll.ndim:
            return f"PositionSolution(positions={self.positions!r}, {self.status!r})"
        return (
            f"PositionSolution({self.status.name} after {int(self.iterations)} iterations, "
            f"positions={self.positions!r}, nll={float(self.nll):.4f} nats per label "
            f"({float(self.flat_nll):.4f} without positions))"
        )


def solve_positions(
    prompts: Prompts,
    y: ArrayLike,
    *,
    positions: Literal["lag", "decay", "absolute"] = "lag",
    num_lags: int | None = None,
    solver: Literal["newton", "lbfgs"] = "newton",
    prior: ArrayLike | None = None,
    tolerance: ArrayLike | None = None,
    max_iterations: ArrayLike | None = None,
) -> PositionSolution:
    """The core of :func:`fit_positions`, for use under jit and vmap: no standard errors.

    ``status`` is decided from the data and the solver, the gravest first: the loss is not finite
    (a label stands at no visible position); the data are separated, because the win graph of a
    row is not strongly connected, or because a position that is seen never holds the label; the
    solver reached its limit; tokens of a row never stand together in view.

    Two things need the solution and float64, and are left to :func:`fit_positions`: that a
    position which does hold labels is nevertheless best without weight, and that log-weights
    can be traded against each other or against logits. The status is then "converged" here.
    A sign of the former is a log-weight many nats below the others.

    Args:
        prompts: n prompts over K tokens, with token ids.
        y: (n,) integer labels; each stands at a visible position of its prompt.
        positions: As in :func:`fit_positions`.
        num_lags: Of ``"lag"``, how many lags have a weight. If None, as many as the array of
            tokens has columns.
        solver: As in :func:`fit_positions`.
        prior: Precision τ >= 0, as in :func:`fit_positions`; may be traced.
        tolerance: As in :func:`fit_positions`; may be traced.
        max_iterations: As in :func:`fit_positions`; may be traced.

    Returns:
        A :class:`PositionSolution`.

    Raises:
        ValueError: If only counts of the prompts are known, an option is unknown, ``num_lags``
            is given for other positions than ``"lag"``, the array of tokens has more than 64
            columns with ``"absolute"``, or a concrete number or label is out of range.

    >>> import jax, attnmarkov as am
    >>> teacher = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.4, 0.6]])
    >>> prompts = am.prompts.uniform(jax.random.key(0), 20_000, 4, 2)
    >>> weighted = am.LagContext([1.0, 3.0, 0.5, 1.0]).weighted_counts(prompts)
    >>> y = teacher.sample(jax.random.key(1), am.Prompts(weighted, prompts.last))
    >>> jax.jit(solve_positions)(prompts, y).status
    Status(converged)
    """
    check(prompts, positions, num_lags, solver)
    room = jnp.asarray(prompts.tokens).shape[-1]
    check_room(positions, room)
    labels = _check.labels(prompts, y)
    lags = room if num_lags is None else num_lags
    tolerance, max_iterations = limits(prior, tolerance, max_iterations, solver)
    dtype = jnp.result_type(float)
    design = design_of(positions, lags)
    strength = jnp.asarray(0.0 if prior is None else prior, dtype)
    found = maximise(
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        jnp.asarray(prompts.last),
        labels,
        jnp.asarray(design, dtype),
        strength,
        jnp.asarray(tolerance, dtype),
        jnp.asarray(max_iterations, jnp.int32),
        *cold(design, prompts.num_tokens),
        num_tokens=prompts.num_tokens,
        solver=solver,
    )
    logits, theta, loss = found.logits, found.theta, found.loss
    n, proper = prompts.num_prompts, strength > 0
    penalties = [
        strength / (2 * n) * ((s**2).sum() + (b**2).sum())
        for s, b in ((logits, theta), (found.flat_logits, 0 * theta))
    ]
    nll, flat_nll = loss - penalties[0], found.flat_loss - penalties[1]
    if positions == "decay":  # the best slope >= 0 is 0
        flat = theta[0] <= 0
        logits = jnp.where(flat, found.flat_logits, logits)
        theta, nll = jnp.where(flat, 0, theta), jnp.where(flat, flat_nll, nll)
    table = jnp.einsum(
        "glm,m->gl", jnp.asarray(design, dtype), theta, precision=jax.lax.Precision.HIGHEST
    )
    never = found.never & ~proper & (positions != "decay")
    status = Status.decide(
        finite=jnp.isfinite(nll) & jnp.isfinite(logits).all() & jnp.isfinite(theta).all(),
        solved=found.converged,
        separated=(found.separated.any() | never.any()) & ~proper,
        identified=(found.components == 0).all() | proper,
    )
    return PositionSolution(
        model=CCMC(logits),
        log_weights=by_position(table, positions, 0.0),
        nll=nll,
        status=PositionStatus(status.code),
        components=found.components,
        separated=found.separated,
        unbounded=by_position(never, positions, False),
        flat_model=CCMC(found.flat_logits),
        flat_nll=flat_nll,
        iterations=found.iterations,
        positions=positions,
    )


def by_position(table: Array, positions: str, beyond: float) -> Array:
    """What belongs to every group and lag, as the user sees it."""
    if positions != "absolute":
        return table[0]
    position, column = np.indices((len(table), len(table)))
    held = position <= column
    return jnp.where(held, table[column, np.where(held, column - position, 0)], beyond)


def cold(design: np.ndarray, size: int) -> tuple[Array, tuple[Array, Array], Array]:
    """Nothing masked, and the start at 0."""
    dtype = jnp.result_type(float)
    start = jnp.zeros((size, size), dtype), jnp.zeros(design.shape[-1], dtype)
    return jnp.zeros(design.shape[:2], bool), start, jnp.array(False)


def check(prompts: Prompts, positions: str, num_lags: int | None, solver: str) -> None:
    """Raise unless the options are known and the prompts have token ids."""
    _validate.choice(positions, "positions", ("lag", "decay", "absolute"))
    _validate.choice(solver, "solver", MAX_ITERATIONS)
    _check.prompts(prompts)
    if prompts.tokens is None or prompts.lengths is None:
        raise ValueError(
            "prompts: positional weights are learned from token ids, but only the counts of these "
            "prompts are known"
        )
    if num_lags is not None and positions != "lag":
        raise ValueError(f"num_lags: only positions='lag' can be cut off, not {positions!r}")
    if num_lags is not None:
        _validate.integer(num_lags, "num_lags", minimum=1)


def check_room(positions: str, room: int) -> None:
    """Raise if there are too many absolute positions."""
    if positions == "absolute" and room > _LONGEST_ABSOLUTE:
        raise ValueError(
            f"prompts: have up to {room} tokens; absolute positions, {room * (room - 1) // 2} "
            f"numbers, are learned up to {_LONGEST_ABSOLUTE}"
        )


def limits(
    prior: ArrayLike | None,
    tolerance: ArrayLike | None,
    max_iterations: ArrayLike | None,
    solver: str,
) -> tuple[ArrayLike, ArrayLike]:
    """Tolerance and iterations, the defaults for None; raise if a concrete number is no good."""
    for value, name in ((prior, "prior"), (tolerance, "tolerance")):
        if value is None or not _validate.is_concrete(value):
            continue
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected a number, got {value!r:.80}") from None
        if not (np.isfinite(number) and number >= 0 and (number > 0 or name == "prior")):
            bound = "of at least 0" if name == "prior" else "above 0"
            raise ValueError(f"{name}: must be a finite number {bound}, got {number}")
    if max_iterations is not None and _validate.is_concrete(max_iterations):
        _validate.integer(max_iterations, "max_iterations", minimum=1)
    return (
        TOLERANCE[str(jnp.result_type(float))] if tolerance is None else tolerance,
        MAX_ITERATIONS[solver] if max_iterations is None else max_iterations,
    )
