"""The drift of the mean field and its flow, against NumPy and SciPy in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import attnmarkov as am
from attnmarkov.dynamics import drift, growth_exponents, mean_field, stationary_law

P = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.3, 0.6]])


def frozen(p, m, a=1.0, temperature=1.0):
    """Stationary law by the matrix-tree theorem: sums of products, nothing subtracted."""
    weight = m**a * p ** (1 / temperature)
    law = weight / weight.sum(axis=1, keepdims=True)
    k = len(m)
    out = np.zeros(k)
    for root in range(k):
        others = [i for i in range(k) if i != root]
        for choice in np.ndindex(*[k] * len(others)):
            edges = dict(zip(others, choice, strict=True))
            for i in others:
                j, seen = i, 0
                while j != root and seen <= k:
                    j, seen = edges[j], seen + 1
                if j != root:
                    break
            else:
                out[root] += np.prod([law[i, j] for i, j in edges.items()])
    return out / out.sum()


@pytest.fixture(scope="module")
def model():
    return am.CCMC.from_transition_matrix(P)


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 1.0), (2.0, 1.0), (0.6, 0.8)])
def test_stationary_law_near_faces(model, exponent, temperature):
    shares = np.array([[0.2, 0.3, 0.5], [1, 1e-12, 1e-7], [1e-9, 1e-3, 1], [1e-12, 1, 1e-12]])
    got = stationary_law(model, shares, exponent=exponent, temperature=temperature)
    want = [frozen(P, m / m.sum(), exponent / temperature, temperature) for m in shares]
    np.testing.assert_allclose(got, want, rtol=3e-5)
    m = shares / shares.sum(axis=1, keepdims=True)
    moved = drift(model, shares, exponent=exponent, temperature=temperature)
    np.testing.assert_allclose(moved, np.array(want) - m, atol=2e-6)
    growth = growth_exponents(model, shares, exponent=exponent, temperature=temperature)
    np.testing.assert_allclose(growth, np.array(want) / m, rtol=5e-5)


def test_absent_tokens_and_transformations(model):
    law = stationary_law(model, [[3, 0, 5], [0, 2, 0]])  # counts will do
    pair = frozen(P[np.ix_([0, 2], [0, 2])], np.array([3, 5]) / 8)
    np.testing.assert_allclose(law, [[pair[0], 0, pair[1]], [0, 1, 0]], rtol=1e-5)
    growth = growth_exponents(model, [0, 1, 0])
    np.testing.assert_allclose(growth, P[1] / P[1, 1], rtol=1e-5)
    np.testing.assert_array_equal(growth_exponents(model, [0, 1, 0], exponent=2.0), [0, 1, 0])
    absent = growth_exponents(model, [0, 1, 0], exponent=0.5)
    np.testing.assert_array_equal(absent, [np.inf, 1, np.inf])
    shares = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    batched = jax.vmap(lambda m: drift(model, m))(shares)
    np.testing.assert_allclose(jax.jit(drift)(model, shares), batched, atol=1e-6)


def test_masked_tokens():
    masked = am.CCMC.from_transition_matrix([[0.5, 0.5, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(stationary_law(masked, [1, 1, 2]), [0.5, 0.5, 0], atol=1e-6)
    with pytest.raises(
        ValueError,
        match=r"shares: masked tokens keep \[1\] and \[0\] apart|"
        r"shares: masked tokens keep \[0\] and \[1\] apart",
    ):
        stationary_law(am.CCMC.from_transition_matrix(np.eye(2)), [0.5, 0.5])
    flow = mean_field(masked, [1, 1, 2], at=[0.0, 1.0, 3.0])
    np.testing.assert_allclose(flow.shares[0, :, 2], 0.5 * np.exp([0, -1, -3]), rtol=1e-4)


def reference(p, m0, times, a=1.0):
    def field(_, z):
        m = np.exp(z)
        return frozen(p, m / m.sum(), a) / m - 1

    solved = solve_ivp(field, (0, times[-1]), np.log(m0), t_eval=times, rtol=1e-9, atol=1e-10)
    return np.exp(solved.y.T)


def test_flow_against_scipy(model):
    starts = np.array([[0.2, 0.3, 0.5], [0.6, 0.399, 0.001]])
    times = np.array([0.0, 1.0, 5.0, 25.0])
    flow = mean_field(model, starts, at=times)
    assert flow.shares.shape == (2, 4, 3)
    for got, start in zip(flow.shares, starts, strict=True):
        np.testing.assert_allclose(got, reference(P, start, times), rtol=3e-4)
    assert float(flow.shares.min()) < 1e-3  # decayed shares are compared too
    super_ = mean_field(model, starts, at=times, exponent=1.5)
    np.testing.assert_allclose(super_.shares[0], reference(P, starts[0], times, 1.5), rtol=1e-3)


@pytest.mark.parametrize("winner", [0, 2])  # whichever comes first or last in the elimination
def test_decay_keeps_its_exponent_to_the_end_of_float32(model, winner):
    start = np.where(np.arange(3) == winner, 1, 0.01)
    flow = mean_field(model, start, at=[40.0, 80.0, 400.0])
    others = np.arange(3) != winner
    rare = np.asarray(flow.shares[0, :2], np.float64)[:, others]
    slope = np.diff(np.log(rare), axis=0)[0] / 40
    np.testing.assert_allclose(slope, (P[winner] / P[winner, winner] - 1)[others], atol=2e-4)
    assert flow.shares[0, -1].tolist() == (np.arange(3) == winner).tolist()  # below 1e-45


def test_flow_prints_and_single_start(model):
    flow = mean_field(model, [5, 3, 0], log_time=2.0, num_points=3)
    np.testing.assert_allclose(flow.log_time, [0, 1, 2])
    assert flow.shares.shape == (1, 3, 3)
    assert (flow.shares[..., 2] == 0).all()
    assert "1 starts of 3 tokens, 3 points up to log time 2" in repr(flow)
    assert "[0.625 0.375 0.   ] ->" in repr(flow)
    assert "MeanField(log_time=" in repr(jax.eval_shape(lambda: flow))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m0": [0.5, 0.5]}, "m0: expected 3 entries on the last axis"),
        ({"m0": [[1, 1, 1], [1, -1, 1]]}, r"m0: row \[1\] has a negative entry: \[ 1. -1.  1.\]"),
        ({"m0": [0, 0, 0]}, "m0: the vector has no token"),
        ({"m0": [np.nan, 0, 1]}, r"m0: entry \[0\] is nan"),
        ({"m0": np.ones((1, 1, 3))}, r"m0: expected shape \(K,\) or \(B, K\)"),
        ({"log_time": 0.0}, "log_time: must be above 0, got 0.0"),
        ({"num_points": 1}, "num_points: must be at least 2, got 1"),
        ({"at": []}, "at: expected a non-empty vector"),
        ({"at": [1.0, 1.0]}, "at: log times must increase"),
        ({"at": [-1.0]}, "at: log times must increase from at least 0"),
        ({"temperature": 0.0}, "temperature: must be positive and finite, got 0"),
        ({"exponent": 1e7}, "exponent: must lie between"),
    ],
)
def test_bad_arguments(model, change, message):
    with pytest.raises(ValueError, match=message):
        mean_field(model, **{"m0": [1, 1, 1], **change})


def test_large_powers_and_low_temperatures():
    model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.6, 0.4]])
    grown = growth_exponents(model, [0.5, 0.5], exponent=1e6)  # equal shares: any power is plain
    np.testing.assert_allclose(grown, [1.5, 0.5], rtol=1e-5)
    with pytest.raises(ValueError, match=r"temperature: at power 1e\+30 the chances to leave"):
        stationary_law(model, [0.4, 0.6], temperature=1e-30)


def test_shares_below_float32_are_absent():
    model = am.CCMC.from_transition_matrix([[0.8, 0.2], [0.6, 0.4]])
    for tiny in (1e-40, 1e-39, 1e-300):
        law = stationary_law(model, [tiny, 1.0])
        np.testing.assert_array_equal(law, [0, 1])
    np.testing.assert_allclose(growth_exponents(model, [1e-37, 1.0])[0], 1.5, rtol=1e-4)
