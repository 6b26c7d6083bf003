"""Finding the smallest change that makes a workload fit, without compilation."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from ovis_jax.errors import OvisError
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.memory_estimate import estimate_memory, usable_bytes
from ovis_jax.plan.topologies import MeshSizes
from ovis_jax.plan.workload import Workload, default_mesh_sizes
from ovis_jax.quantization import QuantizationFormat

_QUANTIZATIONS: tuple[tuple[QuantizationFormat | None, KVCacheDtype], ...] = (
    (None, "auto"),
    ("int8", "auto"),
    (None, "int8"),
    ("int8", "int8"),
    ("int4", "auto"),
    ("int4", "int8"),
)
"""Quantizations of the weights and of the KV cache, in the order in which they are tried."""

_FORMATS = (None, "int8", "int4")

LENGTH_STEP = 128
"""Step size in the search over max-model-len, in positions."""


def fits_in_memory(workload: Workload, bytes_above_estimate: int = 0) -> bool:
    """Return whether a workload is valid and fits in the usable memory of a device.

    Args:
      workload: The workload.
      bytes_above_estimate: Additional bytes per device beyond the estimate.
    """
    try:
        workload.validate()
        peak = estimate_memory(workload).peak
    except OvisError:
        return False
    return peak + bytes_above_estimate <= usable_bytes(workload.topology)


def smallest_fitting_change(
    workload: Workload, bytes_above_estimate: int = 0
) -> tuple[str, Workload] | None:
    """Find a change that makes a workload fit.

    These changes are tried in order: a larger "model" axis, a stronger quantization, a smaller
    batch, a smaller max-model-len, and a larger topology of the same kind, alone and with a
    stronger quantization.

    Args:
      workload: A workload that does not fit.
      bytes_above_estimate: Bytes per device by which the compiler's peak exceeds the estimate. The
        difference is assumed to be the same after the change.

    Returns:
      The command-line options of the change, such as "--batch-size 4", and the changed workload.
      None if no known topology of the same kind is large enough.
    """
    num_devices = workload.topology.num_devices
    for model in range(workload.mesh_sizes.model + 1, num_devices + 1):
        data, rest = divmod(num_devices, model)
        changed = replace(workload, mesh_sizes=MeshSizes(data, model))
        if not rest and fits_in_memory(changed, bytes_above_estimate):
            return f"--mesh data={data},model={model}", changed

    for options, changed in _stronger_quantizations(workload):
        if fits_in_memory(changed, bytes_above_estimate):
            return options, changed

    def fits_with(**changes: int) -> bool:
        return fits_in_memory(replace(workload, **changes), bytes_above_estimate)

    batch = _largest_multiple(
        0, workload.batch_size - 1, workload.mesh_sizes.data, lambda n: fits_with(batch_size=n)
    )
    if batch:
        return f"--batch-size {batch}", replace(workload, batch_size=batch)
    length = _largest_multiple(
        max(workload.visual_tokens_per_row, 1) - 1,
        workload.max_length - 1,
        LENGTH_STEP,
        lambda n: fits_with(max_length=n),
    )
    if length:
        return f"--max-model-len {length}", replace(workload, max_length=length)
    for topology in workload.topology.larger():
        mesh_sizes = default_mesh_sizes(workload.config, topology.num_devices)
        larger = replace(workload, topology=topology, mesh_sizes=mesh_sizes)
        for options, changed in [("", larger), *_stronger_quantizations(larger)]:
            if fits_in_memory(changed, bytes_above_estimate):
                return f"--topology {topology.name} {options}".strip(), changed
    return None


def _stronger_quantizations(workload: Workload) -> list[tuple[str, Workload]]:
    """Return workloads with stronger quantization and their options, the smallest change first."""
    found = []
    for quantization, kv_cache_dtype in _QUANTIZATIONS:
        options = []
        if quantization != workload.quantization:
            options.append(f"--quantization {quantization}")
        if kv_cache_dtype != workload.kv_cache_dtype:
            options.append(f"--kv-cache-dtype {kv_cache_dtype}")
        weaker = _FORMATS.index(quantization) < _FORMATS.index(workload.quantization)
        weaker |= kv_cache_dtype == "auto" != workload.kv_cache_dtype
        if options and not weaker:
            changed = replace(workload, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
            found.append((" ".join(options), changed))
    return found


def _largest_multiple(low: int, high: int, step: int, accepts: Callable[[int], bool]) -> int:
    """Return the largest accepted multiple of `step` in (low, high], by bisection; 0 if none.

    If a multiple is accepted, all smaller multiples above `low` must also be accepted.
    """
    multiples = range(low // step * step + step, high + 1, step)
    count = bisect_right(multiples, False, key=lambda multiple: not accepts(multiple))
    return multiples[count - 1] if count else 0
