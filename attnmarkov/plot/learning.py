"""Error of the fitted model against the number of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov.estimate.teacher_student import learning_groups, ratio_to_prediction
from attnmarkov.plot import _style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_LABELS = {
    "excess_risk": ("excess risk (nats per token)", r"$r/2n$", "excess risk"),
    "squared_error": (
        r"squared error $\|\hat S - S^\star\|_F^2$",
        r"$\mathrm{tr}(I^+)/n$",
        "squared error",
    ),
}


def learning_curves(
    dataset: xr.Dataset, variable: str = "excess_risk", *, ax: Axes | None = None
) -> Axes:
    """Plot a mean error with its standard errors against ``n``, one series per kind of config.

    Args:
        dataset: Of :func:`attnmarkov.estimate.teacher_student`, or any with ``variable`` over
            (config, replicate), ``predicted_<variable>``, and coordinates on config, among them
            ``num_prompts``. Configs that share the others make one series; fits without an
            error (NaN) are left out of its means.
        variable: ``"excess_risk"`` or ``"squared_error"``.
        ax: Axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: If ``variable`` is neither.
    """
    _check(variable)
    ax = _style.axes(ax)
    ylabel, formula, _ = _LABELS[variable]
    groups = learning_groups(dataset)
    values, predicted = _by_config(dataset[variable]), _by_config(dataset[f"predicted_{variable}"])
    for i, (shared, index) in enumerate(groups):
        # Grid points of an unfinished run are left out.
        index = index[(~np.isnan(values[index])).sum(axis=1) > 1]
        n, (mean, error) = dataset["num_prompts"].values[index], _mean(values[index])
        colour, label = _style.colour(i), _name(shared, groups)
        ax.errorbar(n, mean, 2 * error, fmt="o", ms=4, capsize=2, color=colour, label=label)
        prediction = np.nanmean(predicted[index], axis=1)
        ax.plot(n, prediction, color=colour, linestyle="--", linewidth=1)
    ax.plot([], [], color="0.25", linestyle="--", linewidth=1, label=f"predicted {formula}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=8)
    return _style.finish(ax, xlabel="prompts $n$", ylabel=f"{ylabel}, mean ± 2 s.e.")


def learning_ratios(
    dataset: xr.Dataset, variable: str = "excess_risk", *, ax: Axes | None = None
) -> Axes:
    """Plot a mean error over its prediction, a row for each kind of config, darker for larger n.

    Theory says 1 as ``n`` grows. Arguments, return and errors as :func:`learning_curves`.
    """
    _check(variable)
    ax = _style.axes(ax)
    groups = learning_groups(dataset)
    ratio = ratio_to_prediction(dataset, variable)
    most = max(len(index) for _, index in groups)
    for row, (_, index) in enumerate(groups):
        for place, config in enumerate(index):
            if (~np.isnan(ratio[config])).sum() < 2:
                continue
            (mean,), (error,) = _mean(ratio[config : config + 1])
            shade = 1 - 0.7 * (1 - (place + 1) / len(index))
            offset = (place - (len(index) - 1) / 2) * 0.55 / most
            ax.errorbar(
                mean,
                row + offset,
                xerr=2 * error,
                fmt="o",
                ms=4,
                capsize=2,
                color=_style.colour(0),
                alpha=shade,
            )
    ax.axvline(1, color="0.25", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(groups)), [_name(shared, groups) for shared, _ in groups], fontsize=8)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    _, _, words = _LABELS[variable]
    return _style.finish(ax, xlabel=f"{words} / prediction, mean ± 2 s.e.", ylabel="")


def _check(variable: str) -> None:
    if variable not in _LABELS:
        raise ValueError(f"variable: unknown {variable!r}; known: {', '.join(_LABELS)}")


def _by_config(values: xr.DataArray) -> np.ndarray:
    array = values.transpose("config", ...).values
    return array.reshape(len(array), -1)


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the rows and their standard errors, NaN left out."""
    known = np.sqrt((~np.isnan(values)).sum(axis=1))
    return np.nanmean(values, axis=1), np.nanstd(values, axis=1, ddof=1) / known


def _name(shared: dict[str, Any], groups: list[tuple[dict[str, Any], np.ndarray]]) -> str:
    """``K = 4``, and what else tells this group from the others."""
    words = {"num_tokens": "K = {}", "length": "L = {}", "distribution": "{}"}
    told = [
        words.get(name, name.replace("_", " ") + " {}").format(shared[name])
        for name in sorted(shared, key=lambda name: name != "num_tokens")
        if name == "num_tokens" or len({str(g[name]) for g, _ in groups}) > 1
    ]
    return ", ".join(told)
