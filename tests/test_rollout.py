from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import EQUAL_ROWS, EXACT_LOGITS, OBJECTS, TESTED, keeping, sampled
from hypothesis import given, settings
from oracles import assert_law, assert_mean, assert_poisson, trajectory_law

import attnmarkov as am
from attnmarkov.model import DecayContext, LagContext, Sampling, WindowContext
from attnmarkov.rollout import ENGINES, Scan, scan

engines = pytest.mark.parametrize("engine", keeping("tokens"))
all_engines = pytest.mark.parametrize("engine", keeping("counts"))


def rollout(engine, *args, **kwargs):
    return am.rollout(*args, engine=OBJECTS[engine], **kwargs)


def test_every_engine_is_tested():
    assert sorted(ENGINES) == sorted(TESTED)


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
    if engine in EQUAL_ROWS and any(row != p[0] for row in p):
        pytest.skip("the engine is for equal rows")
    model = am.CCMC.from_transition_matrix(p)
    runs = 12_000 if engine == "urn" else 40_000
    assert_law(sampled(engine, model, key, prompt, 4, runs), trajectory_law(p, prompt, 4))


@engines
def test_counts_are_those_of_the_tokens(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    at = [0, 1, 127, 128, 129, 300]
    tokens = np.asarray(rollout(engine, model, key, [0, 1, 2, 2], 300, 5).tokens)
    counted = rollout(engine, model, key, [0, 1, 2, 2], 300, 5, record="counts", at=at)
    expected = [
        [[prompt + (row[:t] == j).sum() for j, prompt in enumerate((1, 1, 2))] for t in at]
        for row in tokens
    ]
    np.testing.assert_array_equal(counted.counts, expected)
    np.testing.assert_array_equal(counted.at, at)


@all_engines
def test_long_runs_agree_across_engines(engine, key):
    # The mean share of each token after 200 steps, against a float64 NumPy simulation.
    if engine in EQUAL_ROWS:
        pytest.skip("the engine is for equal rows")
    rng = np.random.default_rng(7)
    p, runs = np.array(P), 3000
    counts = np.tile([1.0, 1, 1], (runs, 1))
    last = np.full(runs, 2)
    for _ in range(200):
        edges = (counts * p[last]).cumsum(1)
        last = (rng.random((runs, 1)) * edges[:, -1:] > edges).sum(1)
        counts[np.arange(runs), last] += 1
    model = am.CCMC.from_transition_matrix(p)
    got = rollout(engine, model, key, [0, 1, 2], 200, runs, record="counts").counts[:, 0]
    for token in range(3):
        ours, theirs = np.asarray(got[:, token], float), counts[:, token]
        gap = (ours.mean() - theirs.mean()) / np.hypot(ours.std(), theirs.std()) * np.sqrt(runs)
        assert abs(gap) < 4.9  # two-sided normal tail 1e-6


@engines
@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_draws_do_not_depend_on_the_batch(engine, seed):
    key, cut = jax.random.key(seed), 2
    model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, 3))
    prompts = am.prompts.uniform(key, 6, 4, 3)
    whole = rollout(engine, model, key, prompts, 130, 6).tokens
    head = rollout(engine, model, key, prompts[:cut], 130, cut).tokens
    tail = rollout(engine, model, key, prompts[cut:], 130, 6 - cut, first_replicate=cut).tokens
    np.testing.assert_array_equal(whole, jnp.concatenate([head, tail]))
    shorter = rollout(engine, model, key, prompts, 60, 6).tokens
    np.testing.assert_array_equal(whole[:, :60], shorter)


@all_engines
def test_counts_do_not_depend_on_the_batch(engine, key):
    model = am.CCMC.from_transition_matrix([[0.5, 0.3, 0.2]] * 3)
    prompts = am.prompts.uniform(key, 6, 4, 3)
    whole = rollout(engine, model, key, prompts, 90, 6, record="counts", at=[30, 90]).counts
    tail = rollout(
        engine, model, key, prompts[4:], 90, 2, record="counts", at=[30, 90], first_replicate=4
    ).counts
    np.testing.assert_array_equal(whole[4:], tail)


