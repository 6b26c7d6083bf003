"""Estimating the memory that a workload needs on one device, without compilation."""

from dataclasses import dataclass

from ovis_jax.model.attention_kernels import AttentionCall, choose_kernel
from ovis_jax.model.blockwise_attention import BLOCK_SIZE
from ovis_jax.model.visual_tokenizer import VISUAL_TOKENS_PER_CHUNK
from ovis_jax.plan.abstract_arrays import abstract_cache, abstract_params, crops_per_device
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.topologies import Topology
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import axis_letter_sizes

RESERVED_FRACTION = 0.05
"""Fraction of device memory that is reserved for program code, fragmentation and buffers."""

COMPILER_RESERVED_BYTES = 64 * 2**20
"""Memory that compilers reserve in every program, in bytes; 30 to 70 MiB were observed."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a workload, in bytes on one device."""

    weights: dict[str, int]
    """Bytes of the weights, by part of the model; exact."""
    cache: int
    """Bytes of the KV cache; exact."""
    decode_temp: int
    """Bytes of the temporary arrays in a decode step; estimated."""
    prefill_temp: int
    """Bytes of the temporary arrays in a prefill, including images; estimated."""

    @property
    def activations(self) -> int:
        """Bytes of the temporary arrays in a decode step or a prefill, whichever needs more."""
        return max(self.decode_temp, self.prefill_temp)

    @property
    def peak(self) -> int:
        """Bytes of the weights, the cache and the activations together."""
        return sum(self.weights.values()) + self.cache + self.activations


def usable_bytes(topology: Topology) -> int:
    """Compute how much memory a plan may use on one device, in bytes."""
    return int(topology.device.memory_bytes * (1 - RESERVED_FRACTION))


def estimate_memory(workload: Workload) -> MemoryEstimate:
    """Estimate the memory that a workload needs on one device.

    The sizes of the weights and the cache are exact, because they follow from the padded and
    sharded shapes. The sizes of temporary arrays are estimates; the functions below document the
    formulas.
    """
    mesh = workload.abstract_mesh
    weights: dict[str, int] = {}
    for path, x in abstract_params(workload, mesh).items():
        part = path.partition("/")[0]
        weights[part] = weights.get(part, 0) + bytes_per_device(x)
    cache = bytes_per_device(abstract_cache(workload, mesh))
    return MemoryEstimate(weights, cache, decode_temp_bytes(workload), prefill_temp_bytes(workload))


def decode_temp_bytes(workload: Workload) -> int:
    """Estimate the size of the temporary arrays in a decode step, in bytes on one device.

    Let b be the number of rows per device, and m the size of the mesh axis "model". These are the
    float32 arrays, with their numbers of elements: logits, 2 b V/m; attention scores and weights of
    one block, 2 b N/m S; residual, 3 b D; and gated MLP, 2 b F/m.
    """
    n = axis_letter_sizes(workload.config, "decoder/")
    data, model = workload.mesh_sizes
    rows = workload.batch_size // data
    sharded = n["V"] + n["N"] * workload.max_length + n["F"]
    float32_values = rows * (2 * sharded // model + 3 * n["D"])
    return float32_values * FLOAT32_BYTES + COMPILER_RESERVED_BYTES


def prefill_temp_bytes(workload: Workload) -> int:
    """Estimate the size of the temporary arrays in a prefill of prompts of the maximum length.

    The result, in bytes on one device, is the larger of `vision_temp_bytes` and the decoder's peak,
    plus the embeddings of the images (s I M D), which the decoder reads. Let b be the number of
    rows per device, m the size of the mesh axis "model", and s the number of bytes per element. The
    decoder's peak is s b T (3 D + 3 max(F, (N + K) H) / m) plus the attention scores of one block.
    The term 3 D is the residual and the input and output of half a block (4 D if the output is
    summed over devices). The other term is either the gated MLP, or the queries, keys, values,
    attention output and transposed copies for a kernel.
    """
    n = axis_letter_sizes(workload.config, "decoder/")
    data, model = workload.mesh_sizes
    rows, s = workload.batch_size // data, workload.bytes_per_activation
    sharded = 3 * max(n["F"], (n["N"] + n["K"]) * n["H"])
    replicated = (3 + (model > 1)) * n["D"]
    decoder = s * rows * workload.prompt_positions * (replicated + sharded // model)
    decoder += score_bytes(workload, "prefill", rows, n["N"], workload.prompt_positions)
    tokens = workload.num_crops * workload.config.visual_tokenizer.tokens_per_crop
    embeddings = s * tokens * n["D"]
    return max(vision_temp_bytes(workload), decoder) + embeddings + COMPILER_RESERVED_BYTES


def vision_temp_bytes(workload: Workload) -> int:
    """Estimate the size of the temporary arrays of the vision encoder and the visual tokenizer.

    Let I be the number of crops per device, m the size of the mesh axis "model", and s the number
    of bytes per element. The result, in bytes on one device, is the pixels, 4 I h w C, plus the
    larger of two terms. The first term is a SigLIP block with its residual,
    I P (3 s E + 4 E + s (4 E + 2 F) / m), plus the attention scores. The second term is the logits
    and probabilities over visual words for the n tokens that are processed at a time,
    n W/m (4 + s).
    """
    tokenizer, vision = workload.config.visual_tokenizer, workload.config.vision
    s, m = workload.bytes_per_activation, workload.mesh_sizes.model
    crops = crops_per_device(workload)
    E, P = vision.width, vision.num_patches
    block = crops * P * ((3 * s + FLOAT32_BYTES) * E + s * (4 * E + 2 * vision.mlp_width) // m)
    block += score_bytes(workload, "vision", crops, vision.num_heads, P)
    tokens = min(crops * tokenizer.tokens_per_crop, max(crops, VISUAL_TOKENS_PER_CHUNK))
    words = tokens * tokenizer.vocab_size // m * (FLOAT32_BYTES + s)
    pixels = FLOAT32_BYTES * crops * vision.image_size**2 * vision.num_channels
    return max(block, words) + pixels


def score_bytes(workload: Workload, call: AttentionCall, rows: int, heads: int, length: int) -> int:
    """Return the bytes of the float32 attention scores on one device, with sharded heads.

    Splash attention and tokamax keep the scores on the chip. Other kernels need four such arrays at
    once. Blockwise attention needs these arrays only for two blocks of queries.
    """
    platform = "tpu" if workload.topology.device.platform == "tpu" else "gpu"
    kernel = choose_kernel("auto", call, length, dtype=workload.dtype, platform=platform)
    if kernel == "tokamax" and not workload.topology.device.has_bfloat16:
        kernel = "blockwise"  # tokamax needs Ampere or newer
    if kernel in ("splash", "tokamax"):
        return 0
    queries = min(length, 2 * BLOCK_SIZE) if kernel == "blockwise" else length
    return 4 * FLOAT32_BYTES * rows * heads * queries * length // workload.mesh_sizes.model
