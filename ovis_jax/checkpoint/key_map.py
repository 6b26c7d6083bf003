"""Mapping the Hub's tensor keys to parameter paths, and matching a checkpoint with a config."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.safetensors_reader import DTYPES, TensorInfo
from ovis_jax.checkpoint.tensor_index import DOWNLOAD_ADVICE, TensorIndex
from ovis_jax.config import OvisConfig
from ovis_jax.quantization import Quantization, stored_tensors
from ovis_jax.sharding import (
    axes_of_param,
    axis_letter_sizes,
    shape_from_axes,
    split_axis_letters,
)

_VISION = "visual_tokenizer.backbone.vision_model"
_VISION_BLOCK = f"{_VISION}.encoder.layers.*"
_LLM_BLOCK = "llm.model.layers.*"

HUB_KEYS: Mapping[str, str] = {
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
"""Patterns of parameter paths, by the corresponding patterns of keys on the Hub."""

LLAMA_HUB_KEYS: Mapping[str, str] = {
    f"{_LLM_BLOCK}.post_attention_layernorm.weight": "decoder/block_*/pre_mlp_norm",
}
"""Keys of norms that have a different role in Llama, where no norm follows attention or the MLP."""

OUTPUT_KEY, EMBEDDING_KEY = "llm.lm_head.weight", "llm.model.embed_tokens.weight"

_TIED_REASON = f"the decoder's embeddings are tied, so this is a copy of {EMBEDDING_KEY}"
_NORM_REASON = "the features are the output of the last block, before this norm"
_HEAD_REASON = "the pooling head is not part of Ovis: every patch's features are used"

UNUSED_HUB_KEYS: Mapping[str, tuple[str, str]] = {
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
"""Keys of published checkpoints that the model never uses, each with its axes and the reason."""


@dataclass(frozen=True)
class KeyMap:
    """The tensor keys that one checkpoint layout has for one config.

    Attributes:
      parameters: Name of each tensor by key. The name is the path of a parameter or, for a
        quantized matrix, the path of one of its arrays.
      unused: Reason why the model never uses a tensor, by the tensor's key.
      tensors: Axes and dtype of every tensor by name, as in `stored_tensors`; several allowed
        dtypes are separated by spaces. None if the checkpoint is not quantized.
    """

    parameters: Mapping[str, str]
    unused: Mapping[str, str]
    tensors: Mapping[str, tuple[str, str | None]] | None = None


@dataclass(frozen=True)
class MatchedTensors:
    """A checkpoint whose tensors match a config exactly.

    Attributes:
      sources: Location of each tensor by the name in `KeyMap.parameters`, in the order of
        `param_shapes`.
      unused_found: Tensors in the files that the model never uses, each with the reason.
      unused_missing: Keys of never-used tensors that are not in the files.
      tied_output: If the embeddings are tied and the files still contain an output matrix, this
        matrix and the embedding that it must equal (see `check_tied_output`); otherwise None. The
        matrix is also in `unused_found`.
    """

    sources: Mapping[str, TensorInfo]
    unused_found: tuple[tuple[TensorInfo, str], ...]
    unused_missing: tuple[str, ...]
    tied_output: tuple[TensorInfo, TensorInfo] | None = None


def make_hub_key_map(config: OvisConfig) -> KeyMap:
    """Return the key map for a folder in the Hub's layout."""
    patterns, parameters = HUB_KEYS, {}
    if not config.decoder.post_norms:
        patterns = {**HUB_KEYS, **LLAMA_HUB_KEYS}
        patterns = {key: x for key, x in patterns.items() if "feedforward_layernorm" not in key}
    for key, path in patterns.items():
        depth = (config.vision if path.startswith("vision/") else config.decoder).depth
        for block in range(depth) if "*" in key else [0]:
            parameters[key.replace("*", str(block))] = path.replace("*", str(block))
    if config.decoder.tie_embeddings:
        del parameters[OUTPUT_KEY]
    return KeyMap(parameters, {key: reason for key, (_, reason) in UNUSED_HUB_KEYS.items()})


def make_converted_key_map(config: OvisConfig, quantization: Quantization | None = None) -> KeyMap:
    """Return the key map for a converted folder, whose tensors are named by parameter path."""
    tensors = stored_tensors(config, quantization)
    return KeyMap({name: name for name in tensors}, {}, tensors)


