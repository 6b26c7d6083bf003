"""Memory that a workload needs on one device, computed without compiling."""

from dataclasses import dataclass

from ovis_jax.model.attention_kernels import AttentionCall, choose_kernel
from ovis_jax.model.blockwise_attention import BLOCK_SIZE
from ovis_jax.model.visual_tokenizer import VISUAL_TOKENS_PER_CHUNK
from ovis_jax.plan.abstract_arrays import abstract_cache, abstract_params, crops_per_device
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import axis_letter_sizes

RESERVED_FRACTION = 0.05
"""Fraction of device memory kept free for program code, fragmentation and transfer buffers."""

COMPILER_RESERVED_BYTES = 64 * 2**20
"""Memory that compilers reserve for any program; 30 to 70 MiB were observed."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: dict[str, int]
    """Weights by model part; exact."""
    cache: int
    """KV cache; exact."""
    decode_temp: int
    """Temporary arrays of a decode step; estimated."""
    prefill_temp: int
    """Temporary arrays of a prefill, images included; estimated."""

    @property
    def activations(self) -> int:
        """Temporary arrays of the larger program."""
        return max(self.decode_temp, self.prefill_temp)

    @property
    def peak(self) -> int:
        """Weights, cache and activations, which coexist."""
        return sum(self.weights.values()) + self.cache + self.activations


def usable_bytes(workload: Workload) -> int:
    """Compute the memory of one device that a plan may use, in bytes."""
    return int(workload.topology.device.memory_bytes * (1 - RESERVED_FRACTION))


def estimate_memory(workload: Workload) -> MemoryEstimate:
    """Estimate the bytes on one device.

    Weights and cache are exact: they follow from the padded and sharded shapes. Temporary arrays
    are estimates; the functions below give the formulas.
    """
    mesh = workload.abstract_mesh
    weights: dict[str, int] = {}
    for path, x in abstract_params(workload, mesh).items():
        part = path.partition("/")[0]
        weights[part] = weights.get(part, 0) + bytes_per_device(x)
    cache = bytes_per_device(abstract_cache(workload, mesh))
    return MemoryEstimate(weights, cache, decode_temp_bytes(workload), prefill_temp_bytes(workload))


def decode_temp_bytes(workload: Workload) -> int:
    """Estimate the temporary arrays of one decode step, in bytes on one device.

    With b = B / data rows and m = model, the float32 arrays are: logits b V/m twice, the scores and
    weights of one block b N/m S twice, the residual b D three times, a gated MLP b F/m twice.
    """
    n = axis_letter_sizes(workload.config, "decoder/")
    data, model = workload.mesh_sizes
    rows = workload.batch_size // data
    sharded = n["V"] + n["N"] * workload.max_length + n["F"]
    float32_values = rows * (2 * sharded // model + 3 * n["D"])
    return float32_values * FLOAT32_BYTES + COMPILER_RESERVED_BYTES


def prefill_temp_bytes(workload: Workload) -> int:
    """Estimate the temporary arrays of a prefill at the maximum length, in bytes on one device.

    The result is the larger of `vision_temp_bytes` and the peak of the decoder, plus the embeddings
    of the images (s I M D), which the decoder reads. With b = B / data rows, m = model and s bytes
    per item, the decoder's peak is s b T (3 D + 3 max(F, (N + K) H) / m) plus the attention scores
    of one block: the residual, input and output of a half block (one D more if the output is summed
    over devices), and either the gated MLP, or queries, keys and values with the attention output
    and the copies that a kernel transposes.
    """
    n = axis_letter_sizes(workload.config, "decoder/")
    data, model = workload.mesh_sizes
    rows, s = workload.batch_size // data, workload.bytes_per_weight
    sharded = 3 * max(n["F"], (n["N"] + n["K"]) * n["H"])
    replicated = (3 + (model > 1)) * n["D"]
    decoder = s * rows * workload.max_length * (replicated + sharded // model)
    decoder += _score_bytes(workload, "prefill", rows, n["N"], workload.max_length)
    tokens = workload.num_crops * workload.config.visual_tokenizer.tokens_per_crop
    embeddings = s * tokens * n["D"]
    return max(vision_temp_bytes(workload), decoder) + embeddings + COMPILER_RESERVED_BYTES


def vision_temp_bytes(workload: Workload) -> int:
    """Estimate the temporary arrays of the vision encoder and visual words, in bytes on one device.

    With I crops per device, m = model and s bytes per item, the result is the pixels, 4 I h w C,
    plus the larger of two terms. A SigLIP block with its residual and attention scores takes
    I P (3 s E + 4 E + s (4 E + 2 F) / m). The logits and probabilities of the visual words of the
    R tokens processed together take R W/m (4 + s).
    """
    tokenizer, vision = workload.config.visual_tokenizer, workload.config.vision
    s, m, crops = workload.bytes_per_weight, workload.mesh_sizes.model, crops_per_device(workload)
    E, P = vision.width, vision.num_patches
    block = crops * P * ((3 * s + FLOAT32_BYTES) * E + s * (4 * E + 2 * vision.mlp_width) // m)
    block += _score_bytes(workload, "vision", crops, vision.num_heads, P)
    tokens = min(crops * tokenizer.tokens_per_crop, max(crops, VISUAL_TOKENS_PER_CHUNK))
    words = tokens * tokenizer.vocab_size // m * (FLOAT32_BYTES + s)
    pixels = FLOAT32_BYTES * crops * vision.image_size**2 * vision.num_channels
    return max(block, words) + pixels


def _score_bytes(
    workload: Workload, call: AttentionCall, rows: int, heads: int, length: int
) -> int:
    """Bytes of the float32 attention scores in device memory, with heads sharded over "model".

    Splash and tokamax keep the scores on the chip. Other kernels hold four such arrays at once;
    blockwise attention holds them for two blocks of queries.
    """
    platform = "tpu" if workload.topology.device.platform == "tpu" else "gpu"
    kernel = choose_kernel("auto", call, length, dtype=workload.dtype, platform=platform)
    if kernel in ("splash", "tokamax"):
        return 0
    queries = min(length, 2 * BLOCK_SIZE) if kernel == "blockwise" else length
    return 4 * FLOAT32_BYTES * rows * heads * queries * length // workload.mesh_sizes.model
