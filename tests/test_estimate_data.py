"""Weighted, padded, permuted and pooled data, and contexts that are known."""

from __future__ import annotations

import importlib

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import attnmarkov as am

SOLVERS = ["newton", "lbfgs"]
fit_module = importlib.import_module("attnmarkov.estimate.fit")  # am.estimate.fit is the function


def assert_same_fit(a, b, atol=2e-5):
    np.testing.assert_allclose(a.model.logits, b.model.logits, atol=atol)
    np.testing.assert_allclose(a.nll, b.nll, atol=1e-6)
    np.testing.assert_allclose(a.standard_errors, b.standard_errors, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(a.components, b.components)
    np.testing.assert_array_equal(a.separated, b.separated)
    assert int(a.status.code) == int(b.status.code)
    assert int(a.num_parameters) == int(b.num_parameters)


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_are_copies(solver):
    _, prompts, y = oracle.well_posed("weights", 4, 8, 400)
    copies = oracle.generator("weights").integers(0, 4, 400)
    many = np.repeat(np.arange(400), copies)
    assert_same_fit(
        am.fit(prompts, y, solver, weights=copies), am.fit(prompts[many], y[many], solver)
    )


def test_fractional_weights_scale_the_information():
    _, prompts, y = oracle.well_posed("fractions", 3, 8, 500)
    plain = am.fit(prompts, y)
    scaled = am.fit(prompts, y, weights=np.full(500, 0.0025))  # less than one label a row
    np.testing.assert_allclose(scaled.model.logits, plain.model.logits, atol=2e-5)
    np.testing.assert_allclose(scaled.nll, plain.nll, rtol=1e-6)
    np.testing.assert_allclose(scaled.standard_errors, 20 * plain.standard_errors, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_of_weight_zero_changes_nothing_whatever_it_holds(solver):
    counts, last, y = oracle.random_data(oracle.generator("padding"), 5, 60)
    plain = am.fit(am.Prompts.from_counts(counts, last), y, solver, max_iterations=50)
    padded = am.Prompts(  # rows that from_counts would refuse
        jnp.asarray(np.concatenate([counts, np.zeros((7, 5), int), 9 * np.ones((3, 5), int)])),
        jnp.asarray(np.concatenate([last, np.arange(10) % 5]), jnp.int32),
    )
    labels = np.concatenate([y, np.full(10, -1)])
    weights = np.concatenate([np.ones(60), np.zeros(10)])
    assert_same_fit(am.fit(padded, labels, solver, weights=weights, max_iterations=50), plain)


def test_minibatches_find_the_same_maximum():
    _, prompts, y = oracle.well_posed("minibatches", 3, 8, 600)
    weights = oracle.generator("minibatches").integers(0, 3, 600)
    solver = optax.adam(0.02)
    with jax.enable_x64(True):
        exact = am.fit(prompts, y, prior=0.5, weights=weights)
        found = am.fit(
            prompts,
            y,
            solver,
            prior=0.5,
            weights=weights,
            batch_size=32,
            key=oracle.key_of("batches"),
            tolerance=1e-7,
        )
        assert found.status.name == "converged"
        np.testing.assert_allclose(found.model.logits, exact.model.logits, atol=1e-5)
        np.testing.assert_allclose(found.standard_errors, exact.standard_errors, rtol=1e-5)
    assert 0 < found.iterations < 20_000
    short = am.fit(
        prompts, y, solver, batch_size=32, key=oracle.key_of("batches"), max_iterations=5
    )
    assert short.status.name == "iteration_limit"
    assert short.iterations == 5


def test_datasets_of_different_sizes_map_together_by_their_weights():
    _, prompts, y = oracle.well_posed("sizes", 3, 9, 300)
    sizes = np.array([100, 200, 300])
    weights = jnp.asarray(np.arange(300) < sizes[:, None], jnp.float32)
    fits = jax.jit(jax.vmap(lambda w: am.fit(prompts, y, weights=w)))(weights)
    for i, n in enumerate(sizes):
        assert_same_fit(jax.tree.map(lambda x, i=i: x[i], fits), am.fit(prompts[:n], y[:n]))


def test_order_does_not_matter():
    counts, last, y = oracle.random_data(oracle.generator("order"), 5, 80)
    shuffle = oracle.generator("shuffle").permutation(80)
    weights = np.linspace(0.5, 2, 80)
    plain = am.fit(am.Prompts.from_counts(counts, last), y, weights=weights, prior=0.1)
    mixed = am.Prompts.from_counts(counts[shuffle], last[shuffle])
    assert_same_fit(am.fit(mixed, y[shuffle], weights=weights[shuffle], prior=0.1), plain)


CONTEXTS = {
    "decay": am.DecayContext(0.7),
    "lags": am.LagContext([0.5, 2.0, 0.0, 1.0, 1.0, 3.0, 0.1, 1.0]),
    "exponent": am.FullContext(exponent=0.5),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_known_context_is_an_offset(context):
    teacher, prompts, _ = oracle.well_posed("context", 3, 8, 500)
    counts = np.asarray(context.weighted_counts(prompts), np.float64)
    y = teacher.sample(oracle.key_of("labels"), prompts)  # another law: the offset must show
    held = counts[np.arange(500), y] > 0
    prompts, y, counts = prompts[held], np.asarray(y)[held], counts[held]
    exact = oracle.maximum(counts, np.asarray(prompts.last), y)
    result = am.fit(prompts, y, context=context)
    assert result.status == am.estimate.Status.CONVERGED
    np.testing.assert_allclose(result.model.logits, exact, atol=2e-4)
    nll = oracle.negative_log_likelihood(exact, counts, np.asarray(prompts.last), y) / len(y)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-6)
    assert abs(am.fit(prompts, y).model.logits - exact).max() > 0.01  # without it: another fit


def test_far_weights_do_not_underflow():
    tokens = np.array([[0, 1] + 198 * [1] + [0]] * 40)  # token 0 last, and at lag 200
    prompts = am.Prompts.from_tokens(np.concatenate([tokens, tokens[:, ::-1]]), 2)
    result = am.fit(prompts, [0, 1] * 40, context=am.DecayContext(0.01))
    assert np.isfinite(result.nll)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_a_group_share_their_logits(solver):
    _, prompts, y = oracle.well_posed("groups", 4, 8, 800)
    groups = np.array([2, 0, 2, 0])
    result = am.fit(prompts, y, solver, row_groups=groups)
    pooled = am.Prompts.from_counts(prompts.counts, groups[np.asarray(prompts.last)])
    expected = am.fit(pooled, y, solver)
    np.testing.assert_allclose(result.model.logits, expected.model.logits[groups], atol=2e-5)
    np.testing.assert_allclose(result.standard_errors, expected.standard_errors[groups], rtol=1e-3)
    np.testing.assert_allclose(result.nll, expected.nll, rtol=1e-6)
    assert result.num_parameters == 2 * 3
    assert result.status == am.estimate.Status.CONVERGED  # rows 1 and 3 have no group of theirs


def test_number_of_parameters_counts_what_is_identified():
    prompts = am.Prompts.from_tokens([[0, 1], [2, 1, 0], [0, 2]], 3)
    assert am.fit(prompts, [0, 1, 2]).num_parameters == 4
    assert am.fit(prompts, [0, 1, 2], row_groups=[0, 0, 0]).num_parameters == 2
    assert am.fit(am.Prompts.from_tokens([[0]], 1), [0]).num_parameters == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": [1.0]}, r"weights: expected shape \(2,\), one per prompt, got \(1,\)"),
        ({"weights": [1.0, -0.5]}, r"weights: must be finite and at least 0, got -0.5 at \[1\]"),
        ({"weights": [np.nan, 1.0]}, r"weights: .* got nan at \[0\]"),
        ({"weights": [0, 0]}, "weights: all are 0"),
        ({"row_groups": [0, 1]}, r"row_groups: expected shape \(3,\)"),
        ({"row_groups": [0, 1, 3]}, r"row_groups: expected ids in 0..2"),
        ({"row_groups": [0.5, 1, 2]}, "row_groups"),
        ({"solver": "newton", "batch_size": 8}, "batch_size: newton needs all prompts"),
        ({"solver": "lbfgs", "batch_size": 8}, "batch_size: lbfgs needs all prompts"),
        (
            {"solver": optax.lbfgs(), "batch_size": 8, "key": jax.random.key(0)},
            "batch_size: the solver searches along a line",
        ),
        ({"solver": "adam", "batch_size": 8}, "key: minibatches are drawn"),
        ({"solver": "adam", "batch_size": 0, "key": jax.random.key(0)}, "batch_size: .* got 0"),
        ({"context": "full"}, "context: expected a Context"),
        ({"context": am.DecayContext(1.5)}, "gamma"),
        ({"context": am.WindowContext(1)}, r"y: entry \[1\] is token 0, .* the context of"),
    ],
)
def test_bad_input(kwargs, message):
    prompts = am.Prompts.from_tokens([[0, 1], [0, 2]], 3)
    with pytest.raises(ValueError, match=message):
        am.fit(prompts, [1, 0], **kwargs)


