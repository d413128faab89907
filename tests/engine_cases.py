"""The engines under test, and which of them takes what. A new engine is entered here."""

import jax.numpy as jnp
import numpy as np

import attnmarkov as am
from attnmarkov.model import FullContext, Sampling
from attnmarkov.rollout import ENGINES, Pallas, _layout
from attnmarkov.rollout.law import Law

TESTED = ["reference", "scan", "skip_ahead", "urn", "pallas", "rejection"]
EQUAL_ROWS = ["urn"]  # engines that take only models all of whose rows are equal
EXACT_LOGITS = ["reference", "scan"]  # engines that take logits spread by more than 60 nats
LANE_MAJOR = _layout._TOKEN_MAJOR + 8  # a vocabulary that scan lays out lane-major
OBJECTS = {**ENGINES, "pallas": Pallas(interpret=True)}  # as they run on a CPU


def record_of(engine, size=3, context=None, decoder=None):
    """The fullest record that an engine keeps of a law: tokens, counts, or None if it refuses."""
    law = Law(jnp.zeros((size, size)), context or FullContext(), decoder or Sampling())
    for record in ("tokens", "counts"):
        if OBJECTS[engine].refusal(law, record) is None:
            return record
    return None


def keeping(record):
    """Engines that keep this record of plain generation."""
    order = ["counts", "tokens"]
    able = {name: record_of(name) for name in OBJECTS}
    return [n for n, r in able.items() if r and order.index(r) >= order.index(record)]


def sampled(engine, model, key, prompt, num_steps, runs, **law):
    """(runs, num_steps) tokens, as they are or read off the counts after every step."""
    if record_of(engine, model.num_tokens, **law) == "tokens":
        traj = am.rollout(model, key, prompt, num_steps, runs, OBJECTS[engine], **law)
        return np.asarray(traj.tokens)
    at = np.arange(num_steps + 1)
    traj = am.rollout(model, key, prompt, num_steps, runs, OBJECTS[engine], "counts", at, **law)
    return np.diff(np.asarray(traj.counts), axis=1).argmax(-1)
