"""The 9B's programs compiled for TPU slices that need not be there: `make test-tpu`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu has an environment of its own"
)

COUNT = """
from ovis_jax.plan.compiler import devices_of
from ovis_jax.plan.devices import DEVICES, Topology
names = [Topology(kind, x.shapes[1]) for kind, x in DEVICES.items() if x.platform == "tpu"]
for name in names:
    print(name.name, len(devices_of(name)), name.num_devices)
"""


def test_libtpu_counts_as_many_devices():
    command = [sys.executable, "-c", COUNT]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    counts = [line.split() for line in lines.splitlines()]
    assert len(counts) == 5 and all(there == ours for _, there, ours in counts), counts


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:1x1", "v6e:2x2", "v5p:2x2x1"])
def test_the_9b(target, tmp_path):
    """In a process of its own: libtpu stays loaded, and this one's devices are the CPU's."""
    output = tmp_path / "plan.json"
    command = f"benchmarks.accelerators --topology {target} --by compiler --json {output}"
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # what the tests set for themselves
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=1800,
    )
    (plan,) = json.loads(output.read_text())["plans"]
    assert len(plan["checks"]) == 17 and all(plan["checks"].values())
    decode, prefill, images = (plan["steps"][x] for x in ("decode", "prefill", "images"))
    assert decode["arguments"] == pytest.approx(plan["arithmetic"]["decode_arguments"], rel=1e-2)
    alone = target == "v6e:1x1"
    for step in (decode, prefill):
        assert step["collectives"].keys() == (set() if alone else {"all-reduce"})
    if not alone:
        assert decode["collectives"]["all-reduce"]["count"] == 2 * 42 + 1
    # Splash in every block.
    assert sum(prefill["kernels"].values()) == 42 and sum(images["kernels"].values()) == 27
    assert all("splash" in kernel for kernel in (*prefill["kernels"], *images["kernels"]))
