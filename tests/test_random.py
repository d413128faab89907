import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_law, assert_mean

from attnmarkov import _random

PROBS = [0.3, 0.0, 0.05, 0.5, 0.15]
LAW = {(i,): p for i, p in enumerate(PROBS) if p > 0}


def bits_for(key, n):
    return jax.random.bits(key, (2, n), jnp.uint32)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-36, 1e20, 1e37])
def test_draw_has_the_law(key, scale):
    weights = jnp.broadcast_to(jnp.array(PROBS) * scale, (200_000, 5))
    tokens = jax.jit(_random.draw)(weights, bits_for(key, 200_000))
    assert_law(np.asarray(tokens)[:, None], LAW)
    by_column = jax.jit(lambda w, b: _random.draw(w, b, axis=0))(weights.T, bits_for(key, 200_000))
    np.testing.assert_array_equal(tokens, by_column)


def test_lookup_has_the_law(key):
    table = _random.fixed_table(jnp.array(PROBS))
    tokens = _random.lookup(table, bits_for(key, 200_000))
    assert_law(np.asarray(tokens)[:, None], LAW)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65])
def test_lookup_agrees_with_exact_thresholds(key, size):
    # Python integers of unlimited size as the oracle; the most likely token stands last.
    probs = np.asarray(jax.random.dirichlet(key, jnp.full(size, 0.3)), np.float64)
    table = _random.fixed_table(jnp.asarray(probs, jnp.float32))
    bits = np.array(bits_for(key, 2000))
    bits[0, :1000] = np.resize(table.high, 1000)  # where the low word decides
    got = np.asarray(_random.lookup(table, jnp.asarray(bits)))
    order = np.arange(size)
    top = int(np.float32(probs).argmax())
    order[[top, size - 1]] = order[[size - 1, top]]
    p32 = jnp.asarray(probs, jnp.float32)
    p32 = np.asarray(p32 / p32.sum())[order]
    edges = np.cumsum([int(float(p) * 2**64) for p in p32[:-1]], dtype=object)
    for u, token in zip((int(a) << 32 | int(b) for a, b in bits.T), got, strict=True):
        slot = sum(bool(edge <= u) for edge in edges)
        assert token == order[slot]


@pytest.mark.parametrize("probability", [1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_rare_tokens_come_at_their_rate(key, probability, place):
    # A token's units fill an interval of the 2**31 values of u. The chance to be drawn, summed
    # over all u near that interval, is its expected number of units: measured closely here,
    # where plain sampling would need 1e12 draws.
    n = 400_000
    weights = jnp.insert(jnp.array([0.75, 0.25]), place, probability)
    before = 0.25 if place == 2 else 0.0  # the largest weight is left out of the running sum
    first = max(int(before / (1 + probability) * 2**31) - 40, 0)
    reach = 400
    u = jnp.asarray(first + np.arange(n) % reach, jnp.uint32) << 1
    v = jax.random.bits(key, (n,), jnp.uint32)
    token = _random.draw(jnp.broadcast_to(weights, (n, 3)), jnp.stack([u, v]))
    units = (np.asarray(token) == place).reshape(-1, reach).sum(axis=1)
    assert_mean(units, probability / (1 + probability) * 2**31)


@pytest.mark.parametrize("size", [300, 70_000])
def test_many_equal_weights_are_all_drawn_at_their_rate(key, size):
    # Token 0, taken as the largest, has the end of the interval of u, and token K-1 stands
    # before it. Rounded up together the others' units would run into token 0's.
    unit = 2**31 / size
    for back, token in ((0.5, 0), (1.5, size - 1)):
        u = jnp.full(40, int(2**31 - back * unit), jnp.uint32) << 1
        bits = jnp.stack([u, jax.random.bits(key, (40,), jnp.uint32)])
        assert set(_random.draw(jnp.ones((40, size)), bits).tolist()) == {token}


def test_draw_never_returns_what_has_no_weight(key):
    weights = jnp.array([[0.0, 1e-30, 0.0], [0.0, 0.0, 0.0], [jnp.nan, 1, 1], [jnp.inf, 1, 1]])
    edges = jnp.array([0, 2**32 - 1], jnp.uint32)
    for word in edges:
        tokens = _random.draw(weights, jnp.full((2, 4), word, jnp.uint32))
        assert tokens.tolist() == [1, -1, -1, -1]


def test_words_depend_on_lane_and_step_alone(key):
    keys = _random.replicate_keys(key, jnp.arange(7), "test")
    whole = _random.lane_words(keys, _random.BLOCK, 3)
    part = _random.lane_words(keys[2:5], 17, 3)
    np.testing.assert_array_equal(whole[:17, :, 2:5], part)


@pytest.mark.parametrize("num_steps", [0, 1, 127, 128, 129, 300])
def test_scan_and_advance_use_the_same_words(key, num_steps):
    keys = _random.replicate_keys(key, jnp.arange(3), "test")
    blocks = [_random.lane_words(keys, _random.BLOCK, b)[:, 0] for b in range(3)]
    expected = jnp.concatenate(blocks)[:num_steps]
    _, out = _random.scan_steps(lambda s, b: (s, b[0]), 0, keys, num_steps)
    np.testing.assert_array_equal(out, expected)
    for cut in {0, num_steps // 3, num_steps}:
        total = jnp.zeros(3, jnp.uint32)
        for a, b in ((0, cut), (cut, num_steps)):
            total = _random.advance(
                lambda s, w: s + w[0], total, keys, jnp.asarray(a), jnp.asarray(b)
            )
        np.testing.assert_array_equal(total, expected.sum(0, dtype=jnp.uint32))
