"""The Pallas engine by its interpreter: the draws of scan, and of a float32 NumPy account of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import threefry

import attnmarkov as am
from attnmarkov import _random
from attnmarkov.model import Sampling, WindowContext
from attnmarkov.rollout import Pallas, Summary, rollout_chunks

INTERPRET = Pallas(interpret=True, block=16)


def model_of(size):
    return am.CCMC.from_transition_matrix(
        np.random.default_rng(size).dirichlet(np.full(size, 0.7), size)
    )


@pytest.mark.parametrize("size", [3, 16, 20])
def test_draws_are_those_of_scan(key, size):
    model, prompts = model_of(size), am.prompts.uniform(key, 37, 9, size)  # 37: blocks of 16
    arguments = model, key, prompts, 60, 37
    ours, scanned = (am.rollout(*arguments, engine=e) for e in (INTERPRET, "scan"))
    np.testing.assert_array_equal(ours.tokens, scanned.tokens)
    assert ours.tokens.dtype == scanned.tokens.dtype
    at = [0, 1, 7, 60]
    ours, scanned = (am.rollout(*arguments, e, "counts", at).counts for e in (INTERPRET, "scan"))
    np.testing.assert_array_equal(ours, scanned)


@pytest.mark.parametrize("block", [1, 8, 128])
def test_draws_do_not_depend_on_the_block(key, block):
    arguments = model_of(3), key, [0, 1, 2], 30, 11
    blocked = am.rollout(*arguments, engine=Pallas(interpret=True, block=block)).tokens
    np.testing.assert_array_equal(blocked, am.rollout(*arguments, engine="scan").tokens)


def test_selection_reads_what_a_gather_reads(key):
    # TPUs read P[last] by selection; the interpreter otherwise by the gathers of GPUs.
    from attnmarkov.rollout import pallas

    model, prompts = model_of(5), am.prompts.uniform(key, 16, 4, 5)
    seeds = _random.replicate_seeds(key, jnp.arange(16), "rollout")
    drawn = [
        pallas._launch(
            model.logits,
            seeds,
            prompts.counts,
            prompts.last,
            jnp.zeros(1, jnp.int32),
            num_steps=40,
            block=16,
            backend=backend,
            interpret=True,
        )
        for backend in ("cpu", "tpu")
    ]
    np.testing.assert_array_equal(*drawn)
    scanned = am.rollout(model, key, prompts, 40, 16, engine="scan").tokens
    np.testing.assert_array_equal(drawn[0], scanned)


def test_the_generator_in_a_kernel_is_threefry():
    from jax.experimental import pallas as pl

    def kernel(words, out):
        out[0, :], out[1, :] = _random.threefry(words[0, :], words[1, :], words[2, :], words[3, :])

    words = np.random.default_rng(4).integers(0, 2**32, (4, 64), np.uint32)
    shape = jax.ShapeDtypeStruct((2, 64), jnp.uint32)
    drawn = pl.pallas_call(kernel, out_shape=shape, interpret=True)(jnp.asarray(words))
    np.testing.assert_array_equal(drawn, threefry(*words))


def account(logits, seeds, counts, last, num_steps):
    """The tokens of lanes, one operation after the other, in float32 and unlimited integers."""
    logits, seeds = np.asarray(logits, np.float32), np.asarray(seeds)
    table = np.asarray(jnp.exp(logits - logits.max(1, keepdims=True)))  # XLA's exp, to the bit
    out = []
    for lane, (n, k) in enumerate(zip(np.array(counts), np.asarray(last), strict=True)):
        tokens = []
        for t in range(num_steps):
            high, low = (int(w) for w in threefry(seeds[0, lane], seeds[1, lane], t, 0))
            weights = n.astype(np.float32) * table[k]
            total = np.float32(0)
            for w in weights:
                total = np.float32(total + w)
            scale = np.float32(2**30) / total
            v = np.float32(low >> 8) * np.float32(2**-24)
            # XLA may fuse the product with the sum: both roundings are accounts of it.
            fused = [int(float(w) * float(scale) + float(v)) for w in weights]
            units = [int(np.float32(np.float32(w * scale) + v)) for w in weights]
            choices = set()
            for each in (units, fused):
                edges = np.cumsum(each)
                u = (high << 8 | low & 255) * int(edges[-1]) >> 40
                choices.add(int((edges <= u).sum()))
            (k,) = choices  # 2**-30 of draws could tell them apart
            tokens.append(k)
            n[k] += 1
        out.append(tokens)
    return np.array(out)


@pytest.mark.parametrize("engine", [INTERPRET, "scan"])
@pytest.mark.parametrize("size", [2, 5])
def test_draws_are_those_of_a_plain_account(key, engine, size):
    model, prompts = model_of(size), am.prompts.uniform(key, 6, 4, size)
    seeds = _random.replicate_seeds(key, jnp.arange(6), "rollout")
    expected = account(model.logits, seeds, prompts.counts, prompts.last, 50)
    tokens = am.rollout(model, key, prompts, 50, 6, engine).tokens
    np.testing.assert_array_equal(tokens, expected)


def test_nothing_to_attend_emits_minus_one(key):
    # Rejected on concrete models; within jit such a lane stays as it is.
    def tokens(logits):
        model = am.CCMC(logits)
        return am.rollout(model, key, [0, 0], 3, 2, INTERPRET).tokens

    logits = jnp.array([[-jnp.inf, 0.0], [0.0, 0.0]])
    assert jax.jit(tokens)(logits).tolist() == [[-1] * 3] * 2


def test_it_needs_a_gpu_or_tpu(key):
    if jax.default_backend() != "cpu":
        pytest.skip("there is one")
    message = r"engine: pallas can't run on the cpu backend: it needs a GPU or TPU; .* can: .*scan"
    with pytest.raises(ValueError, match=message):
        am.rollout(model_of(3), key, [0], 5, engine="pallas")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": model_of(33)},
            r"engine: Pallas can't keep the counts of 33 tokens on chip, 32 at most; .* that can: ",
        ),
        ({"context": WindowContext(2)}, "engine: Pallas can't take WindowContext, only the full"),
        ({"decoder": Sampling(0.5)}, "engine: Pallas can't decode or reinforce"),
        ({"record": "summary"}, r"engine: Pallas can't .* that can: scan"),
        ({"record": Summary()}, r"engine: Pallas can't .* that can: scan"),
        ({"num_steps": 2**31}, "can't count a history of 2147483649 tokens, 2147483647 at most"),
        (
            {"model": am.CCMC.from_logits([[0.0, -70.0]] * 2), "prompt": [1]},
            "engine: Pallas can't hold logits more than 60 nats below",
        ),
    ],
)
def test_bad_input(key, change, message):
    arguments = {"model": model_of(3), "key": key, "prompt": [0], "num_steps": 5}
    arguments |= {"engine": Pallas(interpret=True), "record": "counts"}
    with pytest.raises(ValueError, match=message):
        am.rollout(**arguments | change)


def test_it_cuts_no_chunks(key):
    with pytest.raises(ValueError, match=r"engine: Pallas can't .* that can: scan"):
        rollout_chunks(model_of(3), key, [0], 5, engine=INTERPRET, chunk=2)


def test_no_steps(key):
    tokens = am.rollout(model_of(3), key, [0], 0, 4, INTERPRET).tokens
    assert tokens.shape == (4, 0)
    assert tokens.dtype == jnp.int8
