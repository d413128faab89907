"""Teachers speak, students learn, and theory says how well: one call, one dataset."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov import _validate
from attnmarkov.estimate import _check
from attnmarkov.estimate._students import (
    DISTRIBUTIONS,
    Population,
    Source,
    Teachers,
    draw_teachers,
    fit_students,
    population,
    room_for,
)
from attnmarkov.estimate.first_order import MAX_ITERATIONS
from attnmarkov.estimate.prior import Prior, as_prior
from attnmarkov.model import _leaves
from attnmarkov.model.contexts import Context, FullContext
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    import optax
    import xarray as xr
    from jaxtyping import Array, Key

    from attnmarkov.estimate._students import Distribution

ERRORS = ("excess_risk", "squared_error")
_PER_FIT = {
    "excess_risk": "mean KL(teacher ‖ student) on fresh prompts, nats per token",
    "squared_error": "‖Ŝ − S*‖²_F, centred over the components that prompts can join",
    "nll": "mean negative log-likelihood of the training labels, nats",
    "status": "how the fit ended, a code of attnmarkov.estimate.Status",
    "iterations": "iterations of the solver",
    "num_parameters": "parameters that the training prompts identify",
}
_PER_TEACHER = {
    "predicted_excess_risk": "r / (2n)",
    "predicted_squared_error": "tr(I⁺) / n",
    "share_without_maximum": "share of fits whose errors are NaN",
}


def teacher_student(
    key: Key[Array, ""],
    *,
    num_tokens: int | Iterable[int] = 4,
    num_prompts: int | Iterable[int] = 1000,
    length: int | Iterable[int] = 10,
    distribution: str | Iterable[str] | Mapping[str, Distribution] = "uniform",
    embedding_dim: int | Iterable[int | None] | None = None,
    context: str | Context | Iterable[str | Context] | Mapping[str, Context] = "full",
    solver: str | Iterable[str] | Mapping[str, str | optax.GradientTransformation] = "newton",
    prior: float | Prior | None = None,
    concentration: float = 8.0,
    num_teachers: int = 8,
    num_replicates: int = 100,
    num_test_prompts: int = 4096,
    num_information_prompts: int = 2**16,
    max_bytes: int = 2**30,
) -> xr.Dataset:
    """Draw teachers, prompts and labels, fit students, and set their errors beside the theory.

    Every combination of the first seven arguments is one ``config``; each takes one value or
    several. Fits are vmapped over teachers and replicates, in blocks of bounded memory.

    A teacher has Dirichlet rows ``P`` and emits labels after prompts by its law under the
    context, which the student knows. The student is fitted by maximum likelihood. Theory
    ([CCMC], sample complexity; THEORY section 2) predicts, as the number of prompts n grows,

        E‖Ŝ − S*‖²_F ≈ tr(I⁺) / n,      excess risk ≈ r / (2n),

    with ``I`` the Fisher information of one sample and ``r`` the number of identifiable
    parameters, ``K(K−1)`` where the prompts cover everything: both fall as ``n`` to the power
    −1, which :func:`learning_exponents` measures. ``I`` is averaged over
    ``num_information_prompts`` prompts per teacher. A prior leaves the predictions as they are:
    those of maximum likelihood.

    A fit without a unique maximum has no error: ``excess_risk`` and ``squared_error`` are NaN
    where the data are separated, where they leave open what prompts of this distribution can
    identify, and where the solver did not finish. ``status`` tells which, and
    ``share_without_maximum`` how many; means over the others are means given that a maximum
    exists. Where the distribution itself leaves the model unidentified, errors and predictions
    are those of the contrasts that it can teach.

    Teacher ``t`` is a function of ``(key, num_tokens, embedding_dim, concentration, t)``, so that
    configs of one size share their teachers. Prompts and labels depend on these, on the config
    without its solver (solvers see the same data), and on the replicate; on nothing else. An
    ``embedding_dim`` of at least K has the teachers and the data of None.

    Args:
        key: A typed JAX key.
        num_tokens: Vocabulary sizes K, at least 2.
        num_prompts: Numbers of prompts n.
        length: Tokens per prompt L, at least 2.
        distribution: ``"uniform"``; ``"zipf"`` (independent tokens with ``zipf_law``);
            ``"markov"`` (stationary stretches of the chain with the teacher's own ``P``);
            ``"without_replacement"`` (L <= K distinct tokens; all of them for L = K); or a
            mapping from labels to these names or to functions ``(key, n, L, K) -> Prompts`` that
            work under jit and vmap, such as ``lambda key, n, length, K: from_supports(...)``.
        embedding_dim: None: students learn the logits ``S``. An integer d: tokens have Gaussian
            embeddings ``E`` (K, d), known to the student, who learns ``W`` by
            :func:`fit_attention`. For d < K the teacher is ``S = E Wᵀ Eᵀ`` with a Gaussian ``W``,
            scaled so that its logits spread as those of Dirichlet rows do. For d >= K every
            ``S`` has its ``W``.
        context: ``"full"``, contexts (labelled by their ``repr``), or a mapping from labels to
            contexts.
        solver: Solvers of :func:`attnmarkov.fit`, by name or as a mapping from labels. With an
            ``embedding_dim``, those of :func:`fit_attention`: no ``"newton"``.
        prior: As for :func:`attnmarkov.fit`; only without an ``embedding_dim``.
        concentration: Dirichlet parameter of the teachers' rows.
        num_teachers: Teachers per size.
        num_replicates: Students per config and teacher, each with data of its own.
        num_test_prompts: Fresh prompts on which the excess risk is measured.
        num_information_prompts: Prompts per teacher that ``I`` is averaged over.
        max_bytes: About how much memory the fits of one block may take; at least one fit runs.

    Returns:
        Dims ``config``, ``teacher``, ``replicate``; the grid's parameters are coordinates on
        ``config`` (``embedding_dim`` is 0 for None). For every fit ``excess_risk``,
        ``squared_error``, ``nll``, ``status``, ``iterations`` and ``num_parameters``; for every
        teacher ``predicted_excess_risk``, ``predicted_squared_error`` and
        ``share_without_maximum``. ``attrs`` hold the other arguments. Fit for ``to_zarr``.

    Raises:
        ValueError: If an argument is out of range, unknown or repeated (it is named), or a
            combination cannot be.

    >>> import jax
    >>> data = teacher_student(
    ...     jax.random.key(0), num_tokens=3, num_prompts=600, num_teachers=2, num_replicates=20
    ... )
    >>> dict(data.sizes)
    {'config': 1, 'teacher': 2, 'replicate': 20}
    >>> float(data.predicted_excess_risk[0, 0])  # K(K-1)/2n
    0.005
    >>> bool(abs(data.excess_risk.mean() / 0.005 - 1) < 0.3)
    True
    """
    import xarray as xr

    _validate.check_key(key)
    numbers = {
        "num_tokens": (num_tokens, 2),
        "num_prompts": (num_prompts, 1),
        "length": (length, 2),
    }
    grid: dict[str, Mapping[Any, Any]] = {
        **{name: _integers(v, name, minimum) for name, (v, minimum) in numbers.items()},
        "distribution": _distributions(distribution),
        "embedding_dim": _dims(embedding_dim),
        "context": _contexts(context),
        "solver": _solvers(solver),
    }
    for name, value in (
        ("num_teachers", num_teachers),
        ("num_replicates", num_replicates),
        ("num_test_prompts", num_test_prompts),
        ("num_information_prompts", num_information_prompts),
        ("max_bytes", max_bytes),
    ):
        _validate.integer(value, name, minimum=1)
    spread = _leaves.number(concentration, "concentration")
    if spread is None or not (np.isfinite(spread) and spread > 0):
        raise ValueError(f"concentration: must be one number above 0, got {concentration!r}")
    belief = None if prior is None else as_prior(prior)
    for size in grid["num_tokens"].values():
        if belief is not None:
            belief.check(size)
    configs = [
        _Config(**{k: (label, grid[k][label]) for k, label in zip(grid, labels, strict=True)})
        for labels in itertools.product(*grid.values())
    ]
    for config in configs:
        config.check(belief)

    shape = (len(configs), num_teachers, num_replicates)
    integers = ("status", "iterations", "num_parameters")
    values = {
        k: np.zeros(shape, np.int32) if k in integers else np.full(shape, np.nan) for k in _PER_FIT
    }
    predicted = {k: np.full(shape[:2], np.nan) for k in _PER_TEACHER}
    which = np.repeat(np.arange(num_teachers), num_replicates)
    taught: dict[str, tuple[Teachers, Population]] = {}
    for i, config in enumerate(configs):
        size, n = config.num_tokens[1], config.num_prompts[1]
        source = Source(config.distribution[1], config.length[1])
        where = None if config.context[0] == "full" else config.context[1]
        if (place := f"{config.source_id} {config.embedding_dim[0]}") not in taught:
            own = _fold(key, f"teachers {size} {config.family}")
            teachers = draw_teachers(own, num_teachers, size, spread, config.embedding_dim[1])
            sample = _fold(key, f"population {config.source_id}")
            known = population(teachers, source, where, sample, num_information_prompts)
            taught[place] = teachers, known
        teachers, known = taught[place]
        found = fit_students(
            teachers,
            known,
            which,
            _fit_keys(_fold(key, config.data_id), num_teachers, num_replicates),
            source=source,
            num_prompts=n,
            num_test_prompts=num_test_prompts,
            context=where,
            solver=config.solver[1],
            prior=None if belief is None else belief.over(size, jnp.result_type(float)),
            room=room_for(n, size, which.size),
            max_bytes=max_bytes,
        )
        for name, array in values.items():
            array[i] = found[name].reshape(shape[1:])
        rank = np.where(known.rank < 0, np.nan, known.rank)
        predicted["predicted_excess_risk"][i] = rank / (2 * n)
        predicted["predicted_squared_error"][i] = known.trace / n
        lost = np.isnan(values["excess_risk"][i])
        predicted["share_without_maximum"][i] = lost.mean(-1)

    dims = ("config", "teacher", "replicate")
    variables = {
        **{k: (dims, v, {"long_name": _PER_FIT[k]}) for k, v in values.items()},
        **{k: (dims[:2], v, {"long_name": _PER_TEACHER[k]}) for k, v in predicted.items()},
    }
    return xr.Dataset(
        variables,
        {k: ("config", _column([getattr(c, k) for c in configs])) for k in grid},
        {
            "concentration": spread,
            "prior": "none" if belief is None else repr(belief),
            "num_test_prompts": int(num_test_prompts),
            "num_information_prompts": int(num_information_prompts),
            "key": json.dumps([str(jax.random.key_impl(key)), jax.random.key_data(key).tolist()]),
            "predicted_exponent": -1.0,
        },
    )


def learning_exponents(dataset: xr.Dataset, *, most_without_maximum: float = 0.01) -> xr.Dataset:
    """Measured exponents of both errors in n, beside the predicted −1.

    For all configs that differ in ``num_prompts`` alone, the log of the mean error over its
    prediction is regressed on ``log n``, weighted by the standard errors of the means; taking
    each teacher's error over its own prediction removes what teachers differ in. At finite n the
    next order of the error shows as a few hundredths.

    Args:
        dataset: Of :func:`teacher_student`, or any with ``excess_risk``, ``squared_error`` and
            their predictions over ``config`` and further dims.
        most_without_maximum: Configs with a larger share of fits without an error are left out:
            their means are those of the lucky ones.

    Returns:
        Dim ``group``, with the parameters the configs of a group share as coordinates:
        ``excess_risk_slope``, ``excess_risk_slope_error`` (one standard error), the same of
        ``squared_error``, ``predicted_slope``, and ``num_sizes``, how many values of n were
        used; slopes are NaN where those are fewer than two.

    >>> import numpy as np, xarray as xr
    >>> n = np.array([100.0, 200, 400])
    >>> error = 6 / n[:, None] * np.array([0.9, 1.1])
    >>> names = {"excess_risk": error, "squared_error": error}
    >>> data = xr.Dataset({k: (("config", "replicate"), v) for k, v in names.items()})
    >>> data = data.assign({f"predicted_{k}": ("config", 6 / n) for k in names})
    >>> found = learning_exponents(data.assign_coords(num_prompts=("config", n)))
    >>> found.excess_risk_slope.values.round(6).tolist()
    [-1.0]
    """
    import xarray as xr

    groups = learning_groups(dataset)
    columns: dict[str, list[Any]] = {f"{v}_slope{e}": [] for v in ERRORS for e in ("", "_error")}
    columns["num_sizes"] = []
    for _, index in groups:
        n = dataset["num_prompts"].values[index].astype(float)
        ratios = {v: ratio_to_prediction(dataset, v)[index] for v in ERRORS}
        lost = np.isnan(ratios["excess_risk"])
        used = (lost.mean(-1) <= most_without_maximum) & ((~lost).sum(-1) > 1)
        used &= len(set(n[used])) > 1
        columns["num_sizes"].append(int(used.sum()))
        for name in ERRORS:
            slope, error = _slope(n[used], ratios[name][used])
            columns[f"{name}_slope"].append(slope)
            columns[f"{name}_slope_error"].append(error)
    names = list(groups[0][0]) if groups else []
    shared = {k: ("group", _column([(g[k],) for g, _ in groups])) for k in names}
    found = xr.Dataset({k: ("group", np.array(v)) for k, v in columns.items()}, shared)
    return found.assign(predicted_slope=("group", np.full(len(groups), -1.0)))


def learning_groups(dataset: xr.Dataset) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Configs that differ in ``num_prompts`` alone: what they share, and their places by n."""
    names = [
        str(k)
        for k, v in dataset.coords.items()
        if v.dims == ("config",) and k not in ("config", "num_prompts")
    ]
    columns = [dataset[k].values.tolist() for k in names]
    found: dict[tuple[Any, ...], list[int]] = {}
    for i in range(dataset.sizes["config"]):
        found.setdefault(tuple(c[i] for c in columns), []).append(i)
    n = dataset["num_prompts"].values
    return [
        (dict(zip(names, shared, strict=True)), np.array(sorted(index, key=lambda i: n[i])))
        for shared, index in found.items()
    ]


def ratio_to_prediction(dataset: xr.Dataset, variable: str) -> np.ndarray:
    """An error over its prediction, (config, fit)."""
    ratio = dataset[variable] / dataset[f"predicted_{variable}"]
    ratio = ratio.transpose("config", ...).values
    return ratio.reshape(len(ratio), -1)


def _slope(n: np.ndarray, ratio: np.ndarray) -> tuple[float, float]:
    """Weighted least-squares slope of ``log(mean ratio / n)`` on ``log n``, and its error."""
    if not len(n):
        return np.nan, np.nan
    mean = np.nanmean(ratio, axis=1)
    error = np.nanstd(ratio, axis=1, ddof=1) / np.sqrt((~np.isnan(ratio)).sum(axis=1)) / mean
    weight = 1 / np.where(error > 0, error, np.nan) ** 2
    x = np.log(n)
    x = x - (weight * x).sum() / weight.sum()
    total = (weight * x**2).sum()
    return float((weight * x * np.log(mean / n)).sum() / total), float(1 / np.sqrt(total))


class _Config(NamedTuple):
    """One grid point: the label and the value of every parameter."""

    num_tokens: tuple[Any, Any]
    num_prompts: tuple[Any, Any]
    length: tuple[Any, Any]
    distribution: tuple[Any, Any]
    embedding_dim: tuple[Any, Any]
    context: tuple[Any, Any]
    solver: tuple[Any, Any]

    @property
    def family(self) -> int:
        """0 if teachers have Dirichlet rows, else how wide their embeddings are."""
        dim = self.embedding_dim[1]
        return 0 if dim is None or dim >= self.num_tokens[1] else dim

    @property
    def source_id(self) -> str:
        """What the information of a sample depends on."""
        labels = (self.num_tokens, self.length, self.distribution, self.context)
        return json.dumps([*(label for label, _ in labels), self.family])

    @property
    def data_id(self) -> str:
        """What the prompts and labels depend on."""
        return f"data {self.num_prompts[0]} {self.source_id}"

    def check(self, prior: Prior | None) -> None:
        """Raise unless the combination can be run."""
        size, length = self.num_tokens[1], self.length[1]
        if self.distribution[1] == "without_replacement" and length > size:
            raise ValueError(
                f"length: {length} distinct tokens cannot be drawn from a vocabulary of {size}"
            )
        context: Context = self.context[1]
        sample = Prompts.from_tokens(np.zeros((1, length), int), size)
        if not np.isfinite(context.log_weighted_counts(sample)[0, 0]):
            raise ValueError(
                f"context: {self.context[0]!r} gives no position of a prompt of {length} tokens "
                "a finite weight above 0"
            )
        if callable(self.distribution[1]):
            _check_function(*self.distribution, size, length)
        if self.embedding_dim[1] is None:
            return
        if self.solver[1] == "newton":
            raise ValueError(
                "solver: newton learns the logits S, not W; with an embedding_dim choose "
                f"one of {', '.join(MAX_ITERATIONS)} or an optax.GradientTransformation"
            )
        if self.context[0] != "full":
            raise ValueError(
                f"context: {self.context[0]!r} cannot be combined with an embedding_dim"
            )
        if prior is not None:
            raise ValueError("prior: cannot be combined with an embedding_dim")


def _check_function(label: str, draw: Any, size: int, length: int) -> None:
    batch = jax.eval_shape(lambda key: draw(key, 2, length, size), jax.random.key(0))
    if not isinstance(batch, Prompts) or batch.counts.shape != (2, size):
        got = batch.counts.shape if isinstance(batch, Prompts) else type(batch).__name__
        raise ValueError(
            f"distribution: {label!r} must return Prompts with counts of shape (n, K), "
            f"here (2, {size}); got {got}"
        )


def _several(values: Any, name: str) -> list[Any]:
    """One value or several, as a list."""
    several = isinstance(values, Iterable) and not isinstance(values, str | Mapping | Context)
    out = list(values) if several else [values]
    if not out:
        raise ValueError(f"{name}: expected at least one value, got none")
    return out


def _labelled(pairs: Iterable[tuple[Any, Any]], name: str) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for label, value in pairs:
        if label in out:
            raise ValueError(f"{name}: {label!r} is given twice")
        out[label] = value
    return out


def _integers(values: Any, name: str, minimum: int) -> dict[int, int]:
    numbers = [_validate.integer(v, name, minimum=minimum) for v in _several(values, name)]
    return _labelled(((v, v) for v in numbers), name)


def _dims(values: Any) -> dict[int, int | None]:
    name = "embedding_dim"
    pairs = [
        (0, None) if v is None else (_validate.integer(v, name, minimum=1), int(v))
        for v in _several(values, name)
    ]
    return _labelled(pairs, name)


def _items(values: Any, name: str, label: Any) -> dict[str, Any]:
    """A mapping as it is; of one value or several, the mapping from their labels."""
    if not isinstance(values, Mapping):
        return _labelled(((label(v), v) for v in _several(values, name)), name)
    if not values:
        raise ValueError(f"{name}: expected at least one value, got none")
    for each in values:
        if not isinstance(each, str):
            raise ValueError(f"{name}: labels are strings, got {each!r}")
    return dict(values)


def _distributions(values: Any) -> dict[str, Distribution]:
    def label(value: Any) -> str:
        if callable(value):
            raise ValueError(
                "distribution: give a function in a mapping, such as {'mine': function}"
            )
        return value

    name = "distribution"
    out = _items(values, name, label)
    for value in out.values():
        if not callable(value):
            _validate.choice(value, name, DISTRIBUTIONS)
    return out


def _contexts(values: Any) -> dict[str, Context]:
    out = _items(values, "context", lambda v: v if isinstance(v, str) else repr(v))
    full = FullContext()
    for label, value in out.items():
        if isinstance(value, str) and value == "full":
            value = full
        if not isinstance(value, Context):
            raise ValueError(
                "context: expected 'full' or a Context such as DecayContext(0.9), "
                f"got {value!r:.80}"
            )
        if label == "full" and not (isinstance(value, FullContext) and value.exponent == 1):
            raise ValueError("context: the label 'full' means FullContext(); choose another")
        value.check()
        out[label] = value
    return out


def _solvers(values: Any) -> dict[str, Any]:
    def label(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(
                "solver: give an optax.GradientTransformation in a mapping, "
                f"such as {{'mine': transformation}}; got {value!r:.80}"
            )
        return value

    if hasattr(values, "update") and hasattr(values, "init"):  # a tuple of functions
        label(values)
    out = _items(values, "solver", label)
    for value in out.values():
        _check.solver(value, ("newton", *MAX_ITERATIONS))
    return out


def _fold(key: jax.Array, text: str) -> jax.Array:
    return jax.random.fold_in(key, np.uint32(zlib.crc32(text.encode())))


def _fit_keys(key: jax.Array, num_teachers: int, num_replicates: int) -> jax.Array:
    """A key per teacher and replicate, flat."""
    teacher, replicate = jnp.arange(num_teachers), jnp.arange(num_replicates)
    keys = jax.vmap(lambda t: jax.random.fold_in(key, t))(teacher)
    keys = jax.vmap(lambda k: jax.vmap(lambda r: jax.random.fold_in(k, r))(replicate))(keys)
    return keys.reshape(-1)


def _column(pairs: list[tuple[Any, ...]]) -> np.ndarray:
    array = np.asarray([label for label, *_ in pairs])
    return array.astype(object) if array.dtype.kind == "U" else array
