"""The printed report of ``fit-text``, written from its numbers."""

from __future__ import annotations

import textwrap
from typing import Any

from attnmarkov.experiments._text_models import FEWEST_BLOCKS

_WIDTH = 96
_SINGLE = 0.9  # share of one token from which a text counts as collapsed on it


def render(results: dict[str, Any]) -> str:
    """The report of :func:`attnmarkov.experiments.fit_text.analyse`'s results."""
    name = _Names(results)
    sections = [
        _corpus(results, name),
        _coverage(results, name),
        _comparison(results),
        _strongest(results, name),
        _generation(results, name),
    ]
    head = f"CCMC on {results['file']}"
    tail = f"{results['seconds']:.0f} s, solver {results['settings']['solver']}."
    return "\n\n".join([f"{head}\n{'=' * len(head)}", _summary(results), *sections, tail]) + "\n"


def _summary(results: dict[str, Any]) -> str:
    rows = results["held_out"]["all"]
    told = [verdict(rows[0]["model"], row) for row in rows if "gram" in row["model"]]
    return _paragraph("On all held-out tokens: " + " ".join(told))


class _Names:
    """How tokens are written: characters quoted, words plain."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.char = results["settings"]["level"] == "char"
        self.unknown = results["corpus"]["unknown"]
        self.noun = "character" if self.char else "word"

    def __call__(self, token: str) -> str:
        if token == self.unknown:
            return "(unknown)"
        return repr(token) if self.char else token

    def join(self, tokens: list[str], most: int = 12) -> str:
        """A list of tokens, cut after ``most``."""
        more = f" and {len(tokens) - most} more" if len(tokens) > most else ""
        return " ".join(map(self, tokens[:most])) + more


def _paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _section(title: str, *parts: str) -> str:
    return "\n".join([title, "-" * len(title), *parts])


def _corpus(results: dict[str, Any], name: _Names) -> str:
    c, w, s = results["corpus"], results["windows"], results["settings"]
    known = len(c["vocabulary"]) - 1
    tried = results["validation_by_prior"]
    prior = (
        "chosen there among " + ", ".join(f"{float(k):g} ({v:.4f})" for k, v in tried.items())
        if tried
        else "given"
    )
    return _section(
        "The text",
        _paragraph(
            f"{c['characters']} characters: {c['training_tokens']} {name.noun} tokens for "
            f"training, of which the last {c['validation_tokens']} are the validation part, then "
            f"{c['held_out_tokens']} held out. Vocabulary: {known} of the "
            f"{c['distinct_in_training']} distinct tokens of the training part. One more stands "
            f"for the unknown: {_part(c, 'unknown_training', 'training_tokens')} of the training "
            f"tokens and {_part(c, 'unknown_held_out', 'held_out_tokens')} of the held-out ones, "
            f"{c['held_out_new']} of which never occur in training."
        ),
        _paragraph(
            f"A prompt is a window of {s['window']} tokens. A CCMC emits only tokens of its "
            f"window: the next token stands in the window for {_share(w['training'])} of the "
            f"training windows, on which the CCMC is trained, and for {_share(w['held_out'])} of "
            "the held-out ones."
        ),
        _paragraph(
            f"Validation part (log-likelihood in brackets): prior precision {s['prior']:g}, "
            f"{prior}; bigram add-{s['delta']:g}; interpolation c/(c + {s['beta']:g}); escape "
            f"probability {s['escape']:.4f}. The fit with this prior: {_status(results)}."
        ),
    )


def _part(facts: dict[str, int], number: str, total: str) -> str:
    return f"{facts[number]} ({facts[number] / facts[total]:.1%})"


def _status(results: dict[str, Any]) -> str:
    state = results["fit"]["status"].replace("_", " ")
    return f"{state} after {results['fit']['iterations']} iterations"


def _share(part: dict[str, int]) -> str:
    return f"{part['inside'] / part['windows']:.1%} ({part['inside']} of {part['windows']})"


def _coverage(results: dict[str, Any], name: _Names) -> str:
    c = results["coverage"]
    size = len(results["corpus"]["vocabulary"]) - len(c["unseen"])
    never_last = [t for t in c["never_last"] if t not in c["unseen"]]
    parts = [
        _paragraph(
            f"Identifiable: {c['identifiable']} of {c['parameters']} parameters. For "
            f"{c['connected_rows']} of {size} last tokens the co-occurrence graph is connected: "
            "given windows enough, their row of P is determined."
        )
    ]
    if c["unseen"]:
        parts.append(
            _paragraph(
                "Never in a training window, so that nothing is known of it: "
                f"{name.join(c['unseen'])}."
            )
        )
    if never_last:
        parts.append(
            _paragraph(
                "Never the last token of a training window, so that nothing is known of what "
                f"follows: {name.join(never_last)}."
            )
        )
    if c["disconnected"]:
        parts.append(
            _paragraph(
                "Disconnected: these last tokens have too few windows, and the tokens listed "
                "never share one with the rest, so their scores can't be compared:"
            )
        )
        parts += [
            _paragraph(
                f"after {name(row['last'])} ({_count(row['windows'], 'window')}, {row['groups']} "
                f"groups): {name.join(row['cut_off'])}",
                "    ",
            )
            for row in c["disconnected"][:6]
        ]
        if len(c["disconnected"]) > 6:
            parts.append(f"    and {len(c['disconnected']) - 6} more last tokens")
    parts.append(
        _paragraph(
            f"Separated: in {c['separated_rows']} rows some tokens stood in the windows but were "
            "never emitted (or always), so the likelihood has no finite maximum and only the "
            f"prior keeps their scores finite. Of {c['pairs_possible']} pairs (last, next) that "
            f"a window allowed, {c['pairs_emitted']} were ever seen."
            + (" The narrowest rows:" if c["narrowest"] else "")
        )
    )
    parts += [
        _paragraph(
            f"after {name(row['last'])}, {_count(row['possible'], 'token')} could have come, but "
            f"only {name.join(row['emitted'])} did",
            "    ",
        )
        for row in c["narrowest"]
    ]
    return _section("What the windows can teach", *parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _comparison(results: dict[str, Any]) -> str:
    h = results["held_out"]
    errors = (
        f"Standard errors come from batch means over {h['blocks']} blocks of "
        f"{h['positions_per_block']} consecutive positions, as neighbouring windows overlap; "
        "those of the difference are paired. "
        if h["all"][0]["standard_error"] is not None
        else "The text is too short for standard errors: neighbouring windows overlap, and the "
        f"held-out positions make no more than {_count(h['blocks'], 'block')} of a window's "
        f"length, where {FEWEST_BLOCKS} are needed. A longer text, or a smaller window, gives "
        "them. "
    )
    return _section(
        "Held-out log-likelihood, nats per token",
        _paragraph(
            f"{errors}'Among the window's tokens': the law restricted to the tokens of the "
            "window, since the CCMC knows that the next one is among them."
        ),
        "",
        f"(a) the {h['inside']} positions whose next token stands in the window",
        _table(h["in_window"]),
        *_sentences(h["in_window"]),
        "",
        f"(b) all {h['positions']} positions; where the next token is not in the window, the "
        "unigram law",
        "    over the other tokens gives it, with the escape probability",
        _table(h["all"]),
        *_sentences(h["all"]),
    )


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["model"]) for row in rows)
    lines = [f"    {'model':{width}}  log-likelihood        CCMC minus model"]
    for i, row in enumerate(rows):
        lead = f"{row['lead']:+.4f}{_error(row['lead_error'])}" if i else ""
        value = f"{row['log_likelihood']:.4f}{_error(row['standard_error'])}"
        lines.append(f"    {row['model']:{width}}  {value:16}    {lead}".rstrip())
    return "\n".join(lines)


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _sentences(rows: list[dict[str, Any]]) -> list[str]:
    """Who beats whom, in words; a difference within two standard errors is no difference."""
    first = rows[0]["model"]
    return [_paragraph(verdict(first, row), "    ") for row in rows[1:]]


def verdict(first: str, row: dict[str, Any]) -> str:
    """One sentence on the ``first`` model against that of ``row``."""
    lead, error = row["lead"], row["lead_error"]
    if error is None:
        return f"The text is too short to tell the {first} from the {row['model']} ({lead:+.4f})."
    amount = f"{abs(lead):.4f} ± {error:.4f} nats per token"
    if abs(lead) <= 2 * error:
        return (
            f"The {first} and the {row['model']} can't be told apart ({lead:+.4f} ± {error:.4f})."
        )
    if lead > 0:
        return f"The {first} beats the {row['model']} by {amount}."
    return f"The {row['model']} beats the {first} by {amount}."


def _strongest(results: dict[str, Any], name: _Names) -> str:
    rows = results["strongest"]
    lines = ["    last -> next          P      seen   times the rate of the next token overall"]
    total = results["corpus"]["training_tokens"]
    for row in rows:
        lift = row["pairs"] / row["last_count"] / (row["next_count"] / total)
        pair = f"{name(row['last'])} -> {name(row['next'])}"
        lines.append(f"    {pair:18} {row['p']:6.3f}  {row['pairs']:8d}   {lift:.1f}")
    return _section(
        "Strongest transitions",
        _paragraph(
            "P[k, j] is what one copy of j in the window weighs after k, next to one copy of "
            "every other token: it is large for a token that is rare overall but common after k."
        ),
        *lines,
    )


def _generation(results: dict[str, Any], name: _Names) -> str:
    g = results["generation"]
    after, once = g["window"], g["once"]
    text = after["trajectories"][0]
    winners = name.join(g["possible_winners"]) or "none"
    return _section(
        "The CCMC writes, and collapses",
        _paragraph(
            "Each generated token joins the context and makes itself likelier; a token that the "
            "prompt lacks never comes. A context of t tokens changes by one part in t with each "
            "step, so all this goes with the logarithm of the number of steps. The effective "
            "number of tokens is the exponential of the entropy of their shares."
        ),
        "",
        f"(a) after the first held-out window, {g['steps']} steps",
        f"    {'steps':18} {'distinct':>8} {'effective':>9}   most frequent",
        _span("the prompt", after["prompt"], name),
        *(_span(f"{s['from'] + 1} to {s['to']}", s, name) for s in text["spans"]),
        _paragraph(_trend(after["prompt"], text["spans"][-1], g["steps"]), "    "),
        "    The prompt ends:",
        _paragraph(after["prompt_end"], "        "),
        "    the text goes on:",
        _paragraph(text["start"], "        "),
        f"    and ends, at step {g['steps']}:",
        _paragraph(text["end"], "        "),
        "",
        "(b) after a prompt that holds every known token once: no token has a start over another",
        f"    {'trajectory, steps':18} {'distinct':>8} {'effective':>9}   most frequent",
        _span("the prompt", once["prompt"], name, tops=0),
        *_races(once["trajectories"], name),
        _paragraph(_winners(once["trajectories"]), "    "),
        _paragraph(
            f"Tokens that can take over alone, by theory (P[w, w] is the largest entry of row w): "
            f"{winners}. Any other lasting winner is a group of tokens that call one another.",
            "    ",
        ),
        *_endings(once["trajectories"]),
    )


def _span(label: str, s: dict[str, Any], name: _Names, tops: int = 5) -> str:
    line = f"    {label:18} {s['distinct']:8d} {s['effective']:9.1f}  "
    for token, share in zip(s["top"][:tops], s["top_shares"][:tops], strict=True):
        item = f" {name(token)} {share:.1%}"
        if len(line) + len(item) <= _WIDTH:
            line += item
    return line.rstrip()


def _races(trajectories: list[dict[str, Any]], name: _Names) -> list[str]:
    lines = []
    for i, trajectory in enumerate(trajectories):
        spans = trajectory["spans"]
        for s in (spans[0], spans[-1]) if len(spans) > 1 else spans:
            lines.append(_span(f"{i + 1}: {s['from'] + 1} to {s['to']}", s, name))
    return lines


def _endings(trajectories: list[dict[str, Any]]) -> list[str]:
    lines = []
    for i, trajectory in enumerate(trajectories):
        lines.append(f"    Trajectory {i + 1} ends:")
        lines.append(_paragraph(trajectory["end"][-160:], "        "))
    return lines


def _trend(prompt: dict[str, Any], last: dict[str, Any], steps: int) -> str:
    numbers = f"from {prompt['effective']:.1f} to {last['effective']:.1f} effective tokens"
    ratio = last["effective"] / prompt["effective"]
    if last["top_shares"][0] > _SINGLE:
        return f"The text has collapsed on one token: {numbers}."
    if ratio < 0.5:
        return f"The text is collapsing on few tokens: {numbers}."
    if ratio < 0.95:
        return f"The text narrows slowly, and is far from collapsed at step {steps}: {numbers}."
    return f"No collapse within {steps} steps: {numbers}."


def _winners(trajectories: list[dict[str, Any]]) -> str:
    ends = [trajectory["spans"][-1] for trajectory in trajectories]
    single = sum(s["top_shares"][0] > _SINGLE for s in ends)
    sizes = ", ".join(f"{s['effective']:.1f}" for s in ends)
    return (
        f"Of {len(ends)} trajectories {single} ended on a single token (above {_SINGLE:.0%} of the "
        f"last half); the effective numbers of tokens at the end are {sizes}. Which tokens win is "
        "settled by chance early on."
    )
