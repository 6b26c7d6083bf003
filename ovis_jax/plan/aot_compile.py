"""Ahead-of-time compilation of the model's programs for devices that are not attached.

Compilation only needs the package that contains the compiler. No program is executed.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax.inference.generate import generate
from ovis_jax.model.ovis import Ovis
from ovis_jax.plan.abstract_arrays import (
    abstract_cache,
    abstract_inputs,
    abstract_params,
    abstract_token_ids,
    cache_shapes,
    matrix_shapes,
)
from ovis_jax.plan.hlo_analysis import (
    bytes_per_device,
    collective_counts_and_bytes,
    compiled_memory,
    count_kernel_calls,
    count_weight_sized_operations,
    max_all_reduces_per_block,
    parse_out_of_memory_bytes,
)
from ovis_jax.plan.topologies import MeshSizes, Topology
from ovis_jax.plan.workload import Workload

Program = Literal["decode", "prefill", "images", "generate"]
REQUEST_PROGRAMS: tuple[Program, ...] = ("decode", "prefill")
"""The programs that serve requests. Other programs are "images", the part of prefill that embeds
crops, and "generate", which contains all of these programs."""

_COMPILER_PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin")}
COMPILER_EXTRAS = {"tpu": ("tpu",), "cuda": ("cuda12", "cuda13")}
"""The extras that install the compiler for each platform."""

# GPU properties that the compiler requires, from OpenXLA's h100_sxm and a100_sxm_80 specs.
_GPU_PROPERTIES = {
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
_COMMON_GPU_PROPERTIES = """
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
"""


def installed_compiler(platform: str) -> str | None:
    """Return the name and version of the installed compiler for "tpu" or "cuda", or None."""
    for package in _COMPILER_PACKAGES[platform]:
        with contextlib.suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return None


def compile_only_devices(topology: Topology) -> list[Any]:
    """Create devices that programs can be compiled for but not run on.

    This disables this machine's accelerators for the current process.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No program is executed, so other processes may use the TPU or compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if topology.device.platform == "cuda":
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"1x1x{topology.shape}",
            topology=f"1x1x{topology.shape}",
            target_config=gpu_target_config(topology),
        ).devices
    options: dict[str, Any] = {}
    if set(topology.shape) == {"1", "x"}:
        # By default, libtpu assumes that the topology is a complete host.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
        # As on real hosts, there is one device per chip; by default, libtpu creates one per core.
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    ).devices


def compile_only_mesh(topology: Topology, sizes: MeshSizes) -> Mesh:
    """Create a mesh of the first devices that `compile_only_devices` returns."""
    devices = compile_only_devices(topology)[: math.prod(sizes)]
    return Mesh(np.array(devices).reshape(sizes), ("data", "model"))


