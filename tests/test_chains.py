import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_law, assert_mean, markov_law

import attnmarkov as am


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_stationary_law_against_eigenvector(key, size):
    p = np.asarray(am.random_transition_matrix(key, size), np.float64)
    values, vectors = np.linalg.eig(p.T)
    expected = np.real(vectors[:, np.argmax(np.real(values))])
    chain = am.MarkovChain.from_transition_matrix(p)
    np.testing.assert_allclose(chain.stationary(), expected / expected.sum(), atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda c: c.stationary())(chain), chain.stationary())


def test_stationary_law_is_accurate_in_every_entry():
    # p01 / p10 = 1e-7: the rare state's mass keeps its relative precision.
    chain = am.MarkovChain.from_transition_matrix([[1 - 1e-8, 1e-8], [0.1, 0.9]])
    np.testing.assert_allclose(chain.stationary()[1], 1e-7, rtol=1e-5)


def test_transient_tokens_and_several_closed_classes():
    chain = am.MarkovChain.from_transition_matrix([[0, 1, 0], [0, 0.5, 0.5], [0, 0.25, 0.75]])
    np.testing.assert_allclose(chain.stationary(), [0, 1 / 3, 2 / 3], rtol=1e-6)
    two = am.MarkovChain.from_transition_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"not unique; closed classes: \[0\], \[1\]"):
        two.stationary()
    assert "no unique stationary law" in repr(two)


def test_entropy_rate(key):
    p = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.4, 0.6]])
    chain = am.MarkovChain.from_transition_matrix(p)
    pi = np.linalg.matrix_power(p, 4000)[0]
    logs = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(chain.entropy_rate(), -(pi[:, None] * p * logs).sum(), rtol=1e-6)


def test_sample_law_from_stationarity_and_from_elsewhere(key):
    p = [[0.7, 0.3, 0.0], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]
    chain = am.MarkovChain.from_transition_matrix(p)
    tokens = chain.sample(key, 4, 50_000)
    assert tokens.dtype == jnp.int32
    assert_law(tokens, markov_law(p, np.asarray(chain.stationary(), float), 4))
    start = [0.0, 1.0, 0.0]
    assert_law(chain.sample(key, 3, 50_000, initial=start), markov_law(p, start, 3))


def test_sample_is_stable_in_length_and_batch(key):
    chain = am.MarkovChain.from_transition_matrix(am.random_transition_matrix(key, 5))
    whole = chain.sample(key, 300, 8)
    np.testing.assert_array_equal(whole[:3, :140], chain.sample(key, 140, 3))


def test_random_transition_matrix_is_dirichlet(key):
    matrices = jax.vmap(lambda k: am.random_transition_matrix(k, 3, 2.0))(
        jax.random.split(key, 20_000)
    )
    np.testing.assert_allclose(matrices.sum(-1), 1, atol=1e-6)
    assert_mean(matrices[:, 1, 2], 1 / 3)
    assert_mean((matrices[:, 0, 0] - 1 / 3) ** 2, (1 / 3) * (2 / 3) / 7)  # Dirichlet variance


def test_zipf_law():
    law = am.zipf_law(4, 2.0)
    np.testing.assert_allclose(law / law[0], [1, 1 / 4, 1 / 9, 1 / 16], rtol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.4]], "transition_matrix: row 1 sums to 0.9, not 1"),
        ([[1.5, -0.5], [0.5, 0.5]], r"transition_matrix: entry \[0, 1\] is negative \(-0.5\)"),
        ([[0.5, 0.5], [float("nan"), 0.5]], r"transition_matrix: entry \[1, 0\] is NaN"),
        ([[0.5, 0.5]], r"transition_matrix: expected a square \(K, K\) array, got shape \(1, 2\)"),
        (np.zeros((0, 0)), "transition_matrix: expected a square"),
        ([["a", "b"], ["c", "d"]], "transition_matrix: expected an array of real numbers"),
    ],
)
@pytest.mark.parametrize("cls", [am.MarkovChain, am.CCMC])
def test_bad_matrices(cls, matrix, message):
    with pytest.raises(ValueError, match=message):
        cls.from_transition_matrix(matrix)


def test_bad_arguments(key):
    chain = am.MarkovChain.from_transition_matrix([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match="num_steps: must be at least 1, got -3"):
        chain.sample(key, -3)
    with pytest.raises(ValueError, match="num_trajectories: must be at least 1, got 0"):
        chain.sample(key, 3, 0)
    with pytest.raises(ValueError, match=r"num_steps: expected an integer, got 2\.5"):
        chain.sample(key, 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"initial: sums to 0\.8"):
        chain.sample(key, 3, initial=[0.5, 0.3])
    with pytest.raises(ValueError, match="initial: expected shape"):
        chain.sample(key, 3, initial=[1.0])
    with pytest.raises(ValueError, match="key: expected a typed key"):
        chain.sample(jnp.zeros(2, jnp.uint32), 3)
    with pytest.raises(ValueError, match="key: expected a single key"):
        chain.sample(jax.random.split(key), 3)
    with pytest.raises(ValueError, match="concentration: must be one number above 0, got -1"):
        am.random_transition_matrix(key, 3, -1.0)
    with pytest.raises(ValueError, match="num_tokens: must be at least 1, got 0"):
        am.random_transition_matrix(key, 0)
