"""One attention head as a CCMC of low rank, and rollouts on its context's tokens."""

import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FAILURE_RATE, ccmc_law, trajectory_law
from scipy import stats

import attnmarkov as am
from attnmarkov.rollout.support import SupportTrajectory

SCALE = 0.7
HEAD = am.CCMC.from_attention_head


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(2)
    return rng.normal(size=(9, 5)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))


@pytest.fixture(scope="module")
def logits(weights):
    e, w_q, w_k = weights
    s = SCALE * (e @ w_q) @ (e @ w_k).T
    return s - s.mean(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def head(weights):
    return HEAD(*weights, scale=SCALE)


def softmax(s):
    return np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True)


def test_equals_the_dense_ccmc(head, weights, logits):
    assert (head.num_tokens, head.rank) == (9, 3)
    assert repr(head) == "AttentionHead(num_tokens=9, rank=3)"
    dense = head.to_ccmc()
    assert isinstance(dense, am.CCMC)
    for s in (dense.logits, head.logits, head.logits_of(np.arange(9))):
        np.testing.assert_allclose(s, logits, atol=2e-6)
    np.testing.assert_allclose(head.transition_matrix, softmax(logits), atol=1e-6)
    default = HEAD(*weights)  # 1 / sqrt(r)
    np.testing.assert_allclose(default.logits, logits / SCALE / np.sqrt(3), atol=2e-6)
    rows, columns = [[2, 8], [0, 2]], [5, 5, 1]
    np.testing.assert_allclose(head.logits_of(rows, columns), logits[rows][..., columns], atol=2e-6)
    small, ids = head.restrict([7, 2, 4])
    assert ids.tolist() == [7, 2, 4]
    part = logits[np.ix_(ids, ids)]
    np.testing.assert_allclose(small.logits, part - part.mean(axis=1, keepdims=True), atol=2e-6)


def test_laws_of_the_next_token(head, logits, key):
    p = softmax(logits)
    contexts = [[3, 3, 1, 8], [0], [5, 4, 4, 4, 2]]
    law = np.array([ccmc_law(p, c) for c in contexts])
    counts = np.array([np.bincount(c, minlength=9) for c in contexts])
    last = [c[-1] for c in contexts]
    np.testing.assert_allclose(head.next_token_probs(counts, last), law, atol=1e-6)
    ours = head.log_next_token_probs(counts[0], 8)
    assert (np.isneginf(ours) == (counts[0] == 0)).all()
    for context, expected in zip(contexts, law, strict=True):
        np.testing.assert_allclose(head(context), expected, atol=1e-6)
        small, ids = head.restrict(np.unique(context))
        n = np.bincount(context, minlength=9)[ids]
        at = int(np.searchsorted(ids, context[-1]))
        np.testing.assert_allclose(small.next_token_probs(n, at), expected[ids], atol=1e-6)
    np.testing.assert_allclose(head([3, 1], query=6), ccmc_law(p, [3, 1], 6), atol=1e-6)


def test_weights_and_heads_may_be_traced(head, weights, logits):
    e, w_q, w_k = map(jnp.asarray, weights)

    def score(w):
        return HEAD(e, w, w_k, SCALE).restrict([4, 1])[0].logits[0, 0]

    step = 1e-3 * np.ones_like(weights[1])
    change = (score(w_q + step) - score(w_q - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(score)(w_q), step), change, rtol=2e-3)
    traced = jax.jit(lambda h: (h.logits_of([1], [2]), h([3, 1]), h.to_ccmc().logits))(head)
    for got, expected in zip(traced, (head.logits_of([1], [2]), head([3, 1]), logits), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_dynamics_takes_the_tokens_of_the_prompt_alone(key):
    e = np.random.default_rng(5).normal(size=(40_000, 4))
    wide, prompt = HEAD(e, np.eye(4), np.eye(4)), [39_999, 7, 300]
    with pytest.raises(ValueError, match=r"take head.restrict\(np.unique\(prompt\)\)"):
        wide.to_ccmc()
    small, ids = wide.restrict(np.unique(prompt))
    local = np.searchsorted(ids, prompt)
    ours = am.dynamics.absorption(wide, prompt, 3, horizon=4)
    theirs = am.dynamics.absorption(small, local, 3, horizon=4)
    assert ours.winner_probabilities.shape == (40_000,)
    assert ours.cumulative is not None
    assert theirs.cumulative is not None
    np.testing.assert_allclose(ours.winner_probabilities[ids], theirs.winner_probabilities)
    np.testing.assert_allclose(ours.mean_times[ids], theirs.mean_times)
    np.testing.assert_allclose(ours.cumulative[:, ids], theirs.cumulative)
    assert ours.mean_time == pytest.approx(theirs.mean_time)
    for context in (3, am.DecayContext(0.5)):
        sample = am.dynamics.absorption_monte_carlo(wide, key, prompt, context, 4, 200)
        assert np.isin(sample.winners, [*ids, -1]).all()
    assert (np.flatnonzero(sample.run) == ids).all()
    won = am.dynamics.winner_probabilities(wide, key, prompt, 8, 500)
    assert won.tokens.tolist() == ids.tolist()
    assert won.shares.shape == (8, 3)
    assert {j for s in won.sets for j in s} <= set(ids.tolist())
    counts = np.bincount(prompt, minlength=40_000)[None]
    some = am.dynamics.basins(wide, key, counts, prompt[-1], 8, 500)
    np.testing.assert_array_equal(some.hits[0].sum(), won.hits.sum())
    times = am.dynamics.time_to_share(wide, key, prompt, 0.5, 7, 4, 100)
    assert times.times.shape == (4,)


def test_rollout_is_that_of_the_restricted_ccmc(head, key):
    prompt, ids = [7, 2, 2, 4, 0], np.array([0, 2, 4, 7])  # a power of two: nothing is filled up
    small, _ = head.restrict(ids)
    ours = am.rollout(head, key, prompt, 60, 5)
    theirs = am.rollout(small, key, np.searchsorted(ids, prompt), 60, 5)
    np.testing.assert_array_equal(ours.tokens, ids[np.asarray(theirs.tokens)])
    assert ours.num_tokens == 9
    assert ours.tokens.dtype == np.int8
    wide = am.CCMC.from_attention_head(np.ones((200, 1)), [[1.0]], [[1.0]])
    assert am.rollout(wide, key, [199, 3], 5).tokens.dtype == np.int16
    options = {"record": "counts", "at": [0, 7, 60]}
    counts = am.rollout(head, key, prompt, 60, 5, **options)
    assert isinstance(counts, SupportTrajectory)
    np.testing.assert_array_equal(counts.support, ids)
    np.testing.assert_array_equal(
        counts.counts, am.rollout(small, key, np.searchsorted(ids, prompt), 60, 5, **options).counts
    )
    parts = list(am.rollout_chunks(head, key, prompt, 60, 5, engine="scan", chunk=25))
    scan = am.rollout(head, key, prompt, 60, 5, engine="scan")
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts], 1), scan.tokens)


