from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from oracles import assert_law, assert_mean, assert_poisson, trajectory_law

import attnmarkov as am
from attnmarkov.rollout import ENGINES, Scan

engines = pytest.mark.parametrize("engine", ["reference", "scan"])  # those that keep tokens
all_engines = pytest.mark.parametrize("engine", ["reference", "scan", "skip_ahead", "urn"])


def sampled(engine, model, key, prompt, num_steps, runs):
    """(runs, num_steps) tokens, read off the counts after every step."""
    at = np.arange(num_steps + 1)
    counts = am.rollout(model, key, prompt, num_steps, runs, engine, "counts", at).counts
    return np.diff(np.asarray(counts), axis=1).argmax(-1)


def test_every_engine_is_tested():
    assert sorted(ENGINES) == ["reference", "scan", "skip_ahead", "urn"]


P = [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.25, 0.25, 0.5]]


@all_engines
@pytest.mark.parametrize(
    ("p", "prompt"),
    [
        (P, [0, 1, 2, 2]),
        (P, [1, 0]),  # the third token never comes
        ([[0.5, 0.5, 0], [0, 0.5, 0.5], [1, 0, 0]], [2, 1, 0]),  # masked attention
        ([[0.3, 0.7], [0.9, 0.1]], [0, 1]),
        ([[0.1, 0.2, 0.7]] * 3, [0, 0, 1, 2]),  # an urn
    ],
)
def test_law_of_short_trajectories(engine, key, p, prompt):
    if engine == "urn" and any(row != p[0] for row in p):
        pytest.skip("the urn engine is for equal rows")
    model = am.CCMC.from_transition_matrix(p)
    runs = 12_000 if engine == "urn" else 60_000
    assert_law(sampled(engine, model, key, prompt, 4, runs), trajectory_law(p, prompt, 4))


@engines
def test_counts_are_those_of_the_tokens(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    at = [0, 1, 127, 128, 129, 300]
    tokens = np.asarray(am.rollout(model, key, [0, 1, 2, 2], 300, 5, engine=engine).tokens)
    counted = am.rollout(model, key, [0, 1, 2, 2], 300, 5, engine, "counts", at)
    expected = [
        [[prompt + (row[:t] == j).sum() for j, prompt in enumerate((1, 1, 2))] for t in at]
        for row in tokens
    ]
    np.testing.assert_array_equal(counted.counts, expected)
    np.testing.assert_array_equal(counted.at, at)


@engines
def test_long_runs_agree_across_engines(engine, key):
    # The mean share of each token after 200 steps, against a float64 NumPy simulation.
    rng = np.random.default_rng(7)
    p, runs = np.array(P), 4000
    counts = np.tile([1.0, 1, 1], (runs, 1))
    last = np.full(runs, 2)
    for _ in range(200):
        edges = (counts * p[last]).cumsum(1)
        last = (rng.random((runs, 1)) * edges[:, -1:] > edges).sum(1)
        counts[np.arange(runs), last] += 1
    got = am.rollout(
        am.CCMC.from_transition_matrix(p), key, [0, 1, 2], 200, 4000, engine, "counts"
    ).counts[:, 0]
    for token in range(3):
        ours, theirs = np.asarray(got[:, token], float), counts[:, token]
        gap = (ours.mean() - theirs.mean()) / np.hypot(ours.std(), theirs.std()) * np.sqrt(runs)
        assert abs(gap) < 4.9  # two-sided normal tail 1e-6


@engines
@settings(max_examples=4)
@given(cut=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_draws_do_not_depend_on_the_batch(engine, cut, seed):
    key = jax.random.key(seed)
    model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, 3))
    prompts = am.prompts.uniform(key, 6, 4, 3)
    whole = am.rollout(model, key, prompts, 130, 6, engine).tokens
    head = am.rollout(model, key, prompts[:cut], 130, cut, engine).tokens
    tail = am.rollout(model, key, prompts[cut:], 130, 6 - cut, engine, first_replicate=cut).tokens
    np.testing.assert_array_equal(whole, jnp.concatenate([head, tail]))
    shorter = am.rollout(model, key, prompts, 60, 6, engine).tokens
    np.testing.assert_array_equal(whole[:, :60], shorter)


