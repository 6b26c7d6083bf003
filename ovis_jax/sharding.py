"""One table: parameter path -> axis letters; rules: letter -> mesh axis.

Shapes, shardings, the key map and every complaint about a shape are read from `PARAM_AXES`. The
letters are the alphabet of the whole repository (B D E F H I K M N P S T U V A C), and W the visual
words (U without the image indicators), p a patch's side in pixels, m the merging stride, R the rank
of a low-rank adapter. A group in brackets is one dimension, the product of its letters; a number
stands for itself.
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

_LOOKED_UP = {"vision/position", "visual_embedding", "decoder/embed"}
"""Of two dimensions, but rows are looked up or added: nothing is multiplied by the whole."""

_PADDED = "UW"
"""Letters whose dimension gets rows of zeros where it would not divide: 65531 is odd."""

_DIMENSION = r"\([^)]*\)|\S+"

Rules = Mapping[str, str]

TENSOR: Rules = {axis: "model" for axis in "NKFAVUW"} | {"B": "data"}
"""Tensor parallel: heads, MLP widths and vocabularies over "model", the batch over "data"."""

FSDP: Rules = {"D": "data", "E": "data"}
"""Weights over "data" along their width; for weights only, as activations have B there."""

TENSOR_FSDP: Rules = {**TENSOR, **FSDP}
"""Every weight over both mesh axes."""

RULES: Mapping[str, Rules] = {"tensor": TENSOR, "fsdp": FSDP, "tensor_fsdp": TENSOR_FSDP}
"""By the name that configs and commands use."""


def param_axes(config: OvisConfig) -> dict[str, str]:
    """Every parameter path of a model with its letters, in one fixed order, block by block."""
    axes = {}
    for prefix, group in groupby(PARAM_AXES, lambda pattern: pattern.partition("*")[0]):
        patterns = list(group)
        repeated = "*" in patterns[0]
        depth = (config.vision if prefix.startswith("vision/") else config.decoder).depth
        for block in range(depth) if repeated else [0]:
            for pattern in patterns:
                axes[pattern.replace("*", str(block))] = PARAM_AXES[pattern]
    if config.decoder.tie_embeddings:
        del axes["decoder/unembed"]
    return axes


def param_letters(path: str) -> str:
    """The letters of a parameter, such as "(N H) D" for "decoder/block_0/attn/q"."""
    return PARAM_AXES[re.sub(r"/block_\d+/", "/block_*/", path)]


def takes_adapter(path: str) -> bool:
    """Whether a parameter is a matrix that `linear` multiplies by, so that it may be adapted."""
    return len(dimensions(param_letters(path))) == 2 and path not in _LOOKED_UP


def adapter_axes(config: OvisConfig) -> dict[str, str]:
    """Both halves of every adapter that a model may have: `path/a` "R in", `path/b` "out R"."""
    axes = {}
    for path, letters in param_axes(config).items():
        if takes_adapter(path):
            rows, columns = re.findall(_DIMENSION, letters)
            axes |= {f"{path}/a": f"R {columns}", f"{path}/b": f"{rows} R"}
    return axes


def letter_sizes(config: OvisConfig, path: str) -> dict[str, int]:
    """The size of every letter at a path; F and H are those of the part that the path is in."""
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


def dimensions(letters: str) -> list[list[str]]:
    """The letters of each dimension: "(N H) D" -> [["N", "H"], ["D"]]."""
    return [part.strip("()").split() for part in re.findall(_DIMENSION, letters)]


def shape_of(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that letters stand for."""
    return tuple(
        math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in group)
        for group in dimensions(letters)
    )


