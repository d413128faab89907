"""Contexts and decoders, each with what the float64 oracle needs to know of it.

Entries are ``(library object, keyword arguments of oracles.trajectory_law)``. Probabilities are
in general position: no two tokens tie, and none stands at a threshold.
"""

import numpy as np
import oracles
import pytest

import attnmarkov as am
from attnmarkov.model import (
    DecayContext,
    FullContext,
    Greedy,
    LagContext,
    PositionContext,
    Sampling,
    WindowContext,
)

P = [[0.213, 0.468, 0.319], [0.571, 0.137, 0.292], [0.261, 0.243, 0.496]]
PROMPTS = [[0, 1, 2, 2], [1, 0], [2, 1, 0]]  # of different lengths; in the second, 2 never comes
NUM_STEPS = 4

_rng = np.random.default_rng(11)
_bias = _rng.normal(size=(8, 8))
_bias[0, 3:] = -np.inf  # the first token is forgotten in histories of 4 and more
_u = _rng.normal(size=(8, 3)) / 2
_e = _rng.normal(size=(3, 3))
_w = _rng.normal(size=(3, 3)) / 2


def _case(value, **oracle):
    return pytest.param(value, oracle, id=str(value))


def _lags(weights):
    return lambda i, length, query: weights[length - 1 - i] if length - 1 - i < len(weights) else 0


def _window(size):
    return lambda i, length, query: float(length - 1 - i < size)


CONTEXTS = [
    _case(FullContext()),
    _case(FullContext(exponent=1.7), exponent=1.7),
    _case(FullContext(exponent=0.0), exponent=0.0),
    _case(FullContext(exponent=-0.6), exponent=-0.6),
    _case(DecayContext(0.4), weight=lambda i, length, query: 0.4 ** (length - 1 - i)),
    _case(
        DecayContext(0.7, exponent=1.3),
        weight=lambda i, length, query: 0.7 ** (length - 1 - i),
        exponent=1.3,
    ),
    _case(WindowContext(2), weight=_window(2)),
    _case(WindowContext(3, exponent=-0.4), weight=_window(3), exponent=-0.4),
    _case(LagContext([0.0, 1.0, 0.25, 3.0]), weight=_lags([0.0, 1.0, 0.25, 3.0])),
    _case(LagContext([0.5, 2.0, 0.7], exponent=0.6), weight=_lags([0.5, 2, 0.7]), exponent=0.6),
    _case(PositionContext(_bias), weight=lambda i, length, query: np.exp(_bias[i, length - 1])),
    _case(
        PositionContext.from_embeddings(_u, _w, exponent=1.2),
        weight=lambda i, length, query: np.exp(_u[i] @ _w @ _u[length - 1]),
        exponent=1.2,
    ),
    _case(
        PositionContext.from_attention(am.SelfAttention.from_weights(_e, _w), _u),
        weight=lambda i, length, query: np.exp(_u[i] @ _w @ (_e[query] + _u[length - 1])),
        shift=lambda j, length: _e[j] @ _w @ _u[length - 1],
    ),
    _case(
        PositionContext.from_attention(am.SelfAttention.from_weights(_e, _w), _u, exponent=0.5),
        weight=lambda i, length, query: np.exp(_u[i] @ _w @ (_e[query] + _u[length - 1])),
        shift=lambda j, length: _e[j] @ _w @ _u[length - 1],
        exponent=0.5,
    ),
]

DECODERS = [
    _case(Sampling()),
    _case(Sampling(temperature=0.6), decode=oracles.hf_sampling(temperature=0.6)),
    _case(Sampling(top_k=2), decode=oracles.hf_sampling(top_k=2)),
    _case(Sampling(top_p=0.75), decode=oracles.hf_sampling(top_p=0.75)),
    _case(
        Sampling(0.8, 2, 0.83, repetition_penalty=1.25),
        decode=oracles.hf_sampling(0.8, 2, 0.83, repetition_penalty=1.25),
    ),
    _case(Greedy(), decode=oracles.greedy),
]
