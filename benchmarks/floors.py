"""The least that a machine must do for each stage: products to compute and bytes to read.

A stage cannot take less than its bytes over the memory's bandwidth, nor less than its FLOP over the
rate of the best matrix product. What norms, softmax and the like cost is not counted.
"""

from dataclasses import dataclass

from ovis_jax.config import OvisConfig


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of one stage."""

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "Work":
        return Work(times * self.flops, times * self.bytes)

    def seconds(self, bandwidth: float, flop_rate: float) -> float:
        """The floor, at bytes and FLOP a second."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)


def vision(config: OvisConfig, crops: int, itemsize: int) -> Work:
    """SigLIP over some crops."""
    v = config.vision
    E, F, P = v.width, v.mlp_width, v.num_patches
    patch, block = v.num_channels * v.patch_size**2 * E, 4 * E * E + 2 * E * F
    weights = patch + v.depth * block
    attention = v.depth * 2 * P * E  # a patch: scores, and the weighted sum
    return Work(2 * crops * P * (weights + attention), weights * itemsize)


def visual_tokens(config: OvisConfig, crops: int, itemsize: int) -> Work:
    """Head, and the product with the visual embedding table."""
    t = config.visual_tokenizer
    weights = t.num_words * (t.merged_width + config.decoder.width)
    return Work(2 * crops * t.tokens_per_crop * weights, weights * itemsize)


def prefill(config: OvisConfig, rows: int, length: int, itemsize: int) -> Work:
    """Rows of `length` positions through the decoder, logits at the last alone."""
    d = config.decoder
    seen = sum(
        min(n + 1, d.window(i) or length) for i in range(min(d.depth, 2)) for n in range(length)
    )
    seen = seen * d.depth / min(d.depth, 2)  # pairs of positions, over all blocks
    attention = seen * 2 * d.num_heads * d.head_dim
    table = d.vocab_size * d.width
    products = length * d.depth * _block(config) + attention + table
    return Work(2 * rows * products, (d.depth * _block(config) + table) * itemsize)


def decode(config: OvisConfig, rows: int, length: int, itemsize: int) -> Work:
    """One token a row, after `length` positions: all weights once, and the cache."""
    d = config.decoder
    weights = d.depth * _block(config) + d.vocab_size * d.width
    seen = sum(min(length, d.window(i) or length) for i in range(d.depth))
    cache = rows * seen * 2 * d.num_kv_heads * d.head_dim
    attention = rows * seen * 2 * d.num_heads * d.head_dim
    return Work(2 * (rows * weights + attention), (weights + cache) * itemsize)


def request(config: OvisConfig, length: int, crops: int, new_tokens: int, itemsize: int) -> Work:
    """A whole answer: crops, prompt, and `new_tokens`, the first of which the prompt gives."""
    return (
        vision(config, crops, itemsize)
        + visual_tokens(config, crops, itemsize)
        + prefill(config, 1, length, itemsize)
        + (new_tokens - 1) * decode(config, 1, length, itemsize)
    )


def _block(config: OvisConfig) -> int:
    """Weights of the matrices of one decoder block."""
    d = config.decoder
    attention = 2 * (d.num_heads + d.num_kv_heads) * d.head_dim
    return d.width * (attention + 3 * d.mlp_width)
