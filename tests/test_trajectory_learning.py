"""Learning from generated trajectories: prompts, fits, information, verdicts, budgets.

Statistical tests have fixed keys; a correct library fails each with probability 1e-6.
"""

from __future__ import annotations

import functools

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate import information_rollout
from attnmarkov.estimate.budget import BudgetComparison, learn_with_budget
from attnmarkov.estimate.information_growth import InformationGrowth, information_growth
from attnmarkov.estimate.information_rollout import rollout_information
from attnmarkov.estimate.learnable import learnable_contrasts
from attnmarkov.estimate.trajectory import fit_trajectory, trajectory_prompts

P = np.array([[0.5, 0.2, 0.3], [0.4, 0.3, 0.3], [0.5, 0.3, 0.2]])
MODEL = am.CCMC.from_transition_matrix(P)
PROMPT = [0, 1, 2, 2]


def prefixes(tokens, prompt, size):
    """Counts, last tokens and labels of every prefix, by loops."""
    counts, last, y = [], [], []
    history = list(prompt)
    for token in tokens:
        counts.append([history.count(j) for j in range(size)])
        last.append(history[-1])
        y.append(int(token))
        history.append(int(token))
    return np.array(counts), np.array(last), np.array(y)


def pooled(tokens, prompts, size):
    parts = [prefixes(t, p, size) for t, p in zip(tokens, prompts, strict=True)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@functools.cache
def rolled():
    return am.rollout(MODEL, oracle.key_of("rolled"), PROMPT, 40, 6)


# --- prompts and fits


@pytest.mark.parametrize("case", ["single", "shared", "own", "prompts"])
def test_prefixes_are_the_prompts(case):
    rng = oracle.generator(case)
    tokens = rng.integers(0, 3, (3, 7))
    own = [[0, 1, 2], [2, 1, 0], [1, 0, 2]]
    if case == "single":
        tokens, given, expected = tokens[0], [1, 2, 0], prefixes(tokens[0], [1, 2, 0], 3)
    elif case == "shared":
        given, expected = [1, 2, 0], pooled(tokens, [[1, 2, 0]] * 3, 3)
    else:
        given, expected = own, pooled(tokens, own, 3)
        if case == "prompts":
            given = am.Prompts.from_tokens(own, 3)
    prompts, y = trajectory_prompts(tokens.astype(np.int8), given, 3)
    traced, traced_y = jax.jit(lambda t: trajectory_prompts(t, given, 3))(tokens)
    for got, want in zip((prompts.counts, prompts.last, y), expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == np.int32
    for got, want in zip((traced.counts, traced.last, traced_y), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_prefixes_under_vmap_and_with_one_token():
    tokens = oracle.generator("vmap").integers(0, 2, (4, 5))
    prompts, y = jax.vmap(lambda t: trajectory_prompts(t, [0, 1], 2))(jnp.asarray(tokens))
    for i in range(4):
        counts, last, labels = prefixes(tokens[i], [0, 1], 2)
        np.testing.assert_array_equal(prompts.counts[i], counts)
        np.testing.assert_array_equal(prompts.last[i], last)
        np.testing.assert_array_equal(y[i], labels)
    prompts, y = trajectory_prompts([0, 0], [0], 1)
    assert prompts.counts.tolist() == [[1], [2]]
    assert y.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("tokens", "prompt", "size", "message"),
    [
        ([], [0], 2, r"tokens: there is no step \(shape \(1, 0\)\)"),
        ([0, 2], [0, 1], 2, r"tokens: entry \[0, 1\] is token id 2, outside 0..1"),
        ([0, -1], [0, 1], 2, r"tokens: entry \[0, 1\] is token id -1, outside 0..1"),
        ([[0, 0], [0, 2]], [0, 1], 3, "trajectory 1 draws token 2 at step 1, which does not stand"),
        ([[0], [1]], [[0, 1], [0, 2]], 3, "trajectory 1 draws token 1 at step 0"),
        ([[0], [1]], [[0, 1]] * 3, 2, "prompt: 3 prompts for 2 trajectories"),
        ([0], [0, 3], 2, "token id 3"),
        ([0.5], [0], 2, "tokens: expected integers"),
        ([0], [0], 0, "num_tokens: must be at least 1, got 0"),
    ],
)
def test_bad_trajectories(tokens, prompt, size, message):
    with pytest.raises(ValueError, match=message):
        trajectory_prompts(tokens, prompt, size)
    with pytest.raises(ValueError, match="prompt: over 3 tokens, but the trajectory has 2"):
        trajectory_prompts([0], am.Prompts.from_tokens([[0, 1]], 3), 2)


def test_fit_is_the_maximum_of_the_pooled_trajectories():
    traj = rolled()
    found = fit_trajectory(traj, PROMPT)
    counts, last, y = pooled(np.asarray(traj.tokens), [PROMPT] * 6, 3)
    assert oracle.finite_maximum(counts, last, y).all()
    assert found.status.name == "converged"
    best = oracle.centre(oracle.maximum(counts, last, y), np.zeros((3, 3), int))
    np.testing.assert_allclose(found.model.logits, best, atol=2e-4)


def test_fit_of_each_is_that_of_each_alone():
    traj = rolled()
    each = fit_trajectory(traj, PROMPT, each=True, prior=0.5)
    assert each.model.logits.shape == (6, 3, 3)
    for r, tokens in enumerate(np.asarray(traj.tokens)):
        counts, last, y = prefixes(tokens, PROMPT, 3)
        best = oracle.maximum(counts, last, y, prior=0.5)
        np.testing.assert_allclose(each.model.logits[r], best, atol=2e-4)
    bare = fit_trajectory(traj, PROMPT, each=True, max_iterations=30)
    for r, tokens in enumerate(np.asarray(traj.tokens)):
        finite = oracle.finite_maximum(*prefixes(tokens, PROMPT, 3)).all(1)
        np.testing.assert_array_equal(~np.asarray(bare.separated[r]), finite)


def test_fit_refuses_what_it_would_get_wrong():
    traj, key = rolled(), jax.random.key(0)
    counts = am.rollout(MODEL, key, PROMPT, 5, record="counts")
    with pytest.raises(ValueError, match="recorded counts; pass record='tokens'"):
        fit_trajectory(counts, PROMPT)
    with pytest.raises(
        ValueError, match=r"trajectory: expected what am\.rollout returns, got list"
    ):
        fit_trajectory([0, 1], PROMPT)  # type: ignore[arg-type]
    for context in (am.WindowContext(3), am.FullContext(exponent=2.0)):
        with pytest.raises(ValueError, match="context: only trajectories of the full context"):
            fit_trajectory(traj, PROMPT, context=context)
    for decoder in (am.Greedy(), am.Sampling(temperature=0.5)):
        with pytest.raises(ValueError, match=r"decoder: .* draws from another law"):
            fit_trajectory(traj, PROMPT, decoder=decoder)
    with pytest.raises(ValueError, match="which does not stand in its prompt"):
        fit_trajectory(traj, [0, 0])
    plain = fit_trajectory(traj, PROMPT, context=am.FullContext(), decoder=am.Sampling())
    assert plain.status.name == "converged"


# --- information over time


def loop_information(logits, tokens, prompt, steps):
    """Summed information (len(steps), K, K, K) and visits, in float64."""
    size = len(logits)
    counts, last, _ = prefixes(tokens, prompt, size)
    out = [oracle.hessian(logits, counts[:t], last[:t]) for t in steps]
    return np.array(out), np.array([np.bincount(last[:t], minlength=size) for t in steps])


def test_information_growth_against_the_loops():
    steps, logits = [0, 1, 7, 256, 300, 700], np.asarray(MODEL.logits, float)
    prompts = [[0, 1, 2], [2, 0, 1]]
    traj = am.rollout(MODEL, oracle.key_of("growth"), prompts, 730, 2)
    growth = information_growth(MODEL, traj, prompts, steps)
    assert growth.gain.shape == (2, 6, 3, 3, 3)
    for r in range(2):
        expected, visits = loop_information(logits, np.asarray(traj.tokens[r]), prompts[r], steps)
        np.testing.assert_allclose(growth.information[r], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.cumsum(growth.visits[r], axis=0), visits)
    whole = information_growth(MODEL, traj, prompts)
    exact = loop_information(logits, np.asarray(traj.tokens[0]), prompts[0], [730])[0]
    np.testing.assert_allclose(whole.information[0], exact, rtol=1e-5, atol=1e-5)
    assert "2 trajectories of 3 tokens at 6 times up to step 700" in repr(growth)


def test_information_growth_of_chunks_is_that_of_the_whole():
    key, steps = oracle.key_of("chunks"), [1, 99, 100, 101, 450]
    traj = am.rollout(MODEL, key, PROMPT, 500, 2, engine="scan")
    chunks = am.rollout_chunks(MODEL, key, PROMPT, 500, 2, engine="scan", chunk=100)
    whole = information_growth(MODEL, traj, PROMPT, steps)
    parts = information_growth(MODEL, chunks, PROMPT, steps)
    np.testing.assert_allclose(parts.gain, whole.gain, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(parts.visits, whole.visits)


def test_information_growth_in_float64():
    with jax.enable_x64(True):
        model = am.CCMC.from_transition_matrix(P)
        traj = am.rollout(model, jax.random.key(3), PROMPT, 60, 1)
        growth = information_growth(model, traj, PROMPT, [20, 60])
        assert growth.gain.dtype == np.float64
        expected, _ = loop_information(
            np.asarray(model.logits), np.asarray(traj.tokens[0]), PROMPT, [20, 60]
        )
        np.testing.assert_allclose(growth.information[0], expected, atol=1e-12)


def test_bad_records():
    traj = rolled()
    chunks = am.rollout_chunks(MODEL, jax.random.key(0), PROMPT, 10, chunk=5)
    for source, at, message in (
        (traj, [3, 41], "at: 41 is beyond the 40 steps of the trajectory"),
        (traj, [3, 3], r"at: must increase from 0 or above, got \[3, 3\]"),
        (traj, [-1], r"at: must increase from 0 or above, got \[-1\]"),
        (traj, [], "at: is empty"),
        (traj, [0], "at: no step is asked for"),
        (chunks, None, "at: must be given with chunks"),
        (3, [1], "trajectory: expected what am.rollout returns, got int"),
        ([3], [1], "trajectory: expected what am.rollout returns, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            information_growth(MODEL, source, PROMPT, at)  # type: ignore[arg-type]


def growth_of(gain, at):
    gain = np.asarray(gain, float)
    return InformationGrowth(np.asarray(at), gain, np.zeros(gain.shape[:3]))


def test_effective_information_against_pseudo_inverses():
    rng = oracle.generator("effective")
    weight = rng.gamma(0.5, size=(2, 3, 4, 4, 4)) * 10.0 ** rng.integers(-3, 3, (2, 3, 4, 4, 4))
    weight = (weight + weight.swapaxes(-1, -2)) * (1 - np.eye(4))
    growth = growth_of(weight, [1, 2, 3])
    for winner in (0, 2):
        got = np.asarray(growth.effective(winner))
        inverse = np.linalg.pinv(growth.information, hermitian=True, rcond=1e-12)
        for j in set(range(4)) - {winner}:
            e = np.eye(4)[winner] - np.eye(4)[j]
            np.testing.assert_allclose(got[..., j], 1 / (e @ inverse @ e), rtol=1e-4)
        assert np.isposinf(got[..., winner]).all()


def test_effective_information_between_parts_is_zero():
    weight = np.zeros((1, 1, 4, 4, 4))
    weight[..., [0, 3], [3, 0]] = 0.3
    weight[..., [1, 2], [2, 1]] = 0.7
    got = np.asarray(growth_of(weight, [1]).effective(3))[0, 0, 0]
    np.testing.assert_allclose(got, [0.3, 0, 0, np.inf], rtol=1e-6)
    empty = growth_of(np.zeros((1, 1, 2, 2, 2)), [1]).effective(0)
    np.testing.assert_array_equal(empty[0, 0], [[np.inf, 0], [np.inf, 0]])
    with pytest.raises(ValueError, match=r"winner: 4 is outside 0..3"):
        growth_of(weight, [1]).effective(4)


@pytest.mark.parametrize("exponent", [-0.6, 0.0, 0.7])
def test_exponents_of_power_laws(exponent):
    at = am.log_spaced(10**6, 43)  # cuts near, not at, the decades
    edges = np.append(0.9, at).astype(float)
    power = np.log(edges) if exponent == 0 else edges**exponent / exponent
    gain = np.zeros((1, len(at), 2, 2, 2))
    gain[0, :, 0, 0, 1] = gain[0, :, 0, 1, 0] = np.diff(power)
    growth = growth_of(gain, at)
    for decades in (2.0, 3.0):
        measured = growth.exponents(0, decades)
        assert measured[0, 0, 1] == pytest.approx(exponent, abs=2e-3)
        assert np.isnan(measured[0, 1, 1])  # nothing gained
        assert np.isnan(measured[0, 0, 0])  # no contrast
    gain[0, -5:] = 0
    start, middle = growth.halves(2.0)
    assert at[start] == pytest.approx(1e4, rel=0.2)
    assert at[middle] == pytest.approx(1e5, rel=0.2)
    gain[0, middle + 1 :] = 0
    assert growth.exponents(0)[0, 0, 1] == -np.inf
    with pytest.raises(ValueError, match="decades: the records 1 to 1e"):
        growth.exponents(0, 8.0)
    with pytest.raises(ValueError, match="decades: the records 10 to 1000 can't be cut"):
        growth_of(np.zeros((1, 2, 2, 2, 2)), [10, 1000]).exponents(0)


# --- whole runs at once


def test_sums_over_runs():
    rng = oracle.generator("runs")
    cases = [(1, 1.0, 0.5, 0), (1, 0.0, 2.0, 1), (5, 0.3, 0.0, 4)]
    for _ in range(200):
        length = int(10 ** rng.uniform(0, 5))
        magnitudes = 10 ** rng.uniform([0, -4, -3], [7, 0, 6])
        cases.append((int(magnitudes[0]), *magnitudes[1:], length))
    n, own, others, length = (np.array(c, np.float32) for c in zip(*cases, strict=True))
    got = information_rollout._sum_run(*(jnp.asarray(x) for x in (n, own, others, length)))
    for i, (n_i, p, c, steps) in enumerate(zip(n, own, others, length, strict=True)):
        weight = (float(n_i) + np.arange(int(steps))) * float(p)
        q = weight / np.maximum(weight + float(c), 1e-300)
        rest = float(c) / np.maximum(weight + float(c), 1e-300)
        np.testing.assert_allclose(float(got[0][i]), (q * rest).sum(), rtol=5e-6)
        np.testing.assert_allclose(float(got[1][i]), (rest * rest).sum(), rtol=5e-6)


def test_information_of_runs_is_that_of_their_steps():
    """With a record at every step the path is known; a coarse record sums the same path."""
    sticky = am.CCMC.from_transition_matrix([[0.9, 0.05, 0.05], [0.2, 0.75, 0.05], [0.5, 0.3, 0.2]])
    key, steps = oracle.key_of("path"), 400
    fine, counts = rollout_information(sticky, key, PROMPT, np.arange(1, steps + 1), 4)
    start = np.bincount(PROMPT, minlength=3)
    tokens = np.diff(counts, axis=1, prepend=np.tile(start, (4, 1, 1))).argmax(-1)
    coarse, again = rollout_information(sticky, key, PROMPT, [0, 150, steps], 4)
    np.testing.assert_array_equal(
        again, np.stack([np.tile(start, (4, 1)), *counts[:, [149, -1]].swapaxes(0, 1)], 1)
    )
    longest = 0
    for r in range(4):
        expected, visits = loop_information(
            np.asarray(sticky.logits, float), tokens[r], PROMPT, [150, steps]
        )
        np.testing.assert_allclose(coarse.information[r, 1:], expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(fine.information[r, [149, -1]], expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(np.cumsum(coarse.visits[r], 0)[1:], visits)
        changes = np.flatnonzero(np.diff(tokens[r], prepend=-1, append=-1))
        longest = max(longest, np.diff(changes).max())
    assert longest > 20  # Euler's formula was used
    assert (np.asarray(coarse.gain[:, 0]) == 0).all()


def test_law_of_the_runs():
    """Chi-square test of all trajectories of four tokens against enumeration."""
    number, steps = 4096, 4
    _, counts = rollout_information(
        MODEL, oracle.key_of("law"), PROMPT, np.arange(1, steps + 1), number
    )
    start = np.bincount(PROMPT, minlength=3)
    tokens = np.diff(counts, axis=1, prepend=np.tile(start, (number, 1, 1))).argmax(-1)
    law = oracles.trajectory_law(P, PROMPT, steps)
    assert sum(law.values()) == pytest.approx(1)
    seen: dict[tuple[int, ...], int] = {tuple(path): 0 for path in law}
    for path in tokens:
        seen[tuple(int(t) for t in path)] += 1
    expected = number * np.array(list(law.values()))
    statistic = ((np.array(list(seen.values())) - expected) ** 2 / expected).sum()
    assert expected.min() > 4
    assert stats.chi2.sf(statistic, len(law) - 1) > oracles.FAILURE_RATE


def test_long_runs_and_batches():
    at = [10**6, 10**10]
    key = oracle.key_of("long")
    collapsing = am.CCMC.from_transition_matrix(
        [[0.7, 0.14, 0.16], [0.5, 0.2, 0.3], [0.5, 0.3, 0.2]]
    )
    growth, counts = rollout_information(collapsing, key, PROMPT, at, 3)
    np.testing.assert_array_equal(counts.sum(-1), np.tile(np.array(at) + 4, (3, 1)))
    assert np.isfinite(growth.gain).all()
    np.testing.assert_allclose(growth.visits.sum((1, 2)), 1e10, rtol=1e-5)
    part, split = rollout_information(collapsing, key, PROMPT, at, 2, first_replicate=1)
    np.testing.assert_array_equal(split, counts[1:])
    np.testing.assert_allclose(part.gain, growth.gain[1:], rtol=1e-5)
    own, other = rollout_information(collapsing, key, [PROMPT, [0, 0], PROMPT], at, 3)
    np.testing.assert_array_equal(other[[0, 2]], counts[[0, 2]])
    assert (np.asarray(own.gain[1]) == 0).all()  # one token alone says nothing


def test_runs_work_under_x64():
    with jax.enable_x64(True):
        model = am.CCMC.from_transition_matrix(P)
        growth, counts = rollout_information(model, jax.random.key(1), PROMPT, [50], 2)
        assert counts.sum(-1).tolist() == [[54], [54]]
        assert np.isfinite(growth.gain).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": 3}, "key: expected a typed key"),
        ({"at": [2**62]}, "at: the history must stay below 2\\*\\*62 tokens"),
        ({"at": []}, "at: is empty"),
        ({"num_trajectories": 0}, "num_trajectories: must be at least 1, got 0"),
        ({"first_replicate": -1}, "first_replicate: must be at least 0, got -1"),
        ({"prompt": [[0, 1], [0, 2]], "num_trajectories": 3}, "prompt: 2 prompts for 3 traj"),
        ({"prompt": am.Prompts.from_tokens([[0, 1]], 2)}, "prompt: over 2 tokens, but the model"),
        (
            {"model": am.CCMC.from_logits([[0, -70, 0], [0, 0, 0], [0, 0, 0]])},
            "model: entries of a row of P must differ by less than exp\\(60\\), got logits 70",
        ),
        (
            {"model": am.CCMC.from_transition_matrix([[1.0, 0.0], [0.5, 0.5]]), "prompt": [0, 1]},
            "model: entries of a row of P must differ .* inf apart",
        ),
    ],
)
def test_bad_rollouts(change, message):
    arguments = {"model": MODEL, "key": jax.random.key(0), "prompt": PROMPT, "at": [10]}
    with pytest.raises(ValueError, match=message):
        rollout_information(**{**arguments, **change})


# --- what can be learned


def test_learnable_contrasts_against_the_rule():
    p = np.array([[0.5, 0.4, 0.1, 0.3], [0.3, 0.5, 0.1, 0.2], [0.1, 0.2, 0.6, 0.1], [0.4] * 4])
    p /= p.sum(1, keepdims=True)
    found = learnable_contrasts(am.CCMC.from_transition_matrix(p), 1)
    growth = p[1] / p[1, 1]  # 0.6, 1, 0.2, 0.4: tokens 0 and 3 together at the boundary
    np.testing.assert_allclose(found.growth, growth, rtol=1e-5)
    for a in range(4):
        assert np.isnan(found.exponents[a, 1])
        assert found.learnable[a, 1]
        for j in (0, 2, 3):
            total = growth[a] + growth[j] - 1
            assert float(found.exponents[a, j]) == pytest.approx(total, abs=1e-5)
            assert bool(found.learnable[a, j]) == (total > -1e-9), (a, j)
            rate = -max(total, 0) / 2
            assert float(found.error_exponents[a, j]) == pytest.approx(rate, abs=1e-5)
    assert bool(found.learnable[0, 3])
    assert bool(found.learnable[3, 0])
    assert found.rows.tolist() == [False, True, False, False]
    text = repr(found).splitlines()
    assert text[0].startswith("LearnableContrasts(6 of 12 contrasts with winner 1 learnable (*)")
    assert text[1].split() == ["row", "growth", "1", ":", "0", "1", ":", "2", "1", ":", "3"]
    assert text[2].split() == ["0", "0.60", "0.20*", "-0.20", "0.00*"]


def test_learnable_contrasts_traced_and_in_float64():
    traced = jax.jit(lambda m: learnable_contrasts(m, 0))(MODEL)
    np.testing.assert_allclose(traced.exponents, learnable_contrasts(MODEL, 0).exponents, atol=1e-6)
    with jax.enable_x64(True):
        p = [[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]
        found = learnable_contrasts(am.CCMC.from_transition_matrix(p), 0)
        np.testing.assert_allclose(found.growth, [1, 0.6, 0.4], rtol=1e-12)
        assert found.rows.tolist() == [True, True, False]  # 0.6 + 0.4 rounds below 1 or not
    alone = learnable_contrasts(am.CCMC.from_transition_matrix([[1.0]]), 0)
    assert alone.rows.tolist() == [True]
    assert "0 of 0 contrasts" in repr(alone)


def test_learnable_contrasts_refuses():
    with pytest.raises(ValueError, match=r"winner: 3 is outside 0..2"):
        learnable_contrasts(MODEL, 3)
    with pytest.raises(
        ValueError, match=r"winner: token 1 cannot win, because P\[1, 0\] is not below P\[1, 1\]"
    ):
        learnable_contrasts(MODEL, 1)
    masked = am.CCMC.from_transition_matrix([[0.8, 0.2], [1.0, 0.0]])
    with pytest.raises(ValueError, match=r"model: P\[1, 1\] is 0"):
        learnable_contrasts(masked, 0)


# --- equal budgets

BUDGET = {"budget": 64, "num_segments": 4, "num_replicates": 12}


def compare(key="budget", model=MODEL, prompt=PROMPT, **change):
    return learn_with_budget(oracle.key_of(key), model, prompt, **{**BUDGET, **change})


def test_budgets_errors_and_what_is_learned():
    bare, with_prior = compare(), compare(prior=0.5)
    assert bare.schemes == ("one", "restarts", "refreshing")
    np.testing.assert_array_equal(bare.learned, with_prior.learned)
    learned = np.asarray(bare.learned)
    assert 0.1 < learned.mean() < 0.9  # both kinds are met
    error = ((np.asarray(bare.fits.model.logits) - np.asarray(MODEL.logits)) ** 2).sum(-1)
    np.testing.assert_allclose(np.asarray(bare.squared_error)[learned], error[learned], rtol=1e-5)
    assert np.isposinf(np.asarray(bare.squared_error)[~learned]).all()
    whole = learned.all(-1)
    assert np.isposinf(np.asarray(bare.excess_risk)[~whole]).all()
    assert np.isfinite(np.asarray(bare.excess_risk)[whole]).all()
    assert np.isfinite(with_prior.squared_error).all()
    assert np.isfinite(with_prior.excess_risk).all()
    np.testing.assert_allclose(bare.share_learned, learned.mean(1), rtol=1e-6)
    text = repr(with_prior)
    assert text.startswith("BudgetComparison(12 replicates")
    assert "refreshing" in text


def test_budgets_learn_from_the_tokens_they_say():
    """The one trajectory and the restarts again, by rollouts and SciPy."""
    found, key = compare(prior=0.5), oracle.key_of("budget")
    one = am.rollout(MODEL, jax.random.fold_in(key, 0), PROMPT, 64, 12)
    again = am.rollout(MODEL, jax.random.fold_in(key, 1), PROMPT, 16, 48)
    for r in (0, 7):
        sources = np.asarray(one.tokens[r])[None], np.asarray(again.tokens[4 * r : 4 * r + 4])
        for scheme, tokens in enumerate(sources):
            counts, last, y = pooled(tokens, [PROMPT] * len(tokens), 3)
            best = oracle.maximum(counts, last, y, prior=0.5)
            np.testing.assert_allclose(found.fits.model.logits[scheme, r], best, atol=3e-4)
            finite = oracle.finite_maximum(counts, last, y)
            joined = (oracle.components(counts, last) == 0).all(1)
            np.testing.assert_array_equal(found.learned[scheme, r], finite.all(1) & joined)


def test_budgets_do_not_depend_on_the_batch():
    whole = compare(prior=0.5)
    part = compare(prior=0.5, num_replicates=5, first_replicate=7)
    for name in ("squared_error", "excess_risk", "learned"):
        got, want = getattr(part, name), np.asarray(getattr(whole, name))[:, 7:]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_fresh_prompts_come_from_the_pool():
    only = am.Prompts.from_tokens([[0, 0, 1]], 3)  # token 2 never stands in it
    found = compare(fresh=only, prior=0.5)
    parts = np.asarray(found.fits.components)
    assert (parts[2, :, :, 2] == 2).all()
    assert not np.asarray(found.learned[2]).any()
    pool = am.Prompts.from_tokens([[0, 1], [0, 2]], 3)
    parts = np.asarray(compare(fresh=pool, prior=0.5).fits.components)
    assert (parts[2, :, 0] == 0).all(-1).mean() > 0.5  # row 0 saw both: 7 in 8 have drawn both
    assert (parts[0] == 0).all()


def test_fresh_prompts_are_uniform():
    """Chi-square tests of the tokens of default prompts, and of the picks from a pool."""
    from attnmarkov.estimate.budget import _fresh

    pool = am.Prompts.from_counts(np.eye(5, dtype=int), np.arange(5))
    drawn = _fresh(oracle.key_of("pool"), pool, 0, 5000, 1, 5)
    tally = np.asarray(drawn.counts).sum(0)
    assert stats.chisquare(tally).pvalue > oracles.FAILURE_RATE
    drawn = _fresh(oracle.key_of("uniform"), None, 0, 1000, 5, 3)
    assert (np.asarray(drawn.counts).sum(1) == 5).all()
    tally = np.asarray(drawn.counts).sum(0)
    assert stats.chisquare(tally).pvalue > oracles.FAILURE_RATE
    later = _fresh(oracle.key_of("uniform"), None, 10, 5, 5, 3)
    np.testing.assert_array_equal(later.counts, drawn.counts[10:15])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 65}, "budget: 65 tokens can't be cut into 4 equal segments"),
        ({"budget": 0}, "budget: must be at least 1, got 0"),
        ({"num_segments": 0}, "num_segments: must be at least 1, got 0"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1, got 0"),
        ({"first_replicate": -1}, "first_replicate: must be at least 0, got -1"),
        ({"prompt": [[0, 1], [0, 2]]}, "prompt: expected a single prompt, got 2"),
        ({"prompt": am.Prompts.from_tokens([[0, 1]], 2)}, "prompt: over 2 tokens, but the model"),
        ({"fresh": am.Prompts.from_tokens([[0, 1]], 2)}, "fresh: over 2 tokens, but the model"),
        ({"test": am.Prompts.from_tokens([[0, 1]], 2)}, "test: over 2 tokens, but the model"),
        ({"prior": -1.0}, "prior: must be a finite precision of at least 0, got -1"),
    ],
)
def test_bad_budgets(change, message):
    with pytest.raises(ValueError, match=message):
        compare(**change)


def test_a_batch_of_budgets_prints_when_traced():
    shapes = jax.eval_shape(lambda: BudgetComparison(None, *[jnp.zeros((3, 2, 2))] * 3))  # type: ignore[arg-type]
    assert "BudgetComparison(squared_error=" in repr(shapes)