@engines
def test_no_steps(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    assert am.rollout(model, key, [0, 1], 0, 3, engine).tokens.shape == (3, 0)
    counts = am.rollout(model, key, [0, 1], 0, 3, engine, "counts").counts
    assert counts.tolist() == [[[1, 1, 0]]] * 3


@engines
def test_a_context_of_unlikely_tokens(engine, key):
    # The context's tokens are 1e-22 times as likely as one that is absent.
    model = am.CCMC.from_logits([[0.0, -51.0, -50.0]] * 3)
    first = np.asarray(am.rollout(model, key, [1, 2], 1, 40_000, engine).tokens)
    odds = np.exp(-1.0)
    assert_law(first, {(1,): odds / (1 + odds), (2,): 1 / (1 + odds)})


def test_logits_beyond_float32_need_the_reference(key):
    model = am.CCMC.from_logits([[0.0, -200.0, -200.0]] * 3)
    with pytest.raises(ValueError, match=r"after token 0, .* has a logit 200 below .*'reference'"):
        am.rollout(model, key, [1, 2], 5)
    tokens = am.rollout(model, key, [1, 2], 1, 20_000, "reference").tokens
    assert_law(np.asarray(tokens), {(1,): 0.5, (2,): 0.5})


def test_lanes_split_by_the_engine_are_the_same(key):
    model = am.CCMC.from_transition_matrix(P)
    whole = am.rollout(model, key, [0, 1, 2], 50, 23)
    split = am.rollout(model, key, [0, 1, 2], 50, 23, engine=Scan(max_lanes=5))
    np.testing.assert_array_equal(whole.tokens, split.tokens)
    assert split.engine == "Scan"


def test_attention_rolls_out_like_its_ccmc(key):
    model = am.CCMC.from_transition_matrix(P)
    attention = am.SelfAttention.from_ccmc(model, np.eye(3, 4))
    ours = am.rollout(attention, key, [0, 1, 2], 40, 6).tokens
    assert (np.asarray(ours) == am.rollout(model, key, [0, 1, 2], 40, 6).tokens).mean() > 0.99


@engines
def test_cross_attention_start(engine, key):
    # The first query stands outside the context: it steers the first token and never comes.
    model = am.CCMC.from_transition_matrix(P)
    prompt = am.Prompts.from_tokens([[0, 1]], 3, query=[2])
    first = np.asarray(am.rollout(model, key, prompt, 1, 40_000, engine).tokens)
    assert_law(first, {(0,): 0.5, (1,): 0.5})
    other = np.asarray(am.rollout(model, key, [1, 0], 1, 40_000, engine).tokens)
    assert_law(other, {(0,): 2 / 7, (1,): 5 / 7})


@engines
def test_counts_only_prompts(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    prompt = am.Prompts.from_counts([[2, 0, 1]], [0])
    tokens = np.asarray(am.rollout(model, key, prompt, 2, 40_000, engine).tokens)
    assert_law(tokens, trajectory_law(P, [0, 2, 0], 2))


def test_rare_tokens_are_hit_at_their_rate(key):
    # Token 1 comes with probability n_1 p / (n_0 (1-p) + n_1 p) after token 0, and 0 after 1.
    p, steps, runs = 1e-6, 40, 2**19
    model = am.CCMC.from_transition_matrix([[1 - p, p], [1.0, 0.0]])
    counts = am.rollout(model, key, [1, 0], steps, runs, record="counts").counts[:, 0]
    assert (counts.sum(1) == steps + 2).all()
    mean = runs * p * sum(1 / (1 + t) for t in range(steps))
    assert_poisson(int((counts[:, 1] - 1).sum()), mean)


def test_polya_urn_moments(key):
    # Equal rows: a Polya urn with weights; with P uniform, token 0's share is Beta(1, 2)-like.
    model = am.CCMC.from_transition_matrix(np.full((3, 3), 1 / 3))
    counts = am.rollout(model, key, [0, 1, 2], 500, 4000, record="counts").counts[:, 0]
    share = np.asarray(counts[:, 0]) / 503
    assert_mean(share, 1 / 3)
    # variance of the Beta-binomial fraction with a = 1, b = 2 after n = 500 draws
    expected = 500 * (1 / 3) * (2 / 3) * (503 / 4) / 503**2
    assert_mean((share - 1 / 3) ** 2, expected)


def test_compiles_once_for_other_horizons_and_models(key):
    from attnmarkov.rollout import scan

    at = am.log_spaced(100, 5)
    jitted: Any = scan._counts
    jitted.clear_cache()
    for scale, horizon in ((1, 1), (2, 7), (3, 60)):
        model = am.CCMC.from_logits(scale * np.eye(3))
        am.rollout(model, key, [0, 1, 2], 100 * horizon, 9, record="counts", at=at * horizon)
    am.rollout(am.CCMC.from_logits(np.eye(3)), key, [2, 1], 5000, 9, record="counts", at=at * 50)
    assert jitted._cache_size() == 1


def test_rollout_traces_over_models(key):
    models = [am.CCMC.from_transition_matrix(p) for p in (P, np.full((3, 3), 1 / 3))]

    def counts(model):
        return am.rollout(model, key, [0, 1, 2], 30, 4, record="counts").counts

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(counts))(stacked)
    for i, model in enumerate(models):
        np.testing.assert_array_equal(together[i], counts(model))


def test_trajectory_prints_and_converts(key):
    model = am.CCMC.from_transition_matrix(P)
    tokens = am.rollout(model, key, [0, 1], 7, 2)
    assert repr(tokens) == "Trajectory(2 trajectories of 3 tokens, 7 steps, engine='scan')"
    assert dict(tokens.to_dataset().sizes) == {"replicate": 2, "step": 7}
    counts = am.rollout(model, key, [0, 1], 7, 2, record="counts", at=[3, 7])
    assert "counts at 2 times up to step 7" in repr(counts)
    dataset = counts.to_dataset()
    assert dict(dataset.sizes) == {"replicate": 2, "step": 2, "token": 3}
    np.testing.assert_allclose(counts.frequencies.sum(-1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="counts: this rollout recorded tokens"):
        _ = tokens.frequencies
    with pytest.raises(ValueError, match="tokens: this rollout recorded counts"):
        _ = counts.tokens


def test_log_spaced():
    assert am.log_spaced(10**9, 4).tolist() == [1, 1000, 10**6, 10**9]
    assert am.log_spaced(5, 60).tolist() == [1, 2, 3, 4, 5]
    assert am.log_spaced(7, 1).tolist() == [7]
    with pytest.raises(ValueError, match="num_steps: must be at least 1"):
        am.log_spaced(0, 3)


MODEL = am.CCMC.from_transition_matrix(P)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps: must be at least 0, got -1"),
        ({"num_steps": 1.5}, "num_steps: expected an integer, got 1.5"),
        ({"num_steps": 2**31}, r"num_steps: a context of 3 \+ 2147483648 tokens passes"),
        ({"num_trajectories": 0}, "num_trajectories: must be at least 1, got 0"),
        ({"first_replicate": -1}, "first_replicate: must be at least 0"),
        ({"engine": "warp"}, "engine: unknown engine 'warp'; known: auto, reference, scan, skip"),
        ({"engine": 3}, "engine: expected a name or an engine object, got 3"),
        ({"first_replicate": 2**32}, "first_replicate: replicate ids end at 2"),
        ({"record": "none"}, "record: unknown record 'none'; known: tokens, counts"),
        ({"prompt": []}, "tokens: prompt 0 is empty"),
        ({"prompt": [0, 3]}, r"tokens: entry \[0, 1\] is token id 3, outside 0..2"),
        ({"prompt": [[0], [1], [2]]}, "prompt: 3 prompts for 2 trajectories"),
        (
            {"prompt": am.Prompts.from_tokens([[0]], 2)},
            "prompt: over 2 tokens, but the model has 3",
        ),
        ({"at": [5]}, "at: only counts are recorded at chosen steps"),
        ({"record": "counts", "at": [5, 5]}, "at: must increase, but has 5 before 5"),
        ({"record": "counts", "at": [5, 11]}, "at: 11 is outside 0..num_steps = 10"),
        ({"record": "counts", "at": [-1, 3]}, "at: -1 is outside"),
        ({"record": "counts", "at": []}, "at: is empty"),
        ({"record": "counts", "at": [1.5]}, "at: expected integers"),
        ({"key": 0}, "key: expected a typed key"),
        (
            {"model": am.CCMC.from_transition_matrix([[0, 1], [1, 0]]), "prompt": [0, 0]},
            r"model: token 0 can be reached from the prompt, but attends no token of it",
        ),
        (
            {
                "model": am.CCMC.from_transition_matrix([[0, 1, 0], [0, 0, 1], [0, 0, 1]]),
                "prompt": [1, 0],
            },
            r"token 1 can be reached .*P\[1, j\] = 0 for every j in \[0, 1\]",
        ),
    ],
)
def test_bad_input(key, change, message):
    arguments = {
        "model": MODEL,
        "key": key,
        "prompt": [0, 1, 2],
        "num_steps": 10,
        "num_trajectories": 2,
    }
    with pytest.raises(ValueError, match=message):
        am.rollout(**{**arguments, **change})
