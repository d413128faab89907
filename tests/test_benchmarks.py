import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import estimate_oracles as oracle
import numpy as np
import pytest
from oracles import assert_law, markov_law, trajectory_law

import attnmarkov as am
from benchmarks import table
from benchmarks.peers import attention, textbook
from benchmarks.table import Row, Target

ROOT = Path(__file__).parent.parent
P = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.25, 0.25, 0.5]])
PROMPT = [0, 1, 2, 2]
RUNS = 40_000


def test_textbook_law():
    tokens = textbook.build(P, PROMPT, 4, RUNS, "tokens")(3)
    assert_law(tokens, trajectory_law(P, PROMPT, 4))


def test_textbook_counts():
    tokens = textbook.build(P, PROMPT, 5, 100, "tokens")(3)
    counts = textbook.build(P, PROMPT, 5, 100)(3)
    drawn = np.stack([(tokens == j).sum(1) for j in range(3)], axis=1)
    np.testing.assert_array_equal(counts, drawn + np.array([1, 1, 2]))


@pytest.mark.parametrize("size", [3, 65, 300])  # the two searches, and float32
def test_numba_law(size):
    pytest.importorskip("numba")
    from benchmarks.peers import numba_loop

    used = np.array([0, size // 2, size - 1])  # the tokens of the prompt
    p = np.random.default_rng(0).dirichlet(np.ones(size), size)
    p[np.ix_(used, used)] = P  # a row's scale does not matter
    tokens = numba_loop.build(p, used[PROMPT].tolist(), 4, RUNS, "tokens")(3)
    assert tokens.dtype == np.min_scalar_type(size - 1)
    assert np.isin(tokens, used).all()
    assert_law(np.searchsorted(used, tokens), trajectory_law(P, PROMPT, 4))


@pytest.mark.parametrize("size", [3, 65])
def test_numba_counts(size):
    pytest.importorskip("numba")
    from benchmarks.peers import numba_loop

    p = np.random.default_rng(0).dirichlet(np.ones(size), size)
    tokens = numba_loop.build(p, range(size), 50, 33, "tokens")(3)
    counts = numba_loop.build(p, range(size), 50, 33)(3)
    drawn = [np.bincount(row, minlength=size) for row in tokens]
    np.testing.assert_array_equal(counts, np.array(drawn) + 1)


def layer(width):
    embedding = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0][:3]
    made = am.SelfAttention.from_ccmc(am.CCMC.from_transition_matrix(P), embedding)
    return embedding, np.asarray(made.weight), np.asarray(made.head)


@pytest.mark.parametrize("width", [3, 8])
def test_attention_law(width):
    tokens = attention.build(*layer(width), PROMPT, 4, RUNS)(3)
    assert_law(tokens, trajectory_law(P, PROMPT, 4))


def test_attention_law_over_segments(monkeypatch):
    monkeypatch.setattr(attention, "_SEGMENT", 3)
    tokens = attention.build(*layer(3), PROMPT, 4, RUNS)(3)
    assert_law(tokens, trajectory_law(P, PROMPT, 4))


@pytest.mark.parametrize("width", [3, 8])
def test_torch_attention_law(width):
    pytest.importorskip("torch")
    from benchmarks.peers import attention_torch

    tokens = attention_torch.build(*layer(width), PROMPT, 4, RUNS)(3)
    assert_law(tokens, trajectory_law(P, PROMPT, 4))


def test_quantecon_law():
    pytest.importorskip("quantecon")
    from benchmarks.peers import quantecon_chain

    tokens = quantecon_chain.build(P, 4, RUNS)(3)
    assert_law(tokens, markov_law(P, np.full(3, 1 / 3), 4))


def test_ratio_is_that_of_the_best_rounds():
    names: dict[str, Any] = {"group": "g", "case": "c", "engine": "e", "peer": "p"}
    row = table.compare([2.0, 1.0, 4.0], [3.0, 6.0, 8.0], 100, 50, **names, target=Target(6))
    assert row.ratio == pytest.approx(6)  # 0.01 s a token against 0.06
    assert (row.low, row.high) == pytest.approx((3, 12))
    assert row.rounds == 3
    assert row.met
    assert (row.engine_rate, row.peer_rate) == pytest.approx((100, 50 / 3))
    cost = table.compare([2.0], [1.0], 100, 100, cost=True, **names, target=Target(3, False))
    assert cost.ratio == pytest.approx(2)
    assert cost.met


def test_targets():
    assert Target(1.5).met(1.5)
    assert not Target(1.5).met(1.49)
    assert Target(3, at_least=False).met(3)
    assert not Target(3, at_least=False).met(3.01)
    assert (str(Target(1.5)), str(Target(3, at_least=False))) == ("≥ 1.5", "≤ 3")


ROWS = [
    Row("speed", "K = 4", "auto", "loop", 1.6249, 1.5, 1.75, 5, Target(1.5), 2.5e6, 1e6, 0.8, 0.1),
    Row("memory", "16 T", "auto", "T", 1.25, 1.2, 1.3, 3, Target(1.1, at_least=False), note="MiB"),
    Row("speed", "K = 16", "scan", "loop", 12345.6, 10, 20000, 5),
]


def test_markdown():
    text = table.markdown(ROWS, {"CPU": "one, 2 cores"}, [("case", "no reason")])
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    speed = [line for line in cells if line[:3] == ["K = 4", "auto", "loop"]]
    assert speed == [
        ["K = 4", "auto", "loop", "1.62", "5: 1.5 to 1.75", "≥ 1.5", "yes", "2.5", "1", ""]
    ]
    assert ["16 T", "auto", "T", "1.25", "3: 1.2 to 1.3", "≤ 1.1", "no", "", "", "MiB"] in cells
    assert ["K = 16", "scan", "loop", "12,346", "5: 10 to 20,000", *[""] * 5] in cells
    assert [line for line in cells if line[0] == "speed"] == [
        ["speed", "K = 4", "auto", "0.8", "loop", "0.1"]
    ]
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        *("# Benchmarks", "## speed", "## memory", "## Compilation, in seconds", "## Not measured")
    ]
    assert "* CPU: one, 2 cores" in text
    assert "* case: no reason" in text
    assert len({len(line) for line in text.split("## ")[1].splitlines() if "|" in line}) == 1


