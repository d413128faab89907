"""Rare winners and labels all but certain: what float32 leaves of the optimum and the loss."""

from __future__ import annotations

import estimate_oracles as oracle
import jax
import numpy as np
import pytest

import attnmarkov as am


def rare(n, wins, alike):
    """Prompts that end in token 0; tokens 0 and 1 share the wins but for a few of token 2."""
    rng = oracle.generator(f"rare {n} {wins} {alike}")
    counts = np.ones((n, 3), int) if alike else rng.integers(1, 4, (n, 3))
    y = np.arange(n) % 2
    y[rng.choice(n, wins, replace=False)] = 2
    return am.Prompts.from_counts(counts, np.zeros(n, int)), y


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "mixed"])
@pytest.mark.parametrize("wins", [1, 3, 30])
@pytest.mark.parametrize("n", [1000, 100_000, 400_000])
def test_newton_ends_at_the_optimum_in_float32(n, wins, alike):
    prompts, y = rare(n, wins, alike)
    found = am.fit(prompts, y)
    with jax.enable_x64(True):
        exact = am.fit(prompts, y)
        logits, errors = np.asarray(exact.model.logits[0]), np.asarray(exact.standard_errors[0])
    assert found.status.name == exact.status.name == "not_identified"  # rows 1 and 2 are empty
    assert found.iterations < 30
    assert abs((np.asarray(found.model.logits[0]) - logits) / errors).max() < 1e-3
    if alike:  # then the shares of the labels are the law
        shares = np.bincount(y, minlength=3) / n
        np.testing.assert_allclose(logits, np.log(shares) - np.log(shares).mean(), atol=1e-6)


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "adam"])
@pytest.mark.parametrize(
    ("size", "n", "concentration", "law"),
    [(8, 40_000, 1.5, None), (4, 5000, 4.0, "zipf"), (24, 24_000, 3.0, None)],
    ids=["Dirichlet(1.5)", "Zipf", "K24"],
)
def test_solvers_agree_to_1e_5(solver, size, n, concentration, law):
    teacher_key, key, label = jax.random.split(oracle.key_of(f"agree {size} {law}"), 3)
    p = am.random_transition_matrix(teacher_key, size, concentration=concentration)
    law = np.full(size, 1 / size) if law is None else am.zipf_law(size)
    prompts = am.prompts.iid(key, n, 12, law)
    y = am.CCMC.from_transition_matrix(p).sample(label, prompts)
    found = am.fit(prompts, y, solver)
    with jax.enable_x64(True):
        exact = am.fit(prompts, y)
    assert found.status.name == exact.status.name == "converged"
    # 1e-5, and a ten-thousandth of a standard error where a token is so rare that float32
    # can't do better
    within = 1e-5 + 1e-4 * np.asarray(exact.standard_errors)
    assert (abs(np.asarray(found.model.logits) - np.asarray(exact.model.logits)) < within).all()


@pytest.mark.parametrize("size", [200, 20_000])
def test_the_loss_of_labels_all_but_certain(size):
    counts = np.tile([size, 1], (500, 1))
    prompts, y = am.Prompts.from_counts(counts, np.zeros(500, int)), np.zeros(500, int)
    y[0] = 1
    exact = oracle.maximum(counts, np.zeros(500, int), y)
    expected = oracle.negative_log_likelihood(exact, counts, np.zeros(500, int), y) / 500
    found = am.fit(prompts, y)
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    certain = am.fit(prompts, np.zeros(500, int), max_iterations=100)  # separated
    assert 0 <= certain.nll < 1e-6


def test_logits_too_far_apart_for_products():
    """A chain of tokens each of which always beats the next: some prompts hold only the last."""
    counts = np.repeat(np.eye(6, dtype=int)[:-1] + np.eye(6, dtype=int)[1:], 3, axis=0)
    prompts = am.Prompts.from_counts(counts, np.zeros(15, int))
    logits = np.zeros((6, 6))
    logits[0] = -60.0 * np.arange(6)
    fit = am.fit(prompts, np.repeat(np.arange(5), 3))
    assert fit.status.name == "separated"
    assert np.isfinite(fit.nll)
    from attnmarkov.estimate import _blocks, likelihood

    labels = jax.numpy.asarray(np.repeat(np.arange(5), 3))
    blocks = _blocks.blocks_of(prompts.counts, prompts.last, labels)
    probs, normaliser = likelihood.laws(blocks, jax.numpy.asarray(logits))
    filled = np.asarray(blocks.weight) > 0
    assert np.isfinite(np.asarray(normaliser)[filled]).all()
    np.testing.assert_allclose(np.asarray(probs).sum(-1)[filled], 1, rtol=1e-6)
