"""The Markov chain of ordered window contents: states, laws and transitions, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from attnmarkov.model import Decoder, LagContext, Sampling, WindowContext
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import Law
from attnmarkov.rollout._check import reachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int

    from attnmarkov.model import CCMC

_BITMAP = 2**27  # codes up to which visited windows are marked in an array
_BUCKET = 256  # rows of the smallest batch that a decoder compiles for


@dataclass(frozen=True)
class WindowLaw:
    """The law of the next token after an ordered window, over the tokens of the window alone.

    A window of L tokens is the integer ``Σ_lag digit(lag) B**lag``, the last token at lag 0.

    Attributes:
        tokens: (B,) token ids that the digits stand for, increasing.
        logits: (B, B) scores between them.
        weights: (w,) weight of each lag.
        exponent: Reinforcement exponent.
        decoder: The decoder.
    """

    tokens: Int[np.ndarray, " digit"]
    logits: Float[np.ndarray, "digit digit"]
    weights: Float[np.ndarray, " lag"]
    exponent: float
    decoder: Decoder

    @property
    def size(self) -> int:
        """Length w of a full window."""
        return len(self.weights)

    @property
    def base(self) -> int:
        """How many different digits there are."""
        return len(self.tokens)

    def encode(self, window: np.ndarray) -> int:
        """The code of token ids, oldest first."""
        code = 0
        for digit in np.searchsorted(self.tokens, window):
            code = code * self.base + int(digit)
        return code

    def digits(self, codes: np.ndarray, lag: int) -> np.ndarray:
        """The digit ``lag`` steps behind the last."""
        return codes // self.base**lag % self.base

    def push(self, codes: np.ndarray, length: int) -> np.ndarray:
        """(n, B) codes of the windows that follow windows of ``length`` tokens."""
        kept = codes if length < self.size else codes % self.base ** (self.size - 1)
        return kept[:, None] * self.base + np.arange(self.base)

    def absorbed(self, codes: np.ndarray) -> np.ndarray:
        """Whether each full window holds one single digit: it is that times 1 + B + B² + …."""
        return codes % sum(self.base**lag for lag in range(self.size)) == 0

    def support(self, codes: np.ndarray) -> np.ndarray:
        """The set of digits in each full window, as bits. No more than 62 digits have any."""
        if self.base > 62:
            raise ValueError(f"law: sets of {self.base} different tokens do not fit into 62 bits")
        bits = np.zeros(codes.size, np.int64)
        for lag in range(self.size):
            bits |= 1 << self.digits(codes, lag)
        return bits

    def probabilities(
        self, codes: np.ndarray, length: int, row: np.ndarray | None = None
    ) -> Float[np.ndarray, "window digit"]:
        """The law after each window of ``length`` tokens; zeros where nothing can come.

        In float64, but for what a decoder cuts: ties there are those of float32, as in rollouts.
        ``row`` are the (B,) scores of the query, if it is not the last token.
        """
        n = np.zeros((codes.size, self.base))
        rows = np.arange(codes.size)
        for lag in range(length):
            n[rows, self.digits(codes, lag)] += self.weights[lag]
        scores = self.logits[self.digits(codes, 0)] if row is None else row
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.where(n > 0, self.exponent * np.log(n), -np.inf) + scores
        scores = _decoded(self.decoder, scores)
        top = scores.max(axis=1, keepdims=True)
        law = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = law.sum(axis=1, keepdims=True)
        return np.divide(law, total, out=np.zeros_like(law), where=total > 0)


def _decoded(decoder: Decoder, scores: np.ndarray) -> np.ndarray:
    """Log-weights after the decoder, in float64."""
    cuts = not isinstance(decoder, Sampling) or decoder.top_k is not None or decoder.top_p
    if cuts:
        room = _BUCKET
        while room < len(scores):
            room *= 4
        padded = np.zeros((room, scores.shape[1]), np.float32)
        padded[: len(scores)] = scores
        cut = np.asarray(decoder.log_law(jnp.asarray(padded)), np.float64)[: len(scores)]
        if not isinstance(decoder, Sampling):
            return cut
        scores = np.where(cut > -np.inf, scores, -np.inf)
    assert isinstance(decoder, Sampling)
    top = scores.max(axis=1, keepdims=True)
    power = float(decoder.repetition_penalty) / float(decoder.temperature)
    power = np.clip(power, np.finfo(np.float32).tiny, np.finfo(np.float32).max)
    with np.errstate(over="ignore"):
        return (scores - np.where(np.isfinite(top), top, 0)) * power


def window_law(
    logits: Any,
    tokens: np.ndarray,
    context: WindowContext | LagContext,
    decoder: Decoder,
    max_states: int,
) -> WindowLaw:
    """The law over windows of these different ``tokens``; arguments checked before.

    Raises:
        ValueError: If windows have no 63-bit code, so that there may be far too many.
    """
    logits = np.asarray(logits, np.float64)[np.ix_(tokens, tokens)]
    if isinstance(context, LagContext):
        weights = np.asarray(context.weights, np.float64)
        weights = (weights / weights.max()).astype(np.float32).astype(np.float64)
    else:
        weights = np.ones(context.size if context.size * np.log2(len(tokens)) < 62 else 0)
    law = WindowLaw(tokens, logits, weights, float(context.exponent), decoder)
    if reach(context) * np.log2(len(tokens)) >= 62:
        raise ValueError(refusal(law.base, reach(context), max_states))
    return law


def finite_context(context: Any) -> WindowContext | LagContext:
    """``context`` if it ends; an integer is the size of a window.

    Raises:
        ValueError: If it is neither, or its parameters are out of range.
    """
    if isinstance(context, int | np.integer) and not isinstance(context, bool):
        context = WindowContext(int(context))
    if not isinstance(context, WindowContext | LagContext):
        raise ValueError(
            f"context: expected a window size, a WindowContext or a LagContext, got {context!r}; "
            "other contexts see the whole history and have no finite number of states"
        )
    context.check()
    return context


def checked_decoder(decoder: Any) -> Decoder:
    """``decoder``, or plain sampling if it is None.

    Raises:
        ValueError: If it is none, or its parameters are out of range.
    """
    if decoder is None:
        return Sampling()
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder: expected a Decoder such as {Sampling()}, got {decoder!r}")
    decoder.check()
    return decoder


def reach(context: WindowContext | LagContext) -> int:
    """How many of the last tokens a finite context sees."""
    return context.size if isinstance(context, WindowContext) else np.shape(context.weights)[0]


def prompt_window(
    ccmc: CCMC, prompt: Any, context: WindowContext | LagContext
) -> tuple[np.ndarray, int]:
    """The tokens that the context sees of a prompt, oldest first, and the query.

    Raises:
        ValueError: If it is not a single good prompt of known tokens, or masked tokens would
            leave a reachable token with nothing to attend.
    """
    size = ccmc.num_tokens
    prompts = prompt if isinstance(prompt, Prompts) else Prompts.from_tokens(prompt, size)
    if prompts.num_tokens != size:
        raise ValueError(f"prompt: over {prompts.num_tokens} tokens, but the model has {size}")
    if len(prompts) != 1:
        raise ValueError(f"prompt: expected one prompt, got {len(prompts)}")
    context.check_prompts(prompts)
    reachable(Law(ccmc.logits, context, Sampling()), prompts)
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    return tokens[0, : lengths[0]][-reach(context) :], int(np.asarray(prompts.last)[0])


def fill(
    law: WindowLaw, window: np.ndarray, row: np.ndarray | None, max_states: int
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Generate until the window is full, and at least the step whose query is given apart.

    Args:
        law: The law of the next token.
        window: (L,) tokens to start from, two different ones at least.
        row: (B,) scores of the query, or None if it is the last token.
        max_states: The most windows to follow.

    Returns:
        Codes of the full windows, their probabilities, the number of steps done, and the
        probability to have come to nothing to attend.

    Raises:
        ValueError: If there are too many windows.
    """
    codes, mass = np.array([law.encode(window)]), np.ones(1)
    steps, dead, length = 0, 0.0, len(window)
    while length < law.size or row is not None:
        p = law.probabilities(codes, length, row)
        dead += float(mass[p.sum(axis=1) == 0].sum())
        codes, mass, row = law.push(codes, length)[p > 0], (mass[:, None] * p)[p > 0], None
        if codes.size > max_states:
            raise ValueError(refusal(law.base, law.size, max_states))
        steps, length = steps + 1, min(length + 1, law.size)
    return codes, mass, steps, dead