def param_shapes(
    config: OvisConfig, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """Every parameter path of a model with its shape, in the order of `param_axes`.

    With a mesh, the shape that it has there. The visual table and the visual head are cut along
    their rows, of which there are U and W = U - 5. Where an axis of size n > 1 carries them, both
    have U rows rounded up to a multiple of n; those behind the true ones are zeros. As both have
    the same number, the product of the head's words with the table is made without moving a shard.
    """
    return _shapes(param_axes(config), config, mesh, rules)


def adapter_shapes(
    config: OvisConfig, rank: int, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """The shape of each half of `adapter_axes`, padded on a mesh as its matrix is."""
    return _shapes(adapter_axes(config), config, mesh, rules, R=rank)


def _shapes(
    axes: Mapping[str, str],
    config: OvisConfig,
    mesh: Mesh | AbstractMesh | None,
    rules: Rules,
    **more: int,
) -> dict[str, tuple[int, ...]]:
    return {
        path: shape_of(letters, _sizes_on(mesh, rules, letter_sizes(config, path)) | more)
        for path, letters in axes.items()
    }


def _sizes_on(
    mesh: Mesh | AbstractMesh | None, rules: Rules, sizes: dict[str, int]
) -> dict[str, int]:
    """The sizes of letters with the padding that they have on a mesh."""
    padded = {}
    for letter in _PADDED:
        parts = 1 if mesh is None else mesh.shape.get(rules.get(letter, ""), 1)
        if parts > 1:
            padded[letter] = -(-sizes["U"] // parts) * parts
    return sizes | padded


def true_rows(config: OvisConfig, letters: str) -> int | None:
    """The rows of a parameter without padding, where it may have some; else None."""
    first = dimensions(letters)[0][0]
    return letter_sizes(config, "")[first] if first in _PADDED else None


def pad_params(
    params: Mapping[str, Any],
    config: OvisConfig,
    mesh: Mesh | AbstractMesh,
    rules: Rules = TENSOR,
) -> dict[str, Any]:
    """Parameters in the shapes that `param_shapes` gives for a mesh, to be placed there.

    For plain arrays in memory that are not padded; `load_params` gives them padded and placed. With
    padding they may be used and saved as without it, on any device.
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
    """How each parameter lies on a mesh, in the shapes of `param_shapes` with that mesh.

    A dimension goes where the rules send the first of its letters that they name. Letters without a
    rule, and mesh axes that the mesh does not have, leave a dimension whole.

    Raises:
      OvisError: a letter's size is not a multiple of its mesh axis (U and W are padded to one), or
        two dimensions of one parameter would lie on the same mesh axis.
    """
    return _shardings(param_axes(config), config, mesh, rules)


def adapter_shardings(
    config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules = TENSOR
) -> dict[str, NamedSharding]:
    """How each half of `adapter_axes` lies on a mesh: as its matrix does, and R whole.

    Raises:
      OvisError: as `param_shardings`.
    """
    return _shardings(adapter_axes(config), config, mesh, rules)


def _shardings(
    axes: Mapping[str, str], config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules
) -> dict[str, NamedSharding]:
    return {
        path: NamedSharding(
            mesh,
            _spec(path, letters, _sizes_on(mesh, rules, letter_sizes(config, path)), mesh, rules),
        )
        for path, letters in axes.items()
    }


def _spec(
    path: str,
    letters: str,
    sizes: Mapping[str, int],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
) -> PartitionSpec:
    axes: list[str | None] = []
    for group in dimensions(letters):
        letter = next((letter for letter in group if letter in rules), group[0])
        axis = rules.get(letter)
        if axis not in mesh.shape:
            axes.append(None)
            continue
        if axis in axes:
            raise OvisError(
                f"{path} {letters!r}: the rules put two dimensions on mesh axis {axis!r}, the"
                f" second by letter {letter}; leave one of them out of the rules"
            )
        if sizes[letter] % mesh.shape[axis]:
            raise OvisError(
                f"{path} {letters!r}: letter {letter} has size {sizes[letter]}, which mesh axis"
                f" {axis!r} of size {mesh.shape[axis]} does not divide; use a mesh whose {axis!r}"
                f" axis divides it, or rules without {letter} (each device then has all of it)"
            )
        axes.append(axis)
    return PartitionSpec(*axes)
