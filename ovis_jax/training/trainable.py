"""Splitting the parameters into trainable and frozen parameters, and joining them again."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from ovis_jax.errors import RequestError
from ovis_jax.model.linear import Quantized
from ovis_jax.model.lora import attach_adapters
from ovis_jax.model.ovis import Params

TrainablePart = Literal["visual_tokenizer", "visual_embedding", "llm"]
"""The name of a part of the model, as in the original code."""

TRAINABLE_PARTS: Sequence[TrainablePart] = get_args(TrainablePart)

PART_BY_PREFIX: Mapping[str, TrainablePart] = {
    "vision": "visual_tokenizer",
    "visual_tokenizer": "visual_tokenizer",
    "visual_embedding": "visual_embedding",
    "decoder": "llm",
}
"""The part that a parameter belongs to, by the first component of the parameter's path."""

FlatParams = dict[str, Array]
"""Parameters by path; a path is, for example, "decoder/block_0/attn/q"."""

FrozenParams = dict[str, Array | Quantized]
"""Parameters by path, which may include quantized matrices."""


def split_params(params: Params, parts: Sequence[str]) -> tuple[FlatParams, FrozenParams]:
    """Split parameters into trainable and frozen parameters.

    Args:
      params: Parameters of the whole model.
      parts: The trainable parts, which are names in `TRAINABLE_PARTS`.

    Raises:
      RequestError: `parts` is empty or contains an unknown part, or one with a quantized matrix.
    """
    unknown = [part for part in parts if part not in TRAINABLE_PARTS]
    if unknown or not parts:
        raise RequestError(
            f"trainable parts: {unknown or 'none'}, expected some of {', '.join(TRAINABLE_PARTS)}"
        )
    trainable, frozen = {}, {}
    for path, x in flatten_dict(params, sep="/").items():
        part = PART_BY_PREFIX[path.partition("/")[0]]
        if part in parts and isinstance(x, Quantized):
            raise RequestError(
                f"trainable part {part}: {path} is quantized, so its numbers cannot be trained;"
                " train LoRA adapters on it, or load the model without quantization"
            )
        (trainable if part in parts else frozen)[path] = x
    return trainable, frozen


def cast_params(
    params: Mapping[str, Array | Quantized], dtype: DTypeLike
) -> dict[str, Array | Quantized]:
    """Cast parameters by path to a dtype; quantized matrices stay as they are."""
    return {path: x if isinstance(x, Quantized) else x.astype(dtype) for path, x in params.items()}


def join_params(
    trainable: Mapping[str, Array | Quantized],
    frozen: Mapping[str, Array | Quantized],
    lora_scale: float = 1.0,
) -> Params:
    """Combine trainable and frozen parameters into the parameters of the whole model.

    Args:
      trainable: Trainable parameters by path, or adapters for frozen matrices.
      frozen: All other parameters by path.
      lora_scale: Factor by which the adapters' products are multiplied.
    """
    adapters: dict[str, Any] = {
        path: x for path, x in trainable.items() if path.rpartition("/")[0] in frozen
    }
    flat: dict[str, Any] = {
        **frozen,
        **{path: x for path, x in trainable.items() if path not in adapters},
    }
    return attach_adapters(unflatten_dict(flat, sep="/"), adapters, lora_scale)
