"""The n-gram models that a CCMC is held against on text, and how differences are judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attnmarkov.prompts.text import windows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Bool, Float, Int

    from attnmarkov.model import CCMC
    from attnmarkov.prompts import Prompts

DELTAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BETAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FEWEST_BLOCKS, MOST_BLOCKS = 8, 50  # from fewer blocks, no standard error
_CHUNK = 8192  # rows of (row, token) work done at once


class Positions(NamedTuple):
    """Places in a text where the next token is to be predicted from a window."""

    prompts: Prompts
    counts: Int[np.ndarray, "position token"]
    last: Int[np.ndarray, " position"]
    following: Int[np.ndarray, " position"]
    inside: Bool[np.ndarray, " position"]
    """Whether the next token stands in the window: elsewhere a CCMC gives it probability 0."""


def positions(tokens: np.ndarray, window: int, num_tokens: int, stride: int = 1) -> Positions:
    """Every ``stride``-th window of a text with the token after it."""
    prompts, following = windows(tokens, window, num_tokens, stride)
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    return Positions(prompts, counts, last, following, counts[np.arange(len(last)), following] > 0)


def unigram(tokens: np.ndarray, num_tokens: int, delta: float = 0.5) -> Float[np.ndarray, " token"]:
    """Token frequencies, ``delta`` added to every count.

    >>> unigram(np.array([0, 0, 1]), 2, delta=1.0).tolist()
    [0.6, 0.4]
    """
    counts = np.bincount(tokens, minlength=num_tokens) + delta
    return counts / counts.sum()


def pair_counts(tokens: np.ndarray, num_tokens: int) -> Int[np.ndarray, "token token"]:
    """How often token ``j`` comes right after token ``k``."""
    flat = np.bincount(
        tokens[:-1].astype(np.int64) * num_tokens + tokens[1:], minlength=num_tokens**2
    )
    return flat.reshape(num_tokens, num_tokens)


def bigram(tokens: np.ndarray, num_tokens: int, delta: float) -> Float[np.ndarray, "token token"]:
    """The law of the token after ``k``, ``delta`` added to every pair's count."""
    counts = pair_counts(tokens, num_tokens) + delta
    return counts / counts.sum(axis=1, keepdims=True)


def interpolated(
    tokens: np.ndarray, num_tokens: int, beta: float
) -> Float[np.ndarray, "token token"]:
    """Bigram frequencies with weight ``c_k / (c_k + beta)``, the unigram law with the rest.

    ``c_k`` is how often ``k`` was followed by anything, so a token seldom seen leans on the
    unigram law.
    """
    counts = pair_counts(tokens, num_tokens)
    base = unigram(tokens, num_tokens)
    return (counts + beta * base) / (counts.sum(axis=1, keepdims=True) + beta)


class Laws(NamedTuple):
    """The n-gram models learned from one stretch of text, and the escape probability."""

    unigram: Float[np.ndarray, " token"]
    bigram: Float[np.ndarray, "token token"]
    interpolated: Float[np.ndarray, "token token"]
    escape: float


class Settings(NamedTuple):
    """What is chosen on the validation part."""

    delta: float
    beta: float
    escape: float


def tune(tokens: np.ndarray, num_tokens: int, validation: Positions) -> Settings:
    """Choose smoothing and escape by the likelihood of the validation positions."""

    def best(values: Iterable[float], law) -> float:
        k, y = validation.last, validation.following
        return max(values, key=lambda v: np.log(law(tokens, num_tokens, v)[k, y]).mean())

    return Settings(best(DELTAS, bigram), best(BETAS, interpolated), escape_rate(validation))


def learn(tokens: np.ndarray, num_tokens: int, settings: Settings) -> Laws:
    """Learn the n-gram models with the settings given."""
    return Laws(
        unigram(tokens, num_tokens),
        bigram(tokens, num_tokens, settings.delta),
        interpolated(tokens, num_tokens, settings.beta),
        settings.escape,
    )


def escape_rate(at: Positions) -> float:
    """Share of positions whose next token is not in the window, where any could be.

    The maximum of the likelihood of :func:`with_escape`, half an event added to both sides.
    """
    possible = (at.counts == 0).any(axis=1)
    return float(((~at.inside).sum() + 0.5) / (possible.sum() + 1.0))