def test_records_of_a_support_that_is_filled_up(head, key):
    prompts = [[7, 2], [2, 2, 4]]
    counts = am.rollout(head, key, prompts, 50, 2, record="counts", at=[0, 50])
    assert counts.counts.shape == (2, 2, 3)
    assert counts.counts[:, 0].tolist() == [[1, 0, 1], [2, 1, 0]]
    assert counts.counts[:, 1].sum(-1).tolist() == [52, 53]
    data = counts.to_dataset()
    assert data["token"].values.tolist() == [2, 4, 7]
    assert "SupportTrajectory" not in repr(counts)
    assert repr(counts).startswith("Trajectory(2 trajectories of 3 tokens, counts at 2 times")
    summary = am.rollout(head, key, prompts, 50, 2, record="summary")
    transitions = np.asarray(summary.summary.transitions)
    assert transitions.shape == (2, 3, 3)
    assert transitions.sum((1, 2)).tolist() == [50, 50]
    assert summary.to_dataset()["query"].values.tolist() == [2, 4, 7]
    packed = am.Prompts.from_tokens(prompts, 9)
    again = am.rollout(head, key, packed, 50, 2, record="counts", at=[0, 50])
    np.testing.assert_array_equal(counts.counts, again.counts)
    window = am.WindowContext(3)  # needs the order of the prompt's tokens
    one = am.rollout(head, key, packed, 50, 2, context=window)
    np.testing.assert_array_equal(
        one.tokens, am.rollout(head, key, prompts, 50, 2, context=window).tokens
    )
    apart = am.Prompts.from_tokens([[2, 4, 4]], 9, query=[8])
    cross = am.rollout(head, key, apart, 20, 3, record="counts")
    assert isinstance(cross, SupportTrajectory)
    np.testing.assert_array_equal(cross.support, [2, 4, 8])
    assert (cross.counts[..., 2] == 0).all()
    only_counts = am.Prompts.from_counts([[0, 0, 1, 0, 2, 0, 0, 0, 0]], [4])
    assert am.rollout(head, key, only_counts, 5).tokens.shape == (1, 5)


def test_a_trajectory_does_not_depend_on_the_others(head, key):
    prompts = [[7, 2], [7, 2], [2, 2, 4], [8, 0, 1, 5, 3]]
    tokens = am.rollout(head, key, prompts, 40, 4).tokens
    counts = am.rollout(head, key, prompts, 40, 4, record="counts", at=[3, 40]).counts
    summary = am.rollout(head, key, prompts, 40, 4, record="summary").summary
    parts = list(am.rollout_chunks(head, key, prompts, 40, 4, engine="scan", chunk=15))
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts], 1), tokens)
    union = np.unique(np.concatenate(prompts))
    for i, prompt in enumerate(prompts):
        alone = am.rollout(head, key, prompt, 40, first_replicate=i)
        np.testing.assert_array_equal(alone.tokens[0], tokens[i])
        for t, step in enumerate((3, 40)):
            history = np.append(prompt, tokens[i, :step])
            np.testing.assert_array_equal(counts[i, t], np.bincount(history, minlength=9)[union])
        moves = np.zeros((9, 9), int)
        np.add.at(moves, (np.append(prompt[-1], tokens[i, :-1]), tokens[i]), 1)
        np.testing.assert_array_equal(
            np.asarray(summary.transitions)[i], moves[np.ix_(union, union)]
        )
        assert summary.distinct[i, 0] == len(set(np.asarray(tokens[i]).tolist()))
    more = am.rollout(head, key, [7, 2], 40, 2, first_replicate=1).tokens
    np.testing.assert_array_equal(more[0], tokens[1])
    assert float(summary.share) == 0.5


