"""What a fitted text model shows: coverage, strong transitions, and the collapse of its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from attnmarkov.dynamics import possible_winners
from attnmarkov.experiments._text_models import pair_counts
from attnmarkov.model import CCMC
from attnmarkov.rollout import rollout

if TYPE_CHECKING:
    from attnmarkov.estimate import Fit
    from attnmarkov.experiments._text_models import Positions
    from attnmarkov.prompts.text import Vocabulary

_RACES = 4  # trajectories after the prompt of every token once


def coverage_facts(vocabulary: Vocabulary, at: Positions, fitted: Fit) -> dict[str, Any]:
    """Which tokens the training windows leave undetermined, and why."""
    rows = np.flatnonzero(at.inside)
    components = np.asarray(fitted.components)  # as coverage() finds them
    size, tokens = vocabulary.num_tokens, vocabulary.tokens
    last, following = at.last[rows], at.following[rows]
    windows = np.bincount(last, minlength=size)
    emitted = np.zeros((size, size), bool)
    emitted[last, following] = True
    possible = np.zeros((size, size), bool)
    for k in np.flatnonzero(windows):
        possible[k] = (at.counts[rows[last == k]] > 0).any(axis=0)
    seen = np.flatnonzero(possible.any(axis=0))  # perhaps without the unknown token
    connected = (components[:, seen] == components[:, seen[:1]]).all(axis=1)
    cut_off = []
    for k in np.flatnonzero((windows > 0) & ~connected):
        labels, sizes = np.unique(components[k, seen], return_counts=True)
        lone = seen[components[k, seen] != labels[sizes.argmax()]]
        cut_off.append(
            {
                "last": tokens[k],
                "windows": int(windows[k]),
                "groups": len(labels),
                "cut_off": [tokens[j] for j in lone],
            }
        )
    separated = np.asarray(fitted.separated) & (windows > 0)
    narrow = sorted(np.flatnonzero(separated & (windows >= 20)), key=lambda k: emitted[k].sum())
    return {
        "parameters": size * (size - 1),
        "identifiable": size**2 - int((components == np.arange(size)).sum()),
        "connected_rows": int((connected & (windows > 0)).sum()),
        "unseen": [t for j, t in enumerate(tokens) if j not in seen],
        "never_last": [tokens[k] for k in np.flatnonzero(windows == 0)],
        "disconnected": sorted(cut_off, key=lambda row: row["windows"]),
        "separated_rows": int(separated.sum()),
        "pairs_possible": int(possible.sum()),
        "pairs_emitted": int(emitted.sum()),
        "narrowest": [
            {
                "last": tokens[k],
                "possible": int(possible[k].sum()),
                "emitted": [tokens[j] for j in np.flatnonzero(emitted[k])],
            }
            for k in narrow[:3]
        ],
    }


def strongest(
    vocabulary: Vocabulary, training: np.ndarray, model: CCMC, number: int = 12
) -> list[dict[str, Any]]:
    """The pairs with the largest ``P[k, j]`` among rows of frequent tokens."""
    size, unknown = vocabulary.num_tokens, vocabulary.unknown
    counts = pair_counts(training, size)
    row = counts.sum(axis=1)
    frequent = row >= max(0.003 * row.sum(), 1)
    p = np.asarray(model.transition_matrix, np.float64)
    candidates = np.where(frequent[:, None], p, -1.0)
    if unknown is not None:
        candidates[unknown], candidates[:, unknown] = -1.0, -1.0
    order = np.argsort(-candidates, axis=None, kind="stable")[:number]
    tokens = vocabulary.tokens
    return [
        {
            "last": tokens[k],
            "next": tokens[j],
            "p": p[k, j],
            "pairs": int(counts[k, j]),
            "last_count": int(row[k]),
            "next_count": int(counts[:, j].sum()),
        }
        for k, j in (divmod(int(i), size) for i in order)
        if candidates[k, j] > 0
    ]


def generate(
    vocabulary: Vocabulary, window: np.ndarray, model: CCMC, steps: int, seed: int
) -> dict[str, Any]:
    """Let the model write, and watch its choice of tokens.

    Once after ``window``, and a few times after a prompt that holds every known
    token once, where no token has a start over another.
    """
    once = np.arange(vocabulary.num_tokens)[::-1]  # ends in the most frequent token
    prompts = {"window": window, "once": once[once != vocabulary.unknown]}
    excerpt = 240 if vocabulary.level == "char" else 50

    def spread(span: np.ndarray) -> dict[str, Any]:
        share = np.bincount(span, minlength=vocabulary.num_tokens) / len(span)
        kept = share[share > 0]
        top = np.argsort(-share, kind="stable")[:6]
        return {
            "tokens": len(span),
            "top": [vocabulary.tokens[j] for j in top if share[j] > 0],
            "top_shares": [float(share[j]) for j in top if share[j] > 0],
            "distinct": len(kept),
            "effective": float(np.exp(-(kept * np.log(kept)).sum())),
        }

    def watch(tokens: np.ndarray) -> dict[str, Any]:
        ends = sorted({10**e for e in range(2, 12) if 10**e < len(tokens)} | {len(tokens)})
        return {
            "spans": [{"from": e // 2, "to": e, **spread(tokens[e // 2 : e])} for e in ends],
            "start": vocabulary.decode(tokens[:excerpt]),
            "end": vocabulary.decode(tokens[-excerpt:]),
        }

    known = np.sort(prompts["once"])
    among = CCMC.from_logits(np.asarray(model.logits)[np.ix_(known, known)])
    winners = known[np.asarray(possible_winners(among))]
    result: dict[str, Any] = {
        "steps": steps,
        "possible_winners": [vocabulary.tokens[w] for w in winners],
    }
    for i, (name, prompt) in enumerate(prompts.items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        number = 1 if name == "window" else _RACES
        tokens = np.asarray(rollout(model, key, prompt, steps, number).tokens)
        result[name] = {
            "prompt": spread(prompt),
            "prompt_end": vocabulary.decode(prompt[-(excerpt // 2) :]),
            "trajectories": [watch(row) for row in tokens],
        }
    return result