@engines
def test_no_tokens(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    assert rollout(engine, model, key, [0, 1], 0, 3).tokens.shape == (3, 0)


@all_engines
def test_no_steps(engine, key):
    model = am.CCMC.from_transition_matrix([P[0]] * 3)
    counts = rollout(engine, model, key, [0, 1], 0, 3, record="counts").counts
    assert counts.tolist() == [[[1, 1, 0]]] * 3


@all_engines
def test_a_context_of_unlikely_tokens(engine, key):
    # The context's tokens are 1e-22 times as likely as one that is absent.
    model = am.CCMC.from_logits([[0.0, -51.0, -50.0]] * 3)
    first = sampled(engine, model, key, [1, 2], 1, 20_000)
    odds = np.exp(-1.0)
    assert_law(first, {(1,): odds / (1 + odds), (2,): 1 / (1 + odds)})


@pytest.mark.parametrize("engine", [e for e in keeping("counts") if e not in EXACT_LOGITS])
def test_logits_beyond_float32_are_refused(engine, key):
    model = am.CCMC.from_logits([[0.0, -200.0, -200.0]] * 3)
    message = (
        "after token 0, .* has a logit 200 below .*'scan' can hold that|"
        "can't hold logits more than 60 nats below .* engines that can: .*scan"
    )
    with pytest.raises(ValueError, match=message):
        rollout(engine, model, key, [1, 2], 5, record="counts")


def test_lanes_split_by_the_engine_are_the_same(key):
    model = am.CCMC.from_transition_matrix(P)
    whole = am.rollout(model, key, [0, 1, 2], 50, 23)
    assert whole.engine == "scan"
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
    first = np.asarray(rollout(engine, model, key, prompt, 1, 20_000).tokens)
    assert_law(first, {(0,): 0.5, (1,): 0.5})
    other = np.asarray(rollout(engine, model, key, [1, 0], 1, 20_000).tokens)
    assert_law(other, {(0,): 2 / 7, (1,): 5 / 7})


@engines
def test_counts_only_prompts(engine, key):
    model = am.CCMC.from_transition_matrix(P)
    prompt = am.Prompts.from_counts([[2, 0, 1]], [0])
    tokens = np.asarray(rollout(engine, model, key, prompt, 2, 20_000).tokens)
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
    at = am.log_spaced(100, 5)
    jitted: Any = scan._counts
    jitted.clear_cache()
    for scale, horizon in ((1, 1), (2, 7), (3, 60)):
        model = am.CCMC.from_logits(scale * np.eye(3))
        am.rollout(model, key, [0, 1, 2], 100 * horizon, 9, record="counts", at=at * horizon)
    # Prompts of another length too; logits beyond float32's range take one more.
    am.rollout(am.CCMC.from_logits(np.eye(3)), key, [2, 1], 5000, 9, record="counts", at=at * 50)
    assert jitted._cache_size() == 1
    for scale in (1, 2):
        model = am.CCMC.from_logits(scale * 100 * np.eye(3))
        am.rollout(model, key, [0], 100, 9, record="counts", at=at)
    assert jitted._cache_size() == 2


@pytest.mark.parametrize("kind", [DecayContext, WindowContext, LagContext])
def test_compiles_once_for_other_parameters(key, kind):
    parameters = {DecayContext: (0.5, 0.9), WindowContext: (2, 2), LagContext: ([1, 2], [0.5, 0])}
    jitted: Any = scan._tokens
    jitted.clear_cache()
    for value, exponent, temperature in zip(parameters[kind], (0.5, 2.0), (0.7, 1.5), strict=True):
        context = kind(value, exponent=exponent)
        decoder = Sampling(temperature, top_p=exponent / 3)
        am.rollout(
            am.CCMC.from_transition_matrix(P),
            jax.random.fold_in(key, 1),
            [0, 1, 2],
            20,
            4,
            context=context,
            decoder=decoder,
        )
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
        ({"num_steps": 2**31}, "scan can't count a history of 2147483651 tokens, 2147483647 at"),
        ({"num_trajectories": 0}, "num_trajectories: must be at least 1, got 0"),
        ({"first_replicate": -1}, "first_replicate: must be at least 0"),
        ({"engine": "warp"}, "engine: unknown engine 'warp'; known: auto, reference, scan"),
        ({"engine": 3}, "engine: expected a name or an engine object, got 3"),
        ({"first_replicate": 2**32}, "first_replicate: replicate ids end at 2"),
        ({"record": "none"}, "record: unknown record 'none'; known: tokens, counts, summary"),
        ({"prompt": []}, "tokens: prompt 0 is empty"),
        ({"prompt": [0, 3]}, r"tokens: entry \[0, 1\] is token id 3, outside 0..2"),
        ({"prompt": [[0], [1], [2]]}, "prompt: 3 prompts for 2 trajectories"),
        (
            {"prompt": am.Prompts.from_tokens([[0]], 2)},
            "prompt: over 2 tokens, but the model has 3",
        ),
        ({"at": [5]}, "at: only counts and summaries are recorded at chosen"),
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


def test_a_known_model_out_of_range_of_float32_is_right_inside_jit(key):
    # Logits 70 below an absent token's: a known model goes over to logarithms, in jit too.
    model = am.CCMC.from_logits([[0.0, -70.0, -69.0]] * 3)
    tokens = jax.jit(lambda k: am.rollout(model, k, [1, 2], 1, 20_000, "scan").tokens)(key)
    odds = np.exp(-1.0)
    assert_law(np.asarray(tokens), {(1,): odds / (1 + odds), (2,): 1 / (1 + odds)})


@pytest.mark.parametrize("size", [3, 60])
@pytest.mark.parametrize("depth", [65, 80, 200])
def test_traced_models_out_of_range_emit_nothing_wrong(key, size, depth):
    # Traced logits can't be looked at: a lane may have nothing left to attend, and says so.
    logits = jnp.full((size, size), -float(depth)).at[:, 0].set(0)

    def run(s, record):
        return am.rollout(am.CCMC.from_logits(s), key, [1, 2], 40, 50, "scan", record).values

    tokens = np.asarray(jax.jit(run, static_argnums=1)(logits, "tokens"))
    assert set(np.unique(tokens)) <= {-1, 1, 2}
    if depth == 65:
        assert (tokens > 0).all()
    counts = np.asarray(jax.jit(run, static_argnums=1)(logits, "counts"))[:, 0]
    np.testing.assert_array_equal(counts.sum(1), 2 + (tokens >= 0).sum(1))


def test_counts_beyond_int32_are_refused_inside_jit(key):
    def run(model):
        return am.rollout(model, key, [0, 1], 2**31, 2, record="counts").counts

    with pytest.raises(ValueError, match=r"can't count a history of .* inside jit, 2147483647"):
        jax.jit(run)(am.CCMC.from_logits(jnp.zeros((2, 2))))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_batches_split_under_any_kind_of_key(kind):
    key = jax.random.key(3, impl=kind)
    whole = am.rollout(MODEL, key, [0, 1, 2], 30, 9).tokens
    tail = am.rollout(MODEL, key, [0, 1, 2], 30, 4, first_replicate=5).tokens
    np.testing.assert_array_equal(whole[5:], tail)


def test_known_scalars_may_be_arrays_inside_jit(key):
    decoder, context = am.Sampling(jnp.float32(0.7)), am.FullContext(exponent=jnp.float32(1))

    def run(model):
        return am.rollout(model, key, [0, 1, 2], 5, 2, context=context, decoder=decoder).tokens

    np.testing.assert_array_equal(jax.jit(run)(MODEL), run(MODEL))


@pytest.mark.parametrize("scale", [1e-50, 1e-40, 1.0, 1e39])
def test_lag_weights_of_any_scale(key, scale):
    context = am.LagContext((1.0 * scale, 0.25 * scale))
    tokens = am.rollout(MODEL, key, [0, 1, 2], 30, 9, context=context).tokens
    same = am.rollout(MODEL, key, [0, 1, 2], 30, 9, context=am.LagContext([4.0, 1.0])).tokens
    np.testing.assert_array_equal(tokens, same)


def test_a_shared_prompt_is_not_copied_to_every_lane(key, monkeypatch):
    from attnmarkov.rollout import scan

    seen, original = [], scan._counts

    def spy(law, seeds, prompts, *rest, **static):
        seen.append(prompts.tokens)
        return original(law, seeds, prompts, *rest, **static)

    monkeypatch.setattr(scan, "_counts", spy)
    am.rollout(MODEL, key, [0, 1, 2] * 50, 5, 9, record="counts")
    assert seen == [None]
