"""The estimate: its optimum, its solvers, its status, and what it is invariant to."""

from __future__ import annotations

import sys

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnmarkov as am
from attnmarkov.estimate import Status
from attnmarkov.estimate.first_order import named

SOLVERS = {
    "newton": "newton",
    "lbfgs": "lbfgs",
    "adam": "adam",
    "momentum": optax.sgd(3.0, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(2.0, momentum=0.8)),
}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


def prompts_of(counts, last):
    return am.Prompts.from_counts(counts, last)


def logits_of(result):
    return np.asarray(result.model.logits, np.float64)


@pytest.mark.parametrize("prior", [None, 0.0, 2.5])
def test_every_solver_finds_the_maximum(solver, prior):
    _, prompts, y = oracle.well_posed("maximum", 4, 8, 800)
    counts, last, labels = (np.asarray(x) for x in (prompts.counts, prompts.last, y))
    exact = oracle.maximum(counts, last, labels, prior or 0.0)
    exact -= exact.mean(1, keepdims=True)
    result = am.fit(prompts, y, solver, prior=prior)
    assert result.status.name == "converged"
    np.testing.assert_allclose(logits_of(result), exact, atol=1e-5)
    nll = oracle.negative_log_likelihood(exact, counts, last, labels) / len(labels)
    penalty = (prior or 0) / 2 * (exact**2).sum() / len(labels)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(result.loss, nll + penalty, rtol=1e-6)
    assert 0 < int(result.iterations) < 4000


def test_newton_in_float32_is_at_the_rounding_noise():
    _, prompts, y = oracle.well_posed("noise", 4, 8, 800)
    single = am.fit(prompts, y)
    with jax.enable_x64(True):
        double = am.fit(prompts_of(np.asarray(prompts.counts), np.asarray(prompts.last)), y)
        assert double.model.logits.dtype == jnp.float64
    assert single.model.logits.dtype == jnp.float32
    np.testing.assert_allclose(logits_of(single), logits_of(double), atol=1e-6)
    assert int(single.iterations) <= 10


@pytest.mark.parametrize("name", ["newton", "lbfgs", "adam"])
def test_solvers_in_float64(name):
    _, prompts, y = oracle.well_posed("double", 4, 8, 800)
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    exact = oracle.maximum(counts, last, np.asarray(y))
    with jax.enable_x64(True):
        result = am.fit(prompts_of(counts, last), np.asarray(y), name)
        assert result.status.name == "converged"
    exact -= exact.mean(1, keepdims=True)
    np.testing.assert_allclose(logits_of(result), exact, atol=1e-7)


def rare_win(n):
    """Token 1 wins half of the ``n`` prompts and token 2 one of them."""
    y = np.arange(n) % 2
    y[0] = 2
    return prompts_of(np.ones((n, 3), int), np.zeros(n, int)), y


def test_adam_keeps_moving_past_its_default_number_of_iterations():
    with jax.enable_x64(True):
        prompts, y = rare_win(4000)
        assert am.fit(prompts, y, "adam").status == Status.ITERATION_LIMIT
        result = am.fit(prompts, y, "adam", max_iterations=20_000)
        assert result.status == Status.NOT_IDENTIFIED  # converged: the other rows have no data
        exact = am.fit(prompts, y)
    np.testing.assert_allclose(logits_of(result), logits_of(exact), atol=1e-5)


def test_standard_errors_of_a_rare_token():
    n = 100_000
    prompts, y = rare_win(n)
    result = am.fit(prompts, y)
    information = n * oracle.hessian(logits_of(result), np.ones((1, 3)), [0])[:1]
    exact = np.sqrt(oracle.pseudo_inverse_diagonal(information)[0])
    np.testing.assert_allclose(result.standard_errors[0], exact, rtol=1e-5)


@pytest.mark.parametrize("prior", [None, 1.5])
def test_standard_errors_are_those_of_the_information(prior):
    _, prompts, y = oracle.well_posed("errors", 4, 8, 800)
    result = am.fit(prompts, y, prior=prior)
    counts, last = np.asarray(prompts.counts), np.asarray(prompts.last)
    hessian = oracle.hessian(logits_of(result), counts, last)
    centring = np.eye(4) - 1 / 4
    whole = centring @ (hessian + (prior or 0) * np.eye(4)) @ centring
    expected = [np.sqrt(np.diag(np.linalg.pinv(h, rcond=1e-10))) for h in whole]
    np.testing.assert_allclose(result.standard_errors, expected, rtol=1e-4)


