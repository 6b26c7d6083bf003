"""The axes of every parameter, and the rules that shard them over a mesh.

`PARAM_AXES` gives the axes of each parameter as letters, and a rule maps a letter to a mesh axis.
Shapes, shardings, the key map and errors about shapes all come from this table. The letters are
those of the whole repository, listed in docs/research.md, and two local ones: p is the side of a
patch in pixels, m the stride that merges patches. A group in parentheses is one dimension, the
product of its letters. A number is a size.
"""

import math
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError

PARAM_AXES: Mapping[str, str] = {
    "vision/patch": "E C p p",
    "vision/patch_bias": "E",
    "vision/position": "P E",
    "vision/block_*/attn_norm/scale": "E",
    "vision/block_*/attn_norm/bias": "E",
    "vision/block_*/attn/q": "(A H) E",
    "vision/block_*/attn/q_bias": "(A H)",
    "vision/block_*/attn/k": "(A H) E",
    "vision/block_*/attn/k_bias": "(A H)",
    "vision/block_*/attn/v": "(A H) E",
    "vision/block_*/attn/v_bias": "(A H)",
    "vision/block_*/attn/o": "E (A H)",
    "vision/block_*/attn/o_bias": "E",
    "vision/block_*/mlp_norm/scale": "E",
    "vision/block_*/mlp_norm/bias": "E",
    "vision/block_*/mlp/up": "F E",
    "vision/block_*/mlp/up_bias": "F",
    "vision/block_*/mlp/down": "E F",
    "vision/block_*/mlp/down_bias": "E",
    "visual_tokenizer/head": "W (m m E)",
    "visual_tokenizer/norm/scale": "W",
    "visual_tokenizer/norm/bias": "W",
    "visual_embedding": "U D",
    "decoder/embed": "V D",
    "decoder/block_*/pre_attn_norm": "D",
    "decoder/block_*/attn/q": "(N H) D",
    "decoder/block_*/attn/k": "(K H) D",
    "decoder/block_*/attn/v": "(K H) D",
    "decoder/block_*/attn/o": "D (N H)",
    "decoder/block_*/post_attn_norm": "D",
    "decoder/block_*/pre_mlp_norm": "D",
    "decoder/block_*/mlp/gate": "F D",
    "decoder/block_*/mlp/up": "F D",
    "decoder/block_*/mlp/down": "D F",
    "decoder/block_*/post_mlp_norm": "D",
    "decoder/final_norm": "D",
    "decoder/unembed": "V D",
}

_LOOKUP_TABLES = {"vision/position", "visual_embedding", "decoder/embed"}
"""Two-dimensional parameters that `linear` does not multiply by."""

_PADDED_LETTERS = "UW"
"""Letters whose dimension is padded with rows of zeros to divide a mesh axis: 65531 is odd."""

_DIMENSION = r"\([^)]*\)|\S+"

Rules = Mapping[str, str]

TENSOR: Rules = {axis: "model" for axis in "NKFAVUW"} | {"B": "data"}
"""Tensor parallelism: heads, MLP widths and vocabularies over "model", the batch over "data"."""

FSDP: Rules = {"D": "data", "E": "data"}
"""Weights over "data" along their width. For weights only, as activations have B on "data"."""

TENSOR_FSDP: Rules = {**TENSOR, **FSDP}
"""Every weight over both mesh axes."""

RULES_BY_NAME: Mapping[str, Rules] = {"tensor": TENSOR, "fsdp": FSDP, "tensor_fsdp": TENSOR_FSDP}
"""The names of the rules in configs and commands."""


def param_axes(config: OvisConfig) -> dict[str, str]:
    """The axes of every parameter of a model by path, in a fixed order, block by block."""
    axes = {}
    for prefix, group in groupby(PARAM_AXES, lambda pattern: pattern.partition("*")[0]):
        patterns = list(group)
        depth = (config.vision if prefix.startswith("vision/") else config.decoder).depth
        for block in range(depth) if "*" in patterns[0] else [0]:
            for pattern in patterns:
                axes[pattern.replace("*", str(block))] = PARAM_AXES[pattern]
    if config.decoder.tie_embeddings:
        del axes["decoder/unembed"]
    return axes


def axes_of_param(path: str) -> str:
    """The axes of a parameter, such as "(N H) D" for "decoder/block_0/attn/q"."""
    return PARAM_AXES[re.sub(r"/block_\d+/", "/block_*/", path)]


def supports_adapter(path: str) -> bool:
    """Whether a parameter is a matrix that `linear` multiplies by."""
    return len(parse_axes(axes_of_param(path))) == 2 and path not in _LOOKUP_TABLES


def adapter_axes(config: OvisConfig) -> dict[str, str]:
    """The axes of every adapter: `<matrix>/lora_a` "R in" and `<matrix>/lora_b` "out R"."""
    axes = {}
    for path, letters in param_axes(config).items():
        if supports_adapter(path):
            rows, columns = re.findall(_DIMENSION, letters)
            axes |= {f"{path}/lora_a": f"R {columns}", f"{path}/lora_b": f"{rows} R"}
    return axes


def axis_letter_sizes(config: OvisConfig, path: str) -> dict[str, int]:
    """The size of every letter at a path; F and H depend on whether the decoder holds the path."""
    tokenizer, vision, decoder = config.visual_tokenizer, config.vision, config.decoder
    in_decoder = path.startswith("decoder/")
    return {
        "A": vision.num_heads,
        "C": vision.num_channels,
        "D": decoder.width,
        "E": vision.width,
        "F": decoder.mlp_width if in_decoder else vision.mlp_width,
        "H": decoder.head_dim if in_decoder else vision.width // vision.num_heads,
        "K": decoder.num_kv_heads,
        "N": decoder.num_heads,
        "P": vision.num_patches,
        "U": tokenizer.vocab_size,
        "V": decoder.vocab_size,
        "W": tokenizer.num_words,
        "m": tokenizer.hidden_stride,
        "p": vision.patch_size,
    }


