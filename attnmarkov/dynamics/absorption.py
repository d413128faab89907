"""Finite contexts, exactly: which token a window ends in, and when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from attnmarkov import _validate
from attnmarkov.dynamics import _absorb, _windows
from attnmarkov.dynamics._models import as_ccmc
from attnmarkov.model import AttentionHead
from attnmarkov.rollout.support import parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from attnmarkov.dynamics._windows import WindowChain
    from attnmarkov.model import CCMC, Decoder, LagContext, SelfAttention, WindowContext
    from attnmarkov.prompts import Prompts

MAX_STATES = 2_000_000


@dataclass(frozen=True, eq=False)
class Absorption:
    """How a generation with a finite context ends, exactly. Times are numbers of steps.

    The time of absorption is that of :class:`attnmarkov.rollout.Summaries`: the number of steps
    after which the context holds one single token.

    Attributes:
        winner_probabilities: (K,) probability that the context ends with each token alone.
        mean_time: Mean time of absorption, given that there is one; NaN if there is none.
        variance: Its variance.
        mean_times: (K,) mean times given each winner; NaN for tokens that never win.
        dead_end: Probability to come to a context in which the last token attends nothing; a
            rollout emits -1 from there on. 0 unless ``P`` has zeros or lags weigh nothing.
        endless: Probability to go round for ever among two tokens or more. 0 unless ``P`` has
            zeros, a decoder cuts, or lags weigh nothing.
        num_states: Ordered full windows that can be reached.
        cumulative: (horizon + 1, K) probability to have been absorbed in each token after
            0, 1, … steps; None if no horizon was given.
    """

    winner_probabilities: Float[np.ndarray, " token"]
    mean_time: float
    variance: float
    mean_times: Float[np.ndarray, " token"]
    dead_end: float
    endless: float
    num_states: int
    cumulative: Float[np.ndarray, "time token"] | None = None

    def __repr__(self) -> str:
        """The winners, the time, and what is not absorbed."""
        p = np.array2string(self.winner_probabilities, precision=4, suppress_small=True)
        text = f"winner_probabilities={p}, mean_time={self.mean_time:.6g}"
        text += f" ± {np.sqrt(self.variance):.4g}"
        for name in ("dead_end", "endless"):
            if getattr(self, name) > 0:
                text += f", {name}={getattr(self, name):.4g}"
        return f"Absorption({text}, {self.num_states} states)"


def absorption(
    model: CCMC | SelfAttention | AttentionHead,
    prompt: Sequence[int] | np.ndarray | Prompts,
    context: int | WindowContext | LagContext,
    decoder: Decoder | None = None,
    *,
    horizon: int | None = None,
    max_states: int = MAX_STATES,
) -> Absorption:
    """Absorption probabilities and times of a generation that sees its last tokens only.

    A token that has left the window can never come back, so that the set of tokens in it only
    shrinks, and generation is absorbed with probability 1 in a window of one single token (if
    ``P`` has no zeros and nothing is cut). States are the ordered windows that can be reached
    from the prompt's; the linear systems are solved support by support, by elimination or
    aggregation without subtractions, so that even times of 1e15 have relative precision 1e-9.

    Args:
        model: A CCMC, self-attention (taken through its exact CCMC), or an attention head (of
            which only the logits between tokens of the prompt are made).
        prompt: (L,) token ids, or :class:`~attnmarkov.Prompts` of one prompt (whose query may be
            given apart). It may be shorter than the window, which then fills up first.
        context: The number of tokens seen, a ``WindowContext`` (with its exponent), or a
            ``LagContext``, whose window are the lags it has weights for.
        decoder: ``Sampling()`` if None. Windows that a cut law never leaves count as endless.
        horizon: Number of steps up to which the distribution of the time is worked out.
        max_states: The most states to solve for; a million takes some five seconds.

    Returns:
        An :class:`Absorption`; arrays are over all K tokens, in float64.

    Raises:
        ValueError: If an argument is not as above, masked tokens leave a reachable token with
            nothing to attend in the prompt (as in rollouts), or there are more than
            ``max_states`` states: see :func:`absorption_monte_carlo` then.

    References:
        [CCMC], on winner-takes-all; Kemeny and Snell (1960), ch. 3, for absorbing chains; Koury,
        McAllister and Stewart (1984), for the iteration on large blocks.

    >>> import attnmarkov as am
    >>> model = am.CCMC.from_transition_matrix([[0.5, 0.5], [0.25, 0.75]])
    >>> absorption(model, [0, 1], 2)
    Absorption(winner_probabilities=[0.1429 0.8571], mean_time=1.42857 ± 0.8806, 4 states)
    """
    context, decoder = _windows.finite_context(context), _windows.checked_decoder(decoder)
    if horizon is not None:
        horizon = _validate.integer(horizon, "horizon", minimum=0)
    max_states = _validate.integer(max_states, "max_states", minimum=1)
    if isinstance(model, AttentionHead):
        (part,) = parts(model, prompt, 1)
        options = {"horizon": horizon, "max_states": max_states}
        found = absorption(part.model, part.prompts, context, decoder, **options)
        return _on_ids(found, part.ids, model.num_tokens)
    ccmc = as_ccmc(model)
    window, query = _windows.prompt_window(ccmc, prompt, context)
    tokens = np.unique(window)
    if tokens.size == 1:
        return _at_once(int(tokens[0]), ccmc.num_tokens, horizon)
    law = _windows.window_law(ccmc.logits, tokens, context, decoder, max_states)
    row = None if query == window[-1] else np.asarray(ccmc.logits, np.float64)[query, tokens]
    codes, mass, steps, dead = _windows.fill(law, window, row, max_states)
    chain = _windows.explore(law, codes, max_states)
    start = np.zeros(chain.codes.size)
    start[np.searchsorted(chain.codes, codes)] = mass
    dead_ends, endless = _absorb.final_states(chain)
    flow = _absorb.moments(chain, start, chain.absorbed | dead_ends | endless)
    # With N = (1 - Q)^-1: P = start N R, E[T; w] = start N^2 R, E[T^2; w] = start (2 N^3 - N^2) R.
    p, first, third = _by_winner(chain, flow, ccmc.num_tokens)
    total = p.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = first.sum() / total
        variance = max((2 * third - first).sum() / total - mean**2, 0.0) if total else np.nan
        means = first / p + steps
    cumulative = None
    if horizon is not None:
        cumulative = _cumulative(chain, start, steps, horizon, ccmc.num_tokens)
    return Absorption(
        p,
        float(mean + steps),
        float(variance),
        means,
        float(dead + flow[0, dead_ends].sum()),
        float(flow[0, endless].sum()),
        chain.codes.size,
        cumulative,
    )


def _on_ids(found: Absorption, ids: np.ndarray, num_tokens: int) -> Absorption:
    """What was found on some tokens, for all: the others never win."""
    p, means = np.zeros(num_tokens), np.full(num_tokens, np.nan)
    p[ids], means[ids] = found.winner_probabilities[: ids.size], found.mean_times[: ids.size]
    cumulative = None
    if found.cumulative is not None:
        cumulative = np.zeros((len(found.cumulative), num_tokens))
        cumulative[:, ids] = found.cumulative[:, : ids.size]
    return replace(found, winner_probabilities=p, mean_times=means, cumulative=cumulative)


def _at_once(token: int, num_tokens: int, horizon: int | None) -> Absorption:
    """A context that holds one single token from the start."""
    p = np.eye(num_tokens)[token]
    cumulative = None if horizon is None else np.tile(p, (horizon + 1, 1))
    return Absorption(p, 0.0, 0.0, np.where(p > 0, 0, np.nan), 0.0, 0.0, 1, cumulative)


def _by_winner(chain: WindowChain, flow: np.ndarray, num_tokens: int) -> np.ndarray:
    """(..., K) flows into the windows of one single token, from (..., S) flows."""
    winners = chain.law.tokens[chain.law.digits(chain.codes[chain.absorbed], 0)]
    out = np.zeros((*flow.shape[:-1], num_tokens))
    out[..., winners] = flow[..., chain.absorbed]
    return out


def _cumulative(
    chain: WindowChain, start: np.ndarray, steps: int, horizon: int, num_tokens: int
) -> Float[np.ndarray, "time token"]:
    """Absorbed by each token up to each time, of windows that are full after ``steps``."""
    out = np.zeros((horizon + 1, num_tokens))
    onward = chain.transitions.T.tocsr()
    mass = start
    for t in range(steps, horizon + 1):
        out[t] = _by_winner(chain, mass, num_tokens)
        mass = onward @ mass
    return out.cumsum(axis=0)
