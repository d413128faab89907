"""Predictions of decoded generation, against enumeration and float64 NumPy."""

import numpy as np
import pytest

from attnmarkov.dynamics import two_token_phases
from attnmarkov.dynamics.decoding import (
    DECODING_REGIMES,
    decoding_cost,
    predict_decoding,
    staying_probability,
)
from attnmarkov.model import CCMC

P = np.array([[0.5, 0.3, 0.2], [0.25, 0.6, 0.15], [0.2, 0.1, 0.7]])
MODEL = CCMC.from_transition_matrix(P)


def law(m, p, power, heat):
    """Decoded law of every query, as a matrix."""
    weight = np.where(m > 0, m, 1.0) ** power * (m > 0) * p ** (1 / heat)
    return weight / weight.sum(axis=1, keepdims=True)


def stationary(matrix):
    values, vectors = np.linalg.eig(matrix.T)
    v = np.real(vectors[:, np.argmin(abs(values - 1))])
    return v / v.sum()


@pytest.mark.parametrize("shares", [[0.2, 0.3, 0.5], [0.6, 0.0, 0.4], [0.0, 1.0, 0.0]])
@pytest.mark.parametrize("setting", [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (2.0, 1.3, 0.8)])
def test_cost_is_the_expected_surprise(shares, setting):
    exponent, temperature, penalty = setting
    m, heat = np.array(shares), temperature / penalty
    drawn, own = law(m, P, exponent / heat, heat), law(m, P, 1.0, 1.0)
    visits = stationary(drawn)
    terms = np.where(drawn > 0, drawn * -np.log(np.where(own > 0, own, 1)), 0)
    cost = decoding_cost(
        MODEL, m, exponent=exponent, temperature=temperature, repetition_penalty=penalty
    )
    np.testing.assert_allclose(cost, visits @ terms.sum(axis=1), rtol=1e-5, atol=1e-7)
    batch = decoding_cost(
        MODEL,
        np.stack([m, 7 * m]),
        exponent=exponent,
        temperature=temperature,
        repetition_penalty=penalty,
    )
    np.testing.assert_allclose(batch, [cost, cost], rtol=1e-5, atol=1e-7)


def stays(p, counts, last, num_steps, power, heat):
    """Chance that each token alone comes, one step after the other."""
    out = []
    for w in range(len(p)):
        n, at, chance = counts.astype(float).copy(), last, 1.0
        for _ in range(num_steps):
            chance *= law(n, p, power, heat)[at, w]
            n[w], at = n[w] + 1, w
        out.append(chance)
    return out


@pytest.mark.parametrize(
    ("setting", "num_steps"),
    [((1.0, 1.0, 1.0), 1), ((1.0, 1.0, 1.0), 40), ((1.0, 0.7, 1.2), 400), ((0.5, 1.0, 1.0), 200)],
)
def test_staying_probability_step_by_step(setting, num_steps):
    exponent, temperature, penalty = setting
    heat = temperature / penalty
    counts, last = np.array([[3, 20, 1], [4, 2, 0], [30, 1, 2]]), np.array([1, 0, 2])
    found = staying_probability(
        MODEL,
        counts,
        last,
        num_steps,
        exponent=exponent,
        temperature=temperature,
        repetition_penalty=penalty,
    )
    expected = [
        stays(P, n, q, num_steps, exponent / heat, heat) for n, q in zip(counts, last, strict=True)
    ]
    with np.errstate(divide="ignore"):
        logs = np.log(found), np.log(expected)
    np.testing.assert_allclose(*logs, rtol=1e-5, atol=3e-6)  # of float32 logits
    assert found[1, 2] == 0
    single = staying_probability(MODEL, counts[0], int(last[0]), 5)
    np.testing.assert_allclose(single, stays(P, counts[0], 1, 5, 1.0, 1.0), rtol=1e-5)