def window_mass(
    law: np.ndarray, at: Positions, *, outside: bool = False
) -> Float[np.ndarray, " position"]:
    """Probability that a (K,) or (K, K) law gives to the tokens of (or outside) each window."""
    mass = np.empty(len(at.last))
    for i in range(0, len(mass), _CHUNK):
        rows = slice(i, i + _CHUNK)
        probs = law[at.last[rows]] if law.ndim == 2 else law
        mass[rows] = np.where((at.counts[rows] > 0) != outside, probs, 0).sum(axis=1)
    return mass


def with_escape(
    log_prob: np.ndarray, at: Positions, base: np.ndarray, escape: float
) -> Float[np.ndarray, " position"]:
    """Log-probability of the next tokens when a window model backs off to the unigram law.

    With probability ``escape`` the next token is none of the window's, drawn from the unigram
    law over all others; else the window model draws it. A window that holds the whole vocabulary
    never escapes.
    """
    outside = window_mass(base, at, outside=True)
    stay = np.where(outside > 0, np.log1p(-escape), 0.0)
    # `outside` is positive wherever the next token is not in the window.
    leave = np.log(escape) + np.log(base[at.following] / np.where(outside > 0, outside, 1.0))
    return np.where(at.inside, stay + log_prob, leave)


def scores(
    model: CCMC, at: Positions, laws: Laws
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Log-probability of each next token under every model.

    Returns:
        Two dicts from a model's name to (n,) values: for positions whose next token stands in
        the window (meaningless elsewhere), and for all positions. The CCMC comes first.
    """
    k, y = at.last, at.following
    ccmc = np.asarray(model.log_prob(at.prompts, y), np.float64)
    own = at.counts[np.arange(len(y)), y]
    with np.errstate(divide="ignore"):
        frequencies = np.log(own / at.counts.sum(axis=1))
    grams = {
        "unigram": (laws.unigram, np.log(laws.unigram[y])),
        "bigram": (laws.bigram, np.log(laws.bigram[k, y])),
        "interpolated bigram": (laws.interpolated, np.log(laws.interpolated[k, y])),
    }
    inside = {"CCMC": ccmc, "window's own frequencies": frequencies}
    for name, (law, value) in grams.items():
        inside[f"{name} among the window's tokens"] = value - np.log(window_mass(law, at))
    everywhere = {
        "CCMC with escape": with_escape(ccmc, at, laws.unigram, laws.escape),
        "window's own frequencies with escape": with_escape(
            frequencies, at, laws.unigram, laws.escape
        ),
    }
    for name, (_, value) in grams.items():
        inside[name] = everywhere[name] = value
    return inside, everywhere


def count_blocks(number: int, window: int, stride: int) -> int:
    """How many blocks for :func:`batch_means`: as many as fit, each at least a window long.

    Args:
        number: Positions, ``stride`` tokens apart.
        window: Tokens in a window; neighbouring positions share most of theirs.
        stride: Distance between the starts of neighbouring windows.

    >>> count_blocks(1000, window=36, stride=1)
    27
    """
    return number // max(-(-window // stride), -(-number // MOST_BLOCKS), 1)


def batch_means(
    values: np.ndarray, num_blocks: int, where: np.ndarray | None = None
) -> tuple[float, float]:
    """Mean of a dependent sequence, and its standard error from means over blocks.

    Args:
        values: (n,) values in the order of the text.
        num_blocks: Number of consecutive blocks of nearly equal length; they are taken as
            independent, so each should be longer than the memory of the sequence.
        where: (n,) mask of the values that count; all if None.

    Returns:
        The mean and its standard error (NaN for fewer than two blocks).

    >>> batch_means(np.array([1.0, 1.0, 3.0, 3.0]), 2)
    (2.0, 1.0)
    """
    use = np.ones(len(values), bool) if where is None else where
    block = np.arange(len(values)) * num_blocks // len(values)
    size = np.bincount(block[use], minlength=num_blocks)
    total = np.bincount(block[use], weights=values[use], minlength=num_blocks)
    mean = total.sum() / size.sum()
    if num_blocks < 2:
        return float(mean), float("nan")
    spread = ((total - mean * size) ** 2).sum() * num_blocks / (num_blocks - 1)
    return float(mean), float(np.sqrt(spread) / size.sum())
