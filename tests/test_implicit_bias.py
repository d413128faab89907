"""Gradient descent on W, and the limits and directions predicted for it."""

from __future__ import annotations

from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from scipy import optimize

import attnmarkov as am
from attnmarkov.estimate.attention import fit_attention
from attnmarkov.estimate.implicit_bias import gradient_descent_path, graph_svm
from attnmarkov.model.maps import attention_weight
from attnmarkov.plot.implicit_bias import implicit_bias

# Row 0: 2 beats 0 and 1, which beat each other. Row 1: 0 beats 1 beats 2. Row 2: nothing.
COUNTS = np.array([[1, 1, 0], [2, 1, 0], [1, 1, 1], [1, 1, 0], [0, 1, 1]])
LAST = np.array([0, 0, 0, 1, 1])
LABELS = np.array([0, 1, 2, 0, 1])


def embedding_of(num_tokens, d):
    return oracle.generator(f"bias {num_tokens} {d}").normal(size=(num_tokens, d))


def descend(counts, last, y, embedding, **options):
    """In float64."""
    with jax.enable_x64(True):
        return gradient_descent_path(am.Prompts.from_counts(counts, last), y, embedding, **options)


def random_data(seed, num_tokens, n, most):
    return oracle.random_data(np.random.default_rng(seed), num_tokens, n, most=most)


def relations(counts, last, y):
    """Tokens that beat each other, and pairs of which one beats the other only, by any chain."""
    ties, wins = [], []
    for k in range(counts.shape[1]):
        graph = nx.DiGraph()
        for c, j in zip(counts[last == k], y[last == k], strict=True):
            graph.add_edges_from((j, a) for a in np.flatnonzero(c) if a != j)
        reach = {a: nx.descendants(graph, a) for a in graph}
        for a in graph:
            for b in reach[a]:
                (ties if a in reach[b] else wins).append((k, a, b))
    return ties, wins


def features(triples, e):
    rows = [np.outer(e[a] - e[b], e[k]).ravel() for k, a, b in triples]
    return np.array(rows).reshape(len(rows), e.shape[1] ** 2)


def max_margin(ties, wins, e):
    """The graph SVM over all chains, by SLSQP."""
    equal, more = features(ties, e), features(wins, e)
    constraints = [{"type": "ineq", "fun": lambda w: more @ w - 1, "jac": lambda w: more}]
    basis = np.linalg.svd(equal)[2][: np.linalg.matrix_rank(equal)] if len(equal) else equal
    if len(basis):
        constraints.append({"type": "eq", "fun": lambda w: basis @ w, "jac": lambda w: basis})
    start = np.linalg.pinv(np.concatenate([equal, more])) @ np.repeat(
        [0.0, 2.0], [len(equal), len(more)]
    )
    found = optimize.minimize(
        lambda w: w @ w / 2, start, jac=lambda w: w, constraints=constraints, method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    assert found.success
    return found.x.reshape(e.shape[1], e.shape[1])


@pytest.mark.parametrize(
    ("seed", "num_tokens", "d", "n", "most"),
    [(0, 3, 3, 6, 3), (1, 4, 6, 8, 4), (2, 3, 5, 12, 3), (3, 4, 4, 5, 2), (4, 4, 4, 14, 4)],
)
def test_the_svm_is_that_of_all_chains(seed, num_tokens, d, n, most):
    data, e = random_data(seed, num_tokens, n, most), embedding_of(num_tokens, d)
    ties, wins = relations(*data)
    svm = graph_svm(am.Prompts.from_counts(*data[:2]), data[2], e)
    assert wins
    np.testing.assert_allclose(svm.weight, max_margin(ties, wins, e), atol=1e-5)
    np.testing.assert_allclose(svm.margin * np.linalg.norm(svm.weight), 1)
    np.testing.assert_allclose(features(ties, e) @ svm.weight.ravel(), 0, atol=1e-9)
    margins = features(svm.comparisons, e) @ svm.weight.ravel()
    np.testing.assert_allclose(margins.min(), 1, rtol=1e-8)
    assert {tuple(t) for t in svm.comparisons.tolist()} <= set(wins)
    tied = {(k, a, b) for k, a, b in ties}
    for k in range(num_tokens):
        for a in range(num_tokens):
            beaten = [b for b in range(num_tokens) if (k, a, b) in tied]
            assert svm.components[k, a] == min([a, *beaten])


def test_hand_made_svm():
    svm = graph_svm(am.Prompts.from_counts(COUNTS, LAST), LABELS, np.eye(3))
    third = 1 / 3
    np.testing.assert_allclose(
        svm.weight.T, [[-third, -third, 2 * third], [1, 0, -1], [0, 0, 0]], atol=1e-12
    )
    assert svm.comparisons.tolist() == [[0, 2, 0], [0, 2, 1], [1, 0, 1], [1, 1, 2]]
    assert svm.components.tolist() == [[0, 0, 2], [0, 1, 2], [0, 1, 2]]
    assert "4 comparisons separated in 2 rows" in repr(svm)


def test_a_narrow_embedding_ties_what_it_cannot_separate():
    """On a line, token 1 between 0 and 2 cannot beat both."""
    e = np.array([[0.0], [1.0], [2.0]])
    counts, y = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]]), np.array([1, 1, 1])
    last = np.array([1, 1, 1])
    svm = graph_svm(am.Prompts.from_counts(counts, last), y, e)
    assert len(svm.comparisons) == 0
    assert not svm.weight.any()
    path = descend(counts, last, y, e, num_steps=3000)
    found: Any = optimize.minimize_scalar(
        lambda w: oracle.negative_log_likelihood(w * e @ e.T, counts, last, y)
    )
    exact = found.x
    np.testing.assert_allclose(path.minimum_norm, [[exact]], atol=1e-6)
    np.testing.assert_allclose(path.weight[-1], path.minimum_norm, atol=1e-9)
    # With 0 and 2 apart in one more dimension it can: only 1 over 0 stays in this example.
    only = graph_svm(am.Prompts.from_counts(counts[:1], last[:1]), y[:1], e)
    np.testing.assert_allclose(only.weight, [[1.0]])