@dataclass(frozen=True)
class WindowChain:
    """Full windows that can be reached, and the transitions between them.

    Attributes:
        law: The law of the next token.
        codes: (S,) windows, increasing.
        transitions: (S, S) CSR matrix in float64; rows of absorbed and of dead windows are empty.
        absorbed: (S,) whether the window holds one single token.
    """

    law: WindowLaw
    codes: Int[np.ndarray, " state"]
    transitions: Any
    absorbed: Bool[np.ndarray, " state"]


def explore(law: WindowLaw, start: np.ndarray, max_states: int) -> WindowChain:
    """The chain on all windows that can be reached from the full windows ``start``.

    Raises:
        ValueError: If there are more than ``max_states``.
    """
    from scipy import sparse

    fresh = _marker(law.base**law.size)
    layers, probabilities, front, total = [], [], np.unique(start), 0
    fresh(front)
    while front.size:
        total += front.size
        if total > max_states:
            raise ValueError(refusal(law.base, law.size, max_states))
        p = law.probabilities(front, law.size)
        p[law.absorbed(front)] = 0  # nothing happens any more
        layers.append(front)
        probabilities.append(p)
        front = fresh(np.unique(law.push(front, law.size)[p > 0]))
    codes, p = np.concatenate(layers), np.concatenate(probabilities)
    order = np.argsort(codes)
    codes, p = codes[order], p[order]
    row, digit = np.nonzero(p)
    column = np.searchsorted(codes, law.push(codes, law.size)[row, digit])
    shape = (codes.size, codes.size)
    transitions = sparse.csr_array((p[row, digit], (row, column)), shape=shape)
    return WindowChain(law, codes, transitions, law.absorbed(codes))


def refusal(base: int, size: int, max_states: int) -> str:
    """Why a chain is not solved, and what to do instead."""
    number = f"{float(base) ** size:.3g}" if size * np.log10(base) < 300 else "more than 1e300"
    return (
        f"context: ordered windows of {size} out of {base} tokens have up to {base}**{size} = "
        f"{number} states, more than max_states = {max_states}; draw from them instead with "
        "absorption_monte_carlo, or take a smaller window"
    )


def _marker(number: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns those of its codes that it has not seen before."""
    if number <= _BITMAP:
        seen = np.zeros(number, bool)

        def mark(codes: np.ndarray) -> np.ndarray:
            new = codes[~seen[codes]]
            seen[new] = True
            return new

        return mark
    known: set[int] = set()

    def remember(codes: np.ndarray) -> np.ndarray:
        new = [c for c in codes.tolist() if c not in known]
        known.update(new)
        return np.array(new, np.int64)

    return remember
