"""What a case needs, by arithmetic: bytes on one device, and the least time that they take."""

import math
from dataclasses import dataclass

from ovis_jax.model.blockwise import BLOCK
from ovis_jax.model.kernels import Call, choose_kernel
from ovis_jax.model.kv_cache import num_slots
from ovis_jax.model.ovis import VISUAL_TOKENS_AT_ONCE
from ovis_jax.plan import arguments
from ovis_jax.plan.arguments import Case
from ovis_jax.plan.program import bytes_a_device
from ovis_jax.sharding import letter_sizes

MARGIN = 0.05
"""The share of a device's memory that a plan leaves free: for the code of programs, memory in
pieces, and the buffers that devices exchange data through."""

COMPILER = 64 * 2**20
"""What compilers set aside whatever the request; 30 to 70 MiB were seen."""

FLOAT32 = 4


@dataclass(frozen=True)
class Needs:
    """Bytes on one device."""

    weights: dict[str, int]
    """By part of the model; exact."""
    cache: int
    """Exact."""
    decode_temp: int
    prefill_temp: int

    @property
    def activations(self) -> int:
        """The larger of the two programs' temporary arrays."""
        return max(self.decode_temp, self.prefill_temp)

    @property
    def peak(self) -> int:
        """All weights, the cache and activations: they are there together."""
        return sum(self.weights.values()) + self.cache + self.activations


@dataclass(frozen=True)
class Floors:
    """The least time that a step can take on one device, and what that follows from."""

    decode_bytes: int
    """Read for each token of the batch: the decoder's weights once, and the whole cache."""
    decode_seconds: float
    """Those bytes over the memory's bandwidth, or the products over peak speed if that is more."""
    decode_link_bytes: int
    """What a device sends for one token of the batch."""
    decode_link_seconds: float
    """Beside the above: sums over devices that nothing else hides."""
    prefill_flops: float
    """Of one device, for prompts of the whole length and all crops."""
    prefill_seconds: float
    """The same over peak speed."""


def usable_bytes(case: Case) -> int:
    """The memory of one device that a plan may fill."""
    return int(case.topology.device.hbm_bytes * (1 - MARGIN))


def needs(case: Case) -> Needs:
    """Bytes on one device, by arithmetic.

    Weights and cache are exact: the padded shapes of `ovis_jax.sharding` and of the ring and full
    caches, cut as their table says. Temporary arrays are an estimate; see the functions below.
    """
    mesh = case.mesh
    weights: dict[str, int] = {}
    for path, x in arguments.params(case, mesh).items():
        part = path.partition("/")[0]
        weights[part] = weights.get(part, 0) + bytes_a_device(x)
    cache = bytes_a_device(arguments.cache(case, mesh))
    return Needs(weights, cache, decode_temp(case), prefill_temp(case))