def split_data(seed="split"):
    """Row 0: {0, 1} with both winning, {2, 3} where 3 always wins, 4 alone. Row 1: all joined."""
    counts = [[2, 1, 0, 0, 0]] * 6 + [[0, 0, 1, 1, 0]] * 3 + [[0, 0, 0, 0, 2]] * 2
    y, last = [0, 0, 1, 1, 1, 0, 3, 3, 3, 4, 4], [0] * 11
    counts += [[1, 1, 1, 1, 1]] * 10
    return counts, last + [1] * 10, y + [0, 1, 2, 3, 4] * 2


def test_split_rows_are_centred_per_component_and_only_the_known_has_errors():
    counts, last, y = split_data()
    result = am.fit(prompts_of(counts, last), y)
    assert result.status.name == "separated"
    assert result.separated.tolist() == [True, False, False, False, False]
    assert result.components[0].tolist() == [0, 0, 2, 2, 4]
    s = logits_of(result)
    half = np.log(0.5) / 2  # from P(0) / P(1) = 1/2, since 0 stands twice and both win equally
    np.testing.assert_allclose(s[0, [0, 1, 4]], [half, -half, 0], atol=1e-6)
    np.testing.assert_allclose(s[0, 2] + s[0, 3], 0, atol=1e-5)
    assert s[0, 3] - s[0, 2] > 5
    np.testing.assert_array_equal(s[2:], 0)
    known = np.isfinite(result.standard_errors)
    expected = np.zeros((5, 5), bool)
    expected[0, :2] = expected[1] = True
    np.testing.assert_array_equal(known, expected)
    np.testing.assert_allclose(result.standard_errors[0, 0], np.sqrt(1 / 6), rtol=1e-5)


def test_split_rows_without_separation_are_not_identified():
    counts, last, y = split_data()
    y[6] = 2
    result = am.fit(prompts_of(counts, last), y)
    assert result.status == Status.NOT_IDENTIFIED
    assert not result.separated.any()
    np.testing.assert_allclose(logits_of(result)[0, 3] * 2, np.log(2), atol=1e-5)
    assert "do not identify" in str(result.status)


def test_a_prior_makes_separated_and_unseen_rows_proper(solver):
    counts, last, y = split_data()
    result = am.fit(prompts_of(counts, last), y, solver, prior=0.5)
    assert result.status.name == "converged"
    assert result.separated.tolist() == [True, False, False, False, False]
    exact = oracle.maximum(np.array(counts), np.array(last), np.array(y), 0.5)
    np.testing.assert_allclose(logits_of(result), exact, atol=1e-5)
    spread = np.sqrt((1 - 1 / 5) / 0.5)  # of a centred row that only the prior knows
    np.testing.assert_allclose(result.standard_errors[2:], spread, rtol=1e-5)
    assert np.isfinite(result.standard_errors).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    most=st.integers(1, 4),
    different=st.sampled_from([1, 10, 60, 300]),
)
def test_status_follows_from_the_data_alone(seed, most, different):
    rng = np.random.default_rng(seed)
    repeated = rng.integers(0, different, 300)
    counts, last, y = (x[repeated] for x in oracle.random_data(rng, 4, different, most=most))
    result = am.fit(prompts_of(counts, last), y)
    labels, finite = oracle.components(counts, last), oracle.finite_maximum(counts, last, y)
    expected = (
        "separated" if not finite.all() else "not_identified" if labels.any() else "converged"
    )
    assert result.status.name == expected
    np.testing.assert_array_equal(result.components, labels)
    np.testing.assert_array_equal(result.separated, ~finite.all(1))
    alone = (labels[:, :, None] == labels[:, None, :]).sum(-1) == 1
    np.testing.assert_array_equal(np.isfinite(result.standard_errors), finite & ~alone)
    np.testing.assert_allclose(
        logits_of(result), oracle.centre(logits_of(result), labels), atol=1e-5
    )
    if finite.all():
        slope = oracle.gradient(logits_of(result), counts, last, y)
        assert abs(slope).max() < 1e-4


@pytest.mark.parametrize("prior", [None, 1.0])
def test_one_token(prior):
    result = am.fit(am.Prompts.from_tokens([[0, 0], [0, 0]], 1), [0, 0], prior=prior)
    assert result.status.name == "converged"
    assert result.model.logits.tolist() == [[0.0]]
    assert float(result.nll) == 0
    assert np.isnan(result.standard_errors).all()


def test_one_prompt():
    result = am.fit(am.Prompts.from_tokens([[0, 1, 2]], 4), [1])
    assert result.status.name == "separated"
    assert result.separated.tolist() == [False, False, True, False]
    np.testing.assert_array_equal(logits_of(result)[[0, 1, 3]], 0)
    assert np.isnan(result.standard_errors).all()


