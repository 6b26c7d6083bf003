"""Set before JAX is imported: eight CPU devices, and checks of every annotated shape."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import browsers
import measured
import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects, few of them garbage
# Compiling is most of the work; workers, commands under test and the next run share what was done.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(
    ["ovis_jax.model", "ovis_jax.inference", "ovis_jax.training", "ovis_jax.engine"],
    "beartype.beartype",
)

# The same examples in every run, and no failure because the machine is busy.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

if importlib.util.find_spec("fastapi"):  # the environment of `make test-tpu` has no server
    pytest_plugins = ["serving_fixtures"]

GOLDEN = Path(__file__).parent / "golden"

HAS_TORCH = importlib.util.find_spec("torch") is not None
MISSING_FOR_BROWSER = browsers.missing()
HAS_CLIENTS = all(importlib.util.find_spec(name) for name in ("langchain_openai", "litellm"))
MISSING = {
    "torch": not HAS_TORCH,
    "browser": bool(MISSING_FOR_BROWSER),
    "clients": not HAS_CLIENTS,
    "ray": importlib.util.find_spec("ray") is None,
}
"""Marker -> whether what its tests need is missing here."""


def pytest_configure(config: pytest.Config) -> None:
    """Compile in a third of the time, unless tests run that are marked `optimized`.

    XLA reads the flags once per process, and knows them only in the oldest JAX that is supported.
    """
    excludes_optimized = "not optimized" in config.getoption("markexpr")
    if excludes_optimized and importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += (
            " --xla_cpu_use_fusion_emitters=false"
            " --xla_cpu_enable_concurrency_optimized_scheduler=false"
            " --xla_cpu_parallel_codegen_split_count=1"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files by their markers, without the cost of importing them.

    A file is left out if what its tests need is missing, if `-m` excludes its marker, or if `-m`
    requires a marker that the file does not contain. `-m` may join markers by "and" and "not".
    """
    if collection_path.suffix != ".py":
        return None
    text, expression = collection_path.read_text(), config.getoption("markexpr")
    excluded = set(re.findall(r"not (\w+)", expression))
    required = set(re.findall(r"\w+", expression)) - excluded - {"and", "not"}
    if any(f"pytest.mark.{marker}" not in text for marker in required):
        return True
    excluded |= {name for name, is_missing in MISSING.items() if is_missing}
    marked = re.compile(r"^pytestmark = .*?^(?!    )", re.M | re.S).search(text)
    found = re.findall(r"pytest\.mark\.(\w+)", marked[0]) if marked else []
    return bool(excluded.intersection(found)) or None


def pytest_report_header() -> list[str]:
    against = "PyTorch and the golden files" if HAS_TORCH else "the golden files only"
    page = "tested in Chromium"
    if MISSING_FOR_BROWSER:
        page = f"NOT TESTED, because {', '.join(MISSING_FOR_BROWSER)} is missing"
    return [f"compared with {against}", f"the page of ovis-jax ui: {page}"]


@pytest.hookimpl(tryfirst=True)  # before any fixture compiles
def pytest_runtest_setup(item: pytest.Item) -> None:
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    wanted = str(item.get_closest_marker("optimized") is None).lower()
    if os.environ.get(name) != wanted:
        import jax

        os.environ[name] = wanted  # for subprocesses
        jax.config.update(name.lower(), wanted == "true")
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _keep_measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hand what a test has measured to the process that reports."""
    yield
    for name, difference, allowed in measured.take():
        label = name if name.startswith("golden") else f"{request.node.originalname[5:]}: {name}"
        request.node.user_properties.append(("measured", (label, difference, allowed)))


def pytest_terminal_summary(terminalreporter) -> None:
    found = [
        tuple(value)
        for report in terminalreporter.getreports("")
        for name, value in report.user_properties
        if name == "measured"
    ]
    if found:
        terminalreporter.section("largest differences")
        for line in measured.table(found):
            terminalreporter.write_line(line)


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
def shallow():
    """A shallow model, whose 69 visual rows no mesh divides, with random parameters."""
    import jax
    from shallow import shallow_config

    from ovis_jax import Ovis

    model = Ovis(shallow_config())
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def shallow_checkpoint(tmp_path_factory) -> Path:
    """The golden float32 checkpoint with its first blocks alone; not to be changed."""
    from shallow import copy_shallow

    return copy_shallow(tmp_path_factory.mktemp("checkpoint") / "shallow")


@pytest.fixture(scope="session")
def lay():
    """Lay parameters on a mesh, data x model, of the first devices; gives them and the mesh."""
    import jax
    import numpy as np
    from flax.traverse_util import unflatten_dict
    from jax.sharding import Mesh

    from ovis_jax.sharding import pad_params, param_shardings

    def lay(params, config, shape, rules):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = Mesh(devices, ("data", "model"))
        shardings = unflatten_dict(param_shardings(config, mesh, rules), sep="/")
        return jax.device_put(pad_params(params, config, mesh, rules), shardings), mesh

    return lay


@pytest.fixture(scope="session")
def change_param():
    """A copy of parameters with one leaf put through a function."""

    def change(params, path, function):
        first, _, rest = path.partition("/")
        value = change(params[first], rest, function) if rest else function(params[first])
        return params | {first: value}

    return change
