"""Trainable parts: splitting parameters into trainable and frozen ones, and joining them again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ovis_jax.errors import RequestError
from ovis_jax.model.lora import attach_adapters
from ovis_jax.model.ovis import Params

TrainablePart = Literal["visual_tokenizer", "visual_embedding", "llm"]
"""The three parts of the model, by the original's names."""

TRAINABLE_PARTS: Mapping[TrainablePart, str] = {
    "visual_tokenizer": r"(vision|visual_tokenizer)/.*",
    "visual_embedding": r"visual_embedding",
    "llm": r"decoder/.*",
}
"""Regular expressions for the parameter paths of each part."""

FlatParams = dict[str, Array]
"""Parameters by path, such as "decoder/block_0/attn/q"."""


def split_params(params: Params, parts: Sequence[str]) -> tuple[FlatParams, FlatParams]:
    """Split parameters into the trainable ones and the frozen ones.

    Args:
      params: parameters of the whole model.
      parts: trainable parts, some of `TRAINABLE_PARTS`.

    Raises:
      RequestError: `parts` is empty, or names an unknown part.
    """
    unknown = [part for part in parts if part not in TRAINABLE_PARTS]
    if unknown or not parts:
        raise RequestError(
            f"trainable parts: {unknown or 'none'}, expected some of {', '.join(TRAINABLE_PARTS)}"
        )
    flat = cast(FlatParams, flatten_dict(params, sep="/"))
    pattern = "|".join(TRAINABLE_PARTS[part] for part in TRAINABLE_PARTS if part in parts)
    trainable = {path: x for path, x in flat.items() if re.fullmatch(pattern, path)}
    return trainable, {path: x for path, x in flat.items() if path not in trainable}


def join_params(
    trainable: Mapping[str, Array], frozen: Mapping[str, Array], lora_scale: float = 1.0
) -> Params:
    """Join trainable and frozen parameters to the parameters of the whole model.

    Args:
      trainable: parameters by path, or adapters of frozen matrices.
      frozen: the other parameters by path.
      lora_scale: factor on the adapters' products.
    """
    adapters = {path: x for path, x in trainable.items() if path.rpartition("/")[0] in frozen}
    flat: dict[str, Any] = {
        **frozen,
        **{path: x for path, x in trainable.items() if path not in adapters},
    }
    return attach_adapters(unflatten_dict(flat, sep="/"), adapters, lora_scale)
