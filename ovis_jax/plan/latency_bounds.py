"""Lower bounds on latency: bytes divided by bandwidth, and FLOPs divided by the peak rate."""

import math
from dataclasses import dataclass

from ovis_jax.model.kv_cache import num_slots
from ovis_jax.plan.abstract_arrays import abstract_params, weights_per_device
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.memory_estimate import MemoryEstimate
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import axis_letter_sizes


@dataclass(frozen=True)
class LatencyBounds:
    """Lower bounds on the time of each program, and the bytes and FLOPs that they follow from."""

    decode_bytes_read: int
    """Bytes that a device reads per decode step: the decoder's weights and the full KV cache."""
    decode_seconds: float
    """Time to read these bytes, or to compute the matrix products if that takes longer."""
    decode_bytes_sent: int
    """Bytes that a device sends to other devices per decode step."""
    decode_link_seconds: float
    """Time to send these bytes, in addition to `decode_seconds`."""
    prefill_flops: float
    """FLOPs per device for a batch of prompts with the maximum length and all crops."""
    prefill_seconds: float
    """Time to compute these FLOPs."""


def latency_bounds(workload: Workload, memory: MemoryEstimate) -> LatencyBounds:
    """Compute lower bounds on the latency of a decode step and a prefill.

    A decode step reads the decoder's weights and, if all rows have the maximum length, the full KV
    cache. A tied embedding table is read completely, because it is also the output matrix; lookups
    in a separate table are negligible. Each block has two all-reduces over "model". In each
    all-reduce over n devices, each device sends 2 (n - 1) / n times the size of the result.
    """
    device, peak_flops = workload.topology.device, workload.peak_flops
    n = axis_letter_sizes(workload.config, "decoder/")
    data, model = workload.mesh_sizes
    weights = {
        path: x
        for path, x in abstract_params(workload, workload.abstract_mesh).items()
        if path.startswith("decoder/")
    }
    if not workload.config.decoder.tie_embeddings:
        del weights["decoder/embed"]
    bytes_read = bytes_per_device(weights) + memory.cache
    rows = workload.batch_size // data
    flops = 2 * rows * weights_per_device(weights.values())
    summed = all_reduces_per_decode_step(workload) * rows * n["D"] * workload.bytes_per_activation
    bytes_sent = int(2 * (model - 1) / model * summed)
    prefill = total_prefill_flops(workload) / workload.topology.num_devices
    return LatencyBounds(
        decode_bytes_read=bytes_read,
        decode_seconds=max(bytes_read / device.memory_bandwidth, flops / peak_flops),
        decode_bytes_sent=bytes_sent,
        decode_link_seconds=bytes_sent / device.link_bandwidth,
        prefill_flops=prefill,
        prefill_seconds=prefill / peak_flops,
    )


def all_reduces_per_decode_step(workload: Workload) -> int:
    """Count the all-reduces in a decode step: two per block, and one for the embedding lookup."""
    return 0 if workload.mesh_sizes.model == 1 else 2 * workload.config.decoder.depth + 1


def total_prefill_flops(workload: Workload) -> float:
    """Count the FLOPs of prompts with the maximum length and all crops, on all devices together.

    The count includes the decoder's matrices at every position, its attention over all visible
    positions, and the output matrix once per row. It also includes the vision encoder's matrices at
    every patch, its attention, and the visual head and embedding table at every visual token. A
    multiply-add counts as two FLOPs.
    """
    c, n = workload.config, axis_letter_sizes(workload.config, "decoder/")
    T, B = workload.prompt_positions, workload.batch_size
    matrices = 2 * (n["N"] + n["K"]) * n["H"] * n["D"] + 3 * n["F"] * n["D"]
    pairs = sum(_visible_pairs(T, num_slots(c.decoder, i, T)) for i in range(c.decoder.depth))
    decoder = B * T * matrices * c.decoder.depth + B * n["V"] * n["D"]
    attention = 2 * B * n["N"] * n["H"] * pairs
    E, P, tokenizer = c.vision.width, c.vision.num_patches, c.visual_tokenizer
    block = P * (4 * E * E + 2 * E * c.vision.mlp_width) + 2 * P * P * E
    words = tokenizer.tokens_per_crop * tokenizer.num_words * (tokenizer.merged_width + n["D"])
    crops = workload.num_crops * (c.vision.depth * block + words)
    return 2.0 * (decoder + attention + crops)


def _visible_pairs(length: int, window: int) -> int:
    """Count the visible query-key pairs in one row, with a causal mask and a sliding window."""
    return math.comb(window + 1, 2) + (length - window) * window