def unused_tensor_shapes(config: OvisConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the model never uses, by their key on the Hub."""
    sizes = axis_letter_sizes(config, "vision/")
    return {key: shape_from_axes(axes, sizes) for key, (axes, _) in UNUSED_HUB_KEYS.items()}


def match_tensors(
    index: TensorIndex, config: OvisConfig, key_map: KeyMap, stored_dtype: str | None
) -> MatchedTensors:
    """Match the tensors of a checkpoint with the parameters of a config, one to one.

    Args:
      index: The tensors of the checkpoint.
      config: Config that determines the expected parameters.
      key_map: The keys of the checkpoint's layout.
      stored_dtype: The dtype that parameters must have: "F32", "F16" or "BF16"; None accepts any of
        the three. The shapes and dtypes of never-used tensors are not checked.

    Raises:
      CheckpointValidationError: The index has faults, a key is unknown or missing, a shape or dtype
        is wrong, or a parameter has no key or several keys. The error lists all faults.
    """
    problems = list(index.problems)
    tensors = key_map.tensors or stored_tensors(config, None)
    problems += _check_key_map(tensors, key_map)

    def report(file: str, key: str, problem: str, expected: str, found: str) -> None:
        problems.append(CheckpointProblem(file, key, problem, expected, found))

    tied = EMBEDDING_KEY in key_map.parameters and OUTPUT_KEY not in key_map.parameters
    by_key: defaultdict[str, list[TensorInfo]] = defaultdict(list)
    for info in index.tensors:
        by_key[info.key].append(info)
    for key, infos in by_key.items():
        info, indexed_file = infos[0], index.weight_map.get(key)
        file, path = info.path.name, key_map.parameters.get(key)
        if len(infos) > 1:
            names = ", ".join(info.path.name for info in infos)
            report(names, key, "in two files", "one tensor", str(len(infos)))
        elif path is not None and indexed_file and info.path != index.folder / indexed_file:
            report(file, key, "index differs", f"the index to name {file}", indexed_file)
        if path is not None and path in tensors:
            (axes, dtype), sizes = tensors[path], axis_letter_sizes(config, path)
            problems += find_tensor_problems(info, axes, sizes, dtype or stored_dtype)
        elif key == OUTPUT_KEY and tied:
            axes, sizes = axes_of_param(HUB_KEYS[key]), axis_letter_sizes(config, HUB_KEYS[key])
            problems += find_tensor_problems(info, axes, sizes, None)
        elif path is None and key not in key_map.unused:
            found = f"{info.dtype} {list(info.shape)}"
            report(file, key, "unknown key", "no such tensor", found)
    known = by_key.keys() | index.unusable_keys
    for key, path in key_map.parameters.items():
        if key not in known and path in tensors:
            shape = shape_from_axes(tensors[path][0], axis_letter_sizes(config, path))
            file, expected = index.weight_map.get(key, "-"), f"{list(shape)} for {path}"
            report(file, key, "missing key", expected, "no such tensor")
    for key, file in index.weight_map.items():
        if key not in known and key not in key_map.parameters:
            report(file, key, "missing tensor", "the tensor that the index names", "no such tensor")
    if problems:
        castable = any(row.problem == "wrong dtype" and row.found in DTYPES for row in problems)
        advice = DOWNLOAD_ADVICE + (", or give the dtype to cast to" if castable else "")
        raise CheckpointValidationError(str(index.folder), problems, advice)
    keys = {path: key for key, path in key_map.parameters.items()}
    unused = {**key_map.unused, **({OUTPUT_KEY: _TIED_REASON} if tied else {})}.items()
    has_copy = tied and OUTPUT_KEY in by_key
    return MatchedTensors(
        sources={path: by_key[keys[path]][0] for path in tensors},
        unused_found=tuple((by_key[key][0], reason) for key, reason in unused if key in by_key),
        unused_missing=tuple(key for key in key_map.unused if key not in by_key),
        tied_output=(by_key[OUTPUT_KEY][0], by_key[EMBEDDING_KEY][0]) if has_copy else None,
    )


def _check_key_map(tensors: Collection[str], key_map: KeyMap) -> list[CheckpointProblem]:
    """Return a fault for each parameter for which the key map has no key or several keys."""
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for key, path in key_map.parameters.items():
        keys[path].append(key)
    rows = []
    for path in dict.fromkeys([*tensors, *keys]):
        sources = ", ".join(keys[path])
        if path not in tensors:
            fault = sources, "no such parameter", "a parameter path", path
        elif not keys[path]:
            fault = path, "parameter without a key", "one key", "none"
        elif len(keys[path]) > 1:
            fault = path, "parameter with several keys", "one key", sources
        else:
            continue
        rows.append(CheckpointProblem("key map", *fault))
    return rows


def find_tensor_problems(
    info: TensorInfo, axes: str, sizes: Mapping[str, int], stored_dtype: str | None
) -> list[CheckpointProblem]:
    """Check the shape and the dtype of a tensor.

    Args:
      info: The tensor.
      axes: The tensor's expected axes, such as "(N H) D".
      sizes: The size of each axis letter.
      stored_dtype: The expected dtype, or several allowed dtypes separated by spaces; None accepts
        any dtype in `DTYPES`.

    Returns:
      One row for each fault.
    """
    file, key = info.path.name, info.key
    shape = shape_from_axes(axes, sizes)
    rows = []
    if info.shape != shape:
        expected, found = f"{list(shape)} {axes!r}", f"{list(info.shape)}"
        if len(info.shape) == len(shape):
            for group, size, wrong in zip(split_axis_letters(axes), shape, info.shape, strict=True):
                if size != wrong:
                    expected += f", {' * '.join(group)} = {size}"
                    found += f", {' * '.join(group)} = {wrong}"
        rows.append(CheckpointProblem(file, key, "wrong shape", expected, found))
    dtypes = stored_dtype.split() if stored_dtype else list(DTYPES)
    if info.dtype not in dtypes:
        expected = dtypes[0] if len(dtypes) == 1 else "one of " + ", ".join(dtypes)
        rows.append(CheckpointProblem(file, key, "wrong dtype", expected, info.dtype))
    return rows
