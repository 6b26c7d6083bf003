"""Creating, attaching and merging low-rank adapters (LoRA, Hu et al. 2021) for the parameters.

Adapters are a flat dict with two arrays for each adapted matrix `path`: `path/lora_a` [rank, in]
and `path/lora_b` [out, rank].
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ovis_jax.errors import RequestError
from ovis_jax.model.linear import LowRank
from ovis_jax.model.ovis import Params
from ovis_jax.sharding import supports_adapter

ATTENTION_MATRICES = r"decoder/.*/attn/[qkvo]"
"""The default pattern for the paths of adapted matrices."""


def init_adapters(
    params: Params, key: Array, *, rank: int, target_modules: str = ATTENTION_MATRICES
) -> dict[str, Array]:
    """Create adapters whose product is zero: `lora_a` is random and `lora_b` is zero.

    Args:
      params: Parameters of the whole model.
      key: Random key for `lora_a`.
      rank: Rank of every adapter.
      target_modules: Regular expression for the paths of adapted matrices. Embedding tables are
        never adapted, because they are only used for lookups, not for multiplication.

    Raises:
      RequestError: The rank is below 1, or the expression matches no matrix.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    paths = [path for path in flat if re.fullmatch(target_modules, path) and supports_adapter(path)]
    if rank < 1 or not paths:
        raise RequestError(
            f"adapters of rank {rank} on {target_modules!r}: {len(paths)} matrices match, expected"
            " a rank and a number of matrices of at least 1"
        )
    adapters = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        out_size, in_size = flat[path].shape
        uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=-2)
        adapters[f"{path}/lora_a"] = uniform(path_key, (rank, in_size))
        adapters[f"{path}/lora_b"] = jnp.zeros((out_size, rank))
    return adapters


def attach_adapters(
    params: Mapping[str, Any], adapters: Mapping[str, Array], scale: float
) -> Params:
    """Replace every adapted matrix with a `LowRank`.

    Args:
      params: Parameters of the whole model.
      adapters: Adapters for some of the model's matrices.
      scale: Factor by which the products b a are multiplied; in PEFT, this is lora_alpha / r.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path in adapters:
        matrix, _, name = path.rpartition("/")
        if name == "lora_a":
            lora_b = adapters[f"{matrix}/lora_b"]
            flat[matrix] = LowRank(flat[matrix], adapters[path] * scale, lora_b)
    return unflatten_dict(flat, sep="/")


def merge_adapters(params: Params) -> Params:
    """Merge every attached adapter into its matrix, in float32; the matrix keeps its dtype."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    merged = {path: x.merged() if isinstance(x, LowRank) else x for path, x in flat.items()}
    return unflatten_dict(merged, sep="/")
