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
import sys
from dataclasses import replace
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ovis_jax import Ovis, presets
from ovis_jax.plan.aot_compile import compile_only_devices
from ovis_jax.plan.hlo_analysis import bytes_per_device, compiled_memory
from ovis_jax.plan.topologies import parse_topology
device = SingleDeviceSharding(compile_only_devices(parse_topology(sys.argv[1]))[0])
config = presets.ovis1_6_gemma2_9b()
config = replace(config, decoder=replace(config.decoder, depth=2, vocab_size=1024))
model = Ovis(config, platform="tpu", kv_cache_dtype="int8")
def on_device(function, *arguments):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(function, *arguments),
    )
params = on_device(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
for rows in (1, 8):
    cache = on_device(lambda: model.empty_cache(rows, 4096, jnp.bfloat16))
    tokens = on_device(lambda: jnp.zeros(rows, jnp.int32))
    program = jax.jit(model.decode, donate_argnums=2).lower(params, tokens, cache).compile()
    memory = compiled_memory(program)
    print(bytes_per_device(cache), memory["aliased"], memory["temp"])
"""


def test_int8_cache():
    """With 1 and 8 rows, a decode step neither copies nor dequantizes the cache of a block."""
    command = [sys.executable, "-c", INT8_CACHE, "v5e:1x1"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [tuple(map(int, line.split())) for line in lines.splitlines()]
    for rows, (cache, aliased, temp) in zip((1, 8), found, strict=True):
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