def test_duplicated_data_move_only_the_errors():
    _, prompts, y = oracle.well_posed("duplicated", 4, 8, 800)
    prompts, y = prompts[:400], y[:400]
    once = am.fit(prompts, y)
    twice = am.fit(prompts[np.tile(np.arange(400), 2)], jnp.tile(y, 2))
    np.testing.assert_allclose(logits_of(twice), logits_of(once), atol=2e-6)
    ratio = np.asarray(once.standard_errors) / np.asarray(twice.standard_errors)
    np.testing.assert_allclose(ratio, np.sqrt(2), rtol=1e-4)
    np.testing.assert_allclose(twice.nll, once.nll, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_prompts_and_names_of_tokens_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    counts, last, y = oracle.random_data(rng, 4, 300, most=4)
    plain = am.fit(prompts_of(counts, last), y, prior=0.1)
    shuffle, names = rng.permutation(300), rng.permutation(4)
    renamed = np.zeros_like(counts)
    renamed[:, names] = counts
    other = am.fit(prompts_of(renamed[shuffle], names[last][shuffle]), names[y][shuffle], prior=0.1)
    moved = np.ix_(names, names)
    np.testing.assert_allclose(logits_of(other)[moved], logits_of(plain), atol=5e-6)
    errors = np.asarray(other.standard_errors)[moved]
    np.testing.assert_allclose(errors, plain.standard_errors, rtol=1e-4)
    np.testing.assert_allclose(other.nll, plain.nll, rtol=1e-6)


def test_scaling_all_counts_of_a_prompt_changes_the_fit_not_at_all():
    counts, last, y = oracle.random_data(oracle.generator("scale"), 4, 300, most=3)
    factors = oracle.generator("factors").integers(1, 50, (300, 1))
    plain = am.fit(prompts_of(counts, last), y, prior=0.1)
    scaled = am.fit(prompts_of(counts * factors, last), y, prior=0.1)
    np.testing.assert_allclose(logits_of(scaled), logits_of(plain), atol=2e-6)
    np.testing.assert_allclose(scaled.nll, plain.nll, rtol=1e-6)


@pytest.mark.parametrize("name", ["newton", "lbfgs", "adam"])
def test_vmap_equals_a_loop(name):
    rng = oracle.generator("vmap")
    batch = [oracle.random_data(rng, 3, 60, most=m) for m in (1, 2, 3, 3)]
    counts, last, y = (np.stack(x) for x in zip(*batch, strict=True))
    prompts = am.Prompts(jnp.asarray(counts, jnp.int32), jnp.asarray(last, jnp.int32))

    def run(prompts, y):
        return am.fit(prompts, y, name, prior=0.2)

    together = jax.jit(jax.vmap(run))(prompts, jnp.asarray(y))
    assert together.status.code.shape == (4,)
    assert repr(together) == "Fit(batch=(4,), Of 4 fits: 4 converged.)"
    for i, (c, k, labels) in enumerate(batch):
        alone = run(prompts_of(c, k), labels)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        np.testing.assert_allclose(logits_of(one), logits_of(alone), atol=5e-6)
        np.testing.assert_allclose(one.standard_errors, alone.standard_errors, rtol=1e-4)
        np.testing.assert_array_equal(one.components, alone.components)
        np.testing.assert_allclose(one.nll, alone.nll, rtol=1e-5)


def test_compiles_once_for_all_tolerances_priors_and_limits(monkeypatch):
    module, traces = sys.modules["attnmarkov.estimate.fit"], []
    original = module.blocks_of
    monkeypatch.setattr(module, "blocks_of", lambda *a: traces.append(1) or original(*a))
    _, prompts, y = oracle.well_posed("traces", 3, 5, 77)  # a size of its own
    for name in ("newton", "lbfgs", SOLVERS["momentum"]):
        am.fit(prompts, y, name)
        am.fit(prompts, y, name, prior=1, tolerance=1e-4, max_iterations=3)
        am.fit(prompts, (y * 0 + prompts.last), name, prior=0.5)
    assert len(traces) == 3
    assert named("lbfgs") is named("lbfgs")


def test_iteration_limit_is_reported(solver):
    _, prompts, y = oracle.well_posed("limit", 4, 8, 800)
    result = am.fit(prompts, y, solver, max_iterations=2)
    assert result.status == Status.ITERATION_LIMIT
    assert int(result.iterations) == 2
    assert "iteration limit" in str(result.status)


def test_a_diverging_solver_is_reported():
    _, prompts, y = oracle.well_posed("diverges", 4, 8, 800)
    result = am.fit(prompts, y, optax.sgd(-1e38), max_iterations=20)
    assert result.status == Status.NON_FINITE


def test_an_impossible_label_inside_jit_is_reported():
    prompts = am.Prompts.from_tokens([[0, 1], [1, 0], [0, 0]], 2)
    result = jax.jit(am.fit)(prompts, jnp.array([0, 1, 1]))
    assert result.status == Status.NON_FINITE
    assert float(result.nll) == np.inf


@pytest.mark.parametrize("label", [-1, 3, -3, 2**31 - 1])
def test_a_label_that_is_no_token_inside_jit_is_reported(label):
    """Minus one is what a model emits where it cannot emit anything."""
    prompts = am.Prompts.from_tokens([[0, 1, 2], [2, 1, 0], [1, 0, 2]], 3)
    result = jax.jit(am.fit)(prompts, jnp.array([label, 0, 1]))
    assert result.status == Status.NON_FINITE
    assert float(result.nll) == np.inf


BAD_LABELS = [
    ([0, 1], r"y: expected shape \(3,\).*got \(2,\)"),
    ([[0], [1], [0]], r"y: expected 1 dimension.*\(3, 1\)"),
    ([0.0, 1.0, 0.0], "y: expected integers"),
    ([True, False, True], "y: expected integers, got dtype bool"),
    ([0, 1, 2], r"y: entry \[2\] is token 2, which does not stand in prompt 2"),
    ([0, 3, 0], r"y: entry \[1\] is token id 3, outside 0\.\.2"),
    ([0, -1, 0], r"y: entry \[1\] is token id -1"),
]


@pytest.mark.parametrize(("y", "message"), BAD_LABELS)
def test_bad_labels(y, message):
    prompts = am.Prompts.from_tokens([[0, 1, 2], [2, 1, 0], [0, 1, 0]], 3)
    with pytest.raises(ValueError, match=message):
        am.fit(prompts, y)


@pytest.mark.parametrize(
    ("y", "message"),
    [(jnp.zeros(2, int), r"expected shape \(3,\)"), (jnp.zeros(3), "expected integers")],
)
def test_bad_labels_inside_jit(y, message):
    prompts = am.Prompts.from_tokens([[0, 1, 2], [2, 1, 0], [0, 1, 0]], 3)
    with pytest.raises(ValueError, match=message):
        jax.jit(am.fit)(prompts, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newtn"}, "unknown solver 'newtn'; known: newton, lbfgs, adam"),
        ({"solver": 3}, "unknown solver 3"),
        ({"prior": -1.0}, "prior: .*-1.0"),
        ({"prior": float("nan")}, "prior: .*nan"),
        ({"prior": "flat"}, "prior: expected a number, got 'flat'"),
        ({"prior": [1.0, 2.0]}, "prior: expected a number"),
        ({"tolerance": 0.0}, "tolerance: must be positive"),
        ({"tolerance": float("inf")}, "tolerance: must be positive and finite"),
        ({"max_iterations": 0}, "max_iterations: must be at least 1, got 0"),
        ({"max_iterations": 2.5}, "max_iterations: expected an integer, got 2.5"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        am.fit(am.Prompts.from_tokens([[0, 1]], 2), [0], **arguments)


def test_bad_prompts():
    none = am.Prompts(jnp.zeros((0, 2), jnp.int32), jnp.zeros(0, jnp.int32))
    with pytest.raises(ValueError, match="prompts: there is no prompt"):
        am.fit(none, np.zeros(0, int))
    many = am.Prompts(jnp.ones((4, 3, 2), jnp.int32), jnp.zeros((4, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"prompts: expected one batch.*\(4, 3, 2\)"):
        am.fit(many, np.zeros((4, 3), int))


def test_prints_something_worth_reading():
    counts, last, y = split_data()
    text = repr(am.fit(prompts_of(counts, last), y))
    for part in ("separated after", "6 of 20 contrasts", "rows [0, 2, 3, 4]", "separated rows [0]"):
        assert part in text
    result = am.fit(prompts_of(counts, last), y, prior=1.0)
    assert repr(result.status) == "Status(converged)"
    leaves, tree = jax.tree.flatten(result)
    assert "Fit(" in repr(jax.tree.unflatten(tree, [object()] * len(leaves)))
    seen = []
    jax.jit(lambda r: seen.append(repr(r)) or r)(result)
    assert seen[0].startswith("Fit(")


def test_statuses_of_a_batch():
    statuses = Status(jnp.array([0, 2, 0]))
    assert str(statuses) == "Of 3 fits: 2 converged, 1 separated."
    assert statuses.name.tolist() == ["converged", "separated", "converged"]
    assert (statuses == Status.SEPARATED).tolist() == [False, True, False]
    for code in range(5):
        assert str(Status(jnp.array(code))).endswith(".")