@pytest.mark.parametrize("seed", range(4))
def test_narrow_svms_are_feasible_and_of_least_norm(seed):
    data, e = random_data(seed, 4, 6, 3), embedding_of(4, 2)
    svm = graph_svm(am.Prompts.from_counts(*data[:2]), data[2], e)
    ties, wins = relations(*data)
    separated = {tuple(t) for t in svm.comparisons.tolist()}
    forced = [w for w in wins if w not in separated and w in _edges(*data)]
    rest = sorted(separated)
    if rest:
        exact = max_margin(ties + forced, rest, e)
        np.testing.assert_allclose(svm.weight, exact, atol=1e-5)
    # No direction without negative margins does better on what is said to be tied.
    rows = features([*wins, *ties], e)
    bounds = [(-1, 1)] * 4
    for triple in forced:
        goal = -features([triple], e)[0]
        found = optimize.linprog(goal, A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=bounds)
        assert -found.fun < 1e-8


def _edges(counts, last, y):
    return {
        (k, j, a)
        for c, k, j in zip(counts, last, y, strict=True)
        for a in np.flatnonzero(c)
        if a != j
    }


@pytest.mark.parametrize("at", [None, [0, 1, 5, 40]])
def test_the_path_is_gradient_descent(at):
    counts, last, y = random_data(5, 3, 20, 3)
    e, rate = embedding_of(3, 2), 0.3
    path = descend(counts, last, y, e, step_size=rate, num_steps=40, at=at)
    w, expected = np.zeros((2, 2)), []
    for _ in range(41):
        expected.append(w)
        g = oracle.gradient(e @ w.T @ e.T, counts, last, y)
        w = w - rate * e.T @ g.T @ e / len(y)
    if at is not None:
        assert path.steps.tolist() == at
    assert path.steps[-1] == 40
    expected = np.array(expected)[path.steps]
    np.testing.assert_allclose(path.weight, expected, atol=1e-13)
    np.testing.assert_allclose(path.norm, np.linalg.norm(expected, axis=(1, 2)), atol=1e-13)
    nll = [oracle.negative_log_likelihood(e @ w.T @ e.T, counts, last, y) / 20 for w in expected]
    np.testing.assert_allclose(path.nll, nll, rtol=1e-12)
    assert path.step_size == rate


@pytest.mark.parametrize("d", [2, 3, 5])
def test_without_separation_it_ends_at_the_optimum_of_least_norm(d):
    _, prompts, y = oracle.well_posed("least norm", 3, 8, 300)
    counts, last, y = np.asarray(prompts.counts), np.asarray(prompts.last), np.asarray(y)
    e = embedding_of(3, d)
    path = descend(counts, last, y, e, num_steps=20_000)
    assert len(path.svm.comparisons) == 0
    assert np.isnan(path.direction_cosine).all()
    assert np.isnan(path.margin).all()
    with jax.enable_x64(True):
        again = am.Prompts.from_counts(counts, last)
        if d == 2:
            expected = np.asarray(fit_attention(again, y, e, solver="adam").weight)
        else:
            expected = attention_weight(np.asarray(am.fit(again, y).model.logits), e)
    np.testing.assert_allclose(path.minimum_norm, expected, atol=1e-6)
    np.testing.assert_allclose(path.weight[-1], path.minimum_norm, atol=1e-6)
    distances = np.linalg.norm(path.weight - path.minimum_norm, axis=(1, 2))
    np.testing.assert_allclose(path.distance_to_minimum_norm, distances, atol=1e-12)


