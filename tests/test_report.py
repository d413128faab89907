"""The report: one offline page, and claims.json."""

from __future__ import annotations

import importlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from dice_experiment import Dice

from attnmarkov import report, sweep

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def lookup(name):
    assert name == "dice"
    return Dice


def run(out, **parameters):
    sweep.run(Dice(**parameters), out / "dice.zarr", progress=False, command="make <it>")
    written = report.render(out, lookup)
    return written, Page(written.path.read_text(encoding="utf-8"))


def test_the_page_tells_everything_and_loads_nothing(tmp_path):
    written, page = run(tmp_path)
    text = " ".join(" ".join(page.text).split())
    for part in (
        "✓ 2 pass",
        "A white die of 6 sides has mean 2.5",
        "Pacioli (1494)",
        "float32",
        "make <it>",
        "Seed 0",
        "Preset custom",
        'open_results("dice.zarr")',
    ):
        assert part in text
    assert page.tags.count(("td", {"class": "number"})) == 6
    for _, attributes in page.tags:
        assert {"src", "href", "srcset", "action", "data"}.isdisjoint(attributes) or (
            attributes.get("src", attributes.get("href", "")).startswith(("data:", "#"))
        )
    html = written.path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|<script|<link", html)
    images = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in images] == ["Mean throw against sides"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= ids
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "dice-means.png",
        "dice-means.svg",
    ]


def test_what_a_user_wrote_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    _, page = run(tmp_path, color=evil)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in a for _, a in page.tags)
    assert evil in "".join(page.text)


def test_claims_json(tmp_path):
    run(tmp_path)
    claims = json.loads((tmp_path / "claims.json").read_text(), parse_constant=pytest.fail)
    assert [list(c) for c in claims] == 2 * [
        ["experiment", "claim", "source", "predicted", "measured", "uncertainty", "verdict"]
    ]
    assert claims[1]["predicted"] == 2.5
    assert isinstance(claims[1]["measured"], float)
    assert claims[1]["uncertainty"] is None
    assert claims[1]["verdict"] == "pass"


def test_rendering_again_changes_nothing(tmp_path):
    written, _ = run(tmp_path)
    files = [written.path, tmp_path / "claims.json", tmp_path / "figures" / "dice-means.svg"]
    before = [f.read_bytes() for f in files]
    report.render(tmp_path, lookup)
    assert [f.read_bytes() for f in files] == before


@pytest.mark.parametrize("sides", [(2, 6), (2, 7)])
def test_a_partial_dataset_gets_a_report_without_verdicts(tmp_path, sides):
    class Stops(Dice):
        def simulate(self, config, key, replicates):
            if config["num_sides"] > 2:
                raise KeyboardInterrupt
            return super().simulate(config, key, replicates)

        def claims(self, dataset):
            if self.sides[1] == 7:
                raise RuntimeError("no <7>")
            return super().claims(dataset)

    with pytest.raises(KeyboardInterrupt):
        sweep.run(Stops(sides=sides), tmp_path / "dice.zarr", progress=False)
    written = report.render(tmp_path, lambda name: Stops)
    page = Page(written.path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "Unfinished: 50% of the replicates" in text
    assert ("no <7>" in text) == (sides[1] == 7)
    verdicts = [c["verdict"] for c in json.loads((tmp_path / "claims.json").read_text())]
    assert verdicts == ([] if sides[1] == 7 else ["inconclusive"] * 2)


def test_folders_without_results(tmp_path):
    with pytest.raises(ValueError, match=f"no results of an experiment in {tmp_path}"):
        report.render(tmp_path, lookup)
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(ValueError, match=r"other\.zarr: path: no results of a sweep"):
        report.render(tmp_path, lookup)
    written, _ = run(tmp_path)
    assert len(written.skipped) == 1


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to"):
        report.write_outputs(tmp_path / "file", [])


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=f"out: cannot write to {tmp_path} .*Permission denied"):
        report.write_outputs(tmp_path, [])
    assert not (tmp_path / "report.html").exists()


def test_a_large_figure_is_embedded_as_png(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module(report.render.__module__), "LARGEST_VECTOR", 10)
    _, page = run(tmp_path)
    (source,) = [a["src"] for tag, a in page.tags if tag == "img"]
    assert source.startswith("data:image/png;base64,")


def test_a_figures_label_is_its_description(tmp_path):
    class Labelled(Dice):
        def figures(self, dataset):
            figures = super().figures(dataset)
            figures["means"].set_label("Means, <seen>")
            return figures

    results = [report.evaluate(Labelled(), sweep.run(Labelled(), progress=False))]
    page = Page(report.write_outputs(tmp_path, results).path.read_text(encoding="utf-8"))
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Means, <seen>"]


def test_the_table_in_words(tmp_path):
    written, _ = run(tmp_path, sides=(2,))
    head, row, counts = str(written).splitlines()
    assert head.split() == [
        "verdict",
        "predicted",
        "measured",
        "uncertainty",
        "experiment",
        "claim",
    ]
    assert row.split()[:2] == ["pass", "0.5"]
    assert row.split()[3:5] == ["–", "dice"]
    assert np.isfinite(float(row.split()[2]))
    assert row.endswith("A white die of 2 sides has mean 0.5")
    assert counts == "1 claims: 1 pass, 0 fail, 0 inconclusive"
