"""The Hub's keys as data: source key -> parameter path, or why a key is not used.

`account` holds a folder's tensors against a key map and a config, and tells all faults at once.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ovis_jax.checkpoint.folder import ADVICE, CheckpointFolder
from ovis_jax.checkpoint.problems import CheckpointProblems, Problem
from ovis_jax.checkpoint.safetensors_files import DTYPES, TensorEntry
from ovis_jax.config import OvisConfig
from ovis_jax.sharding import (
    dimensions,
    letter_sizes,
    param_axes,
    param_letters,
    param_shapes,
    shape_of,
)

_VISION = "visual_tokenizer.backbone.vision_model"
_VISION_BLOCK = f"{_VISION}.encoder.layers.*"
_LLM_BLOCK = "llm.model.layers.*"

PARAMETERS: Mapping[str, str] = {
    f"{_VISION}.embeddings.patch_embedding.weight": "vision/patch",
    f"{_VISION}.embeddings.patch_embedding.bias": "vision/patch_bias",
    f"{_VISION}.embeddings.position_embedding.weight": "vision/position",
    f"{_VISION_BLOCK}.layer_norm1.weight": "vision/block_*/attn_norm/scale",
    f"{_VISION_BLOCK}.layer_norm1.bias": "vision/block_*/attn_norm/bias",
    f"{_VISION_BLOCK}.self_attn.q_proj.weight": "vision/block_*/attn/q",
    f"{_VISION_BLOCK}.self_attn.q_proj.bias": "vision/block_*/attn/q_bias",
    f"{_VISION_BLOCK}.self_attn.k_proj.weight": "vision/block_*/attn/k",
    f"{_VISION_BLOCK}.self_attn.k_proj.bias": "vision/block_*/attn/k_bias",
    f"{_VISION_BLOCK}.self_attn.v_proj.weight": "vision/block_*/attn/v",
    f"{_VISION_BLOCK}.self_attn.v_proj.bias": "vision/block_*/attn/v_bias",
    f"{_VISION_BLOCK}.self_attn.out_proj.weight": "vision/block_*/attn/o",
    f"{_VISION_BLOCK}.self_attn.out_proj.bias": "vision/block_*/attn/o_bias",
    f"{_VISION_BLOCK}.layer_norm2.weight": "vision/block_*/mlp_norm/scale",
    f"{_VISION_BLOCK}.layer_norm2.bias": "vision/block_*/mlp_norm/bias",
    f"{_VISION_BLOCK}.mlp.fc1.weight": "vision/block_*/mlp/up",
    f"{_VISION_BLOCK}.mlp.fc1.bias": "vision/block_*/mlp/up_bias",
    f"{_VISION_BLOCK}.mlp.fc2.weight": "vision/block_*/mlp/down",
    f"{_VISION_BLOCK}.mlp.fc2.bias": "vision/block_*/mlp/down_bias",
    "visual_tokenizer.head.0.weight": "visual_tokenizer/head",
    "visual_tokenizer.head.1.weight": "visual_tokenizer/norm/scale",
    "visual_tokenizer.head.1.bias": "visual_tokenizer/norm/bias",
    "vte.weight": "visual_embedding",
    "llm.model.embed_tokens.weight": "decoder/embed",
    f"{_LLM_BLOCK}.input_layernorm.weight": "decoder/block_*/pre_attn_norm",
    f"{_LLM_BLOCK}.self_attn.q_proj.weight": "decoder/block_*/attn/q",
    f"{_LLM_BLOCK}.self_attn.k_proj.weight": "decoder/block_*/attn/k",
    f"{_LLM_BLOCK}.self_attn.v_proj.weight": "decoder/block_*/attn/v",
    f"{_LLM_BLOCK}.self_attn.o_proj.weight": "decoder/block_*/attn/o",
    f"{_LLM_BLOCK}.post_attention_layernorm.weight": "decoder/block_*/post_attn_norm",
    f"{_LLM_BLOCK}.pre_feedforward_layernorm.weight": "decoder/block_*/pre_mlp_norm",
    f"{_LLM_BLOCK}.mlp.gate_proj.weight": "decoder/block_*/mlp/gate",
    f"{_LLM_BLOCK}.mlp.up_proj.weight": "decoder/block_*/mlp/up",
    f"{_LLM_BLOCK}.mlp.down_proj.weight": "decoder/block_*/mlp/down",
    f"{_LLM_BLOCK}.post_feedforward_layernorm.weight": "decoder/block_*/post_mlp_norm",
    "llm.model.norm.weight": "decoder/final_norm",
    "llm.lm_head.weight": "decoder/unembed",
}
"""Key pattern on the Hub -> parameter path pattern."""

_NORM_REASON = "the features are the last block's output, before this norm"
_HEAD_REASON = "the pooling head is not part of Ovis: every patch's features are used"

UNUSED: Mapping[str, tuple[str, str]] = {
    f"{_VISION}.post_layernorm.weight": ("E", _NORM_REASON),
    f"{_VISION}.post_layernorm.bias": ("E", _NORM_REASON),
    f"{_VISION}.head.probe": ("1 1 E", _HEAD_REASON),
    f"{_VISION}.head.attention.in_proj_weight": ("(3 E) E", _HEAD_REASON),
    f"{_VISION}.head.attention.in_proj_bias": ("(3 E)", _HEAD_REASON),
    f"{_VISION}.head.attention.out_proj.weight": ("E E", _HEAD_REASON),
    f"{_VISION}.head.attention.out_proj.bias": ("E", _HEAD_REASON),
    f"{_VISION}.head.layernorm.weight": ("E", _HEAD_REASON),
    f"{_VISION}.head.layernorm.bias": ("E", _HEAD_REASON),
    f"{_VISION}.head.mlp.fc1.weight": ("F E", _HEAD_REASON),
    f"{_VISION}.head.mlp.fc1.bias": ("F", _HEAD_REASON),
    f"{_VISION}.head.mlp.fc2.weight": ("E F", _HEAD_REASON),
    f"{_VISION}.head.mlp.fc2.bias": ("E", _HEAD_REASON),
}
"""Keys that published checkpoints hold and the model never uses: their letters, and why."""


@dataclass(frozen=True)
class KeyMap:
    """The keys of one layout for one config: `parameters` key -> path, `unused` key -> why."""

    parameters: Mapping[str, str]
    unused: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """Where each parameter comes from, in the order of `param_shapes`, and what is left out.

    `unused` are tensors in the files with the reason; `absent` are unused keys not in the files.
    """

    sources: Mapping[str, TensorEntry]
    unused: tuple[tuple[TensorEntry, str], ...]
    absent: tuple[str, ...]


def hub_keys(config: OvisConfig) -> KeyMap:
    """The key map of a folder in the Hub's layout."""
    parameters = {}
    for source, path in PARAMETERS.items():
        depth = (config.vision if path.startswith("vision/") else config.decoder).depth
        for block in range(depth) if "*" in source else [0]:
            parameters[source.replace("*", str(block))] = path.replace("*", str(block))
    if config.decoder.tie_embeddings:
        del parameters["llm.lm_head.weight"]
    return KeyMap(parameters, {source: why for source, (_, why) in UNUSED.items()})


