from typing import Any

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from oracles import greedy, hf_sampling

from attnmarkov.model import Greedy, Sampling

SIZE = 7
seeds = st.integers(0, 2**31)


def random_law(seed, missing=2):
    """A law in general position, some of whose tokens cannot come."""
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.full(SIZE, 0.7))
    law[rng.permutation(SIZE)[:missing]] = 0
    return law / law.sum()


def logs(law):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(law), jnp.float32)


def far_from_a_threshold(law, temperature, top_k, top_p, repetition_penalty):
    """Whether float32 cannot change which tokens are cut."""
    if top_p is None:
        return True
    kept = hf_sampling(temperature, top_k, None, repetition_penalty)(law)
    above = np.sort(kept)[::-1].cumsum()
    return np.abs(above - top_p).min() > 1e-4


@given(
    seeds,
    st.integers(0, SIZE - 1),
    st.floats(0.2, 5),
    st.none() | st.integers(1, SIZE + 2),
    st.none() | st.floats(0.02, 1),
    st.floats(0.5, 2),
)
def test_sampling_is_that_of_hugging_face(seed, missing, temperature, top_k, top_p, penalty):
    law = random_law(seed, missing)
    assume(far_from_a_threshold(law, temperature, top_k, top_p, penalty) or top_p == 1)
    parameters = (temperature, top_k, top_p, penalty)
    decoder = Sampling(*parameters)
    decoder.check()
    expected = hf_sampling(*parameters)(law)
    got = np.asarray(decoder.law(logs(law) + 3.0))  # in any normalisation
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("decoder", "rule"),
    [
        (Sampling(), hf_sampling()),
        (Sampling(temperature=0.5), lambda law: law**2 / (law**2).sum()),
        (Sampling(0.5, repetition_penalty=0.5), hf_sampling()),
        (Sampling(repetition_penalty=3.0), lambda law: law**3 / (law**3).sum()),
        (Sampling(top_k=1), greedy),
        (Sampling(top_p=1e-9), greedy),
        (Sampling(temperature=1e-45), greedy),
        (Sampling(top_k=SIZE), hf_sampling()),
        (Sampling(top_k=10**6), hf_sampling()),
        (Sampling(top_p=1.0), hf_sampling()),
        (Greedy(), greedy),
    ],
)
def test_special_cases(decoder, rule):
    for seed in range(5):
        law = random_law(seed)
        np.testing.assert_allclose(decoder.law(logs(law)), rule(law), rtol=1e-4, atol=1e-7)


def test_the_order_is_temperature_then_top_k_then_top_p():
    law = np.array([0.4, 0.3, 0.2, 0.1])
    # Squared: 16 9 4 1 of 30. Of three, 16 9 4 of 29: 25/29 < 0.87 <= 26/29, so all three stay;
    # without top-k 25/30 < 0.87 too; without temperature 0.7 / 0.9 < 0.87.
    got = Sampling(0.5, 3, 0.87).law(logs(law))
    np.testing.assert_allclose(got, np.array([16, 9, 4, 0]) / 29, rtol=1e-5)
    got = Sampling(0.5, 3, 0.86).law(logs(law))  # 25/29 = 0.862 >= 0.86, but 25/30 is not
    np.testing.assert_allclose(got, np.array([16, 9, 0, 0]) / 25, rtol=1e-5)
    got = Sampling(1.0, None, 0.86).law(logs(law))
    np.testing.assert_allclose(got, np.array([4, 3, 2, 0]) / 9, rtol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (Sampling(top_k=1), [0, 1, 1, 0, 0]),  # ties with the k-th stay
        (Sampling(top_k=2), [0, 1, 1, 0, 0]),
        (Sampling(top_k=3), [1, 1, 1, 0, 1]),
        (Sampling(top_p=0.25), [0, 1, 1, 0, 0]),
        (Sampling(top_p=0.51), [0, 1, 1, 0, 0]),  # 2/3 are reached by the first two
        (Sampling(top_p=0.66), [0, 1, 1, 0, 0]),
        (Sampling(top_p=0.68), [1, 1, 1, 0, 1]),  # tied tokens come together
        (Sampling(top_k=2, top_p=0.99), [0, 1, 1, 0, 0]),
        (Greedy(), [0, 1, 0, 0, 0]),  # the lowest id
    ],
)
def test_ties(decoder, expected):
    weights = np.array([1.0, 2.0, 2.0, 0.0, 1.0])
    got = decoder.law(logs(weights))
    expected = np.array(expected) * weights
    np.testing.assert_allclose(got, expected / expected.sum(), atol=1e-6)


@given(seeds, st.permutations(range(5)))
def test_the_law_does_not_depend_on_the_order_of_tokens(seed, order):
    weights = np.random.default_rng(seed).integers(0, 3, size=5) + np.eye(5)[0]
    for decoder in (Sampling(top_k=2), Sampling(top_p=0.6), Sampling(0.5, 3, 0.7)):
        np.testing.assert_allclose(
            decoder.law(logs(weights[order])),
            decoder.law(logs(weights))[np.array(order)],
            atol=1e-6,
        )


