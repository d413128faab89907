import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_law, assert_mean, threefry

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


def draw_few(weights, bits):
    return _random.draw_few(list(weights.T), bits)


@pytest.mark.parametrize("draw", [_random.draw, draw_few])
@pytest.mark.parametrize("probability", [1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_rare_tokens_come_at_their_rate(key, probability, place, draw):
    # A token's share of the 2**32 values of the first word is its probability. Counted here
    # over all values near where its share lies, where plain sampling would need 1e12 draws.
    reach, passes = 4000, 400
    weights = jnp.insert(jnp.array([0.75, 0.25]), place, probability)
    before = float(weights[:place].sum() / weights.sum())
    first = int(np.clip(before * 2**32 - 1000, 0, 2**32 - reach))
    word = jnp.asarray(np.tile(first + np.arange(reach), passes), jnp.uint32)
    v = jnp.repeat(jax.random.bits(key, (passes,), jnp.uint32), reach)
    token = draw(jnp.broadcast_to(weights, (word.size, 3)), (word, v))
    share = (np.asarray(token) == place).reshape(passes, reach).sum(axis=1)
    assert_mean(share, probability / (1 + probability) * 2**32)


@pytest.mark.parametrize("size", [300, 70_000])
def test_many_equal_weights_keep_their_places(key, size):
    # Were all rounded up or down together, the last ones would be far from their share.
    picked = np.unique(np.linspace(0, size - 1, 40).astype(int))
    word = jnp.asarray((picked + 0.5) / size * 2**32, jnp.uint32)
    bits = word, jax.random.bits(key, (picked.size,), jnp.uint32)
    tokens = _random.draw(jnp.ones((picked.size, size)), bits)
    np.testing.assert_array_equal(tokens, picked)


def test_draw_few_has_the_law(key):
    weights = jnp.broadcast_to(jnp.array(PROBS) * 1e5, (200_000, 5))
    bits = bits_for(key, 200_000)
    assert_law(np.asarray(draw_few(weights, (bits[0], bits[1])))[:, None], LAW)
    nothing = draw_few(jnp.zeros((2, 5)), (bits[0, :2], bits[1, :2]))
    assert nothing.tolist() == [5, 5]


def test_below_is_the_exact_product():
    rng = np.random.default_rng(5)
    a, b, n = (rng.integers(0, 2**bits, 2000, np.uint64) for bits in (32, 32, 31))
    a[:3], b[:3], n[:3] = [0, 2**32 - 1, 2**32 - 1], [7, 2**32 - 1, 0], [7, 2**31 - 1, 1]
    got = _random.below(
        (jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32)), jnp.asarray(n, jnp.uint32)
    )
    fraction = [(int(x) << 8 | int(y) & 255) * int(m) for x, y, m in zip(a, b, n, strict=True)]
    off = np.array([f >> 40 for f in fraction]) - np.asarray(got)
    # The lowest byte of n is left out of the product with the lowest byte of the fraction.
    near = np.array([f % 2**40 < 2**16 for f in fraction])
    assert (off[~near] == 0).all()
    assert set(off[near].tolist()) <= {0, 1}


def test_draw_never_returns_what_has_no_weight(key):
    weights = jnp.array([[0.0, 1e-30, 0.0], [0.0, 0.0, 0.0], [jnp.nan, 1, 1], [jnp.inf, 1, 1]])
    edges = jnp.array([0, 2**32 - 1], jnp.uint32)
    for word in edges:
        tokens = _random.draw(weights, jnp.full((2, 4), word, jnp.uint32))
        assert tokens.tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize(
    ("key_words", "counter", "expected"),
    [  # known answers of the authors' library (Random123)
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_known_answers(key_words, counter, expected):
    ours = _random.threefry(*(jnp.asarray(w, jnp.uint32) for w in (*key_words, *counter)))
    assert tuple(int(w) for w in ours) == expected
    assert tuple(int(w) for w in threefry(*key_words, *counter)) == expected


def test_words_depend_on_lane_step_and_stream_alone(key):
    seeds = _random.replicate_seeds(key, jnp.arange(7), "test")
    assert np.unique(seeds, axis=1).shape == (2, 7)
    steps = np.array([0, 1, 5, 2**32 - 1], np.uint32)[:, None]
    whole = _random.words(seeds, steps, 3)
    part = _random.words(seeds[:, 2:5], jnp.uint32(5), 3)
    np.testing.assert_array_equal(np.stack(whole)[:, 2, 2:5], np.stack(part))
    s0, s1 = np.asarray(seeds)
    np.testing.assert_array_equal(whole, threefry(s0, s1, steps, 3))
    other = _random.replicate_seeds(key, jnp.arange(7), "other")
    assert not (np.asarray(other) == np.asarray(seeds)).any()


def test_scan_steps_may_start_anywhere(key):
    seeds = _random.replicate_seeds(key, jnp.arange(3), "test")
    _, whole = _random.scan_steps(lambda s, b: (s, b[0]), 0, seeds, 30)
    _, late = _random.scan_steps(lambda s, b: (s, b[0]), 0, seeds, 10, start=20)
    np.testing.assert_array_equal(whole[20:], late)
    np.testing.assert_array_equal(whole, _random.words(seeds, np.arange(30)[:, None])[0])