def own_keys(config: OvisConfig) -> KeyMap:
    """The key map of a converted folder, whose tensors are named by their paths."""
    return KeyMap({path: path for path in param_axes(config)}, {})


def unused_shapes(config: OvisConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the never-used tensors of a checkpoint with this config, by key."""
    sizes = letter_sizes(config, "vision/")
    return {key: shape_of(letters, sizes) for key, (letters, _) in UNUSED.items()}


def account(
    folder: CheckpointFolder, config: OvisConfig, keys: KeyMap, stored_dtype: str | None
) -> Plan:
    """Match every tensor of a folder with every parameter of a config.

    `stored_dtype` is the one dtype ("F32", "F16", "BF16") that parameters must have; None takes any
    of the three. The shapes and dtypes of unused tensors are not looked at.

    Raises:
      CheckpointProblems: with all rows: the folder's own problems, unknown and missing keys, wrong
        shapes and dtypes, parameters never written or written twice.
    """
    problems = list(folder.problems)
    shapes = param_shapes(config)
    problems += _map_problems(shapes, keys)
    found: defaultdict[str, list[TensorEntry]] = defaultdict(list)
    for entry in folder.tensors:
        found[entry.key].append(entry)
    for key, entries in found.items():
        named = folder.index.get(key)
        name = entries[0].path.name
        if len(entries) > 1:
            names = ", ".join(entry.path.name for entry in entries)
            problems.append(Problem(names, key, "in two files", "one tensor", str(len(entries))))
        elif key in keys.parameters and named and entries[0].path != folder.folder / named:
            expected = f"the index to name {name}"
            problems.append(Problem(name, key, "index differs", expected, named))
        if key in keys.parameters:
            path = keys.parameters[key]
            if path in shapes:
                letters, sizes = param_letters(path), letter_sizes(config, path)
                problems += tensor_problems(entries[0], letters, sizes, stored_dtype)
        elif key not in keys.unused:
            what = f"{entries[0].dtype} {list(entries[0].shape)}"
            problems.append(Problem(name, key, "unknown key", "no such tensor", what))
    known = found.keys() | folder.unusable
    for key, path in keys.parameters.items():
        if key not in known and path in shapes:
            file = folder.index.get(key, "-")
            expected = f"{list(shapes[path])} for {path}"
            problems.append(Problem(file, key, "missing key", expected, "no such tensor"))
    for key, file in folder.index.items():
        if key not in known and key not in keys.parameters:
            problems.append(
                Problem(file, key, "missing tensor", "the tensor the index names", "no such tensor")
            )
    if problems:
        castable = any(row.problem == "wrong dtype" and row.found in DTYPES for row in problems)
        advice = ADVICE + (", or name the dtype to cast to" if castable else "")
        raise CheckpointProblems(str(folder.folder), problems, advice)
    sources = {path: key for key, path in keys.parameters.items()}
    return Plan(
        sources={path: found[sources[path]][0] for path in shapes},
        unused=tuple((found[key][0], why) for key, why in keys.unused.items() if key in found),
        absent=tuple(key for key in keys.unused if key not in found),
    )


def _map_problems(shapes: Mapping[str, tuple[int, ...]], keys: KeyMap) -> list[Problem]:
    """Faults of the key map itself, against the parameters that the model has."""
    writers = Counter(keys.parameters.values())
    rows = []
    for path in [*shapes, *(path for path in writers if path not in shapes)]:
        sources = ", ".join(key for key, target in keys.parameters.items() if target == path)
        if path not in shapes:
            rows.append(Problem("key map", sources, "no such parameter", "a path", path))
        elif writers[path] == 0:
            rows.append(Problem("key map", path, "parameter never written", "one key", "none"))
        elif writers[path] > 1:
            rows.append(Problem("key map", path, "parameter written twice", "one key", sources))
    return rows


def tensor_problems(
    entry: TensorEntry, letters: str, sizes: Mapping[str, int], stored_dtype: str | None
) -> list[Problem]:
    """The rows of a tensor that has another shape than its letters, or a dtype that is barred."""
    file, key = entry.path.name, entry.key
    shape = shape_of(letters, sizes)
    rows = []
    if entry.shape != shape:
        expected, found = f"{list(shape)} {letters!r}", f"{list(entry.shape)}"
        if len(entry.shape) == len(shape):
            for group, size, wrong in zip(dimensions(letters), shape, entry.shape, strict=True):
                if size != wrong:
                    expected += f", {' * '.join(group)} = {size}"
                    found += f", {' * '.join(group)} = {wrong}"
        rows.append(Problem(file, key, "wrong shape", expected, found))
    if entry.dtype not in DTYPES or stored_dtype not in (None, entry.dtype):
        expected = stored_dtype or "one of " + ", ".join(DTYPES)
        rows.append(Problem(file, key, "wrong dtype", expected, entry.dtype))
    return rows