@pytest.mark.parametrize(
    "decoder",
    [
        Sampling(),
        Sampling(0.6),
        Sampling(top_k=2),
        Sampling(top_p=0.7),
        Sampling(2, 3, 0.8),
        Greedy(),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_any_axis(decoder, axis):
    batch = np.stack([random_law(seed) for seed in range(6)])
    expected = np.stack([np.asarray(decoder.law(logs(law))) for law in batch])
    laws = np.moveaxis(np.stack([batch] * 2), -1, axis if axis >= 0 else 3 + axis)
    got = np.moveaxis(np.asarray(decoder.law(logs(laws), axis=axis)), axis, -1)
    np.testing.assert_allclose(got, np.stack([expected] * 2), atol=1e-6)


@pytest.mark.parametrize("level", [-500.0, 500.0, -3e38])
def test_log_weights_beyond_the_range_of_float32(level):
    weights = jnp.array([level, level, -np.inf, -np.inf])
    for decoder in (Sampling(), Sampling(0.5), Sampling(top_k=3), Sampling(top_p=0.9)):
        np.testing.assert_allclose(decoder.law(weights), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(Greedy().law(weights), [1, 0, 0, 0])


def test_unlikely_tokens_are_not_lost():
    # Nothing is cut, so a token of probability e**-500 keeps its logarithm, and 1e-9 its mass.
    weights = jnp.array([0.0, -500.0, np.log(1e-9)])
    for decoder in (Sampling(), Sampling(top_k=3), Sampling(top_p=1.0)):
        np.testing.assert_allclose(decoder.log_law(weights), weights)
    np.testing.assert_allclose(Sampling(2.0).log_law(weights), weights / 2)


def test_top_p_next_to_one_does_not_undo_top_k():
    # The masses of the 500 kept sum to 1 within rounding only.
    laws = logs(np.random.default_rng(1).dirichlet(np.ones(1000), 20))
    for top_p in (1.0, 1 - 2**-24, 0.999999):
        kept = (Sampling(top_k=500, top_p=top_p).law(laws) > 0).sum(-1)
        assert ((kept > 490) & (kept <= 500)).all()


@pytest.mark.parametrize(
    "decoder",
    [
        Sampling(),
        Sampling(1e30),
        Sampling(1e-45),
        Sampling(1e30, repetition_penalty=1e-30),
        Sampling(top_k=2),
        Sampling(top_p=0.5),
        Sampling(1, 2, 0.5),
        Greedy(),
    ],
)
def test_what_cannot_come_never_comes(decoder):
    weights = jnp.array([[-np.inf, 1.0, -np.inf], [-np.inf] * 3])
    got = np.asarray(decoder.log_law(weights))
    assert np.isfinite(got).tolist() == [[False, True, False], [False] * 3]
    assert not np.isnan(got).any()
    assert np.isnan(decoder.law(weights)[1]).all()


def test_parameters_are_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def law(decoder, log_weights):
        return decoder.law(log_weights)

    chex.clear_trace_counter()
    weights = logs(random_law(3))
    for value in (1, 2, 3):
        decoder = Sampling(0.5 * value, value, 0.3 * value, 1.0 / value)
        np.testing.assert_allclose(law(decoder, weights), decoder.law(weights), atol=1e-6)
    ks = jnp.arange(1, 8)
    laws = jax.vmap(lambda k: Sampling(top_k=k).law(weights))(ks)
    for k, got in zip(ks, laws, strict=True):
        np.testing.assert_allclose(got, Sampling(top_k=int(k)).law(weights), atol=1e-6)


def test_traced_values_are_not_checked():
    def check(decoder):
        decoder.check()
        assert not decoder.is_plain

    jax.eval_shape(check, Sampling(-1.0, 0, 7.0, 0.0))


@pytest.mark.parametrize(
    ("decoder", "plain"),
    [
        (Sampling(), True),
        (Sampling(0.7, repetition_penalty=0.7), True),
        (Sampling(jnp.ones(())), True),
        (Sampling(top_p=1.0), True),
        (Sampling(temperature=0.7), False),
        (Sampling(repetition_penalty=1.1), False),
        (Sampling(top_k=5), False),
        (Sampling(top_p=0.9), False),
        (Greedy(), False),
    ],
)
def test_is_plain(decoder, plain):
    assert decoder.is_plain is plain
    if plain:
        law = random_law(0)
        np.testing.assert_allclose(decoder.law(logs(law)), law, rtol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "text"),
    [
        (Sampling(), "Sampling()"),
        (Sampling(0.7, top_k=5), "Sampling(temperature=0.7, top_k=5)"),
        (Sampling(top_p=jnp.float32(0.9)), "Sampling(top_p=0.9)"),
        (Greedy(), "Greedy()"),
    ],
)
def test_decoders_print_on_one_line(decoder, text):
    assert repr(decoder) == text
    assert jax.tree.structure(decoder) == jax.tree.structure(jax.tree.map(lambda x: 0, decoder))


NAN, INF = float("nan"), float("inf")
AnySampling: Any = Sampling  # to give it what its types forbid


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Sampling(0), "temperature: must be positive and finite, got 0"),
        (Sampling(-1.5), "temperature: must be positive and finite, got -1.5"),
        (Sampling(INF), "temperature: must be positive and finite, got inf"),
        (Sampling(NAN), "temperature: must be positive and finite, got nan"),
        (AnySampling("hot"), "temperature: expected a number, got 'hot'"),
        (AnySampling(True), "temperature: expected a number, got True"),
        (AnySampling(np.ones(2)), "temperature: expected a number, got array"),
        (Sampling(top_k=0), "top_k: must be at least 1, got 0"),
        (AnySampling(top_k=2.0), "top_k: expected an integer, got 2.0"),
        (AnySampling(top_k=True), "top_k: expected an integer, got True"),
        (Sampling(top_p=0), r"top_p: must lie in \(0, 1\], got 0"),
        (Sampling(top_p=1.1), r"top_p: must lie in \(0, 1\], got 1.1"),
        (Sampling(top_p=NAN), r"top_p: must lie in \(0, 1\], got nan"),
        (Sampling(repetition_penalty=0), "repetition_penalty: must be positive and finite, got 0"),
        (Sampling(repetition_penalty=INF), "repetition_penalty: must be positive and finite"),
    ],
)
def test_bad_parameters(decoder, message):
    with pytest.raises(ValueError, match=message):
        decoder.check()
