"""The command ``attnmarkov``.

Results go to stdout, progress to stderr. Exit codes: 0; 1 if ``reproduce`` finds that a claim
fails; 2 for input that cannot be used, said in one line on stderr; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from attnmarkov.report import Report
    from attnmarkov.sweep import Experiment

RESULTS = Path("attnmarkov-results")
_HELP = {"-h", "--help"}


@dataclass(frozen=True)
class List:
    """Name the experiments, one a line, with what they show."""


@dataclass(frozen=True)
class Output:
    """Where a run keeps its results."""

    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for datasets, figures and report (default: attnmarkov-results/NAME)"""
    resume: bool = True
    """Keep what the folder already holds of this run; --no-resume computes it again."""


@dataclass(frozen=True)
class RunOutput(Output):
    """Where a run keeps its results, and how large it is."""

    preset: Annotated[
        Literal["quick", "full"] | None, arg(metavar="quick|full", help_behavior_hint="")
    ] = None
    """Start from the parameters of a preset instead of the defaults shown here"""


@dataclass(frozen=True)
class Run(RunOutput):
    """Run one experiment. Its parameters are options: attnmarkov run EXPERIMENT --help."""

    experiment: Annotated[Positional[str], arg(metavar="EXPERIMENT")] = field(kw_only=True)
    """Name of the experiment; attnmarkov list shows them."""


@dataclass(frozen=True)
class Reproduce(Output):
    """Run every experiment, write the report, and print the claims. Fails if a claim does."""

    preset: Literal["quick", "full"] = "quick"
    """quick takes minutes on a laptop, full hours."""


@dataclass(frozen=True)
class FitText:
    """Learn a model from a text file and say what the text can teach: fit-text FILE --help."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The text, in UTF-8."""


@dataclass(frozen=True)
class Diagnose:
    """How repetitive and how collapsed a text is, or token ids, such as a model's output."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A text in UTF-8; or token ids as NumPy saves them (.npy), one sequence a row."""
    level: Literal["char", "word"] = "word"
    """The tokens of a text."""
    share: float = 0.9
    """Share of every window that a collapsed sequence keeps for its top tokens."""
    window: int = 128
    """Tokens of that window."""
    winners: int = 1
    """How many tokens may hold the share together."""

    def run(self) -> None:
        """Print the table."""
        from attnmarkov.dynamics.diagnostics import diagnose

        tokens = self._tokens()
        print(
            diagnose(
                tokens,
                collapse_share=self.share,
                collapse_window=self.window,
                num_winners=self.winners,
            )
        )

    def _tokens(self) -> Any:
        if self.file.suffix == ".npy":
            import numpy as np

            try:
                return np.load(self.file)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"file: cannot read {self.file} as .npy ({error})") from None
        from attnmarkov.prompts.text import Vocabulary, read_text

        text = read_text(self.file)
        return Vocabulary.from_text(text, self.level).encode(text)


@dataclass(frozen=True)
class Render:
    """Write report.html, the figures and claims.json again from the datasets in a folder."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder that run or reproduce wrote, finished or not."""