def test_separated_data_send_it_along_the_max_margin_direction():
    e = np.eye(3) + 0.2 * embedding_of(3, 3)
    path = descend(COUNTS, LAST, LABELS, e, num_steps=100_000)
    ties, wins = relations(COUNTS, LAST, LABELS)
    direction = max_margin(ties, wins, e)
    length = np.linalg.norm(direction)
    late = path.steps >= 100
    cosine = (path.weight * direction).sum((1, 2)) / path.norm / length
    np.testing.assert_allclose(path.direction_cosine, cosine, atol=1e-6)
    assert (np.diff(path.direction_cosine[late]) > 0).all()
    assert path.direction_cosine[-1] > 0.99
    # The angle shrinks at least like 1 / log t.
    angle, log_t = np.arccos(path.direction_cosine[late]), np.log(path.steps[late])
    assert angle[-1] * log_t[-1] < 1.05 * angle[0] * log_t[0]
    decade = np.searchsorted(path.steps, 10_000)
    growth = (path.norm[-1] - path.norm[decade]) / np.log(path.steps[-1] / path.steps[decade])
    np.testing.assert_allclose(growth, length, rtol=0.03)
    # Margins over what is separated, across all chains; the least is on an edge.
    margins = features(wins, e) @ np.asarray(path.weight[-1]).ravel()
    np.testing.assert_allclose(path.margin[-1], margins.min() / path.norm[-1], rtol=1e-6)
    assert 0.85 < path.margin[-1] / path.svm.margin <= 1
    # The part that stays: 0 against 1 in row 0, once with counts 1:1 and once with 2:1.
    assert np.linalg.norm(path.minimum_norm) > 0.1
    weight = path.minimum_norm
    logits = e @ weight.T @ e.T
    share = np.exp(logits[0, 0]) / (np.exp(logits[0, 0]) + np.exp(logits[0, 1]))
    odds = share / (1 - share)
    np.testing.assert_allclose(odds / (1 + odds) + 2 * odds / (1 + 2 * odds), 1, rtol=1e-9)
    span = features(ties, e)
    off = weight.ravel() - span.T @ np.linalg.lstsq(span.T, weight.ravel(), rcond=None)[0]
    np.testing.assert_allclose(off, 0, atol=1e-9)
    assert path.distance_to_minimum_norm[-1] < 1e-3
    assert path.distance_to_minimum_norm[-1] < path.distance_to_minimum_norm[decade] / 3


def test_the_step_is_stable_below_its_bound():
    counts, last, y = random_data(6, 3, 30, 3)
    e = embedding_of(3, 3)
    path = descend(counts, last, y, e, num_steps=300, at=np.arange(301))
    np.testing.assert_allclose(path.step_size, path.stable_below / 2)
    fast = descend(
        counts, last, y, e, num_steps=300, at=np.arange(301), step_size=0.999 * path.stable_below
    )
    for run in (path, fast):
        assert (np.diff(run.nll) < 1e-15).all()
    # 2 / stable_below is no less than the curvature anywhere, and not far above the greatest.
    rng, greatest = oracle.generator("points"), 0.0
    for scale in (0, 0.1, 0.5, 1, 2, 4):
        w = scale * rng.normal(size=(3, 3))
        middle = oracle.hessian(e @ w.T @ e.T, counts, last) / len(y)
        blocks = [np.kron(e.T @ h @ e, np.outer(x, x)) for h, x in zip(middle, e, strict=True)]
        greatest = max(greatest, np.linalg.eigvalsh(sum(blocks)).max())
    bound = 2 / path.stable_below
    assert greatest <= bound < 10 * greatest
    # And it is attained: two tokens, one row, at W = 0.
    two = descend([[1, 1]], [0], [0], np.eye(2), num_steps=1)
    np.testing.assert_allclose(two.stable_below, 2 / 0.5)