def parse_axes(axes: str) -> list[list[str]]:
    """The letters of each dimension: "(N H) D" -> [["N", "H"], ["D"]]."""
    return [part.strip("()").split() for part in re.findall(_DIMENSION, axes)]


def shape_from_axes(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter from its axes and the sizes of their letters."""
    return tuple(
        math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in group)
        for group in parse_axes(axes)
    )


def param_shapes(
    config: OvisConfig, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by path, in the order of `param_axes`.

    With a mesh, the shapes include padding. The visual table has U rows and the visual head W =
    U - 5. If a mesh axis of size n > 1 shards them, both get U rounded up to a multiple of n; the
    additional rows are zeros. Both get the same number, so that the product of the head's words
    with the table needs no communication of shards.
    """
    return _shapes(param_axes(config), config, mesh, rules)


def adapter_shapes(
    config: OvisConfig, rank: int, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """The shape of every adapter of rank `rank` by path, padded on a mesh like its matrix."""
    return _shapes(adapter_axes(config), config, mesh, rules, R=rank)


def _shapes(
    axes: Mapping[str, str],
    config: OvisConfig,
    mesh: Mesh | AbstractMesh | None,
    rules: Rules,
    **more_sizes: int,
) -> dict[str, tuple[int, ...]]:
    return {
        path: shape_from_axes(letters, _padded_sizes(config, path, mesh, rules) | more_sizes)
        for path, letters in axes.items()
    }


def _padded_sizes(
    config: OvisConfig, path: str, mesh: Mesh | AbstractMesh | None, rules: Rules
) -> dict[str, int]:
    """`axis_letter_sizes` with the padding for a mesh."""
    sizes = axis_letter_sizes(config, path)
    padded = {}
    for letter in _PADDED_LETTERS:
        parts = 1 if mesh is None else mesh.shape.get(rules.get(letter, ""), 1)
        if parts > 1:
            padded[letter] = -(-sizes["U"] // parts) * parts
    return sizes | padded


def unpadded_rows(config: OvisConfig, axes: str) -> int | None:
    """The number of real rows of a parameter that may be padded on a mesh; None for others."""
    first = parse_axes(axes)[0][0]
    return axis_letter_sizes(config, "")[first] if first in _PADDED_LETTERS else None


def pad_params(
    params: Mapping[str, Any],
    config: OvisConfig,
    mesh: Mesh | AbstractMesh,
    rules: Rules = TENSOR,
) -> dict[str, Any]:
    """Pad plain arrays in memory to the shapes that `param_shapes` returns for a mesh.

    `load_params` returns parameters that are padded already. Padded parameters can be used and
    saved like unpadded ones, on any device.
    """
    shapes = param_shapes(config, mesh, rules)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path, x in flat.items():
        if x.shape != shapes[path]:
            pads = [(0, to - size) for to, size in zip(shapes[path], x.shape, strict=True)]
            flat[path] = jnp.pad(x, pads)
    return unflatten_dict(flat, sep="/")


def param_shardings(
    config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules = TENSOR
) -> dict[str, NamedSharding]:
    """The sharding of every parameter by path, for the shapes of `param_shapes` with that mesh.

    The first letter of a dimension that has a rule decides. A dimension is replicated if none of
    its letters has a rule, or if the mesh lacks the axis.

    Raises:
      OvisError: a letter's size does not divide by its mesh axis (U and W are padded), or the rules
        put two dimensions of a parameter on one mesh axis.
    """
    return _shardings(param_axes(config), config, mesh, rules)


def adapter_shardings(
    config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules = TENSOR
) -> dict[str, NamedSharding]:
    """The sharding of every adapter by path: that of its matrix, with R replicated.

    Raises:
      OvisError: as `param_shardings`.
    """
    return _shardings(adapter_axes(config), config, mesh, rules)


def _shardings(
    axes: Mapping[str, str], config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules
) -> dict[str, NamedSharding]:
    return {
        path: NamedSharding(
            mesh, _spec(path, letters, _padded_sizes(config, path, mesh, rules), mesh, rules)
        )
        for path, letters in axes.items()
    }


def _spec(
    path: str, letters: str, sizes: Mapping[str, int], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    spec: list[str | None] = []
    for group in parse_axes(letters):
        letter = next((letter for letter in group if letter in rules), group[0])
        axis = rules.get(letter)
        if axis not in mesh.shape:
            spec.append(None)
            continue
        if axis in spec:
            raise OvisError(
                f"{path} {letters!r}: the rules put two dimensions on mesh axis {axis!r}, the"
                f" second by letter {letter}; remove one of the two letters from the rules"
            )
        if sizes[letter] % mesh.shape[axis]:
            raise OvisError(
                f"{path} {letters!r}: letter {letter} has size {sizes[letter]}, which mesh axis"
                f" {axis!r} of size {mesh.shape[axis]} does not divide; use a mesh whose {axis!r}"
                f" axis divides it, or rules without {letter}, which replicate the dimension"
            )
        spec.append(axis)
    return PartitionSpec(*spec)


def mesh_axis(letter: str, size: int, mesh: Mesh | AbstractMesh) -> str | None:
    """The mesh axis over which `TENSOR` shards a letter; None if `size` is not divisible by it."""
    axis = TENSOR[letter]
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
