import subprocess
import sys

CHECK = """
import sys, time
import jax
start = time.process_time()
import attnmarkov
print(time.process_time() - start)
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing attnmarkov started a backend"
assert not jax.config.jax_enable_x64
for name in (
    "matplotlib", "xarray", "zarr", "ray", "flax", "tyro", "scipy.sparse", "pandas", "torch",
    "transformers", "diffrax", "networkx",
):
    assert name not in sys.modules, f"importing attnmarkov loads {name}"
"""

BARE = """
import sys
for name in ("matplotlib", "xarray", "zarr", "tyro", "tqdm", "jinja2", "jaxtyping", "pandas"):
    sys.modules[name] = None  # as on a machine that has jax, numpy, scipy and optax only
import jax, attnmarkov as am
key = jax.random.key(0)
model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, 3))
prompts = am.prompts.uniform(key, 200, 6, 3)
fit = am.fit(prompts, model.sample(key, prompts))
am.coverage(prompts), am.excess_risk(model, fit.model, prompts)
am.rollout(fit.model, key, [0, 1, 2], 10)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_quick():
    assert min(float(python(CHECK)) for _ in range(3)) < 0.3  # CPU seconds beyond import jax


def test_kernel_rooms_need_only_jax_numpy_scipy_optax():
    python(BARE)
