"""Priors: their derivatives, and what they are worth in prompts."""

from __future__ import annotations

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.estimate import Prior

SIZE = 4
ALPHA = {
    "one": 0.7,
    "by token": np.array([0.2, 1.5, 0.4, 3.0]),
    "by row and token": np.linspace(0.1, 2.0, 16).reshape(4, 4),
}


def data(name, n=30):
    counts, last, y = oracle.random_data(oracle.generator(name), SIZE, n)
    return am.Prompts.from_counts(counts, last), y


def with_pseudo_prompts(prompts, y, alpha):
    """The data and, for every row and token, a prompt of every token once that α copies count."""
    rows, tokens = np.divmod(np.arange(SIZE**2), SIZE)
    counts = np.concatenate([prompts.counts, np.ones((SIZE**2, SIZE), int)])
    last = np.concatenate([prompts.last, rows])
    weights = np.concatenate([np.ones(len(y)), np.broadcast_to(alpha, (SIZE, SIZE)).ravel()])
    return am.Prompts.from_counts(counts, last), np.concatenate([y, tokens]), weights


@pytest.mark.parametrize("alpha", ALPHA.values(), ids=ALPHA)
@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_pseudo_counts_are_prompts_of_every_token_once(alpha, solver):
    prompts, y = data("pseudo-counts")
    more, labels, weights = with_pseudo_prompts(prompts, y, alpha)
    assert not am.estimate.coverage(prompts).connected.all()  # the prior has something to do
    with jax.enable_x64(True):
        result = am.fit(prompts, y, solver, prior=Prior(pseudo_counts=alpha), tolerance=1e-9)
        expected = am.fit(more, labels, weights=weights)
        np.testing.assert_allclose(result.model.logits, expected.model.logits, atol=1e-6)
        np.testing.assert_allclose(
            result.standard_errors, expected.standard_errors, rtol=1e-5, atol=1e-9
        )
        # The prior is no data: nll is of the labels alone.
        log_prob = np.asarray(result.model.log_prob(prompts, y))
        np.testing.assert_allclose(result.nll, -log_prob.mean(), rtol=1e-6)
    assert result.status.name == "converged"


def test_a_row_without_data_has_the_law_of_its_pseudo_counts():
    prompts = am.Prompts.from_tokens([[0, 1, 0]], 3)
    alpha = np.array([[1.0, 2.0, 1.0], [3.0, 2.0, 5.0], [1.0, 1.0, 8.0]])
    p = am.fit(prompts, [1], prior=Prior(pseudo_counts=alpha)).model.transition_matrix
    np.testing.assert_allclose(p[1:], alpha[1:] / alpha[1:].sum(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("alpha", [None, *ALPHA.values()], ids=["none", *ALPHA])
def test_derivatives_of_the_penalty(alpha):
    rng = oracle.generator("penalty")
    s, direction = rng.normal(size=(2, SIZE, SIZE))
    with jax.enable_x64(True):
        prior = Prior(precision=0.3, pseudo_counts=alpha).over(SIZE, jnp.float64)
        h = 1e-5
        ahead, back = s + h * direction, s - h * direction
        rise = (np.asarray(prior.penalty(ahead)) - np.asarray(prior.penalty(back))) / (2 * h)
        gradient = np.asarray(prior.gradient(jnp.asarray(s)))
        np.testing.assert_allclose((gradient * direction).sum(1), rise, atol=1e-8)
        bend = (np.asarray(prior.gradient(ahead)) - np.asarray(prior.gradient(back))) / (2 * h)
        laplacian = np.broadcast_to(prior.laplacian(jnp.asarray(s)), (SIZE, SIZE, SIZE))
        product = np.einsum("kab,kb->ka", laplacian, direction) + 0.3 * direction
        np.testing.assert_allclose(product, bend, atol=1e-8)
        # up to a constant it is minus the log-density of a Dirichlet law and of a Gaussian
        if alpha is not None:
            full = np.broadcast_to(alpha, (SIZE, SIZE))
            log_p = s - np.log(np.exp(s).sum(1, keepdims=True))
            expected = 0.15 * (s**2).sum(1) - (full * log_p).sum(1)
            np.testing.assert_allclose(prior.penalty(jnp.asarray(s)), expected, rtol=1e-12)


def test_a_grid_of_priors_shares_one_compilation_and_maps():
    prompts, y = data("grid of priors")
    strength = jnp.array([0.1, 1.0, 10.0])
    fits = jax.vmap(lambda a: am.fit(prompts, y, prior=Prior(pseudo_counts=a)))(strength)
    for i, a in enumerate(strength):
        one = am.fit(prompts, y, prior=Prior(pseudo_counts=a))
        np.testing.assert_allclose(fits.model.logits[i], one.model.logits, atol=2e-5)
    spread = np.asarray(fits.model.logits**2).sum((1, 2))
    assert spread[0] > spread[1] > spread[2]  # a stronger prior draws towards uniform rows


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (Prior(precision=-1.0), r"prior: must be a finite precision of at least 0, got -1"),
        (Prior(pseudo_counts=0.0), r"pseudo_counts: must be positive and finite, got 0"),
        (Prior(pseudo_counts=[1, -2, 1, 1]), r"pseudo_counts: .* got -2 at \[1\]"),
        (Prior(pseudo_counts=np.full((4, 4), np.inf)), r"pseudo_counts: .* got inf at \[0, 0\]"),
        (Prior(pseudo_counts=[1.0, 1.0]), r"pseudo_counts: expected shape .* got \(2,\)"),
    ],
)
def test_bad_priors_are_refused(prior, message):
    prompts, y = data("bad priors")
    with pytest.raises(ValueError, match=message):
        am.fit(prompts, y, prior=prior)