def test_law_of_rollouts(head, logits, key):
    """Three steps, enumerated, on a support of three tokens that is filled up to four."""
    many, prompt = 40_000, [1, 6, 3]
    law = trajectory_law(softmax(logits), prompt, 3)
    tokens = np.asarray(am.rollout(head, key, prompt, 3, many, engine="scan").tokens)
    seen, number = np.unique(tokens, axis=0, return_counts=True)
    assert set(map(tuple, seen.tolist())) <= set(law)
    found = dict(zip(map(tuple, seen.tolist()), number, strict=True))
    expected = np.array(list(law.values())) * many
    got = np.array([found.get(k, 0) for k in law])
    large = expected >= 10
    pooled = [np.append(x[large], x[~large].sum()) for x in (got, expected)]
    chi2 = ((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1e-9)).sum()
    assert chi2 < stats.chi2.isf(FAILURE_RATE, large.sum())


def test_fifty_thousand_tokens_never_become_a_matrix(key):
    num_tokens, rank = 50_000, 64
    rng = np.random.default_rng(0)
    e = rng.normal(size=(num_tokens, 96)).astype(np.float32)
    w_q, w_k = rng.normal(size=(2, 96, rank)) / 96**0.5
    prompt = rng.integers(0, num_tokens, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = HEAD(e, w_q, w_k)
    traj = am.rollout(head, key, prompt, 500, 4)
    counts = am.rollout(head, key, prompt, 500, 4, record="counts")
    law = head(prompt)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**20  # a GiB; the logits would take 9.3
    assert set(np.unique(traj.tokens)) <= set(prompt.tolist())
    assert counts.counts.shape == (4, 1, len(set(prompt.tolist())))
    s = (e[prompt].astype(float) @ w_k) @ (e[prompt[-1]].astype(float) @ w_q) / 8
    expected = np.zeros(num_tokens)
    np.add.at(expected, prompt, softmax(s))
    np.testing.assert_allclose(law, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"logits of 50000 tokens would take 9\.3 GiB"):
        head.to_ccmc()
    with pytest.raises(ValueError, match="logits of 50000 tokens"):
        _ = head.transition_matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((np.ones(3), 0, 0), r"embedding: expected a \(K, d\) array, got shape \(3,\)"),
        ((0, np.ones((4, 3)), 0), r"query_weight: expected shape \(5, r\), got \(4, 3\)"),
        ((0, 0, np.ones((5, 2))), r"key_weight: expected shape \(5, 3\), got \(5, 2\)"),
        ((0, np.full((5, 3), np.nan), 0), r"query_weight: entry \[0, 0\] is nan"),
    ],
)
def test_bad_weights(weights, change, message):
    arguments = [w if np.isscalar(c) else c for w, c in zip(weights, change, strict=True)]
    with pytest.raises(ValueError, match=message):
        HEAD(*arguments)


def test_bad_input(head, weights, key):
    bad: Any
    for bad, message in (([1.0, 2.0], "single number"), (np.inf, r"scale: entry .* is inf")):
        with pytest.raises(ValueError, match=message):
            HEAD(*weights, scale=bad)
    with pytest.raises(ValueError, match="tokens: the prompt is empty"):
        head([])
    with pytest.raises(ValueError, match="query: the value is token id 9"):
        head([1], query=9)
    with pytest.raises(ValueError, match=r"columns: entry \[0\] is token id -1"):
        head.logits_of([1], [-1])
    with pytest.raises(ValueError, match="tokens: is empty"):
        head.restrict(np.zeros(0, int))
    with pytest.raises(ValueError, match="counts: expected 9 entries"):
        head.next_token_probs([1, 1], 0)
    with pytest.raises(ValueError, match=r"tokens: entry \[1\] is token id 9, outside 0..8"):
        am.rollout(head, key, [1, 9], 5)
    with pytest.raises(ValueError, match="empty"):
        am.rollout(head, key, [], 5)
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        am.rollout(head, key, [[1], []], 5, 2)
    with pytest.raises(ValueError, match="prompt: over 4 tokens, but the model has 9"):
        am.rollout(head, key, am.Prompts.from_tokens([1], 4), 5)
    with pytest.raises(ValueError, match="prompt: 2 prompts for 3 trajectories"):
        am.rollout(head, key, [[1], [2]], 5, 3)
    with pytest.raises(ValueError, match="prompt: must be known when an attention head"):
        jax.jit(lambda x: am.rollout(head, key, x, 5).tokens)(jnp.array([1, 2]))
