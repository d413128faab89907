"""The rejection engine where it is used: large vocabularies, low acceptance, rare tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_law, assert_poisson, trajectory_law

import attnmarkov as am
from attnmarkov.rollout import Pallas, Rejection, _engines, rejection

K = 60
CONTEXT = [1, 1, 1, 7, 16, 17, 33, 59]


@pytest.fixture(scope="module")
def mixed():
    """Queries whose likeliest token is absent, so that lanes wait, beside one that accepts."""
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.ones(K), K)
    low = [t for t in CONTEXT if t != 7]
    p[low] *= 1e-3
    p[low, 5] = 1.0
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_law_where_some_lanes_wait(key, mixed, num_steps):
    prompts, runs = [CONTEXT, [7, 1, 16]], 20_000
    model = am.CCMC.from_transition_matrix(mixed)
    batch = am.Prompts.from_tokens(prompts, K)[np.repeat([0, 1], runs)]
    tokens = am.rollout(model, key, batch, num_steps, len(batch), "rejection").tokens
    for own, prompt in zip(np.split(np.asarray(tokens), 2), prompts, strict=True):
        assert_law(own, trajectory_law(mixed, prompt, num_steps))


def test_draws_do_not_depend_on_who_waits(key, mixed):
    model = am.CCMC.from_transition_matrix(mixed)
    whole = np.asarray(am.rollout(model, key, CONTEXT, 300, 40, "rejection").tokens)
    shorter = am.rollout(model, key, CONTEXT, 100, 40, "rejection").tokens
    tail = am.rollout(model, key, CONTEXT, 300, 7, "rejection", first_replicate=33).tokens
    split = am.rollout(model, key, CONTEXT, 300, 40, Rejection(max_lanes=3)).tokens
    np.testing.assert_array_equal(whole[:, :100], shorter)
    np.testing.assert_array_equal(whole[33:], tail)
    np.testing.assert_array_equal(whole, split)


def test_rare_tokens_come_at_their_rate(key):
    # A long history that holds every token equally often, so that draws are all but independent.
    rare = np.arange(64) % 4 != 1
    law = np.where(rare, 1e-6, 1.0)
    model = am.CCMC.from_transition_matrix(np.tile(law / law.sum(), (64, 1)))
    prompt, steps, lanes = np.tile(np.arange(64), 2000), 300, 4096
    counts = am.rollout(model, key, prompt, steps, lanes, "rejection", "counts").counts[:, 0]
    drawn = np.asarray(counts, np.int64) - 2000
    np.testing.assert_array_equal(drawn.sum(1), steps)
    assert_poisson(drawn[:, rare].sum(), lanes * steps * law[rare].sum() / law.sum())


def test_one_compilation_serves_near_horizons(key, mixed):
    model = am.CCMC.from_transition_matrix(mixed)
    jitted: Any = rejection._tokens
    jitted.clear_cache()
    for steps in (600, 611, 640):
        at = [steps // 2, steps]
        traj = am.rollout(model, key, CONTEXT, steps, 4, "rejection", "counts", at)
        np.testing.assert_array_equal(traj.counts.sum(-1) - len(CONTEXT), [at] * 4)
    assert jitted._cache_size() == 1


def test_auto_takes_it_for_many_tokens(key):
    size = _engines._MANY
    model = am.CCMC.from_logits(jax.random.normal(key, (size, size)))
    prompts = am.prompts.uniform(key, 6, 5, size)
    whole = am.rollout(model, key, prompts, 20, 6)
    assert whole.engine == "rejection"
    counted = am.rollout(model, key, prompts, 20, 6, record="counts").counts[:, 0]
    tally = np.apply_along_axis(np.bincount, 1, np.asarray(whole.tokens), minlength=size)
    np.testing.assert_array_equal(counted - prompts.counts, tally)
    tail = am.rollout(model, key, prompts[4:], 20, 2, first_replicate=4).tokens
    np.testing.assert_array_equal(whole.tokens[4:], tail)
    inside = jax.jit(lambda m: am.rollout(m, key, prompts, 20, 6).tokens)(model)
    np.testing.assert_array_equal(whole.tokens, inside)
    assert am.rollout(model, key, prompts, 20, 6, record="summary").engine == "scan"
    assert (
        am.rollout(model, key, prompts[:1], _engines._KEPT + 1, 2, record="counts").engine == "scan"
    )


def test_counts_only_prompts_inside_jit(key):
    model = am.CCMC.from_logits(jnp.zeros((3, 3)))
    prompt = am.Prompts.from_counts([[2, 0, 1]], [0])
    for engine in ("rejection", "reference"):

        def tokens(m, engine=engine):
            return am.rollout(m, key, prompt, 5, 2, engine).tokens

        np.testing.assert_array_equal(jax.jit(tokens)(model), tokens(model))


def test_bad_engine_objects():
    model = am.CCMC.from_logits(jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="max_lanes: must be at least 1, got 0"):
        am.rollout(model, jax.random.key(0), [0], 5, engine=Rejection(max_lanes=0))
    with pytest.raises(ValueError, match="block: must be a power of two, got 48"):
        am.rollout(model, jax.random.key(0), [0], 5, engine=Pallas(block=48))
