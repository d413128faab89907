"""The likelihood-ratio test against float64, its size, its power, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate.likelihood_ratio import LikelihoodRatioTest, likelihood_ratio_test

REPLICATES = 1000


def urn_fit(prompts, y):
    """The maximum likelihood among models whose rows are all equal."""
    return am.fit(prompts, y, row_groups=np.zeros(4, int))


def test_statistic_and_p_value_against_float64():
    _, prompts, y = oracle.well_posed("statistic", 4, 8, 300)
    null, full = urn_fit(prompts, y), am.fit(prompts, y)
    result = likelihood_ratio_test(null, full, prompts, y)
    data = tuple(np.asarray(x) for x in (prompts.counts, prompts.last, y))
    exact = 2 * (
        oracle.negative_log_likelihood(np.asarray(null.model.logits, float), *data)
        - oracle.negative_log_likelihood(np.asarray(full.model.logits, float), *data)
    )
    np.testing.assert_allclose(result.statistic, exact, rtol=1e-9)
    assert result.df == 12 - 3
    np.testing.assert_allclose(result.p_value, stats.chi2.sf(exact, 9), rtol=1e-6)
    assert repr(result) == (
        f"LikelihoodRatioTest(twice the log-likelihood ratio is {exact:.4g} on 9 degrees of "
        f"freedom: p = {result.p_value:.3g})"
    )


def test_a_given_model_has_no_parameters_and_df_can_be_given():
    teacher, prompts, y = oracle.well_posed("given", 4, 8, 300)
    full = am.fit(prompts, y)
    assert likelihood_ratio_test(teacher, full, prompts, y).df == 12
    result = likelihood_ratio_test(teacher, full, prompts, y, df=3)
    assert result.df == 3
    np.testing.assert_allclose(result.p_value, stats.chi2.sf(result.statistic, 3), rtol=1e-6)
    same = likelihood_ratio_test(full, full, prompts, y, df=1)
    assert (same.statistic, same.p_value) == (0.0, 1.0)


def test_parameters_that_the_data_do_not_identify_do_not_count():
    rng = oracle.generator("split")
    counts = np.kron(np.eye(2, dtype=int), np.ones((1, 2), int)).repeat(40, 0)
    last = np.repeat([0, 2], 40)
    y = last + rng.integers(0, 2, 80)
    prompts = am.Prompts.from_counts(counts, last)
    full = am.fit(prompts, y)
    assert full.status.name == "not_identified"
    zero = am.CCMC.from_logits(np.zeros((4, 4)))
    result = likelihood_ratio_test(zero, full, prompts, y)
    assert result.df == 2
    ones = np.array([(y[last == k] == k).mean() for k in (0, 2)])
    entropy = -(ones * np.log(ones) + (1 - ones) * np.log(1 - ones)).sum()
    np.testing.assert_allclose(result.statistic, 80 * (2 * np.log(2) - entropy), atol=1e-5)


def made_otherwise(name):
    """Prompts, labels, whole weights, and the prompt of every copy."""
    _, prompts, y = oracle.well_posed(name, 4, 8, 300, concentration=10.0)
    weights = oracle.generator(name).integers(0, 4, 300)
    return prompts, np.asarray(y), weights, np.repeat(np.arange(300), weights)


def test_under_a_context_against_float64():
    """Tokens are weighed by 0.6 to the power of their age."""
    prompts, y, _, _ = made_otherwise("context")
    context = am.DecayContext(0.6)
    null = am.fit(prompts, y, context=context, row_groups=np.zeros(4, int))
    full = am.fit(prompts, y, context=context)
    tokens = np.asarray(prompts.tokens)
    ages = 0.6 ** np.arange(tokens.shape[1])[::-1]
    counts = np.array([np.bincount(t, ages, 4) for t in tokens])
    data = counts, tokens[:, -1], y
    few, many = (
        oracle.negative_log_likelihood(np.asarray(x.model.logits, float), *data)
        for x in (null, full)
    )
    found = likelihood_ratio_test(null, full, prompts, y, context=context)
    np.testing.assert_allclose(found.statistic, 2 * (few - many), rtol=1e-5)
    np.testing.assert_allclose(2 * 300 * (null.nll - full.nll), found.statistic, rtol=1e-3)
    with pytest.raises(ValueError, match=r"null: its nll is .*context give"):
        likelihood_ratio_test(null, full, prompts, y)


def test_weights_count_as_copies():
    prompts, y, weights, copies = made_otherwise("copies")
    null, full = (am.fit(prompts, y, weights=weights, row_groups=g) for g in ([0] * 4, None))
    copied = likelihood_ratio_test(
        urn_fit(prompts[copies], y[copies]),
        am.fit(prompts[copies], y[copies]),
        prompts[copies],
        y[copies],
    )
    spoilt = np.where(weights > 0, y, -1)
    found = likelihood_ratio_test(null, full, prompts, spoilt, weights=weights)
    np.testing.assert_allclose(found.statistic, copied.statistic, rtol=1e-5)
    assert found.df == copied.df
    with pytest.raises(ValueError, match=r"null: its nll is .*weights"):
        likelihood_ratio_test(null, full, prompts, y)
    with pytest.raises(ValueError, match="full: its nll is"):
        likelihood_ratio_test(am.CCMC.from_logits(np.zeros((4, 4))), full, prompts, y, df=1)


def test_a_prior_is_refused():
    prompts, y, _, _ = made_otherwise("prior")
    with pytest.raises(ValueError, match="full: was made with a prior"):
        likelihood_ratio_test(urn_fit(prompts, y), am.fit(prompts, y, prior=1.0), prompts, y)


def test_a_small_gain_survives_many_prompts():
    """Half a nat out of 3e5: float32 sums would lose it."""
    teacher, prompts, y = oracle.well_posed("many", 4, 8, 200_000)
    result = likelihood_ratio_test(teacher, am.fit(prompts, y), prompts, y)
    with jax.enable_x64(True):
        same = am.Prompts.from_counts(np.asarray(prompts.counts), np.asarray(prompts.last))
        teacher = am.CCMC(jnp.asarray(np.asarray(teacher.logits), jnp.float64))
        exact = likelihood_ratio_test(teacher, am.fit(same, np.asarray(y)), same, np.asarray(y))
    np.testing.assert_allclose(result.statistic, exact.statistic, atol=2e-4)


@partial(jax.jit, static_argnames="size")
def both_fits(key, model, prompts, size):
    def one(key):
        y = model.sample(key, prompts)
        return urn_fit(prompts, y), am.fit(prompts, y), y

    return jax.vmap(one)(jax.random.split(key, size))


def p_values(key, model, prompts):
    fits = jax.tree.map(np.asarray, both_fits(key, model, prompts, REPLICATES))
    found = []
    for i in range(REPLICATES):
        null, full, y = jax.tree.map(lambda x, i=i: x[i], fits)
        found.append(likelihood_ratio_test(null, full, prompts, y).p_value)
    return np.array(found)


def test_size_and_power():
    """Uniform p-values where all rows are equal (fails once in 1e6), small ones elsewhere."""
    teacher, prompts, _ = oracle.well_posed("size", 4, 8, 1000, concentration=10.0)
    urn = am.CCMC(jnp.broadcast_to(teacher.logits[0], (4, 4)))
    under_null = p_values(oracle.key_of("null"), urn, prompts)
    assert stats.kstest(under_null, "uniform").pvalue > oracle.SMALL_RATE
    tail = oracle.SMALL_RATE / 2
    low, high = stats.binom.ppf([tail, 1 - tail], REPLICATES, 0.05)
    assert low <= (under_null <= 0.05).sum() <= high
    assert (p_values(oracle.key_of("other"), teacher, prompts) < 0.05).mean() > 0.9


def test_bad_input():
    teacher, prompts, y = oracle.well_posed("bad", 4, 8, 300)
    full, null = am.fit(prompts, y), urn_fit(prompts, y)
    whole: Any = likelihood_ratio_test
    run: Any = partial(whole, prompts=prompts, y=y)
    small = am.CCMC.from_logits(np.zeros((2, 2)))
    masked = am.CCMC.from_logits(np.array([[0, 0, 0, -np.inf]] * 4))
    pair = am.Prompts.from_tokens([[0, 1]] * 9, 2)
    separated = am.fit(pair, [1] * 9)
    for match, call in {
        "null: expected a Fit or a CCMC, got str": lambda: run("urn", full),
        "full: has logits of shape": lambda: run(null, small),
        "full: has 3 parameters, null has 12": lambda: run(full, null),
        "null: has the greater likelihood, by": lambda: run(full, null, df=1),
        "full: has 0 parameters": lambda: run(teacher, teacher),
        "df: must be at least 1, got 0": lambda: run(null, full, df=0),
        "df: expected an integer, got 1.5": lambda: run(null, full, df=1.5),
        "full: gives a label probability zero": lambda: run(null, masked, df=1),
        "null: is iteration limit": lambda: run(am.fit(prompts, y, max_iterations=1), full),
        "full: is separated": lambda: likelihood_ratio_test(small, separated, pair, [1] * 9),
        "y: expected shape": lambda: likelihood_ratio_test(null, full, prompts, y[:3]),
        "prompts: expected Prompts": lambda: whole(null, full, None, y),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(ValueError, match="needs concrete inputs"):
        jax.jit(lambda y: likelihood_ratio_test(null, full, prompts, y).p_value)(y)
    impossible = likelihood_ratio_test(masked, full, prompts, y)
    assert (impossible.statistic, impossible.p_value) == (np.inf, 0.0)
    assert isinstance(impossible, LikelihoodRatioTest)
