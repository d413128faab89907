"""The command line, from arguments to files, exit codes and one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dice_experiment import Dice

import attnmarkov
from attnmarkov import experiments, sweep
from attnmarkov.cli import main

ROOT = Path(attnmarkov.__file__).parents[1]


@pytest.fixture(autouse=True)
def only_dice(monkeypatch, tmp_path):
    """The registry holds the dice alone; results go below a temporary folder."""
    monkeypatch.setattr(experiments, "REGISTRY", {"dice": "dice_experiment:Dice"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def test_list(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == f"dice  {Dice.summary}\n"


def test_run_writes_dataset_figures_claims_and_report(capsys, tmp_path):
    out = tmp_path / "deep" / "results"
    assert main(["run", "dice", "--out", str(out), "--seed", "5", "--sides", "3", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out / "report.html")
    assert "has mean 1.5" in captured.out
    assert "task" in captured.err
    assert sorted(p.name for p in out.iterdir()) == [
        "claims.json", "dice.zarr", "figures", "report.html",
    ]  # fmt: skip
    dataset = sweep.open_results(out / "dice.zarr")
    assert Dice.from_spec(dataset.attrs["spec"]) == Dice(seed=5, sides=(3, 4))
    assert dataset.attrs["command"] == f"attnmarkov run dice --out {out} --seed 5 --sides 3 4"
    assert len(json.loads((out / "claims.json").read_text())) == 2


def test_run_takes_presets_and_a_default_folder(tmp_path):
    assert main(["run", "dice", "--preset", "full", "--sides", "5"]) == 0
    dataset = sweep.open_results(tmp_path / "attnmarkov-results" / "dice" / "dice.zarr")
    assert dict(dataset.sizes) == {"config": 1, "replicate": 40, "step": 3}


@pytest.mark.parametrize("line", ["--out coins dice", "--preset quick --out coins dice"])
def test_the_value_of_an_option_is_never_taken_for_the_experiment(
    line, monkeypatch, capsys, tmp_path
):
    two = dict.fromkeys(("dice", "coins"), "dice_experiment:Dice")
    monkeypatch.setattr(experiments, "REGISTRY", two)
    assert main(["run", *line.split()]) == 2
    error = capsys.readouterr().err
    assert "experiment: must come right after run, before the options" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["run", "dice", "--out", "coins"]) == 0
    assert (tmp_path / "coins" / "dice.zarr").is_dir()


def test_reproduce_and_report(capsys, tmp_path):
    assert main(["reproduce"]) == 0
    out = Path("attnmarkov-results/reproduce-quick")
    first = capsys.readouterr().out
    assert first.splitlines()[-1] == str(out / "report.html")
    assert "2 claims: 2 pass, 0 fail, 0 inconclusive" in first
    assert sweep.open_results(out / "dice.zarr").sizes["replicate"] == 4
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    (out / "claims.json").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert (out / "report.html").read_text() == page


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("inconclusive", 0), ("fail", 1)])
def test_reproduce_says_by_its_exit_code_whether_a_claim_fails(monkeypatch, capsys, verdict, code):
    monkeypatch.setattr(Dice, "presets", {"quick": {"verdict": verdict, "sides": (2,)}})
    assert main(["reproduce", "--preset", "quick", "--out", "out"]) == code
    assert f"1 {verdict}" in capsys.readouterr().out


def test_a_run_is_resumed_unless_told_otherwise(monkeypatch, capsys):
    command = ["run", "dice", "--out", "a b", "--sides", "2"]
    simulate = Dice.simulate

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dice, "simulate", interrupt)
    assert main(command) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("attnmarkov: interrupted - what is finished is kept in a b: ")
    assert "`attnmarkov run dice --out 'a b' --sides 2` goes on" in line
    assert main(["report", "a b"]) == 0

    monkeypatch.setattr(Dice, "simulate", simulate)
    assert main(command) == 0
    monkeypatch.setattr(Dice, "simulate", interrupt)
    assert main(command) == 0  # finished: nothing left to simulate
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--no-resume"]) == 130


BAD = {
    "": "Expected one of",
    "reprodce": "unknown command 'reprodce'; did you mean 'reproduce'?",
    "--lost": "--lost",
    "list extra": "extra",
    "run": "experiment: must come right after run, before the options; known: dice",
    "run --seed 1": "experiment: must come right after run",
    "run --sides 5 dice": "experiment: must come right after run",
    "run dcie": "unknown experiment 'dcie'; did you mean 'dice'? known: dice",
    "run dice --side 3": "--side, 3; did you mean --sides?; see attnmarkov run dice --help",
    "run dice --sides three": "three",
    "run dice --sides 1": "sides: a die has at least 2, got (1,)",
    "run dice --num-replicates -3": "num_replicates: must be at least 1, got -3",
    "run dice --num-replicates 1.5": "1.5",
    "run dice --preset slow": "slow",
    "run dice --preset": "--preset",
    "run dice --out file/below": "out: cannot write to",
    "run dice --out file": "out: cannot write to",
    "reproduce --preset slow": "'slow'",
    "reproduce --out file/below": "out: cannot write to",
    "report": "DIR",
    "report nowhere": "no results of an experiment in nowhere",
    "report file": "no results of an experiment in file",
    "fit-text": "attnmarkov fit-text --help",
    "fit-text missing.txt": "missing.txt",
    "fit-text file --level line": "'line'",
    "fit-text file --solver sgd": "'sgd'",
    "fit-text file --seed 99999999999999999999": "seed: must be below 2**32, got 999999999999",
    "fit-text file --generate 3000000000": "generate: ",
    "diagnose": "FILE",
    "diagnose missing.txt": "missing.txt does not exist",
    "diagnose missing.npy": "file: cannot read missing.npy as .npy",
    "diagnose file --level line": "'line'",
    "diagnose file --share 2": "collapse_share: must lie in (0, 1], got 2",
    "diagnose file --window 0": "collapse_window: must be at least 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2(line, capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("attnmarkov: error: ")
    assert BAD[line] in captured.err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        ("", "arguments cannot be read; see attnmarkov report --help"),
        ("╭───╮\n╰───╯\n", "arguments cannot be read; see attnmarkov report --help"),
        ("no box at all", "no box at all; see attnmarkov report --help"),
        ("\x1b[31m╭─ Only a title ─╮\x1b[0m\n", "Only a title; see attnmarkov report --help"),
        ("+--- Title ---+\n| what is\r\n\n|   wrong |\n+----+", "what is"),
    ],
)
def test_a_message_of_tyro_that_cannot_be_parsed_is_still_one_line(
    drawn, shown, monkeypatch, capsys
):
    def cli(*_, **__):
        print(drawn, end="", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr("tyro.cli", cli)
    assert main(["report", "--dri", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnmarkov: error: ")
    assert shown in captured.err
    assert len(captured.err.splitlines()) == 1


def test_an_error_of_many_lines_becomes_one(monkeypatch, capsys):
    def claims(self, dataset):
        raise ValueError("first\n  second")

    monkeypatch.setattr(Dice, "claims", claims)
    assert main(["run", "dice"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "attnmarkov: error: first second"


def test_results_of_another_run_are_refused(capsys):
    assert main(["run", "dice", "--out", "out"]) == 0
    capsys.readouterr()
    assert main(["run", "dice", "--out", "out", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "seed: stored 0, asked 1" in error
    assert main(["run", "dice", "--out", "out", "--seed", "1", "--no-resume"]) == 0


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("--help", "reproduce"),
        ("run --help", "EXPERIMENT"),
        ("run dice --help", "(default: 2 6)"),
        ("run dice --preset quick --help", "(default: 4)"),
        ("reproduce --help", "(default: quick)"),
        ("run --help dice", "EXPERIMENT"),
        ("fit-text --help", "attnmarkov fit-text"),
        ("fit-text --help", "{char,word}"),
        ("fit-text --help", "{newton,lbfgs,adam}"),
        ("diagnose --help", "one sequence a row"),
        ("report -h", "DIR"),
        ("--version", attnmarkov.__version__),
    ],
)
def test_help(line, shown, capsys):
    assert main(line.split()) == 0
    captured = capsys.readouterr()
    assert shown in " ".join(captured.out.split())
    assert captured.err == ""


def test_fit_text(capsys, tmp_path):
    (tmp_path / "rhyme.txt").write_text("one for the money, two for the show. " * 40)
    line = "fit-text rhyme.txt --window 16 --generate 50 --prior 0.3"
    assert main(line.split()) == 0
    assert "unigram" in capsys.readouterr().out


def test_diagnose(capsys, tmp_path):
    (tmp_path / "rhyme.txt").write_text("one for the money, " + "the show, " * 100)
    assert main(["diagnose", "rhyme.txt", "--winners", "3", "--window", "30"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Diagnostics(1 sequence of 305 tokens from a vocabulary of 6:")
    assert "1 of 1 collapse: 3 tokens with 0.9 of every 30 tokens" in printed
    assert main(["diagnose", "rhyme.txt", "--level", "char"]) == 0
    assert "1 sequence of 1019 tokens" in capsys.readouterr().out
    np.save(tmp_path / "ids.npy", np.arange(60).reshape(3, 20) % 7)
    assert main(["diagnose", "ids.npy"]) == 0
    assert "3 sequences of 20 tokens from a vocabulary of 7:" in capsys.readouterr().out
    np.save(tmp_path / "ids.npy", np.ones((3, 20)))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-9])
    for file, message in (("ids", "tokens: expected integers"), ("torn", "file: cannot read")):
        assert main(f"diagnose {file}.npy".split()) == 2
        assert message in capsys.readouterr().err


def test_the_registry_is_complete(monkeypatch):
    monkeypatch.undo()
    for name in experiments.names():
        cls = experiments.get(name)
        assert cls.name == name
        assert cls.summary
        for preset in ("quick", "full"):
            assert cls.from_spec(cls.preset(preset).spec()) == cls.preset(preset)


def test_python_m_attnmarkov(tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "attnmarkov", *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"attnmarkov {attnmarkov.__version__}\n")
    wrong = run("run", "nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("attnmarkov: error: experiment: unknown experiment 'nothing'")
    assert wrong.stderr.count("\n") == 1
