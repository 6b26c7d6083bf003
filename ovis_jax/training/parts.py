"""Which parameters learn: the flat dict path -> array is split in two and put together again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ovis_jax.errors import RequestError
from ovis_jax.model.layers import LowRank
from ovis_jax.model.ovis import Params
from ovis_jax.sharding import takes_adapter

PARTS: Mapping[str, str] = {
    "visual_tokenizer": r"(vision|visual_tokenizer)/.*",
    "visual_embedding": r"visual_embedding",
    "llm": r"decoder/.*",
}
"""The three parts of the original, by its names -> a pattern of parameter paths."""

Flat = dict[str, Array]


def split(params: Params, parts: Sequence[str]) -> tuple[Flat, Flat]:
    """The parameters that learn and those that are frozen, by path.

    Raises:
      RequestError: no part is named, or one that there is not.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise RequestError(
            f"parts to learn: {unknown or 'none'}, expected some of {', '.join(PARTS)}"
        )
    flat = cast(Flat, flatten_dict(params, sep="/"))
    pattern = "|".join(PARTS[part] for part in parts)
    learned = {path: x for path, x in flat.items() if re.fullmatch(pattern, path)}
    return learned, {path: x for path, x in flat.items() if path not in learned}


def add_adapters(
    params: Params, key: Array, *, rank: int, targets: str = r"decoder/.*/attn/[qkvo]"
) -> Flat:
    """New low-rank adapters: `path/a` [rank, in], random, and `path/b` [out, rank], zero.

    Args:
      params: of the whole model.
      key: for the random half.
      rank: of every adapter.
      targets: a pattern of the paths of the matrices that get one; tables have rows that are
        looked up, so they get none.

    Raises:
      RequestError: the rank is below 1, or the pattern names no matrix.
    """
    flat = cast(Flat, flatten_dict(params, sep="/"))
    paths = [path for path in flat if re.fullmatch(targets, path) and takes_adapter(path)]
    if rank < 1 or not paths:
        raise RequestError(f"adapters of rank {rank} on {targets!r}: {len(paths)} matrices match")
    adapters = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        out_size, in_size = flat[path].shape
        uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=-2)
        adapters[f"{path}/a"] = uniform(path_key, (rank, in_size))
        adapters[f"{path}/b"] = jnp.zeros((out_size, rank))
    return adapters


def join(learned: Mapping[str, Array], frozen: Mapping[str, Array], scale: float = 1.0) -> Params:
    """The parameters of the whole model; matrices with an adapter become `LowRank`.

    `scale` multiplies the adapters' products (alpha / rank in the literature).
    """
    whole: dict[str, Any] = {**frozen}
    for path, x in learned.items():
        matrix, _, half = path.rpartition("/")
        if matrix in frozen and half == "a":
            whole[matrix] = LowRank(frozen[matrix], x * scale, learned[f"{matrix}/b"])
        elif matrix not in frozen:
            whole[path] = x
    return unflatten_dict(whole, sep="/")


def merge_adapters(params: Params) -> Params:
    """Add every adapter into its matrix, in float32, keeping the matrix's dtype."""
    flat = flatten_dict(params, sep="/")
    merged = {path: x.merged() if isinstance(x, LowRank) else x for path, x in flat.items()}
    return unflatten_dict(merged, sep="/")