def decode_temp(case: Case) -> int:
    """Estimate of one decode step's temporary arrays, in bytes.

    With b = B / data rows and m = model, in float32: logits b V/m twice, scores and weights of one
    block b N/m S twice, the residual b D three times and a gated MLP b F/m twice.
    """
    n = letter_sizes(case.config, "decoder/")
    rows = case.batch // case.data
    split = n["V"] + n["N"] * case.max_length + n["F"]
    return rows * (2 * split // case.model + 3 * n["D"]) * FLOAT32 + COMPILER


def prefill_temp(case: Case) -> int:
    """Estimate of the temporary arrays of reading prompts of the whole length, in bytes.

    The larger of what the images and what the decoder takes at its fullest. With b = B / data rows,
    m = model and s bytes an item, the decoder's is s b T (3 D + 3 max(F, (N + K) H) / m), for the
    residual, input and output of a half, which takes D more where it is summed over devices; the
    gated MLP, or queries, keys and values beside the answer and what a kernel wants in another
    order. To it come the `_scores` of one block. The images' is `vision_temp`; their embeddings,
    s I M D, stay until the decoder has read them.
    """
    n = letter_sizes(case.config, "decoder/")
    s, positions = case.item_bytes, case.batch // case.data * case.max_length
    split = 3 * max(n["F"], (n["N"] + n["K"]) * n["H"])
    whole = (3 + (case.model > 1)) * n["D"]
    decoder = s * positions * (whole + split // case.model)
    decoder += _scores(case, "prefill", case.batch // case.data, n["N"], case.max_length)
    embedded = s * case.crops * case.config.visual_tokenizer.tokens_per_crop * n["D"]
    return max(vision_temp(case), decoder) + embedded + COMPILER


def vision_temp(case: Case) -> int:
    """Estimate of the temporary arrays of all crops' features and visual words, in bytes.

    With I crops on a device, m = model and s bytes an item, the larger of
    I P (3 s E + 4 E + s (4E + 2F) / m), a SigLIP block beside its residual, with its `_scores`, and
    of R W/m (4 + s), logits and probabilities of the visual words of the R tokens that are looked
    at together; and the pixels, 4 I h w C.
    """
    tokenizer, vision = case.config.visual_tokenizer, case.config.vision
    s, m, crops = case.item_bytes, case.model, arguments.crops_a_device(case)
    E, P = vision.width, vision.num_patches
    block = crops * P * ((3 * s + FLOAT32) * E + s * (4 * E + 2 * vision.mlp_width) // m)
    block += _scores(case, "vision", crops, vision.num_heads, P)
    tokens = min(crops * tokenizer.tokens_per_crop, max(crops, VISUAL_TOKENS_AT_ONCE))
    words = tokens * tokenizer.vocab_size // m * (FLOAT32 + s)
    pixels = FLOAT32 * crops * vision.image_size**2 * vision.num_channels
    return max(block, words) + pixels


def _scores(case: Case, call: Call, rows: int, heads: int, length: int) -> int:
    """Bytes of the float32 scores that the kernel chosen for a call holds, heads over "model".

    Splash and tokamax keep them on the chip. Elsewhere four arrays of them are there at once, in a
    loop over blocks of queries those of two.
    """
    platform = case.topology.device.platform
    setting = "tpu" if platform == "tpu" else "gpu"
    kernel = choose_kernel(setting, call, length, dtype=case.dtype)
    if kernel in ("splash", "tokamax"):
        return 0
    queries = min(length, 2 * BLOCK) if kernel == "blockwise" else length
    return 4 * FLOAT32 * rows * heads * queries * length // case.model


def floors(case: Case, need: Needs) -> Floors:
    """The least time for a token and for the prompts.

    A token reads the decoder's weights and, at worst, the whole cache. The table of tokens is read
    as the output matrix; where it is a matrix of its own, looking up rows reads next to nothing.
    Each block sums twice over "model": with n devices a device sends 2 (n - 1) / n of the sum.
    """
    device, n = case.topology.device, letter_sizes(case.config, "decoder/")
    decoder = case.config.decoder
    weights = need.weights["decoder"]
    if not decoder.tie_embeddings:
        weights -= n["V"] * n["D"] * case.item_bytes // case.model
    read = weights + need.cache
    rows = case.batch // case.data
    flops = 2 * rows * weights / case.item_bytes
    sums = sums_of_a_step(case) * rows * n["D"] * case.item_bytes
    sent = int(2 * (case.model - 1) / case.model * sums)
    prefill = prefill_flops(case) / case.topology.num_devices
    return Floors(
        decode_bytes=read,
        decode_seconds=max(read / device.hbm_bandwidth, flops / device.flops),
        decode_link_bytes=sent,
        decode_link_seconds=sent / device.link_bandwidth,
        prefill_flops=prefill,
        prefill_seconds=prefill / device.flops,
    )


def sums_of_a_step(case: Case) -> int:
    """All-reduces of one decode step: two a block and one for the rows of the token table."""
    return 0 if case.model == 1 else 2 * case.config.decoder.depth + 1


def prefill_flops(case: Case) -> float:
    """Operations for prompts of the whole length and all crops: two a multiplied pair.

    The decoder's matrices at every position and the output matrix once a row; attention over what
    each position sees; the vision encoder's matrices at every patch and its attention, the visual
    head and the product with the visual table at every visual token.
    """
    c, n = case.config, letter_sizes(case.config, "decoder/")
    T, B = case.max_length, case.batch
    matrices = 2 * (n["N"] + n["K"]) * n["H"] * n["D"] + 3 * n["F"] * n["D"]
    pairs = sum(_seen(T, num_slots(c.decoder, i, T)) for i in range(c.decoder.depth))
    decoder = B * T * matrices * c.decoder.depth + B * n["V"] * n["D"]
    attention = 2 * B * n["N"] * n["H"] * pairs
    E, P, tokenizer = c.vision.width, c.vision.num_patches, c.visual_tokenizer
    block = P * (4 * E * E + 2 * E * c.vision.mlp_width) + 2 * P * P * E
    words = tokenizer.tokens_per_crop * tokenizer.num_words * (tokenizer.merged_width + n["D"])
    return 2.0 * (decoder + attention + case.crops * (c.vision.depth * block + words))


def _seen(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, in one row."""
    return math.comb(window + 1, 2) + (length - window) * window
