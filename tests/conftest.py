import zlib

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
