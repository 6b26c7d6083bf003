"""Set before JAX is imported: eight CPU devices, and checks of every annotated shape."""

import functools
import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["ovis_jax.model", "ovis_jax.inference"], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference files of the original code; tests/golden/README.md describes them."""
    return GOLDEN


@pytest.fixture(scope="session")
def load_golden():
    """Load one of the two golden checkpoints in a dtype, once a session."""
    from ovis_jax.loading import load

    return functools.cache(lambda name, dtype: load(GOLDEN / name, dtype=dtype))


@pytest.fixture(scope="session")
def change_param():
    """A copy of parameters with one leaf put through a function."""

    def change(params, path, function):
        first, _, rest = path.partition("/")
        value = change(params[first], rest, function) if rest else function(params[first])
        return params | {first: value}

    return change