COMMANDS = {
    "list": List,
    "run": Run,
    "reproduce": Reproduce,
    "fit-text": FitText,
    "diagnose": Diagnose,
    "report": Render,
}
DESCRIPTION = (
    "Attention as a Markov model: run the experiments, read the report.\n\n"
    "attnmarkov COMMAND --help shows a command's options, attnmarkov --version the version."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("MPLBACKEND", "agg")  # figures go to files
    try:
        return _dispatch(args)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except (ValueError, OSError) as error:
        print(f"attnmarkov: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(" ".join(["attnmarkov: interrupted", *interrupt.args]), file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    if args == ["--version"]:
        from attnmarkov import __version__

        print(f"attnmarkov {__version__}")
        return 0
    name, rest = (args[0], args[1:]) if args else ("", [])
    if name not in COMMANDS:
        _help(args)
        return 0
    prog = f"attnmarkov {name}"
    match name:
        case "run" if rest and not rest[0].startswith("-"):
            return _run(rest[0], rest[1:], args)
        case "run" if not _HELP & set(rest):
            from attnmarkov import experiments

            known = ", ".join(experiments.names())
            raise ValueError(
                f"experiment: must come right after run, before the options; known: {known}"
            )
        case "fit-text":
            from attnmarkov.experiments import fit_text

            return _parse(fit_text.FitText, rest, prog).run()
    match _parse(COMMANDS[name], rest, prog):
        case List():
            _list()
        case Reproduce() as command:
            return _reproduce(command, args)
        case Diagnose() as command:
            command.run()
        case Render() as command:
            _report(command.dir)
    return 0


def _help(args: list[str]) -> None:
    """Show the help of the whole; anything else before a command is an error."""
    if args and not args[0].startswith("-"):
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"command: unknown command {args[0]!r}; {hint}known: {', '.join(COMMANDS)}"
        )
    kinds = tuple(Annotated[v, subcommand(k)] for k, v in COMMANDS.items())
    _parse(Union[kinds], args, "attnmarkov", DESCRIPTION)  # noqa: UP007


def _list() -> None:
    from attnmarkov import experiments

    width = max(map(len, experiments.names()))
    for name in experiments.names():
        print(f"{name:{width}}  {experiments.get(name).summary}")


def _run(name: str, options: list[str], args: list[str]) -> int:
    from attnmarkov import experiments

    cls = experiments.get(name)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    preset = first.parse_known_args(options)[0].preset
    default = cls() if preset is None else cls.preset(preset)
    parsed = _parse(
        dataclasses.make_dataclass(
            "Options",
            [
                ("parameters", Annotated[cls, arg(name="")], field(default=default)),
                ("output", Annotated[RunOutput, arg(name="")], field(default=RunOutput())),
            ],
        ),
        options,
        f"attnmarkov run {name}",
        cls.summary,
    )
    out = parsed.output.out or RESULTS / name
    _sweep([parsed.parameters], out, parsed.output.resume, args)
    _report(out)
    return 0


def _reproduce(command: Reproduce, args: list[str]) -> int:
    from attnmarkov import experiments

    out = command.out or RESULTS / f"reproduce-{command.preset}"
    presets = [experiments.get(name).preset(command.preset) for name in experiments.names()]
    _sweep(presets, out, command.resume, args)
    return 1 if _report(out).count("fail") else 0


def _sweep(todo: list[Experiment], out: Path, resume: bool, args: list[str]) -> None:
    from attnmarkov import sweep

    command = shlex.join(["attnmarkov", *args])
    try:
        for experiment in todo:
            store = out / f"{experiment.name}.zarr"
            sweep.run(experiment, store, resume=resume, command=command)
    except KeyboardInterrupt:
        again = shlex.join(["attnmarkov", *(a for a in args if a != "--no-resume")])
        raise KeyboardInterrupt(
            f"- what is finished is kept in {out}: `{again}` goes on from there, "
            f"`attnmarkov report {shlex.quote(str(out))}` shows it"
        ) from None


def _report(out: Path) -> Report:
    from attnmarkov import experiments, report

    written = report.render(out, experiments.get)
    for line in written.skipped:
        print(f"attnmarkov: left out {line}", file=sys.stderr)
    print(written, written.path, sep="\n")
    return written


def _parse(kind: Any, args: list[str], prog: str, description: str | None = None) -> Any:
    """Parse options with tyro; what is wrong with them becomes a one-line ``ValueError``."""
    if _HELP & set(args):
        return tyro.cli(kind, args=args, prog=prog, description=description)
    stderr = io.StringIO()
    try:
        with _wide(), contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=args, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_message(stderr.getvalue())}; see {prog} --help") from None


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Let tyro write its messages without wrapping them."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _message(box: str) -> str:
    """What tyro's message says between its title and its first rule, and the option it suggests.

    All that it says if that is nothing.
    """
    plain = re.sub(r"\x1b\[[\d;]*m|[╭╮╰╯│]", "", box)
    body = "\n".join(line.strip() for line in plain.splitlines()[1:])
    parts = [" ".join(part.split()) for part in re.split(r"^[─-]+$", body, flags=re.MULTILINE)]
    all_words = " ".join(plain.split()).strip("─- ")
    message = next(filter(None, [*parts, all_words]), "arguments cannot be read").rstrip(".")
    near = re.search(r"Perhaps you meant:\s*(--[\w-]+)", body)
    return message + (f"; did you mean {near[1]}?" if near else "")
