"""The 9B's programs, compiled for TPU slices without a TPU: `make test-tpu`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu needs a separate environment"
)

COUNT_DEVICES = """
from ovis_jax.plan.aot_compile import compile_only_devices
from ovis_jax.plan.topologies import DEVICES, Topology
topologies = [Topology(kind, x.shapes[1]) for kind, x in DEVICES.items() if x.platform == "tpu"]
for one in topologies:
    print(one.name, len(compile_only_devices(one)), one.num_devices)
"""


INT8_CACHE = """
from dataclasses import replace
from ovis_jax import presets
from ovis_jax.plan.aot_compile import analyze_program
from ovis_jax.plan.workload_from_names import make_workload
config = presets.ovis1_6_gemma2_9b()
config = replace(config, decoder=replace(config.decoder, depth=2, vocab_size=1024))
for rows in (1, 8, 12):
    workload = make_workload(config, "v5e:1x1", rows, 4096, kv_cache_dtype="int8")
    program = analyze_program(workload, "decode")
    print(program["cache"], program["aliased"], program["temp"])
"""


def test_int8_cache():
    """With 1, 8 and 12 rows, a decode step neither copies nor dequantizes the cache of a block."""
    command = [sys.executable, "-c", INT8_CACHE]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [tuple(map(int, line.split())) for line in lines.splitlines()]
    for rows, (cache, aliased, temp) in zip((1, 8, 12), found, strict=True):
        assert cache == rows * (32 + 0.5) * 2**20 + 4 * rows  # two blocks, and the lengths
        assert aliased >= cache
        assert temp < 2**22 + rows * 2**18  # the keys of one block take 2**23 bytes per row


def test_libtpu_has_as_many_devices():
    command = [sys.executable, "-c", COUNT_DEVICES]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    counts = [line.split() for line in lines.splitlines()]
    assert len(counts) == 5 and all(libtpu == ours for _, libtpu, ours in counts), counts


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:1x1", "v5p:2x2x1"])
def test_9b(target, tmp_path):
    """Compile in a separate process: libtpu stays loaded, and this process uses the CPU."""
    output = tmp_path / "plan.json"
    command = (
        f"benchmarks.compile_for_accelerators --topology {target} --method compiler --json {output}"
    )
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # set by the tests
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=1800,
    )
    (plan,) = json.loads(output.read_text())["plans"]
    assert len(plan["checks"]) == 20 and all(plan["checks"].values())
    decode, prefill, images = (plan["programs"][x] for x in ("decode", "prefill", "images"))
    assert decode["arguments"] == pytest.approx(plan["arithmetic"]["decode_arguments"], rel=1e-2)
    single = target == "v6e:1x1"
    for program in (decode, prefill):
        assert program["collectives"].keys() == (set() if single else {"all-reduce"})
    if not single:
        assert decode["collectives"]["all-reduce"]["count"] == 2 * 42 + 1
    # Splash attention in every block.
    assert sum(prefill["kernels"].values()) == 42 and sum(images["kernels"].values()) == 27
    assert all("splash" in kernel for kernel in (*prefill["kernels"], *images["kernels"]))


def test_chunks_of_the_engine(tmp_path):
    """A prefill step of the engine copies no cache, in any format."""
    output = tmp_path / "results.json"
    command = "benchmarks.compile_engine_programs --topology v6e:1x1 --json".split()
    arguments = [*command, str(output), "--program", "prefill_chunks x1"]
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, timeout=1800)
    programs = json.loads(output.read_text())["programs"]
    assert len(programs) == 6 and all(all(x["checks"].values()) for x in programs)
