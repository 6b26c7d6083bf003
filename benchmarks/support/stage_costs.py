"""FLOPs and bytes of each stage, and the lower bound of its time that follows from them.

A stage takes at least its bytes over the memory bandwidth, and at least its FLOPs over the FLOP
rate of the fastest matrix product. Norms, softmax and the like are not counted.
"""

from dataclasses import dataclass

from ovis_jax.config import OvisConfig


@dataclass(frozen=True)
class StageCost:
    """FLOPs and bytes of one stage."""

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "StageCost") -> "StageCost":
        return StageCost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "StageCost":
        return StageCost(times * self.flops, times * self.bytes)

    def min_seconds(self, bandwidth: float, flop_rate: float) -> float:
        """Compute the lower bound of the time from bytes and FLOPs per second."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)


def vision_cost(config: OvisConfig, crops: int, itemsize: int) -> StageCost:
    """Compute the cost of the vision encoder."""
    v = config.vision
    E, F, P = v.width, v.mlp_width, v.num_patches
    patch, block = v.num_channels * v.patch_size**2 * E, 4 * E * E + 2 * E * F
    weights = patch + v.depth * block
    attention = v.depth * 2 * P * E  # per patch: scores and weighted sum
    return StageCost(2 * crops * P * (weights + attention), weights * itemsize)


def visual_head_cost(config: OvisConfig, crops: int, itemsize: int) -> StageCost:
    """Compute the cost of the visual head and the product with the visual embedding table."""
    t = config.visual_tokenizer
    weights = t.num_words * (t.merged_width + config.decoder.width)
    return StageCost(2 * crops * t.tokens_per_crop * weights, weights * itemsize)


def prefill_cost(config: OvisConfig, batch_size: int, length: int, itemsize: int) -> StageCost:
    """Compute the cost of a prefill with logits at the last position only."""
    d = config.decoder
    visible = sum(
        min(n + 1, d.window(i) or length) for i in range(min(d.depth, 2)) for n in range(length)
    )
    pairs = visible * d.depth / min(d.depth, 2)  # query-key pairs over all blocks
    attention = pairs * 2 * d.num_heads * d.head_dim
    table = d.vocab_size * d.width
    blocks = d.depth * _block_weights(config)
    products = length * blocks + attention + table
    return StageCost(2 * batch_size * products, (blocks + table) * itemsize)


def decode_cost(config: OvisConfig, batch_size: int, length: int, itemsize: int) -> StageCost:
    """Compute the cost of one token per row after `length` positions: all weights and the cache."""
    d = config.decoder
    weights = d.depth * _block_weights(config) + d.vocab_size * d.width
    visible = sum(min(length, d.window(i) or length) for i in range(d.depth))
    cache = batch_size * visible * 2 * d.num_kv_heads * d.head_dim
    attention = batch_size * visible * 2 * d.num_heads * d.head_dim
    return StageCost(2 * (batch_size * weights + attention), (weights + cache) * itemsize)


def request_cost(
    config: OvisConfig, length: int, crops: int, new_tokens: int, itemsize: int
) -> StageCost:
    """Compute the cost of a complete answer; the prefill produces the first of `new_tokens`."""
    return (
        vision_cost(config, crops, itemsize)
        + visual_head_cost(config, crops, itemsize)
        + prefill_cost(config, 1, length, itemsize)
        + (new_tokens - 1) * decode_cost(config, 1, length, itemsize)
    )


def _block_weights(config: OvisConfig) -> int:
    """Number of weights in the matrices of one decoder block."""
    d = config.decoder
    attention = 2 * (d.num_heads + d.num_kv_heads) * d.head_dim
    return d.width * (attention + 3 * d.mlp_width)
