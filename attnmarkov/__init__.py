"""attnmarkov: attention as a Markov model, in JAX.

Simulate it in large batches, learn it from prompts, predict what it will do, and check the
papers' claims. Importing this package starts no backend, changes no JAX setting, and loads
neither matplotlib nor xarray.
"""

from __future__ import annotations

import importlib

from attnmarkov import chains, dynamics, estimate, model, prompts
from attnmarkov.chains import MarkovChain, random_transition_matrix, zipf_law
from attnmarkov.estimate import Fit, coverage, excess_risk, fisher_information, fit
from attnmarkov.model import (
    CCMC,
    AttentionHead,
    DecayContext,
    FullContext,
    Greedy,
    LagContext,
    PositionContext,
    Sampling,
    SelfAttention,
    WindowContext,
)
from attnmarkov.prompts import Prompts
from attnmarkov.rollout import Summary, Trajectory, log_spaced, rollout, rollout_chunks

__version__ = "0.1.0"

_LAZY = ("adapters", "data", "experiments", "plot", "report", "sweep")

__all__ = [
    "CCMC",
    "AttentionHead",
    "DecayContext",
    "Fit",
    "FullContext",
    "Greedy",
    "LagContext",
    "MarkovChain",
    "PositionContext",
    "Prompts",
    "Sampling",
    "SelfAttention",
    "Summary",
    "Trajectory",
    "WindowContext",
    "chains",
    "coverage",
    "dynamics",
    "estimate",
    "excess_risk",
    "fisher_information",
    "fit",
    "log_spaced",
    "model",
    "prompts",
    "random_transition_matrix",
    "rollout",
    "rollout_chunks",
    "zipf_law",
]


def __getattr__(name: str) -> object:
    """Load the rooms that need more than JAX when they are first used."""
    if name in _LAZY:
        return importlib.import_module(f"attnmarkov.{name}")
    raise AttributeError(f"module 'attnmarkov' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
