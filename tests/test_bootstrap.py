"""The parametric bootstrap: its replicates, its intervals, and their coverage."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate import Status
from attnmarkov.estimate.bootstrap import BootstrapFits, bootstrap, bootstrap_trajectory
from attnmarkov.estimate.intervals import intervals

module = importlib.import_module("attnmarkov.estimate.bootstrap")  # not the function

CONTRASTS = np.array([(k, a, 0) for k in range(4) for a in (1, 2, 3)])


def test_replicates_are_refits_of_redrawn_labels(key):
    _, prompts, y = oracle.well_posed("replicates", 4, 8, 200)
    fit = am.fit(prompts, y)
    fits = bootstrap(fit, prompts, key, 5)
    np.testing.assert_array_equal(fits.contrasts, CONTRASTS)
    assert fits.num_replicates == 5
    for i in range(5):
        drawn = fit.model.sample(jax.random.fold_in(key, i), prompts)
        again = am.fit(prompts, drawn)
        np.testing.assert_allclose(
            fits.logits[i] - fits.logits[i].mean(-1, keepdims=True), again.model.logits, atol=1e-5
        )
        s = np.asarray(again.model.logits)
        own = s[CONTRASTS[:, 0], CONTRASTS[:, 1]] - s[CONTRASTS[:, 0], 0]
        np.testing.assert_allclose(fits.estimates[i], own, atol=2e-5)
        assert fits.status.code[i] == again.status.code
    s = np.asarray(fit.model.logits)
    np.testing.assert_allclose(
        fits.estimate, s[CONTRASTS[:, 0], CONTRASTS[:, 1]] - s[CONTRASTS[:, 0], 0], atol=1e-6
    )


def test_a_replicate_depends_on_its_id_alone(key, monkeypatch):
    _, prompts, y = oracle.well_posed("alone", 4, 8, 200)
    fit = am.fit(prompts, y)
    whole = bootstrap(fit, prompts, key, 7)
    monkeypatch.setattr(module, "_ELEMENTS", 3 * 200 * 4)  # blocks of three
    cut = bootstrap(fit, prompts, key, 8)
    np.testing.assert_allclose(cut.estimates[:7], whole.estimates, atol=1e-6)
    assert cut.estimates.shape == (8, 12)


def test_standard_errors_agree_with_the_information(key):
    """999 replicates know a standard error to about 2 %; n to about 1 %."""
    _, prompts, y = oracle.well_posed("errors", 4, 8, 2000, concentration=10.0)
    fit = am.fit(prompts, y)
    fits = bootstrap(fit, prompts, key, 999)
    wald = intervals(fit, prompts, y)
    ratio = np.asarray(fits.standard_errors / wald.standard_error)
    spread = stats.norm.isf(oracle.SMALL_RATE / 24) / np.sqrt(2 * 999)
    assert (abs(ratio - 1) < spread + 0.02).all()
    assert int(fits.num_infinite.sum()) == int(fits.num_unknown.sum()) == 0
    for kind in ("percentile", "basic"):
        low, high = fits.interval(0.95, kind)
        off = np.abs(np.r_[low - wald.low, high - wald.high] / np.tile(wald.standard_error, 2))
        assert off.max() < 0.6


def made_otherwise(name):
    """Prompts, labels, whole weights, and the prompt of every copy."""
    _, prompts, y = oracle.well_posed(name, 4, 8, 500, concentration=10.0)
    weights = oracle.generator(name).choice([0, 1, 4], 500)
    return prompts, np.asarray(y), weights, np.repeat(np.arange(500), weights)


def test_weights_are_copies_and_the_labels_know_it(key):
    """Spread as the information says: 400 replicates, ratios within 5 of their spreads."""
    prompts, y, weights, copies = made_otherwise("copies")
    fit = am.fit(prompts, y, weights=weights)
    found = bootstrap(fit, prompts, key, 400, contrasts=CONTRASTS, weights=weights)
    copied = bootstrap(fit, prompts[copies], key, 400, contrasts=CONTRASTS)
    np.testing.assert_array_equal(found.estimates, copied.estimates)
    wald = intervals(fit, prompts, y, CONTRASTS, weights=weights)
    ratio = np.asarray(found.standard_errors / wald.standard_error)
    assert (abs(ratio - 1) < 5 / np.sqrt(2 * 400) + 0.03).all()
    with pytest.raises(ValueError, match=r"fit: these prompts.* do not give"):
        bootstrap(fit, prompts, key, 9, contrasts=CONTRASTS)
    half = am.fit(prompts, y, weights=np.full(500, 0.5))
    with pytest.raises(ValueError, match=r"weights: must be whole numbers.* 0.5 at"):
        bootstrap(half, prompts, key, 9, weights=np.full(500, 0.5))


def test_refits_know_the_context_and_the_tied_rows(key):
    prompts, y, _, _ = made_otherwise("otherwise")
    cases: list[dict[str, Any]] = [{"row_groups": [1] * 4}, {"context": am.DecayContext(0.6)}]
    for options in cases:
        fit = am.fit(prompts, y, **options)
        found = bootstrap(fit, prompts, key, 400, contrasts=CONTRASTS, **options)
        wald = intervals(fit, prompts, y, CONTRASTS, **options)
        ratio = np.asarray(found.standard_errors / wald.standard_error)
        assert (abs(ratio - 1) < 5 / np.sqrt(2 * 400) + 0.03).all()
        centre = np.asarray(found.estimates.mean(0) - found.estimate)
        assert (abs(centre) < (5 / 20 + 0.1) * np.asarray(wald.standard_error)).all()
        if "row_groups" in options:
            assert (found.logits == found.logits[:, :1]).all()
        with pytest.raises(ValueError, match=r"fit: these prompts.* do not give"):
            bootstrap(fit, prompts, key, 9, contrasts=CONTRASTS)


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_identified(key, size):
    prompts = am.Prompts.from_tokens([[0, 0]], size)
    found = bootstrap(am.fit(prompts, [0]), prompts, key, 7)
    assert found.estimates.shape == (7, 0)
    assert found.logits.shape == (7, size, size)


def test_trajectories_of_one_prompt_in_a_batch(key):
    fit = three_token_fit()
    batch = am.Prompts.from_tokens([[0, 1, 2]], 3)
    plain = bootstrap_trajectory(fit, [0, 1, 2], 30, key, 3)
    found = bootstrap_trajectory(fit, batch, 30, key, 3)
    np.testing.assert_array_equal(found.estimates, plain.estimates)


def by_hand(estimates, estimate):
    rest = jnp.zeros((len(estimates), 4, 4))
    status = Status(jnp.zeros(len(estimates), jnp.int32))
    shaped = jnp.asarray(estimates, jnp.float32)[:, None]
    return BootstrapFits(
        jnp.array([[0, 1, 0]]), jnp.array([estimate], jnp.float32), shaped, rest, status
    )


def test_ends_are_order_statistics():
    values = oracle.generator("order").permutation(np.arange(1.0, 100.0))  # 1 .. 99
    fits = by_hand(values, 40.0)
    assert [float(x[0]) for x in fits.interval(0.9)] == [5, 95]
    assert [float(x[0]) for x in fits.interval(0.9, "basic")] == [80 - 95, 80 - 5]
    assert [float(x[0]) for x in fits.interval(0.5)] == [25, 75]
    np.testing.assert_allclose(fits.standard_errors, np.std(values, ddof=1), rtol=1e-6)


def test_infinite_replicates_stand_at_their_end_and_unknown_ones_count_against():
    values = np.arange(1.0, 100.0)
    values[values > 92] = np.inf
    fits = by_hand(values, 40.0)
    assert [float(x[0]) for x in fits.interval(0.9)] == [5, np.inf]
    assert [float(x[0]) for x in fits.interval(0.9, "basic")] == [-np.inf, 75]
    assert [float(x[0]) for x in fits.interval(0.8)] == [10, 90]
    assert fits.num_infinite.tolist() == [7]
    np.testing.assert_allclose(fits.standard_errors, np.std(values[:92], ddof=1), rtol=1e-6)
    values[:4] = np.nan
    fits = by_hand(values, 40.0)
    assert fits.num_unknown.tolist() == [4]
    assert [float(x[0]) for x in fits.interval(0.9)] == [5, np.inf]
    values[values == 50] = np.nan
    assert [float(x[0]) for x in by_hand(values, 40.0).interval(0.9)] == [-np.inf, np.inf]
    assert np.isnan(by_hand(np.full(19, np.inf), 1.0).standard_errors).all()


def test_separated_replicates_are_told_by_the_data(key):
    """One token wins a tenth of 20 prompts: in (0.9)^20 of the replicates it never does."""
    counts = np.tile([1, 9, 0, 0], (20, 1))
    y = np.array([0, 0] + [1] * 18)
    prompts = am.Prompts.from_counts(counts, np.zeros(20, int))
    fit = am.fit(prompts, y)
    fits = bootstrap(fit, prompts, key, 999, contrasts=CONTRASTS)
    draws = [fit.model.sample(jax.random.fold_in(key, i), prompts) for i in range(30)]
    never = [bool((d == 1).all()) for d in draws]
    assert 0 < sum(never) < 30
    np.testing.assert_array_equal(np.isposinf(fits.estimates[:30, 0]), never)
    np.testing.assert_array_equal(np.asarray(fits.status.code[:30]) == Status.SEPARATED, never)
    tail = stats.binom.ppf([oracle.SMALL_RATE / 2, 1 - oracle.SMALL_RATE / 2], 999, 0.9**20)
    assert tail[0] <= int(fits.num_infinite[0]) <= tail[1]
    assert fits.num_unknown.tolist() == [0] + [999] * 11
    assert float(fits.interval()[1][0]) == np.inf
    assert np.isnan(fits.estimate[1:]).all()
    assert "infinite in some replicate 1, not compared in some 11" in repr(fits)
    found = intervals(fit, prompts, y, CONTRASTS, method="bootstrap", key=key)
    np.testing.assert_array_equal(found.low[0], fits.interval()[0][0])
    assert np.isnan(found.low[1:]).all()
    assert np.isnan(found.high[1:]).all()


ONE_PER_ROW = np.array([(0, 1, 2), (1, 3, 0), (2, 0, 1), (3, 2, 1)])


@jax.jit
def covers(key, teacher, prompts):
    def one(key):
        y = teacher.sample(key, prompts)
        fit = am.fit(prompts, y)
        result = intervals(
            fit, prompts, y, ONE_PER_ROW, method="bootstrap", key=key, num_replicates=99, level=0.9
        )
        target = teacher.logits[ONE_PER_ROW[:, 0], ONE_PER_ROW[:, 1]]
        target = target - teacher.logits[ONE_PER_ROW[:, 0], ONE_PER_ROW[:, 2]]
        return (result.low <= target) & (target <= result.high)

    return jax.lax.map(one, jax.random.split(key, 300))


def test_coverage_is_nominal():
    """4 rows x 300 datasets of 99 replicates at 90 %; fails once in 1e6 if it is exact."""
    teacher, prompts, _ = oracle.well_posed("coverage", 4, 8, 600, concentration=10.0)
    hits = covers(oracle.key_of("coverage"), teacher, prompts)
    tail = oracle.SMALL_RATE / 2
    low, high = stats.binom.ppf([tail, 1 - tail], hits.size, 0.9) / hits.size
    assert low <= float(hits.mean()) <= high


TRAJECTORY = {"prompt": [0, 1, 2], "num_steps": 60, "num_trajectories": 2}


def three_token_fit():
    model = am.CCMC.from_transition_matrix([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
    prompts = am.prompts.uniform(jax.random.key(0), 300, 8, 3)
    return am.fit(prompts, model.sample(jax.random.key(1), prompts))


@pytest.mark.parametrize("engine", ["scan", "reference"])
def test_trajectory_replicates_are_refits_of_rollouts(key, engine, monkeypatch):
    fit = three_token_fit()
    if engine == "scan":
        monkeypatch.setattr(module, "_ELEMENTS", 2 * 2 * 60 * 3)  # blocks of two
    fits = bootstrap_trajectory(fit, key=key, num_replicates=5, engine=engine, **TRAJECTORY)
    tokens = am.rollout(fit.model, key, [0, 1, 2], 60, 10, engine=engine).tokens
    assert fits.estimates.shape == (5, 6)
    for i in range(5):
        sequences = [[0, 1, 2, *t] for t in np.asarray(tokens[2 * i : 2 * i + 2]).tolist()]
        prefixes = [s[: 3 + t] for s in sequences for t in range(60)]
        labels = [s[3 + t] for s in sequences for t in range(60)]
        again = am.fit(am.Prompts.from_tokens(prefixes, 3), labels)
        assert fits.status.code[i] == again.status.code
        if again.status.name == "converged":
            own = again.model.logits
            np.testing.assert_allclose(
                fits.logits[i] - fits.logits[i].mean(-1, keepdims=True), own, atol=1e-4
            )
    assert set(np.asarray(fits.status.code)) <= {Status.CONVERGED, Status.SEPARATED}


def test_jit_and_vmap(key):
    teacher, prompts, _ = oracle.well_posed("transforms", 4, 8, 200)
    keys = jax.random.split(key, 2)

    @jax.jit
    @jax.vmap
    def batch(key):
        fit = am.fit(prompts, teacher.sample(key, prompts))
        return fit, bootstrap(fit, prompts, key, 9, contrasts=CONTRASTS)

    fits, together = batch(keys)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], fits)
        alone = bootstrap(one, prompts, keys[i], 9)
        np.testing.assert_allclose(together.estimates[i], alone.estimates, atol=1e-4)
        for a, b in zip(together.interval(0.5), alone.interval(0.5), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-4)


def test_bad_input(key):
    _, prompts, y = oracle.well_posed("bad", 4, 8, 200)
    fit = am.fit(prompts, y)
    fits = by_hand(np.arange(19.0), 1.0)
    other = am.Prompts.from_tokens([[0, 1]], 2)
    run = partial(bootstrap_trajectory, fit)
    wrong: Any = bootstrap
    wrong_too: Any = bootstrap_trajectory
    for match, call in {
        "key: expected a typed key": lambda: wrong(fit, prompts, 0),
        "num_replicates: must be at least 1, got 0": lambda: bootstrap(fit, prompts, key, 0),
        "contrasts: entry 0 compares": lambda: bootstrap(
            fit, prompts, key, 9, contrasts=[(0, 1, 1)]
        ),
        "prompts: expected Prompts": lambda: wrong(fit, None, key),
        "fit: has logits of shape": lambda: bootstrap(fit, other, key),
        "level: 0.95 needs at least 39 replicates, there are 19": lambda: fits.interval(),
        "level: must lie in": lambda: fits.interval(1.0),
        "kind: unknown kind 'bca'": lambda: fits.interval(0.5, "bca"),
        "num_steps: must be at least 1, got 0": lambda: run([0, 1], 0, key),
        "num_trajectories: must be at least 1": lambda: run([0], 9, key, 9, num_trajectories=0),
        "fit: expected a Fit.* got CCMC": lambda: wrong(fit.model, prompts, key),
        "fit: expected a Fit, .* got CCMC": lambda: wrong_too(
            fit.model,
            [0],
            9,
            key,  # pyright: ignore[reportArgumentType]
        ),
        "prompt: over 2 tokens, but the fit has 4": lambda: run(other, 9, key),
        "prompt: expected the one prompt": lambda: run(prompts, 9, key),
        "token id 7, outside": lambda: run([0, 7], 9, key),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert [float(x[0]) for x in fits.interval(0.9)] == [0, 18]
