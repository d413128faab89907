"""The rejection engine where it is used: large vocabularies, low acceptance, rare tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_law, assert_poisson, trajectory_law

import attnmarkov as am
from attnmarkov.rollout import Pallas, Rejection, _engines, _proposals, rejection
from attnmarkov.rollout._remember import Remembered

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


# Only the last prompt is long enough to be proposed from by cells, and not after every query.
CELLS = [
    [0.02, 0.38, 0.3, 0.3, 0.0],
    [0.5, 1e-3, 0.149, 0.35, 0.0],
    [1e-3, 2e-3, 1e-3, 1e-3, 0.995],
    [0.25, 0.25, 0.25, 0.25, 0.0],
    [0.2, 0.2, 0.2, 0.2, 0.2],
]
MIXED = [[0, 1], [3, 3, 3, 3, 3, 0, 1], [0, 1, 1, 2, 2, 3, 3, 0, 3]]


def test_law_of_prompts_proposed_by_cells(key):
    prompts = am.Prompts.from_tokens(MIXED, 5)
    model, runs, steps = am.CCMC.from_transition_matrix(CELLS), 30_000, 3
    tables = _proposals.find_tables(model.logits, prompts)
    assert tables.cells is not None
    weight = np.asarray(tables.rows.weight)
    few = np.max(prompts.counts, axis=1)[:, None] * weight < np.asarray(prompts.lengths)[:, None]
    assert few.any(axis=1).tolist() == [False, False, True]
    assert not few[2].all()
    batch = prompts[np.repeat(np.arange(3), runs)]
    tokens = am.rollout(model, key, batch, steps, len(batch), "rejection").tokens
    for own, prompt in zip(np.split(np.asarray(tokens), 3), MIXED, strict=True):
        assert_law(own, trajectory_law(CELLS, prompt, steps))


def test_law_of_a_prompt_that_many_lanes_share(key):
    model = am.CCMC.from_transition_matrix(CELLS)
    shared = am.rollout(model, key, MIXED[2], 40, 6, "rejection")
    own = am.rollout(model, key, [MIXED[2]] * 6, 40, 6, "rejection")
    np.testing.assert_array_equal(shared.tokens, own.tokens)
    beside = am.rollout(model, key, [MIXED[0]] + [MIXED[2]] * 5, 40, 6, "rejection")
    np.testing.assert_array_equal(shared.tokens[1:], beside.tokens[1:])
    inside = jax.jit(lambda m: am.rollout(m, key, MIXED[2], 40, 6, "rejection").tokens)
    np.testing.assert_array_equal(shared.tokens, inside(model))


@pytest.mark.parametrize("size", [1, 3, 64, 65, 200])
def test_cells(key, size):
    logits = jax.random.normal(key, (size, size)) * 3
    logits = logits.at[0, size // 2 + 1 :].set(-jnp.inf)
    rows = _proposals.find_rows(logits)
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(rows.p, p, rtol=2e-6)
    scale = np.asarray(rows.scale)
    cells = np.ceil(np.asarray(rows.p) * scale[:, None]).astype(int)
    assert (cells.sum(axis=1) >= 1).all()
    assert (cells.sum(axis=1) < 2 * size).all()
    np.testing.assert_allclose(rows.weight, cells.sum(axis=1) / scale, rtol=1e-6)
    for row, count in zip(np.asarray(_proposals._cells(rows)), cells, strict=True):
        np.testing.assert_array_equal(row[: count.sum()], np.repeat(np.arange(size), count))


def test_tables_are_found_once_and_go_with_the_model(key):
    asked = []
    found = Remembered(lambda x: asked.append(0) or float(x.sum()), 2)
    first, second, third = (jnp.full(3, i) for i in range(3))
    assert [found(x) for x in (first, first, second, first, second)] == [0, 0, 3, 0, 3]
    assert len(asked) == 2
    found(third)  # in the place of the first
    assert [found(first), len(asked)] == [0, 4]
    del first, second, third
    assert found._known == {}
    values = np.zeros(3)
    assert found(values) == 0
    values[:] = 1  # NumPy's arrays may change
    assert found(values) == 3


def test_too_many_tokens():
    class Huge:
        num_tokens = 50_000
        context, is_plain, fits_float32 = am.FullContext(), True, True

    law: Any = Huge()
    assert "more than 46340 tokens" in str(Rejection().refusal(law, "counts"))