def lowering_for(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which programs must be lowered for the devices of a mesh."""
    device = mesh.devices.flat[0]
    # If the default device is not of this platform, GPU kernels are silently omitted.
    return jax.default_device(device) if device.platform == "gpu" else contextlib.nullcontext()


def gpu_target_config(topology: Topology) -> str:
    """Return the GpuTargetConfigProto for a GPU in text format.

    The memory size is that of the GPU itself. All other properties are those of the GPU that
    `DeviceSpec.gpu_target` names.
    """
    gpu = dict(_GPU_PROPERTIES[topology.device.gpu_target or topology.kind])
    name, capability = gpu.pop("name"), gpu.pop("capability")
    gpu["device_memory_size"] = topology.device.memory_bytes
    properties = " ".join(f"{key}: {value}" for key, value in gpu.items())
    return (
        f"gpu_device_info {{ {properties} {_COMMON_GPU_PROPERTIES}"
        f" cuda_compute_capability {{ {capability} }} }}"
        f' platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}'
        f' device_description_str: "{name}"'
    )


def compile_only_model(workload: Workload) -> Ovis:
    """Return the model of a workload, with the attention kernels of its devices."""
    platform = workload.topology.device.jax_platform
    return Ovis(workload.config, platform=platform, kv_cache_dtype=workload.kv_cache_dtype)


def compile_program(workload: Workload, program: Program) -> Any:
    """Compile a program for the devices of a workload.

    Raises:
      jax.errors.JaxRuntimeError: Compilation failed, for example because the device memory is too
        small.
    """
    mesh = compile_only_mesh(workload.topology, workload.mesh_sizes)
    model = compile_only_model(workload)
    params = unflatten_dict(abstract_params(workload, mesh), sep="/")
    cache = abstract_cache(workload, mesh)
    logits = NamedSharding(mesh, PartitionSpec("data", "model"))
    out_shardings = (logits, jax.tree.map(lambda x: x.sharding, cache))
    with lowering_for(mesh):
        if program == "decode":
            jitted = jax.jit(model.decode, donate_argnums=2, out_shardings=out_shardings)
            tokens = abstract_token_ids(mesh, (workload.batch_size,))
            lowered = jitted.lower(params, tokens, cache)
        elif program == "images":
            pixels = abstract_inputs(workload, mesh).pixels
            lowered = jax.jit(model.embed_images).lower(params, pixels)
        elif program == "generate":
            answer = partial(
                generate, model, max_new_tokens=workload.max_length - workload.prompt_positions
            )
            lowered = jax.jit(answer).lower(params, abstract_inputs(workload, mesh))
        else:
            jitted = jax.jit(model.prefill, static_argnums=2, out_shardings=out_shardings)
            inputs = abstract_inputs(workload, mesh)
            lowered = jitted.lower(params, inputs, workload.max_length)
        return lowered.compile()


def analyze_program(workload: Workload, program: Program) -> dict[str, Any]:
    """Compile a program, and collect its memory use and its operations.

    Returns:
      The result of `analyze_compilation`, with "weight_sized" for the matrices and the cache, and
      the bytes of the KV cache ("cache"). "weight_sized" leaves out the cache if a prompt fills it,
      because the prompt's keys then have the same shape.
    """
    stored = matrix_shapes(workload)
    if program == "decode" or workload.prompt_positions < workload.max_length:
        stored += cache_shapes(workload)
    analysis = analyze_compilation(partial(compile_program, workload, program), stored)
    if "error" in analysis:
        return analysis
    cache = abstract_cache(workload, workload.abstract_mesh)
    return {**analysis, "cache": bytes_per_device(cache)}


def analyze_compilation(
    compile_one: Callable[[], Any], stored_shapes: Iterable[tuple[int, ...]]
) -> dict[str, Any]:
    """Compile a program, and collect its memory use and its operations.

    Args:
      compile_one: Compiles and returns the program.
      stored_shapes: Shapes of the matrices and the cache, as in `count_weight_sized_operations`.

    Returns:
      A dict with the program's bytes on one device ("arguments", "output", "aliased", "temp" and
      "peak"), "collectives" by kind, "all_reduces_per_block", "kernels" by name, "compile_seconds",
      and "weight_sized", the result of `count_weight_sized_operations`. If the device memory is too
      small, the dict contains only "error" (the compiler's message) and "peak" (the requested
      bytes, or None if the message does not state them).
    """
    found, hlo = measure_compilation(compile_one)
    if "error" in found:
        return found
    return {
        **found,
        "all_reduces_per_block": max_all_reduces_per_block(hlo),
        "weight_sized": count_weight_sized_operations(hlo, stored_shapes),
    }


def measure_compilation(compile_program: Callable[[], Any]) -> tuple[dict[str, Any], str]:
    """Compile a program, and return its memory use and operations, and its HLO text.

    Returns:
      A dict with the entries "arguments", "output", "aliased", "temp", "peak", "collectives",
      "kernels" and "compile_seconds" of `analyze_compilation`, and the text. If the device memory
      is too small, the dict contains only "error" and "peak", and the text is empty.
    """
    start = time.perf_counter()
    try:
        compiled = compile_program()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        peak = parse_out_of_memory_bytes(message)
        return {"error": message.partition("\n")[0], "peak": peak}, ""
    seconds = time.perf_counter() - start
    hlo = compiled.as_text() or ""
    found = {
        **compiled_memory(compiled),
        "collectives": collective_counts_and_bytes(hlo),
        "kernels": count_kernel_calls(hlo),
        "compile_seconds": seconds,
    }
    return found, hlo
