"""A CCMC on real text: what it can learn, how it predicts, and how its own text collapses."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from attnmarkov import _validate
from attnmarkov.estimate import fit
from attnmarkov.experiments import _text_facts as facts
from attnmarkov.experiments import _text_models as models
from attnmarkov.experiments._text_report import render
from attnmarkov.prompts.text import LEVELS, Vocabulary, read_text, tokenize

if TYPE_CHECKING:
    from attnmarkov.estimate import Fit
    from attnmarkov.model import CCMC

DEFAULT_WINDOW = {"char": 1024, "word": 512}
PRIORS = (0.03, 0.3, 3.0)
SOLVERS = ("newton", "lbfgs", "adam")
VALIDATION = 0.15  # share of the training part that smoothing and prior are chosen on


@dataclass(frozen=True)
class FitText:
    """Fit a CCMC to the windows of a text, hold it against n-gram models, and let it write.

    Every window of the training part is a prompt, the token after it the label. The last part of
    the text is held out, and no window straddles the border.
    """

    file: tyro.conf.Positional[Path]
    """Text file, UTF-8."""
    level: Literal["char", "word"] = "char"
    """Tokens: characters, or lower-cased words and punctuation marks."""
    window: int | None = None
    """Tokens in a window. By default 1024 characters or 512 words, or less for a short text."""
    max_tokens: int = 200
    """Largest vocabulary, one token for the unknown included; the rarest are mapped to it."""
    prior: float | None = None
    """Precision of a Gaussian prior on the scores S. Chosen on a validation part by default."""
    solver: Literal["newton", "lbfgs", "adam"] = "newton"
    """Solver of the fit."""
    holdout: float = 0.2
    """Share of the text, at its end, that is held out for the comparison."""
    seed: int = 0
    """Seed of the generated text, 0 to 2**32 - 1."""
    generate: int = 100_000
    """Tokens to generate; with those of the prompt, fewer than 2**31."""
    out: Path | None = None
    """Folder for fit-text.json (every number) and fit-text.txt (the report)."""
    fold_case: bool = False
    """Lower the case of characters too."""
    keep_whitespace: bool = False
    """Keep line breaks and indents; by default each run of whitespace becomes one blank."""
    max_windows: int = 200_000
    """Most windows per part; in longer texts, windows start further apart."""

    def validate(self) -> None:
        """Raise ``ValueError`` for a parameter out of range, naming it and its value."""
        _validate.choice(self.level, "level", LEVELS)
        _validate.choice(self.solver, "solver", SOLVERS)
        if self.window is not None:
            _validate.integer(self.window, "window", minimum=1)
        _validate.integer(self.max_tokens, "max_tokens", minimum=2)
        _validate.seed(self.seed)
        _validate.integer(self.generate, "generate", minimum=1)
        _check_context(self.generate, self.window or 0)
        _validate.integer(self.max_windows, "max_windows", minimum=8)
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: must be between 0 and 1, got {self.holdout}")
        if self.prior is not None and not (math.isfinite(self.prior) and self.prior > 0):
            raise ValueError(f"prior: must be finite and above 0, got {self.prior}")

    def run(self) -> int:
        """Print the report; write it and the numbers to ``out`` if given.

        Returns:
            0.

        Raises:
            ValueError: For a file that can't be read or is too short, a parameter out of range,
                or a folder that can't be written.
        """
        self.validate()
        if self.out is not None:
            with _validate.writing(self.out, "out"):
                pass  # fails now rather than after the fit
        results = analyse(self)
        report = render(results)
        if self.out is not None:
            numbers = json.dumps(results, indent=1, allow_nan=False) + "\n"
            with _validate.writing(self.out, "out"):
                (self.out / "fit-text.json").write_text(numbers, encoding="utf-8")
                (self.out / "fit-text.txt").write_text(report, encoding="utf-8")
        encoding = sys.stdout.encoding or "utf-8"
        print(report.encode(encoding, "replace").decode(encoding), end="")
        return 0


def analyse(config: FitText) -> dict[str, Any]:
    """All that the report tells, as plain JSON values.

    Raises:
        ValueError: As :meth:`FitText.run`.
    """
    start = time.perf_counter()
    config.validate()
    text = _split(config)
    parts = _windows(config, text)
    _check_context(config.generate, max(parts.window, text.vocabulary.num_tokens - 1))
    settings = models.tune(text.fit, text.vocabulary.num_tokens, parts.validation)
    prior, tried = _choose_prior(config, parts)
    fitted = _fit(parts.training, prior, config.solver)
    held_out = _compare(config, text, parts, settings, fitted.model)
    return {
        "file": str(config.file),
        "settings": {
            **{k: v for k, v in dataclasses.asdict(config).items() if k not in ("file", "out")},
            "window": parts.window,
            "prior": prior,
            **settings._asdict(),
        },
        "validation_by_prior": tried,
        "corpus": text.facts,
        "windows": _window_facts(parts),
        "coverage": facts.coverage_facts(text.vocabulary, parts.training, fitted),
        "fit": {
            "status": str(fitted.status.name),
            "iterations": int(fitted.iterations),
            "mean_nll": float(fitted.nll),
        },
        "held_out": held_out,
        "strongest": facts.strongest(text.vocabulary, text.training, fitted.model),
        "generation": facts.generate(
            text.vocabulary,
            text.held[: parts.window],
            fitted.model,
            config.generate,
            config.seed,
        ),
        "seconds": time.perf_counter() - start,
    }


class Text(NamedTuple):
    """The text as token ids: ``fit`` and ``validation`` together are ``training``."""

    vocabulary: Vocabulary
    training: np.ndarray
    fit: np.ndarray
    validation: np.ndarray
    held: np.ndarray
    facts: dict[str, Any]


class Parts(NamedTuple):
    """The windows of each part."""

    window: int
    fit: models.Positions
    validation: models.Positions
    training: models.Positions
    held: models.Positions


def _check_context(generate: int, prompt: int) -> None:
    """Raise if a prompt and the text generated after it outgrow 32-bit counts."""
    if generate + prompt >= 2**31:
        less = f" less the prompt of {prompt} tokens" if prompt else ""
        raise ValueError(f"generate: must be below 2**31{less}, got {generate}")


def _split(config: FitText) -> Text:
    """Read the file, cut it near ``1 - holdout`` at whitespace, and turn it into ids."""
    whole = read_text(config.file)
    if config.level == "char" and not config.keep_whitespace:
        whole = " ".join(whole.split())
    border = round(len(whole) * (1 - config.holdout))
    while 0 < border < len(whole) and any(c.isspace() for c in whole):
        if whole[border - 1].isspace():
            break
        border += 1
    first, second = whole[:border], whole[border:]
    found = {
        name: tokenize(part, config.level, fold_case=config.fold_case)
        for name, part in (("first", first), ("second", second))
    }
    for name, tokens in found.items():
        if len(tokens) < 64:
            where = "training" if name == "first" else "held-out"
            raise ValueError(
                f"file: {config.file} is too short: its {where} part holds {len(tokens)} "
                f"{config.level} tokens at holdout {config.holdout}"
            )
    seen = set(found["first"])
    vocabulary = Vocabulary.from_text(
        first,
        config.level,
        config.max_tokens,
        min_count=2,
        fold_case=config.fold_case,
        unknown=True,  # whatever the held-out part holds
    )
    training, held = vocabulary.encode(first), vocabulary.encode(second)
    cut = max(1, round(len(training) * (1 - VALIDATION)))
    counted = {
        "characters": len(whole),
        "training_tokens": len(training),
        "validation_tokens": len(training) - cut,
        "held_out_tokens": len(held),
        "distinct_in_training": len(seen),
        "vocabulary": list(vocabulary.tokens),
        "unknown": vocabulary.tokens[-1],
        "unknown_training": int((training == vocabulary.unknown).sum()),
        "unknown_held_out": int((held == vocabulary.unknown).sum()),
        "held_out_new": sum(t not in seen for t in found["second"]),
    }
    return Text(vocabulary, training, training[:cut], training[cut:], held, counted)


def _windows(config: FitText, text: Text) -> Parts:
    """Windows of every part; raises if a part has none, or none that holds its next token."""
    tokens = {"validation": text.validation, "held-out": text.held, "training": text.training}
    shortest = min(len(t) for t in tokens.values())
    window = config.window or max(1, min(DEFAULT_WINDOW[config.level], shortest // 3))
    for name, ids in {**tokens, "fitting": text.fit}.items():
        if len(ids) < window + 8:
            raise ValueError(
                f"window: {window} is too long: the {name} part of {config.file} has only "
                f"{len(ids)} tokens"
            )

    def cut(ids: np.ndarray) -> models.Positions:
        stride = -(-(len(ids) - window) // config.max_windows)
        return models.positions(ids, window, text.vocabulary.num_tokens, stride)

    parts = Parts(window, *map(cut, (text.fit, text.validation, text.training, text.held)))
    for name in ("fit", "validation", "held"):
        if not getattr(parts, name).inside.any():
            raise ValueError(
                f"window: {window} is too short: no window of the {name} part holds the token "
                "that follows it"
            )
    return parts


def _fit(at: models.Positions, prior: float, solver: str = "newton") -> Fit:
    """Fit to the windows that hold their next token."""
    rows = np.flatnonzero(at.inside)
    return fit(at.prompts[rows], at.following[rows], solver=solver, prior=prior)


def _choose_prior(config: FitText, parts: Parts) -> tuple[float, dict[str, float]]:
    """The prior given, or the best of a few on the validation part (by Newton fits)."""
    if config.prior is not None:
        return config.prior, {}
    at = parts.validation
    tried = {}
    for prior in PRIORS:
        model = _fit(parts.fit, prior).model
        log_prob = np.asarray(model.log_prob(at.prompts, at.following), np.float64)
        tried[prior] = float(log_prob[at.inside].mean())
    return max(tried, key=lambda prior: tried[prior]), {str(k): v for k, v in tried.items()}


def _window_facts(parts: Parts) -> dict[str, Any]:
    return {
        name: {"windows": len(at.last), "inside": int(at.inside.sum())}
        for name, at in (("training", parts.training), ("held_out", parts.held))
    }


def _compare(
    config: FitText, text: Text, parts: Parts, settings: models.Settings, model: CCMC
) -> dict[str, Any]:
    """Held-out log-likelihood per token of every model, and the CCMC's lead over each."""
    at = parts.held
    laws = models.learn(text.training, text.vocabulary.num_tokens, settings)
    inside, everywhere = models.scores(model, at, laws)
    stride = -(-(len(text.held) - parts.window) // config.max_windows)
    blocks = models.count_blocks(len(at.last), parts.window, stride)
    enough = blocks >= models.FEWEST_BLOCKS

    def table(values: dict[str, np.ndarray], where: np.ndarray | None) -> list[dict[str, Any]]:
        first = next(iter(values.values()))
        rows = []
        for name, value in values.items():
            mean, error = models.batch_means(value, max(blocks, 1), where)
            lead, lead_error = models.batch_means(first - value, max(blocks, 1), where)
            rows.append(
                {
                    "model": name,
                    "log_likelihood": mean,
                    "standard_error": error if enough else None,
                    "lead": lead,
                    "lead_error": lead_error if enough else None,
                }
            )
        return rows

    with np.errstate(invalid="ignore"):  # -inf minus -inf, at positions that don't count
        return {
            "positions": len(at.last),
            "inside": int(at.inside.sum()),
            "blocks": blocks,
            "positions_per_block": len(at.last) // max(blocks, 1),
            "in_window": table(inside, at.inside),
            "all": table(everywhere, None),
        }
