"""Write claims.json, the figures and report.html beside the datasets they come from."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl

from attnmarkov import _validate, sweep
from attnmarkov.report.result import Report, Result, evaluate, number

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from attnmarkov.sweep import Claim, Experiment

LARGEST_VECTOR = 1_500_000  # bytes; a figure whose SVG is larger is embedded as PNG
FACTS = {  # on the page: in the store's attributes
    "attnmarkov": "attnmarkov",
    "JAX": "jax",
    "Backend": "backend",
    "Device": "device",
    "Float type": "dtype",
}


def render(out: str | os.PathLike[str], lookup: Callable[[str], type[Experiment]]) -> Report:
    """Write the report of every dataset in a folder, finished or not.

    Args:
        out: The folder that holds the ``*.zarr`` stores.
        lookup: The class of an experiment by its name, such as ``attnmarkov.experiments.get``.

    Raises:
        ValueError: If there are no results there, or the folder cannot be written.
    """
    folder = Path(out)
    results: list[Result] = []
    skipped: list[str] = []
    for path in sorted(folder.glob("*.zarr")):
        try:
            dataset = sweep.open_results(path)
            cls = lookup(dataset.attrs["experiment"])
            experiment = cls.from_spec(dataset.attrs["spec"])
        except ValueError as error:
            skipped.append(f"{path.name}: {error}")
        else:
            results.append(evaluate(experiment, dataset))
    if not results:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise ValueError(f"out: no results of an experiment in {folder}{why}")
    return dataclasses.replace(write_outputs(folder, results), skipped=tuple(skipped))


def write_outputs(out: str | os.PathLike[str], results: Sequence[Result]) -> Report:
    """Write ``claims.json``, ``figures/`` and ``report.html`` into a folder.

    Raises:
        ValueError: If the folder cannot be written.
    """
    folder = Path(out)
    claims = [c for r in results for c in r.claims]
    with _validate.writing(folder, "out"):
        (folder / "figures").mkdir(exist_ok=True)
        sections = [_section(folder / "figures", r) for r in results]
        text = json.dumps([c.to_json() for c in claims], indent=2, allow_nan=False)
        (folder / "claims.json").write_text(text + "\n", encoding="utf-8")
        path = folder / "report.html"
        path.write_text(_page(sections, claims), encoding="utf-8")
    return Report(path, claims)


def _page(sections: list[dict[str, Any]], claims: list[Claim]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    source = importlib.resources.files("attnmarkov.report").joinpath("template.html")

    def shared(key: str, part: str = "attributes") -> str:
        return ", ".join(sorted({str(s[part][key]) for s in sections}))

    facts = {title: shared(key) for title, key in FACTS.items()}
    facts |= {"Seed": shared("seed", "parameters"), "Preset": shared("preset", "experiment")}
    started = min(s["attributes"]["created"] for s in sections)
    facts["Started"] = started[:16].replace("T", " ") + " UTC"
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        sections=sections,
        claims=[c.to_json() for c in claims],
        counts=Counter(c.verdict for c in claims),
        facts=facts,
        commands=sorted({s["attributes"]["command"] for s in sections}),
    )


def _section(folder: Path, result: Result) -> dict[str, Any]:
    experiment, dataset = result.experiment, result.dataset
    variables = {
        str(k): {"dims": ", ".join(map(str, v.dims)), "dtype": v.dtype, "shape": v.shape}
        for k, v in sorted(dataset.data_vars.items(), key=str)
    }
    return {
        "experiment": {
            "name": experiment.name,
            "summary": experiment.summary[:1].upper() + experiment.summary[1:],
            "preset": _preset(experiment),
        },
        "note": result.note,
        "parameters": json.loads(experiment.spec()),
        "attributes": dataset.attrs,
        "grid": f"{dataset.sizes['config']} grid points × {dataset.sizes['replicate']} replicates",
        "variables": variables,
        "figures": [_figure(folder, experiment, k, f) for k, f in result.figures.items()],
    }


def _figure(folder: Path, experiment: Experiment, name: str, figure: Figure) -> dict[str, Any]:
    """Save a figure as PNG and SVG; the embedded image, its file and its description."""
    from matplotlib import pyplot as plt

    name = name if name.startswith(experiment.name) else f"{experiment.name}-{name}"
    if Path(name).name != name:
        raise ValueError(f"figures: {name!r} is not a file name")
    images = {}
    with mpl.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
            images[suffix] = buffer.getvalue()
            (folder / f"{name}.{suffix}").write_bytes(images[suffix])
    description = _describe(figure, name)
    plt.close(figure)
    kind, mime = "svg", "image/svg+xml"
    if len(images["svg"]) > LARGEST_VECTOR:
        kind, mime = "png", "image/png"
    data = base64.b64encode(images[kind]).decode()
    return {
        "file": f"{name}.svg",
        "alt": description,
        "source": f"data:{mime};base64,{data}",
        "width": round(120 * figure.get_figwidth()),
    }


def _describe(figure: Figure, name: str) -> str:
    """The figure's label if its author gave one, else its titles and axis labels in words."""
    if figure.get_label():
        return str(figure.get_label())
    panels = []
    for ax in figure.axes:
        axes = " against ".join(x for x in (ax.get_ylabel(), ax.get_xlabel()) if x)
        panels.append(": ".join(x for x in (ax.get_title(), axes) if x))
    text = "; ".join(dict.fromkeys(p for p in panels if p)) or name.replace("-", " ")
    text = re.sub(r"[$\\{}]", "", text)  # mathematics reads as plain words
    return text[:1].upper() + text[1:]


def _preset(experiment: Experiment) -> str:
    """The preset that has these parameters (whatever the seed), or "custom"."""
    for name in ("quick", "full"):
        if dataclasses.replace(experiment.preset(name), seed=experiment.seed) == experiment:
            return name
    return "custom"
