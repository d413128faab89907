"""Rollouts whose results are written to a file: run by ``test_devices`` in processes of its own.

``python device_script.py OUT DEVICES [PORT PROCESSES ID]``
"""

import os
import sys
from typing import Any

out, devices, *cluster = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

# JAX reads these when it is imported, and the cluster must stand before attnmarkov is.
import jax  # noqa: E402, the flags above must be set before it is imported
import numpy as np  # noqa: E402

if cluster:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    port, processes, own = map(int, cluster)
    jax.distributed.initialize(f"localhost:{port}", processes, own)

from engine_cases import LANE_MAJOR  # noqa: E402

import attnmarkov as am  # noqa: E402
from attnmarkov.model import DecayContext, LagContext, Sampling, WindowContext  # noqa: E402
from attnmarkov.rollout import Scan  # noqa: E402

LANES, STEPS, AT = 16, 20, [0, 5, 20]
KEY = jax.random.key(3)
saved = {}


def save(name, array):
    """The rows that this process holds, and how many devices hold a part each."""
    if isinstance(array, np.ndarray):
        saved[name] = array
        return
    parts = {s.index[0].start or 0: s for s in array.addressable_shards}
    saved[name] = np.concatenate([np.asarray(parts[i].data) for i in sorted(parts)])
    saved[f"{name} first"] = min(parts)
    saved[f"{name} devices"] = len(array.sharding.device_set)
    saved[f"{name} replicated"] = array.sharding.is_fully_replicated


def model(size):
    return am.CCMC.from_transition_matrix(np.random.default_rng(1).dirichlet(np.ones(size), size))


def prompts(size, lanes=LANES):
    ids = np.random.default_rng(2).integers(0, size, (lanes, 6))
    return am.Prompts.from_tokens(ids, size, lengths=1 + np.arange(lanes) % 6)


contexts: dict[str, Any] = {
    "full": {},
    "window": {"context": WindowContext(3)},
    "decay": {"context": DecayContext(0.8), "decoder": Sampling(0.7)},
    "lags": {"context": LagContext([0.5, 1.0, 2.0])},
}
names = (
    {3: ["window"], LANE_MAJOR: ["window"]}
    if cluster
    else {3: list(contexts), LANE_MAJOR: ["full", "window"]}
)
for size in (3, LANE_MAJOR):
    shared: Any = (model(size), KEY, prompts(size), STEPS, LANES)
    for name in names[size]:
        save(f"tokens {size} {name}", am.rollout(*shared, **contexts[name]).tokens)
    if cluster and size > 3:
        continue
    window = contexts["window"]
    save(f"counts {size}", am.rollout(*shared, record="counts", at=AT, **window).counts)
    run = am.rollout(*shared, record="summary", at=AT, **window).summary
    for each in ("entropy", "distinct", "transitions", "passage_time", "absorption_time"):
        save(f"{each} {size}", getattr(run, each))
    chunks = am.rollout_chunks(*shared, chunk=10, **window)
    for i, part in enumerate(chunks):
        save(f"chunk {i} {size}", part.tokens)


def one_prompt(steps, lanes=LANES, **kwargs):
    return am.rollout(model(3), KEY, [0, 1, 2], steps, lanes, **kwargs)


save("one prompt", one_prompt(STEPS).tokens)
if not cluster:
    for lanes in (13, 3):
        args: Any = (model(3), KEY, prompts(3, lanes), STEPS, lanes)
        save(f"odd {lanes}", am.rollout(*args, **contexts["window"]).tokens)
        chunks = am.rollout_chunks(*args, chunk=10)
        whole = np.concatenate([np.asarray(part.tokens) for part in chunks], axis=1)
        save(f"odd chunks {lanes}", whole)
    save("split", one_prompt(STEPS, 21, engine=Scan(max_lanes=5)).tokens)
    save("rejection", one_prompt(400, engine="rejection").tokens)
skipped = one_prompt(500, engine="skip_ahead", record="counts", at=[9, 500]).counts
save("skip_ahead", skipped)  # on the host: all of it in each process
np.savez(out, **saved)
