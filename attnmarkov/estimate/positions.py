"""Maximum likelihood of a CCMC and its positional weights together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._position_solver import by_lag, design_of, maximise, unmasked
from attnmarkov.estimate._weightless import Sample, referred, weightless
from attnmarkov.estimate.position_solution import (
    PositionStatus,
    by_position,
    check,
    check_room,
    cold,
    limits,
)
from attnmarkov.estimate.status import Status
from attnmarkov.model.ccmc import CCMC
from attnmarkov.model.contexts import DecayContext, LagContext
from attnmarkov.model.positions import PositionContext
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
    from numpy.typing import ArrayLike

    from attnmarkov.estimate._position_solver import Optimum
    from attnmarkov.model.contexts import Context
    from attnmarkov.rollout.trajectory import Trajectory

_NO_INFORMATION = 1e-9  # eigenvalue of the information, scaled to a diagonal of one


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PositionFit:
    """A fitted CCMC with its positional weights, how the fit ended, and how sure it is.

    Attributes:
        model: The fitted CCMC. Logits sum to zero over every component of every row.
        context: The fitted positional weights, a :class:`~attnmarkov.LagContext`,
            :class:`~attnmarkov.DecayContext` or :class:`~attnmarkov.PositionContext`.
        status: How the fit ended, a code; ``str(fit.status)`` is a sentence.
        nll: Mean negative log-likelihood per label, in nats, without the penalty.
        log_weights: (num_lags,) ``β`` by lag, with ``β[0] = 0``: log-weights relative to that of
            the last token. Of ``"absolute"``: (N, N) as ``bias`` of
            :class:`~attnmarkov.PositionContext`, with 0 for the last position of every length.
            Minus infinity where ``unbounded`` (of ``"lag"`` and ``"absolute"``); if that holds of
            the last token, the reference, 0, is the first lag that has a weight.
        log_weight_errors: Standard errors of ``log_weights``: 0 for the reference, NaN where
            the prompts do not identify the log-weight or it has no finite maximum, and where no
            such position exists.
        standard_errors: (K, K) of ``model.logits``, from the joint information; NaN as in
            :class:`~attnmarkov.estimate.Fit`, and where a logit can be traded against
            log-weights.
        components: (K, K) int32, as in :class:`~attnmarkov.estimate.Fit`, of the tokens that
            stand at a visible position whose weight is not zero.
        separated: (K,) bool, rows whose likelihood has no finite maximum.
        unbounded: Like ``log_weights``, bool: which have no finite maximum, their weight being
            best at zero. ``model``, ``context`` and ``nll`` are then those of the fit without
            these positions, which is the supremum of the likelihood near by; such a context
            cannot weigh a history that holds no other positions.
        num_parameters: How many parameters the prompts identify, weights found to be zero
            included.
        num_position_parameters: How many of them are positional.
        flat_model: The best CCMC with all visible positions weighing alike.
        flat_nll: Its mean negative log-likelihood.
        likelihood_ratio_statistic: ``2n (flat_nll − nll)`` in float64, for the hypothesis
            "positions weigh alike".
        num_prompts: Number of labels n.
        iterations: Iterations taken.
        positions: ``"lag"``, ``"decay"`` or ``"absolute"``.
    """

    model: CCMC
    context: Context
    status: PositionStatus
    nll: Float[Array, ""]
    log_weights: Float[Array, ...]
    log_weight_errors: Float[Array, ...]
    standard_errors: Float[Array, "row token"]
    components: Int[Array, "row token"]
    separated: Bool[Array, " row"]
    unbounded: Bool[Array, ...]
    flat_model: CCMC
    flat_nll: Float[Array, ""]
    iterations: Int[Array, ""]
    likelihood_ratio_statistic: float
    num_parameters: int = field(metadata={"static": True})
    num_position_parameters: int = field(metadata={"static": True})
    num_prompts: int = field(metadata={"static": True})
    positions: str = field(metadata={"static": True})

    @property
    def likelihood_ratio_p_value(self) -> float:
        """The chance of at least this statistic if positions weigh alike; of fits with no prior.

        By the asymptotic law: chi-square with ``num_position_parameters`` degrees of freedom; of
        ``"decay"``, whose slope cannot be negative, 0 in half of the cases and chi-square with one
        degree of freedom in the other half. 1 if nothing positional is identified.
        """
        from scipy import stats

        statistic, df = float(self.likelihood_ratio_statistic), self.num_position_parameters
        if df == 0 or (self.positions == "decay" and statistic <= 0):
            return 1.0
        return float(stats.chi2.sf(statistic, df)) / (2 if self.positions == "decay" else 1)

    def __repr__(self) -> str:
        """How the fit ended, its loss, and what to distrust."""
        if not isinstance(self.log_weights, jax.Array | np.ndarray) or not _validate.is_concrete(
            self
        ):
            return f"PositionFit(positions={self.positions!r}, model={self.model}, ...)"
        text = (
            f"PositionFit({self.status.name} after {int(self.iterations)} iterations, "
            f"positions={self.positions!r}, num_tokens={self.model.num_tokens}, "
            f"nll={float(self.nll):.4f} nats per label ({float(self.flat_nll):.4f} without "
            f"positions), {self.num_parameters} parameters identified, "
            f"{self.num_position_parameters} of them positional"
        )
        unknown = np.isnan(self.log_weight_errors) & ~np.asarray(self.unbounded)
        if self.positions == "absolute":
            room = len(unknown)
            unknown &= np.arange(room)[:, None] < np.arange(room)
        for which, words in ((unknown, "not identified"), (self.unbounded, "without maximum")):
            found = np.argwhere(which)
            if found.size and self.positions == "absolute":
                text += f", {len(found)} log-weights {words}"
            elif found.size:
                text += f", lags {found[:, 0].tolist()} {words}"
        rows = np.flatnonzero(self.separated)
        return text + (f", separated rows {rows.tolist()})" if rows.size else ")")


def fit_positions(
    prompts: Prompts,
    y: ArrayLike,
    *,
    positions: Literal["lag", "decay", "absolute"] = "lag",
    num_lags: int | None = None,
    solver: Literal["newton", "lbfgs"] = "newton",
    prior: float | None = None,
    information: Literal["expected", "observed"] = "expected",
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> PositionFit:
    """Fit a CCMC and the weights of positions to prompts and the tokens that followed them.

    After a prompt ``x_1 … x_L`` with query ``k``, token ``j`` comes with probability
    proportional to ``P[k, j] Σ_{i: x_i = j} exp b(i, L)``. ``positions`` says what ``b`` may be:

    * ``"lag"``: any ``β(L − i)`` for lags below ``num_lags``; older positions have weight zero.
    * ``"decay"``: ``−slope · (L − i)``, slope >= 0 (ALiBi): one number.
    * ``"absolute"``: any number for every position and length.

    A constant added to ``b`` at one query length changes nothing; the last position has
    ``b = 0``. Whether the prompts identify the rest is decided in float64 from the rank of the
    Fisher information of everything at the solution. For instance, prompts that hold every
    token once cannot tell ``β(0)`` from the diagonal of ``S``.

    The likelihood is concave in ``S`` but not in ``(S, b)``. The solver starts at the best ``S``
    with ``b = 0`` and only ever descends, so the end is at least as likely as that. That ``S``
    has no finite maximum is decided exactly, as in :func:`attnmarkov.fit`. A position more than
    5 nats below the heaviest is left out and everything else fitted again: if the likelihood
    then does not rise with its weight, zero is its maximum, and its log-weight is unbounded.
    A teacher's weight of zero is found to be so in about half of all data sets; in the others
    the best weight is positive and small.

    Runs on concrete inputs; :func:`~attnmarkov.estimate.solve_positions` is its core, for use
    under jit and vmap.

    Args:
        prompts: n prompts over K tokens, with token ids; of trajectories, see
            :func:`window_prompts`.
        y: (n,) integer labels; each stands at a visible position of its prompt.
        positions: What the log-weights depend on.
        num_lags: Of ``"lag"``, how many lags have a weight. All of the longest prompt if None.
        solver: ``"newton"`` (damped; one step solves for logits and log-weights together) or
            ``"lbfgs"``, which starts at Newton's optimum without positions.
        prior: Precision τ >= 0 of independent Gaussians on centred logits and on the free
            log-weights (of ``"decay"``, the slope); None is 0.
        information: What the standard errors come from, at the solution. The two differ also in
            their expectation, if the model is wrong.
        tolerance: Largest entry allowed in the gradient of the loss per label, each row of ``S``
            by its own labels. By default 4e-8 in float32 and 1e-10 in float64.
        max_iterations: By default 200 for newton, 500 for lbfgs.

    Returns:
        A :class:`PositionFit`.

    Raises:
        ValueError: If only counts of the prompts are known, an option is unknown or out of
            range, ``num_lags`` is given for other positions than ``"lag"``, there is no prompt, a
            label is no token or stands at no visible position of its prompt, prompts have more
            than 64 tokens with ``"absolute"``, or an input is traced.

    >>> import jax, attnmarkov as am
    >>> teacher = am.CCMC.from_transition_matrix([[0.7, 0.3], [0.4, 0.6]])
    >>> prompts = am.prompts.uniform(jax.random.key(0), 20_000, 4, 2)
    >>> weighted = am.LagContext([1.0, 3.0, 0.5, 1.0]).weighted_counts(prompts)
    >>> y = teacher.sample(jax.random.key(1), am.Prompts(weighted, prompts.last))
    >>> result = fit_positions(prompts, y)
    >>> print(result.context.weights.round(1))
    [1.  3.3 0.6 1.1]
    """
    _validate.choice(information, "information", ("expected", "observed"))
    check(prompts, positions, num_lags, solver)
    if not _validate.is_concrete(prompts, y, prior):
        raise ValueError(
            "prompts: fit_positions decides on the host what is identified, so its inputs cannot "
            "be traced; use solve_positions under jit and vmap"
        )
    room = int(np.max(np.asarray(prompts.lengths)))
    check_room(positions, room)
    lags = room if num_lags is None else num_lags
    least, most = limits(prior, tolerance, max_iterations, solver)
    labels = _check.labels(prompts, y)
    seen = _Seen.of(prompts, labels, lags, positions)
    seen.check_labels()

    dtype = jnp.result_type(float)
    design, size = design_of(positions, lags), prompts.num_tokens
    strength = 0.0 if prior is None else float(prior)

    def maximum(design: np.ndarray, *start: Any, solver: str) -> Optimum:
        return maximise(
            jnp.asarray(prompts.tokens),
            jnp.asarray(prompts.lengths),
            jnp.asarray(prompts.last),
            labels,
            jnp.asarray(design, dtype),
            jnp.asarray(strength, dtype),
            jnp.asarray(least, dtype),
            jnp.asarray(most, jnp.int32),
            *start,
            num_tokens=size,
            solver=solver,
        )

    first = solution = maximum(design, *cold(design, size), solver=solver)
    logits, theta = (np.asarray(x, np.float64) for x in (first.logits, first.theta))
    flat_logits = np.asarray(first.flat_logits, np.float64)
    if positions == "decay" and theta[0] <= 0:  # the best slope >= 0 is 0
        logits, theta = flat_logits, np.zeros(1)
    table = design @ theta
    flat_nll = seen.nll(flat_logits, np.zeros_like(table))
    masked = np.zeros(table.shape, bool)
    if positions != "decay" and strength == 0:

        def refit(masked: np.ndarray) -> tuple[Optimum, np.ndarray, np.ndarray]:
            lighter, reference = referred(design, masked)
            group, lag, which = np.nonzero(lighter)
            start = np.zeros_like(theta)
            start[which] = (table[group, lag] - table[group, reference[group]]).clip(-20, 20)
            warm = jnp.asarray(logits, dtype), jnp.asarray(start, dtype)
            found = maximum(lighter, jnp.asarray(masked), warm, jnp.array(True), solver="newton")
            return (
                found,
                np.asarray(found.logits, np.float64),
                lighter @ np.asarray(found.theta, np.float64),
            )

        masked, edge = weightless(Sample(*seen[:5]), table, np.asarray(first.never), refit)
        if edge is not None:
            solution, logits, table = edge
            seen = seen.without(masked)
    lighter = referred(design, masked)[0] if masked.any() else design
    kept = np.flatnonzero((lighter != 0).any((0, 1)) | (design == 0).all((0, 1)))
    sure = _uncertainty(
        *seen.information(logits, table, lighter[..., kept], expected=information == "expected"),
        np.asarray(solution.components),
        strength,
    )
    nll = seen.nll(logits, table)
    separated = np.asarray(solution.separated)
    unbounded = masked
    if positions == "decay" and strength == 0:
        unbounded = np.broadcast_to(seen.always_last() & (np.arange(lags) > 0), masked.shape)
    group, lag, which = np.nonzero(lighter[..., kept])
    table_errors = np.zeros(table.shape)
    table_errors[group, lag] = (
        np.abs(lighter[..., kept][group, lag, which]) * sure.theta_errors[which]
    )
    table_errors[unbounded] = np.nan
    errors = np.where(separated[:, None] & (strength == 0), np.nan, sure.logit_errors)
    status = Status.decide(
        finite=jnp.asarray(np.isfinite(nll) & np.isfinite(logits).all() & np.isfinite(table).all()),
        solved=solution.converged,
        separated=jnp.asarray((separated.any() or unbounded.any()) and strength == 0),
        identified=jnp.asarray(sure.complete or strength > 0),
    )
    log_weights = by_position(
        jnp.asarray(np.where(masked, -np.inf, table) + 0.0, dtype), positions, 0.0
    )
    zero = int(masked.sum())
    return PositionFit(
        model=CCMC(jnp.asarray(logits, dtype)),
        context=_context(positions, theta, np.asarray(log_weights, np.float64)),
        status=PositionStatus(status.code),
        nll=jnp.asarray(nll, dtype),
        log_weights=log_weights,
        log_weight_errors=by_position(jnp.asarray(table_errors, dtype), positions, np.nan),
        standard_errors=jnp.asarray(errors, dtype),
        components=solution.components,
        separated=solution.separated,
        unbounded=by_position(jnp.asarray(unbounded), positions, False),
        flat_model=CCMC(first.flat_logits),
        flat_nll=jnp.asarray(flat_nll, dtype),
        iterations=first.iterations
        if solution is first
        else first.iterations + solution.iterations,
        likelihood_ratio_statistic=2 * prompts.num_prompts * (flat_nll - nll),
        num_parameters=sure.num_parameters + zero,
        num_position_parameters=sure.num_position_parameters + zero,
        num_prompts=prompts.num_prompts,
        positions=positions,
    )


def position_information(
    model: CCMC, log_weights: ArrayLike, prompts: Prompts
) -> Float[np.ndarray, "parameter parameter"]:
    """Expected Fisher information of one sample about logits and lag weights together.

    Averaged over the prompts, in float64 on the host. Its pseudo-inverse over ``n`` is the
    asymptotic covariance of what :func:`fit_positions` finds from ``n`` such prompts.

    Args:
        model: The CCMC that draws the labels.
        log_weights: (num_lags,) ``β``, finite; positions of further lags have weight zero.
        prompts: n prompts over its tokens, with token ids.

    Returns:
        (K² + num_lags − 1,) squared: the logits row by row, then ``β(1), β(2), …`` relative to
        ``β(0)``.

    Raises:
        ValueError: If ``log_weights`` is no finite vector, the vocabularies differ, or only
            counts of the prompts are known.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_logits([[0.0, 0.0], [0.0, 0.0]])
    >>> prompts = am.Prompts.from_tokens([[0, 1], [1, 0]], 2)
    >>> information = position_information(model, [0.0, 0.0], prompts)
    >>> information[-1].round(6).tolist()  # of β(1), with the four logits and itself
    [-0.125, 0.125, 0.125, -0.125, 0.25]
    """
    _check.prompts(prompts)
    _check.vocabulary(prompts, model, "model")
    weights = _validate.finite(log_weights, "log_weights")
    if weights.ndim != 1 or weights.size == 0:
        raise ValueError(f"log_weights: expected a (num_lags,) vector, got shape {weights.shape}")
    LagContext(np.exp(weights)).check_prompts(prompts)
    size, design = prompts.num_tokens, design_of("lag", weights.size)
    seen = _Seen.of(prompts, jnp.asarray(prompts.tokens)[:, 0], weights.size)
    table = (weights - weights[0])[None]
    logits = np.asarray(model.logits, np.float64)
    in_logits, cross, in_theta = seen.information(logits, table, design, expected=True)
    cross = cross.reshape(size * size, -1)
    whole = np.zeros((size * size, size * size))
    for k in range(size):
        whole[k * size : (k + 1) * size, k * size : (k + 1) * size] = in_logits[k]
    return np.block([[whole, cross], [cross.T, in_theta]]) / prompts.num_prompts


def window_prompts(
    trajectory: Trajectory, prompt: Any, num_lags: int | None = None
) -> tuple[Prompts, Int[Array, " label"]]:
    """Every history of a rollout, cut to its last ``num_lags`` tokens, and the token drawn next.

    Enough to learn lag weights of :func:`fit_positions` that are zero from ``num_lags`` on. All
    labels of all trajectories are pooled; a lane that had nothing left to attend gives none.

    Args:
        trajectory: R trajectories of T tokens, recorded as tokens.
        prompt: What it was generated from, as in :func:`attnmarkov.rollout`.
        num_lags: Tokens kept, at least 1; the whole history if None.

    Returns:
        Up to R·T prompts and their labels, trajectory by trajectory.

    Raises:
        ValueError: If the rollout recorded something else, ``num_lags`` is below 1, the prompts
            hold counts only or are not one or R, or no label is left.

    >>> import jax, attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.5, 0.5]])
    >>> context = am.LagContext([1.0, 2.0])
    >>> traj = am.rollout(model, jax.random.key(1), [0, 1], 3, 2, context=context)
    >>> prompts, y = window_prompts(traj, [0, 1], 2)
    >>> prompts, y.shape
    (Prompts(num_prompts=6, num_tokens=2, lengths 2 to 2), (6,))
    """
    drawn = np.asarray(trajectory.tokens, np.int64)
    number, steps = drawn.shape
    if not isinstance(prompt, Prompts):
        prompt = Prompts.from_tokens(prompt, trajectory.num_tokens)
    if prompt.tokens is None or prompt.lengths is None:
        raise ValueError("prompt: only its counts are known, but histories need token ids")
    if prompt.num_prompts not in (1, number):
        raise ValueError(
            f"prompt: there are {prompt.num_prompts} prompts, but {number} trajectories"
        )
    given = np.broadcast_to(np.asarray(prompt.tokens), (number, np.shape(prompt.tokens)[1]))
    sizes = np.broadcast_to(np.asarray(prompt.lengths), number)
    room = given.shape[1]
    most = room + steps if num_lags is None else num_lags
    most = min(_validate.integer(most, "num_lags", minimum=1), room + steps)

    # Histories end in the same column: prompts are shifted right to meet what was drawn.
    shifted = np.arange(room) - (room - sizes[:, None])
    history = np.take_along_axis(given, np.maximum(shifted, 0), axis=1)
    history = np.concatenate([history, drawn], axis=1)
    lane, step = np.nonzero(drawn >= 0)
    if lane.size == 0:
        raise ValueError("trajectory: no token was drawn")
    length = np.minimum(sizes[lane] + step, most)
    column = room + step[:, None] - length[:, None] + np.arange(most)
    column = np.minimum(column, room + step[:, None] - 1)
    windows = Prompts.from_tokens(
        history[lane[:, None], column], trajectory.num_tokens, lengths=length
    )
    return windows, jnp.asarray(drawn[lane, step], jnp.int32)


def _context(positions: str, theta: np.ndarray, log_weights: np.ndarray) -> Context:
    dtype = jnp.result_type(float)
    if positions == "decay":
        return DecayContext(jnp.asarray(np.exp(-theta[0]), dtype))
    if positions == "absolute":
        return PositionContext(jnp.asarray(log_weights, dtype))
    return LagContext(jnp.asarray(np.exp(log_weights), dtype))


class _Seen(NamedTuple):
    """The data in float64 arithmetic on the host, positions counted by lag."""

    tokens: np.ndarray
    visible: np.ndarray
    last: np.ndarray
    y: np.ndarray
    group: np.ndarray
    num_tokens: int

    @classmethod
    def of(cls, prompts: Prompts, y: jax.Array, num_lags: int, positions: str = "lag") -> _Seen:
        tokens, visible = (
            np.asarray(x)
            for x in by_lag(jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths), num_lags)
        )
        labels, lengths = np.asarray(y), np.asarray(prompts.lengths)
        group = lengths - 1 if positions == "absolute" else np.zeros_like(lengths)
        return cls(tokens, visible, np.asarray(prompts.last), labels, group, prompts.num_tokens)

    def without(self, masked: np.ndarray) -> _Seen:
        """The same with masked positions (group, lag) out of sight."""
        return self._replace(visible=unmasked(self.visible, masked[self.group]))

    def always_last(self) -> bool:
        """Whether every label that could be another token is that of the last position."""
        mixed = (self.visible & (self.tokens != self.tokens[:, :1])).any(-1)
        return bool(mixed.any() and (self.y == self.tokens[:, 0])[mixed].all())

    def check_labels(self) -> None:
        """Raise unless every label stands at a visible position."""
        hidden = ~(self.visible & (self.tokens == self.y[:, None])).any(-1)
        if hidden.any():
            row = int(hidden.argmax())
            raise ValueError(
                f"y: entry [{row}] is token {self.y[row]}, which does not stand among the last "
                f"{self.tokens.shape[1]} tokens of prompt {row}; older ones have weight zero"
            )

    def parts(self) -> list[np.ndarray]:
        """Indices of prompts of one row and one group, in bites that fit in memory."""
        bite = max(1, 2**20 // (self.tokens.shape[1] * self.num_tokens))
        order = np.lexsort((self.group, self.last))
        change = np.diff(self.last[order]) | np.diff(self.group[order])
        cells = np.split(order, np.flatnonzero(change) + 1)
        return [cell[i : i + bite] for cell in cells for i in range(0, len(cell), bite)]

    def shares(self, at: Any, logits: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shares of the positions, of those that hold the label, and the label's probability."""
        scores = table[self.group[at]] + logits[self.last[at][:, None], self.tokens[at]]
        scores = np.where(self.visible[at], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        shares = weights / weights.sum(-1, keepdims=True)
        is_label = self.visible[at] & (self.tokens[at] == self.y[at][:, None])
        top = np.where(is_label, scores, -np.inf).max(-1, keepdims=True)
        of_label = np.where(is_label, np.exp(scores - np.where(top > -np.inf, top, 0)), 0)
        total = of_label.sum(-1, keepdims=True)
        chosen = np.where(is_label, shares, 0).sum(-1)
        return shares, of_label / np.where(total > 0, total, 1), chosen

    def nll(self, logits: np.ndarray, table: np.ndarray) -> float:
        """Mean negative log-likelihood."""
        with np.errstate(all="ignore"):
            total = sum(np.log(self.shares(part, logits, table)[2]).sum() for part in self.parts())
        return float(0.0 - total / len(self.y))

    def information(
        self, logits: np.ndarray, table: np.ndarray, design: np.ndarray, *, expected: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Summed information in ``S`` (K, K, K), between ``S`` and ``θ`` (K, K, M), in ``θ``."""
        size, free = self.num_tokens, design.shape[-1]
        in_logits, cross = np.zeros((size,) * 3), np.zeros((size, size, free))
        in_theta = np.zeros((free, free))
        for part in self.parts():
            k, group = self.last[part[0]], self.group[part[0]]
            shares, of_label, _ = self.shares(part, logits, table)
            holds = (self.tokens[part][..., None] == np.arange(size)) * shares[..., None]
            probs = holds.sum(1)
            in_logits[k] += np.diag(probs.sum(0)) - probs.T @ probs
            cross[k] += (holds.sum(0).T - probs.T @ shares) @ design[group]
            if expected:
                with np.errstate(divide="ignore", invalid="ignore"):
                    root = np.where(holds > 0, holds / np.sqrt(probs)[:, None, :], 0)
                kept = np.einsum("ilk,imk->lm", root, root, optimize=True)
            else:
                kept = np.diag((shares - of_label).sum(0)) + of_label.T @ of_label
            in_theta += design[group].T @ (kept - shares.T @ shares) @ design[group]
        return in_logits, cross, in_theta


class _Uncertainty(NamedTuple):
    logit_errors: np.ndarray
    theta_errors: np.ndarray
    num_parameters: int
    num_position_parameters: int
    complete: bool


def _uncertainty(
    in_logits: np.ndarray,
    cross: np.ndarray,
    in_theta: np.ndarray,
    components: np.ndarray,
    prior: float,
) -> _Uncertainty:
    """Errors of everything, and what is identified: the null space of the joint information.

    That of ``S`` given ``θ`` is known from the components. What remains of the information in
    ``θ`` once ``S`` is eliminated has a null vector ``ν`` for every further direction in which
    nothing changes; ``S`` then moves along with it by ``−H⁺Cν``.
    """
    size = len(in_logits)
    joined = np.zeros_like(components) if prior > 0 else components
    same = joined[:, :, None] == joined[:, None, :]
    projector = same / same.sum(-1, keepdims=True)
    level = np.einsum("kab,kbb->ka", projector, in_logits)
    level = np.where(level > 0, level, 1.0)
    matrix = in_logits + prior * np.eye(size) + projector * level[..., None]
    try:
        inverse = np.linalg.inv(matrix) - projector / (prior + level)[..., None]
    except np.linalg.LinAlgError:  # runaway logits have left no information
        inverse = np.full_like(matrix, np.nan)
    moved = inverse @ cross

    in_theta = in_theta + prior * np.eye(in_theta.shape[0])
    scale = np.sqrt(np.maximum(np.diagonal(in_theta), 0))
    scale = np.where(scale > 0, scale, 1)
    left = in_theta - np.einsum("kam,kan->mn", cross, moved)
    left = left / scale[:, None] / scale
    if not np.isfinite(left).all():
        left = np.zeros_like(left)
    values, vectors = np.linalg.eigh((left + left.T) / 2)
    informed = values > _NO_INFORMATION
    root = vectors[:, informed] / np.sqrt(values[informed]) / scale[:, None]
    null = vectors[:, ~informed] / scale[:, None]
    null = null / np.abs(null).max(axis=0, initial=np.finfo(float).tiny)

    theta_errors = np.sqrt((root**2).sum(-1))
    theta_errors[(np.abs(null) > 1e-6).any(-1)] = np.nan
    variance = np.diagonal(inverse, axis1=1, axis2=2) + ((moved @ root) ** 2).sum(-1)
    alone = same.sum(-1) == 1
    unknown = alone | (np.abs(moved @ null) > 1e-6).any(-1)
    with np.errstate(invalid="ignore"):
        logit_errors = np.where(unknown, np.nan, np.sqrt(variance))
    contrasts = int((joined != np.arange(size)).sum())
    return _Uncertainty(
        logit_errors,
        theta_errors,
        contrasts + int(informed.sum()),
        int(informed.sum()),
        bool((joined == 0).all() and informed.all()),
    )