def test_staying_probability_of_long_runs():
    """Polya's urn: the product is a ratio of gamma functions."""
    from scipy.special import gammaln

    urn = CCMC.from_transition_matrix([[0.5, 0.5], [0.5, 0.5]])
    n, total, steps = 9_990.0, 10_000.0, 10**8
    exact = gammaln(n + steps) - gammaln(n) - gammaln(total + steps) + gammaln(total)
    found = staying_probability(urn, [9_990, 10], 0, steps)
    np.testing.assert_allclose(np.log(found[0]), exact, rtol=1e-5)


def test_staying_probability_under_masks():
    masked = CCMC.from_transition_matrix([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    np.testing.assert_allclose(staying_probability(masked, [2, 1, 1], 1, 1), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(staying_probability(masked, [2, 1, 1], 1, 2), [0, 1 / 6, 0])
    np.testing.assert_allclose(staying_probability(masked, [1, 0, 0], 0, 2), [0, 0, 0])


def test_regimes():
    plain = predict_decoding(MODEL)
    assert plain.regime == DECODING_REGIMES[1] == "power-law collapse"
    np.testing.assert_allclose(plain.entropies, 0)
    np.testing.assert_allclose(plain.costs, 0, atol=1e-12)
    assert predict_decoding(MODEL, repetition_penalty=1.2).regime == "finite-time fixation"
    flat = predict_decoding(MODEL, temperature=2.0)
    assert flat.regime == "all tokens keep a share"
    assert flat.shares.shape == (1, 3)
    np.testing.assert_allclose(flat.costs, decoding_cost(MODEL, flat.shares, temperature=2.0))
    mixing = CCMC.from_transition_matrix([[0.2, 0.8], [0.7, 0.3]])
    assert predict_decoding(mixing).regime == "all tokens keep a share"
    text = repr(flat)
    assert text.startswith("DecodingPrediction(power 0.5, all tokens keep a share; entropy 1.0")


def test_one_power_for_temperature_and_penalty():
    for a, b in (
        ({"temperature": 1.6}, {"temperature": 0.8, "repetition_penalty": 0.5}),
        (
            {"exponent": 0.9, "temperature": 1.5},
            {"exponent": 0.9, "temperature": 3.0, "repetition_penalty": 2.0},
        ),
    ):
        x, y = predict_decoding(MODEL, **a), predict_decoding(MODEL, **b)
        assert x.power == pytest.approx(y.power)
        np.testing.assert_allclose(x.shares, y.shares, atol=1e-6)
        np.testing.assert_allclose(x.costs, y.costs, atol=1e-6)
    rounded = predict_decoding(MODEL, exponent=1.5, temperature=0.3, repetition_penalty=0.2)
    assert 1.5 / (0.3 / 0.2) != 1
    assert rounded.power == 1
    assert rounded.equilibria.complete


def test_two_tokens_in_closed_form():
    p, q = 0.35, 0.45
    model = CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])
    found = predict_decoding(model, temperature=1.8, repetition_penalty=1.2)
    share = two_token_phases(p, q, temperature=1.5).shares[0]
    np.testing.assert_allclose(found.shares, [[share, 1 - share]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be"),
        ({"temperature": -1.0}, "temperature: must be"),
        ({"exponent": 1e7}, "exponent: must lie between"),
    ],
)
def test_bad_settings(change, message):
    for call in (
        lambda: predict_decoding(MODEL, **change),
        lambda: decoding_cost(MODEL, [1, 1, 1], **change),
        lambda: staying_probability(MODEL, [1, 1, 1], 0, 3, **change),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 0, 3), r"counts: expected shape \(3,\), got \(2,\)"),
        (([1, -1, 1], 0, 3), "counts: must not be negative, got -1"),
        (([1, 1, 1], 3, 3), "last: .*3"),
        (([1, 1, 1], 0, 0), "num_steps: must be at least 1, got 0"),
        (([[1, 1, 1]], [0, 1], 1), r"counts: expected shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_bad_counts(arguments, message):
    with pytest.raises(ValueError, match=message):
        staying_probability(MODEL, *arguments)
    with pytest.raises(ValueError, match="shares: expected 3 entries"):
        decoding_cost(MODEL, [1, 1])
