import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import matplotlib
import pytest

matplotlib.use("Agg")

hypothesis.settings.register_profile("default", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A key of the test's own, fixed by its name."""
    return jax.random.key(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs() -> Iterator[None]:
    """Forget compiled programs before they are too many for the process.

    Each program holds memory maps. Linux allows a process 65,530 of them, and XLA's compiler
    dies of a segmentation fault at the next.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