def test_record_is_json():
    made = json.loads(json.dumps(table.record(ROWS, table.environment(), [("case", "why")])))
    assert [row["met"] for row in made["rows"]] == [True, False, None]
    assert made["rows"][0]["target"] == "≥ 1.5"
    assert made["skipped"] == [{"name": "case", "reason": "why"}]
    assert {"CPU", "JAX device", "Python", "jax", "date"} <= set(made["environment"])


def test_environment_names_what_is_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert table.environment()["numba"] == "not installed"


@pytest.mark.slow
def test_all_of_it_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--smoke", "--results", str(tmp_path)]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "benchmarks.md").read_text()
    assert text in done.stdout
    made = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {row["group"] for row in made["rows"]} == {
        line.removeprefix("## ")
        for line in text.splitlines()
        if line.startswith("## ") and "Compilation" not in line and "Not measured" not in line
    }
    assert any(row["peer"] == "vmap + scan" for row in made["rows"])


def fitted(name, prompts, y):
    counts, last, labels = (np.asarray(x) for x in (prompts.counts, prompts.last, y))
    if name == "scipy":
        from benchmarks.peers import scipy_fit

        return scipy_fit.fit(counts, last, labels)
    if name == "statsmodels":
        from benchmarks.peers import statsmodels_fit

        return statsmodels_fit.fit(counts, last, labels)
    from benchmarks.peers import choix_fit

    return choix_fit.fit(choix_fit.rows(np.asarray(prompts.tokens), labels, 3), name)


@pytest.mark.parametrize(
    ("name", "package", "within"),
    [
        ("scipy", "scipy", 1e-5),
        ("mm_top1", "choix", 1e-4),
        ("ilsr_top1", "choix", 1e-4),
        ("statsmodels", "statsmodels", 1e-3),
    ],
)
def test_fits_of_the_peers(name, package, within):
    pytest.importorskip(package)
    _, prompts, y = oracle.well_posed("peers", 3, 8, 300)
    counts, last, labels = (np.asarray(x) for x in (prompts.counts, prompts.last, y))
    exact = oracle.maximum(counts, last, labels)
    np.testing.assert_allclose(fitted(name, prompts, y), exact, atol=within)
