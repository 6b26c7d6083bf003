"""The decode step, prompts and images, compiled for devices that are not there.

Nothing is executed and no accelerator is needed, only the package that has its compiler.
"""

import contextlib
import importlib.util
import os
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.kernels import Setting
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.plan import arguments, program
from ovis_jax.plan.arguments import Case
from ovis_jax.plan.devices import Topology

Step = Literal["decode", "prefill", "images"]
STEPS: tuple[Step, ...] = ("decode", "prefill")
"""What requests run; "images" is the part of prefill that turns crops into embeddings."""

_MODULES = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}
_PACKAGES = {
    "libtpu": "libtpu",
    "jax_plugins.xla_cuda12": "jax-cuda12-plugin",
    "jax_plugins.xla_cuda13": "jax-cuda13-plugin",
}
INSTALL = {"tpu": "pip install 'ovis-jax[tpu]'", "cuda": "pip install 'ovis-jax[cuda12]'"}
"""What brings the compiler for a platform."""

# What the compiler asks of a GPU; the values are OpenXLA's for h100_sxm and a100_sxm_80.
_GPU = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
        "core_count": 132,
        "fpus_per_core": 128,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": "major: 8 feature_extension: NONE",
        "core_count": 108,
        "fpus_per_core": 64,
        "memory_bandwidth": 2039040000000,
        "l2_cache_size": 41943040,
        "clock_rate_ghz": 1.41,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
    },
}
_EVERY_GPU = """
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
"""


def find_compiler(platform: str) -> str | None:
    """The installed package with the compiler for a platform, and its version; None without."""
    for module in _MODULES[platform]:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if found:
            package = _PACKAGES[module]
            with contextlib.suppress(PackageNotFoundError):
                return f"{package} {version(package)}"
            return package
    return None


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for.

    Keeps JAX off the accelerators of this machine, so it belongs into a process of its own.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing is executed, so another process may well hold the TPU, or compile too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if topology.device.platform == "cuda":
        shape, target = f"1x1x{topology.shape}", gpu_target(topology)
        return topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=target
        ).devices
    options: dict[str, Any] = {}
    if set(topology.shape) == {"1", "x"}:
        # One chip is no whole host, which libtpu takes for granted.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
        # Both cores of a chip as one device, as its hosts show them; libtpu alone takes them apart.
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    ).devices


def gpu_target(topology: Topology) -> str:
    """A GpuTargetConfigProto as text."""
    gpu = dict(_GPU[topology.kind])
    name, capability = gpu.pop("name"), gpu.pop("capability")
    gpu["device_memory_size"] = topology.device.hbm_bytes
    facts = " ".join(f"{key}: {value}" for key, value in gpu.items())
    return (
        f"gpu_device_info {{ {facts} {_EVERY_GPU} cuda_compute_capability {{ {capability} }} }}"
        f' platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}'
        f' device_description_str: "{name}"'
    )


def compile_step(case: Case, step: Step) -> Any:
    """Compile a step for the devices of a case.

    Raises:
      jax.errors.JaxRuntimeError: the compiler found that it does not fit, among other reasons.
    """
    devices = devices_of(case.topology)
    mesh = Mesh(np.array(devices).reshape(case.data, case.model), ("data", "model"))
    tpu = case.topology.device.platform == "tpu"
    setting: Setting = "tpu" if tpu else "gpu"
    model = Ovis(case.config, attention=setting)
    params = arguments.nested(arguments.params(case, mesh))
    cache = arguments.cache(case, mesh)
    logits = NamedSharding(mesh, PartitionSpec("data", "model"))
    places = (logits, jax.tree.map(lambda x: x.sharding, cache))
    # Without a default device of the platform, GPU kernels are left out without a word.
    with contextlib.nullcontext() if tpu else jax.default_device(devices[0]):
        if step == "decode":
            jitted = jax.jit(model.decode, donate_argnums=2, out_shardings=places)
            lowered = jitted.lower(params, arguments.tokens(case, mesh, (case.batch,)), cache)
        elif step == "images":
            lowered = jax.jit(model.embed_crops).lower(params, arguments.inputs(case, mesh).pixels)
        else:
            jitted = jax.jit(partial(_prefill, model, case.max_length), out_shardings=places)
            lowered = jitted.lower(params, arguments.inputs(case, mesh))
        return lowered.compile()


def _prefill(model: Ovis, max_length: int, params: Params, inputs: Inputs) -> tuple[Any, Cache]:
    return model.prefill(params, inputs, max_length)


def facts(case: Case, step: Step) -> dict[str, Any]:
    """Compile a step and read off what can be trusted; bytes are those of one device.

    Returns:
      arguments, output, aliased, temp and peak bytes; "cache", the bytes of the cache alone;
      "collectives" by kind, "all_reduces_a_block" and "weight_sized" copies, all-gathers and
      all-reduces; "kernels" by name; "compile_seconds". Or only "error", the compiler's word
      that it does not fit, and "peak", what it would take (None if that is not said).
    """
    begun = time.perf_counter()
    try:
        compiled = compile_step(case, step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": str(error).partition("\n")[0], "peak": program.refused_bytes(str(error))}
    took = time.perf_counter() - begun
    hlo = compiled.as_text() or ""
    return {
        **program.memory_of(compiled),
        "cache": program.bytes_a_device(arguments.cache(case, case.mesh)),
        "collectives": program.collectives(hlo),
        "all_reduces_a_block": program.all_reduces_a_block(hlo),
        "weight_sized": program.of_weights(hlo, arguments.matrix_shapes(case)),
        "kernels": program.kernels(hlo),
        "compile_seconds": took,
    }
