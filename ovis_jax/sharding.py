"""The axes of every parameter, and the rules for sharding parameters over a mesh.

`PARAM_AXES` lists the axes of each parameter as letters, and a rule maps a letter to a mesh axis.
Shapes, shardings, the key map and errors about shapes are all derived from this table.
docs/research.md lists the letters, which have the same meaning in the whole repository. Two more
letters are used only here: p is the side length of a patch in pixels, and m is the stride for
merging patches. A group in parentheses is one dimension, whose size is the product of its letters.
A number is a size.
"""

import math
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
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

POST_NORMS = "/post_attn_norm", "/post_mlp_norm"
"""Ends of the paths of norms that exist only if `DecoderConfig.post_norms` is True."""

_LOOKUP_TABLES = {"vision/position", "visual_embedding", "decoder/embed"}
"""Two-dimensional parameters that `linear` does not multiply by."""

_PADDED_LETTERS = "UW"
"""Letters whose dimensions are padded with rows of zeros, so that the size of a mesh axis divides
them. In the published models, W is 65531, which is odd."""

_DIMENSION = r"\([^)]*\)|\S+"

Rules = Mapping[str, str]

TENSOR: Rules = {axis: "model" for axis in "NKFAVUW"} | {"B": "data"}
"""Tensor parallelism: heads, MLP widths and vocabularies are sharded over "model", the batch over
"data"."""

FSDP: Rules = {"D": "data", "E": "data"}
"""FSDP: weights are sharded over "data" along their width. These rules do not apply to activations,
whose batch is already sharded over "data"."""

TENSOR_FSDP: Rules = {**TENSOR, **FSDP}
"""Tensor parallelism and FSDP together: every weight is sharded over both mesh axes."""

RULES_BY_NAME: Mapping[str, Rules] = {"tensor": TENSOR, "fsdp": FSDP, "tensor_fsdp": TENSOR_FSDP}
"""The rules by the name that configs, commands and `load` use."""

_RULE_LETTERS = {*re.findall("[A-Z]", "".join(PARAM_AXES.values())), "B"}


def parse_rules(rules: Rules | str) -> Rules:
    """Return the rules for a name in `RULES_BY_NAME`, or check and return a dict of rules.

    Raises:
      OvisError: The name is unknown, or the dict does not map letters to names of mesh axes.
    """
    table = RULES_BY_NAME.get(rules) if isinstance(rules, str) else rules
    if (
        table is None
        or not table.keys() <= _RULE_LETTERS
        or not all(isinstance(axis, str) for axis in table.values())
    ):
        raise OvisError(
            f"rules are {rules!r}, expected one of {', '.join(RULES_BY_NAME)}, or a dict from"
            f" letters ({' '.join(sorted(_RULE_LETTERS))}) to names of mesh axes"
        )
    return table


def param_axes(config: OvisConfig) -> dict[str, str]:
    """Return the axes of every parameter by path, in a fixed order, block by block."""
    axes = {}
    for prefix, group in groupby(PARAM_AXES, lambda pattern: pattern.partition("*")[0]):
        patterns = list(group)
        depth = (config.vision if prefix.startswith("vision/") else config.decoder).depth
        for block in range(depth) if "*" in patterns[0] else [0]:
            for pattern in patterns:
                axes[pattern.replace("*", str(block))] = PARAM_AXES[pattern]
    if config.decoder.tie_embeddings:
        del axes["decoder/unembed"]
    if not config.decoder.post_norms:
        axes = {path: x for path, x in axes.items() if not path.endswith(POST_NORMS)}
    return axes


def axes_of_param(path: str) -> str:
    """Return the axes of a parameter, such as "(N H) D" for "decoder/block_0/attn/q"."""
    return PARAM_AXES[re.sub(r"/block_\d+/", "/block_*/", path)]


def supports_adapter(path: str) -> bool:
    """Return whether a parameter can have an adapter: whether `linear` multiplies by it."""
    return len(split_axis_letters(axes_of_param(path))) == 2 and path not in _LOOKUP_TABLES


def adapter_axes(config: OvisConfig) -> dict[str, str]:
    """Return the axes of every adapter: `<matrix>/lora_a` has "R in", `<matrix>/lora_b` "out R"."""
    axes = {}
    for path, letters in param_axes(config).items():
        if supports_adapter(path):
            rows, columns = split_dimensions(letters)
            axes |= {f"{path}/lora_a": f"R {columns}", f"{path}/lora_b": f"{rows} R"}
    return axes


def axis_letter_sizes(config: OvisConfig, path: str) -> dict[str, int]:
    """Return the size of every letter for a path; F and H are different inside the decoder."""
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


def split_dimensions(axes: str) -> list[str]:
    """Return the dimensions: ["(N H)", "D"] for "(N H) D"."""
    return re.findall(_DIMENSION, axes)