def test_float32_follows_float64():
    e = np.eye(3)
    double = descend(COUNTS, LAST, LABELS, e, num_steps=5000)
    single = gradient_descent_path(am.Prompts.from_counts(COUNTS, LAST), LABELS, e, num_steps=5000)
    assert single.weight.dtype == jnp.float32
    np.testing.assert_allclose(single.weight, double.weight, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(single.direction_cosine, double.direction_cosine, atol=1e-4)


def test_degenerate_data():
    one = descend([[2]], [0], [0], [[1.5]], num_steps=5)
    assert one.nll.tolist() == [0.0] * len(one.steps)
    assert not one.weight.any()
    assert one.stable_below == np.inf
    alone = descend([[2, 0], [0, 3]], [0, 1], [0, 1], np.eye(2), num_steps=5)
    assert not alone.weight.any()
    assert not alone.svm.weight.any()
    counts, last, y = random_data(7, 3, 10, 3)
    plain = descend(counts, last, y, np.eye(3), num_steps=50)
    again = np.tile(counts, (2, 1)), np.tile(last, 2), np.tile(y, 2)
    twice = descend(*again, np.eye(3), num_steps=50)
    np.testing.assert_allclose(twice.weight, plain.weight, atol=1e-13)
    np.testing.assert_allclose(twice.nll, plain.nll, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": np.eye(3)}, r"embedding: expected shape \(2, d\)"),
        ({"step_size": 0.0}, "step_size: must be positive and finite, got 0"),
        ({"step_size": -1.0}, "step_size: must be positive and finite, got -1"),
        ({"step_size": "big"}, "step_size: expected a number, got 'big'"),
        ({"num_steps": 0}, "num_steps: must be at least 1, got 0"),
        ({"at": [3, 1]}, r"at: expected increasing steps in 0\.\.10, got \[3, 1\]"),
        ({"at": [3, 11]}, r"at: expected increasing steps in 0\.\.10, got \[3, 11\]"),
        ({"at": [-1, 3]}, "at: expected increasing steps"),
        ({"at": [0.5]}, "at: expected integers"),
        ({"at": np.zeros(0, int)}, "at: there is no step to record"),
        ({"y": [2]}, r"y: entry \[0\] is token id 2"),
    ],
)
def test_bad_input(options, message):
    arguments = {"y": [0], "embedding": np.eye(2), "num_steps": 10, **options}
    with pytest.raises(ValueError, match=message):
        gradient_descent_path(am.Prompts.from_tokens([[0, 1]], 2), **arguments)


def descend_briefly(prompts):
    return gradient_descent_path(prompts, [0], np.eye(2), num_steps=3).weight


def test_traced_inputs_are_refused():
    prompts = am.Prompts.from_tokens([[0, 1]], 2)
    with pytest.raises(ValueError, match="embedding: must be concrete"):
        jax.jit(lambda e: graph_svm(prompts, [0], e).weight)(jnp.eye(2))
    with pytest.raises(ValueError, match="y: must be concrete"):
        jax.jit(lambda y: graph_svm(prompts, y, jnp.eye(2)).weight)(jnp.array([0]))
    # What is traced elsewhere does not matter: 0 beats 1 in row 1.
    inside = jax.jit(lambda r: r * graph_svm(prompts, [0], np.eye(2)).weight)(2.0)
    np.testing.assert_allclose(inside, [[0, 1], [0, -1]], atol=1e-6)
    path = jax.jit(lambda r: r * descend_briefly(prompts))(2.0)
    np.testing.assert_allclose(path, 2 * descend_briefly(prompts))
    with pytest.raises(ValueError, match="step_size: must be concrete"):
        jax.jit(
            lambda r: (
                gradient_descent_path(prompts, [0], np.eye(2), num_steps=3, step_size=r).weight
            )
        )(0.1)


def on_the_right(ax):
    """What is drawn against the right-hand axis."""
    figure = ax.get_figure()
    assert figure is not None
    right = next(a for a in figure.axes if a is not ax)
    return np.asarray(right.get_lines()[0].get_ydata())


def test_prints_and_plots():
    path = descend(COUNTS, LAST, LABELS, np.eye(3), num_steps=5000, at=[0, 1, 10, 100, 5000])
    text = repr(path)
    for part in ("5000 steps of", "separated: cosine 0.9", "margin"):
        assert part in text
    leaves, tree = jax.tree.flatten(path)
    assert "Path(" in repr(jax.tree.unflatten(tree, [object()] * len(leaves)))
    ax = implicit_bias(path)
    norm, prediction = (np.asarray(line.get_ydata()) for line in ax.get_lines())
    np.testing.assert_allclose(norm, path.norm[1:])
    slope = (prediction[-1] - prediction[-2]) / np.log(50)
    np.testing.assert_allclose(slope, np.linalg.norm(path.svm.weight))
    np.testing.assert_allclose(on_the_right(ax), path.direction_cosine[1:])
    finite = descend([[1, 1], [1, 1]], [0, 0], [0, 1], np.eye(2) + 1, num_steps=20)
    assert "separated" not in repr(finite)
    assert "nothing is separated" in repr(finite.svm)
    ax = implicit_bias(finite)
    np.testing.assert_allclose(on_the_right(ax), finite.distance_to_minimum_norm)
    with pytest.raises(ValueError, match="path: has no record at a positive step"):
        implicit_bias(descend(COUNTS, LAST, LABELS, np.eye(3), num_steps=5, at=[0]))
