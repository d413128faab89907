"""Every compiled kernel lowers for GPUs and TPUs, without one."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import LANE_MAJOR

import attnmarkov as am
from attnmarkov._wide import Wide
from attnmarkov.model import DecayContext, FullContext, Greedy, LagContext, Sampling, WindowContext
from attnmarkov.rollout import (
    Summary,
    _proposals,
    pallas,
    reference,
    rejection,
    scan,
    skip_ahead,
)
from attnmarkov.rollout._memory import smallest_dtype
from attnmarkov.rollout.law import Law

LANES, STEPS = 256, 50
platforms = pytest.mark.parametrize("platform", ["cuda", "tpu"])
sizes = pytest.mark.parametrize("size", [3, 20, LANE_MAJOR, 600])
SEEDS = jax.ShapeDtypeStruct((2, LANES), jnp.uint32)
AT = jax.ShapeDtypeStruct((3,), jnp.uint32)


def lowered(fn, platform, *args, **kwargs):
    """The text of ``fn`` lowered for a platform, its array arguments unknown."""
    dynamic = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    checks = ["__gpu$xla.gpu.triton", "tpu_custom_call"]
    exported = jax.export.export(
        jax.jit(partial(fn, **kwargs)),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(c) for c in checks],
    )(*dynamic)
    assert exported.platforms == (platform,)
    return exported.mlir_module()


def prompts(size, context):
    ids = np.zeros((LANES, 8), np.int32)
    made = am.Prompts.from_tokens(ids, size)
    return am.Prompts(made.counts, made.last) if isinstance(context, FullContext) else made


def law(size, context, decoder):
    return Law(jnp.zeros((size, size)), context, decoder)


LAWS = [
    (FullContext(), Sampling(), True),
    (FullContext(exponent=0.5), Sampling(0.7, 3, 0.9), False),
    (WindowContext(4), Sampling(), True),
    (DecayContext(0.9), Greedy(), False),
    (LagContext([1.0, 0.5]), Sampling(0.7), False),
]
laws = pytest.mark.parametrize(
    ("context", "decoder", "linear"), LAWS, ids=[str(c[:2]) for c in LAWS]
)


@platforms
@laws
@sizes
def test_scan_lowers(platform, context, decoder, linear, size):
    arguments = law(size, context, decoder), SEEDS, prompts(size, context)
    lowered(scan._tokens, platform, *arguments, num_steps=STEPS, linear=linear)
    lowered(scan._counts, platform, *arguments, AT, linear=linear)
    lowered(scan._summary, platform, *arguments, AT, summary=Summary(), linear=linear)
    state = jax.eval_shape(scan._begin, *arguments)
    lowered(scan._begin, platform, *arguments)
    start = jax.ShapeDtypeStruct((), jnp.uint32)
    chunk = arguments[0], SEEDS, state, start
    lowered(scan._chunk, platform, *chunk, num_steps=STEPS, linear=linear)


@platforms
@pytest.mark.parametrize("plain", [True, False])
def test_reference_lowers(platform, plain):
    ids, lengths = jnp.zeros((LANES, 8), jnp.int32), jnp.zeros(LANES, jnp.int32)
    own = law(5, DecayContext(0.9), Sampling() if plain else Sampling(top_p=0.5))
    run = partial(reference._tokens, num_steps=STEPS, plain=plain)
    lowered(
        lambda a, b, c, d, e: run(a, b, c, d, e),
        platform,
        own,
        SEEDS,
        ids,
        lengths,
        lengths,
    )


@platforms
@pytest.mark.parametrize("size", [3, LANE_MAJOR])
def test_skip_ahead_lowers(platform, size):
    counts, last = jnp.ones((LANES, size), jnp.int32), jnp.zeros(LANES, jnp.int32)
    lowered(
        skip_ahead._run,
        platform,
        jnp.zeros((size, size)),
        SEEDS,
        counts,
        last,
        jax.eval_shape(Wide, AT, AT),
    )


@platforms
@pytest.mark.parametrize("size", [3, LANE_MAJOR])
def test_rejection_lowers(platform, size):
    ids, lanes = jnp.zeros((LANES, 8), jnp.int32), jnp.zeros(LANES, jnp.int32)
    counts = jnp.ones((LANES, size), jnp.int32)
    start = ids, lanes + 8, counts, lanes

    def run(logits, seeds, ids, lengths, counts, last):
        prompts = am.Prompts(counts, last, ids, lengths)
        tables = _proposals.find_tables(logits, prompts)
        own = ids, lengths, counts, last
        return rejection._tokens(tables, seeds, *own, jnp.int32(STEPS), room=STEPS)

    lowered(jax.jit(run), platform, jnp.zeros((size, size)), SEEDS, *start)


def described(platform):
    """A mesh of one described device: Pallas asks what it lowers for."""
    name = {"tpu": "TPU v5 lite", "cuda": "NVIDIA H100 80GB HBM3"}[platform]
    kind = {
        "device_kind": name,
        "num_cores": 1,
        "platform": {"cuda": "gpu"}.get(platform, platform),
    }
    known = inspect.signature(jax.sharding.AbstractDevice).parameters
    device = jax.sharding.AbstractDevice(**{k: v for k, v in kind.items() if k in known})
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    )


# JAX 0.11 announces its removal; see attnmarkov.rollout.pallas.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("num_steps", [None, STEPS])
@pytest.mark.parametrize("size", [3, 8, 32])
@platforms
def test_pallas_lowers(platform, size, num_steps):
    arguments = (
        jnp.zeros((size, size)),
        SEEDS,
        jnp.ones((LANES, size), jnp.int32),
        jnp.zeros(LANES, jnp.int32),
        jnp.zeros(3, jnp.int32),
    )
    options = {"num_steps": num_steps, "block": 128, "interpret": False}
    backend, call = {"tpu": ("tpu", "tpu_custom_call"), "cuda": ("gpu", "triton")}[platform]
    with described(platform):
        text = lowered(pallas._launch, platform, *arguments, backend=backend, **options)
    assert call in text
    assert smallest_dtype(size) is np.int8


MODEL = am.CCMC.from_logits(np.zeros((4, 4)))
BATCH = am.Prompts.from_counts(np.ones((50, 4), int), np.zeros(50, int))
ESTIMATION = {
    "sample": lambda prompts, y, key: MODEL.sample(key, prompts),
    "log_prob": lambda prompts, y, key: MODEL.log_prob(prompts, y),
    "newton": lambda prompts, y, key: am.fit(prompts, y, solver="newton", prior=1.0).model,
    "lbfgs": lambda prompts, y, key: am.fit(prompts, y, solver="lbfgs").nll,
    "coverage": lambda prompts, y, key: am.coverage(prompts).num_identifiable,
    "fisher": lambda prompts, y, key: am.fisher_information(MODEL, prompts),
    "risk": lambda prompts, y, key: am.excess_risk(MODEL, MODEL, prompts),
    "rollout": lambda prompts, y, key: am.rollout(MODEL, key, prompts, 20, 50).tokens,
}


@platforms
@pytest.mark.parametrize("name", ESTIMATION)
def test_public_functions_lower_within_jit(platform, name):
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda: (BATCH, jnp.zeros(50, jnp.int32)))
    exported = jax.export.export(jax.jit(ESTIMATION[name]), platforms=[platform])(*shapes, key)
    assert exported.platforms == (platform,)
