"""Low-rank adapters (LoRA, Hu et al. 2021) on a parameter tree: create, attach and merge them.

Adapters are a flat dict: for each adapted matrix `path`, `path/lora_a` [rank, in] and `path/lora_b`
[out, rank].
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
"""The default pattern of adapted matrices."""


def init_adapters(
    params: Params, key: Array, *, rank: int, target_modules: str = ATTENTION_MATRICES
) -> dict[str, Array]:
    """Create adapters whose product is zero: `lora_a` is random and `lora_b` is zero.

    Args:
      params: parameters of the whole model.
      key: random key for `lora_a`.
      rank: rank of every adapter.
      target_modules: regular expression for the paths of adapted matrices. Embedding tables are
        looked up, not multiplied, so they are never adapted.

    Raises:
      RequestError: the rank is below 1, or the expression matches no matrix.
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
    """Replace every adapted matrix by a `LowRank`.

    Args:
      params: parameters of the whole model.
      adapters: the adapters of some of its matrices.
      scale: factor on the adapters' products; PEFT's lora_alpha / r.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path in adapters:
        matrix, _, name = path.rpartition("/")
        if name == "lora_a":
            lora_b = adapters[f"{matrix}/lora_b"]
            flat[matrix] = LowRank(flat[matrix], adapters[path] * scale, lora_b)
    return unflatten_dict(flat, sep="/")


def merge_adapters(params: Params) -> Params:
    """Add every attached adapter to its matrix, in float32, and keep the matrix's dtype."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    merged = {path: x.merged() if isinstance(x, LowRank) else x for path, x in flat.items()}
    return unflatten_dict(merged, sep="/")