def test_a_context_of_positions_needs_tokens():
    prompts = am.Prompts.from_counts([[2, 1]], [0])
    with pytest.raises(ValueError, match="needs token ids"):
        am.fit(prompts, [0], context=am.DecayContext(0.5))
    assert am.fit(prompts, [0], context=am.FullContext(exponent=2.0)).status.name == "separated"


def test_labels_of_padding_are_not_looked_at_but_others_are():
    prompts = am.Prompts.from_tokens([[0, 1], [0, 2]], 3)
    with pytest.raises(ValueError, match="y: "):
        am.fit(prompts, [7, 0], weights=[1, 0])
    am.fit(prompts, [1, 7], weights=[1, 0])


def test_numbers_of_prompts_share_a_program_and_change_nothing():
    teacher = am.CCMC.from_transition_matrix([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    prompts = am.prompts.uniform(jax.random.key(0), 62, 5, 3)
    y = np.asarray(teacher.sample(jax.random.key(1), prompts))

    def first(n: int) -> am.Prompts:
        return am.Prompts.from_counts(np.asarray(prompts.counts)[:n], np.asarray(prompts.last)[:n])

    am.fit(first(62), y)
    compiled = fit_module._fit._cache_size()
    filled = {n: am.fit(first(n), y[:n]) for n in (40, 51)}
    assert fit_module._fit._cache_size() == compiled
    for n, found in filled.items():  # traced data are taken as they are
        assert_same_fit(found, jax.jit(am.fit)(first(n), y[:n]))
        own, plain = am.coverage(first(n)), jax.jit(am.coverage)(first(n))
        np.testing.assert_allclose(
            own.algebraic_connectivity, plain.algebraic_connectivity, rtol=1e-5
        )