def split_axis_letters(axes: str) -> list[list[str]]:
    """Return the letters of each dimension: [["N", "H"], ["D"]] for "(N H) D"."""
    return [part.strip("()").split() for part in split_dimensions(axes)]


def shape_from_axes(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a parameter, given its axes and the sizes of the letters."""
    return tuple(
        math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in group)
        for group in split_axis_letters(axes)
    )


def param_shapes(
    config: OvisConfig, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by path, in the order of `param_axes`.

    With a mesh, the shapes include padding. The visual embedding table has U rows, and the visual
    head has W = U - 5 rows. If a mesh axis of size n > 1 shards them, both are padded with rows of
    zeros to the same number of rows: U, rounded up to a multiple of n. The same words are then on
    the same device, so that multiplying the probabilities by the table needs no resharding.
    """
    return _shapes(param_axes(config), config, mesh, rules)


def adapter_shapes(
    config: OvisConfig, rank: int, mesh: Mesh | AbstractMesh | None = None, rules: Rules = TENSOR
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every adapter by path, padded for a mesh like its matrix."""
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
    """Return the sizes from `axis_letter_sizes`, with the padding for a mesh."""
    sizes = axis_letter_sizes(config, path)
    padded = {}
    for letter in _PADDED_LETTERS:
        parts = 1 if mesh is None else mesh.shape.get(rules.get(letter, ""), 1)
        if parts > 1:
            padded[letter] = -(-sizes["U"] // parts) * parts
    return sizes | padded


def unpadded_rows(config: OvisConfig, axes: str) -> int | None:
    """Return the number of real rows if a parameter may be padded for a mesh, otherwise None."""
    first = split_axis_letters(axes)[0][0]
    return axis_letter_sizes(config, "")[first] if first in _PADDED_LETTERS else None


def pad_params(
    params: Mapping[str, Any],
    config: OvisConfig,
    mesh: Mesh | AbstractMesh,
    rules: Rules = TENSOR,
) -> dict[str, Any]:
    """Pad arrays to the shapes that `param_shapes` returns for a mesh.

    The parameters from `load_params` are already padded. Padded parameters can be used and saved
    like unpadded parameters, on any device.
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
    """Return the sharding of every parameter by path, for the shapes from `param_shapes`.

    If a dimension has several letters, the first letter with a rule determines the sharding. A
    dimension is replicated if none of its letters has a rule, or if the mesh has no such axis.

    Raises:
      OvisError: The mesh has none of the axes in the rules, the size of a letter is not divisible
        by the size of its mesh axis (U and W are padded), or the rules shard two dimensions of a
        parameter over the same mesh axis.
    """
    return _shardings(param_axes(config), config, mesh, rules)


def adapter_shardings(
    config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules = TENSOR
) -> dict[str, NamedSharding]:
    """Return the sharding of every adapter by path: that of its matrix, with R replicated.

    Raises:
      OvisError: The rules cannot shard the adapters, as in `param_shardings`.
    """
    return _shardings(adapter_axes(config), config, mesh, rules)


def _shardings(
    axes: Mapping[str, str], config: OvisConfig, mesh: Mesh | AbstractMesh, rules: Rules
) -> dict[str, NamedSharding]:
    if rules and not set(mesh.axis_names).intersection(rules.values()):
        raise OvisError(
            f"the mesh has the axes {list(mesh.axis_names)}, but the rules shard over"
            f" {sorted(set(rules.values()))}, so every device would hold all parameters; rename the"
            " axes of the mesh, or pass rules with its axes (rules={} replicates them)"
        )
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
    for group in split_axis_letters(letters):
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
    """Return the mesh axis over which `TENSOR` shards a letter; None if `size` is not divisible."""
    axis = TENSOR[letter]
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def mesh_of(x: Array) -> AbstractMesh:
    """Return the mesh in scope or, if there is none, the mesh of an array; it may be empty."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding.mesh if mesh.empty else mesh


def size_per_device(letter: str, size: int, x: Array) -> int:
    """Return the size of a dimension on each device of the mesh of `x`, sharded by `TENSOR`."""
    mesh = mesh_of(x)
    axis = mesh_axis(letter, size, mesh)
    return size if axis is None else size // mesh.shape[axis]


def constrain(x: Array, axes: str) -> Array:
    """Shard an activation over the mesh of `x` as `TENSOR` says.

    Without this, the compiler may compute all rows on every device, to keep a weight sharded.
    Without a mesh, or if its axes are not all automatic, `x` is returned unchanged.

    Args:
      x: The activation.
      axes: One letter per dimension, such as "B T D". Crops are sharded like rows, by letter B.
    """
    mesh = mesh_of(x)
    if mesh.empty or not mesh.are_all_axes_auto:
        return x
    letters = zip(axes.split(), x.shape, strict=True)
    spec = (mesh_axis(letter, size, mesh) if letter in TENSOR else None for letter, size in letters)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
