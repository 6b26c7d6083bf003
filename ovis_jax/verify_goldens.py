"""Comparison of a checkpoint with results of the original code, stage by stage.

A golden file is an .npz with the original's results for one prompt; tests/golden/README.md lists
its fields. Results computed in float32 are compared end to end. Results computed in bfloat16 are
compared stage by stage, each stage with the stored output of the stage before as its input, because
a difference in the last bit of one stage can change the tokens of a model with sharp distributions.
"""

import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.conversation import turns_from_sharegpt
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.model import decoder, vision
from ovis_jax.model.layers import layer_norm
from ovis_jax.model.linear import linear
from ovis_jax.model.ovis import Ovis, Params, apply, forward
from ovis_jax.model.visual_tokenizer import embed_words, merge_patches, tokenize

VISUAL_TOLERANCE = 1e-4
DECODER_TOLERANCE = 1e-2
BLOCK_TOLERANCE_BF16 = 0.032
LOGITS_TOLERANCE_BF16 = 0.17
"""The bfloat16 tolerances are relative to the largest value. They are what two correct computations
differ by (tests/golden/README.md)."""


@dataclass(frozen=True)
class StageResult:
    """One line of the comparison.

    Attributes:
      name: the stage.
      difference: the largest difference found.
      tolerance: the largest difference allowed.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; False for NaN."""
        return self.difference <= self.tolerance


class GoldenFile(dict[str, np.ndarray]):
    """The fields of a golden file.

    Args:
      path: the .npz file.

    Raises:
      RequestError: the file cannot be read, or, later, lacks a field that is looked up.
    """

    def __init__(self, path: Path):
        try:
            file = np.load(path)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with file:
                super().__init__(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise RequestError(f"{path} cannot be read as an .npz file: {error}") from error
        self.path = path

    def __missing__(self, field: str) -> np.ndarray:
        raise RequestError(f"{self.path} has no field {field}, so it is not a golden file")

    @property
    def meta(self) -> dict[str, Any]:
        """The prompt, the images and the dtype of the results."""
        try:
            return json.loads(str(self["meta"]))
        except ValueError as error:
            raise RequestError(f"{self.path}: the field meta is not JSON: {error}") from error


def is_bfloat16_golden(path: Path) -> bool:
    """Whether the results in a golden file were computed in bfloat16."""
    return GoldenFile(path).meta.get("compute") == "bf16"


def compare_with_golden(
    processor: Processor, model: Ovis, params: Params, path: Path
) -> list[StageResult]:
    """Compare a model with a golden file.

    Args:
      processor: of the checkpoint.
      model: of the checkpoint.
      params: in the dtype that the results in the file were computed in.
      path: the golden file.

    Raises:
      RequestError: the file is not a golden file or belongs to another model, or its images are not
        in a folder `images` next to it or above it.
    """
    golden = GoldenFile(path)
    meta = golden.meta
    if "rows" in meta:
        return list(_compare_batch(processor, model, params, golden))
    if (found := len(golden["llm_blocks"])) != (depth := model.config.decoder.depth):
        raise RequestError(
            f"{path} has results of {found} decoder blocks, the model has {depth}: the file belongs"
            " to another model"
        )
    processed = _process(processor, meta, path)
    pixels = golden.get("pixel_values")
    if pixels is None:  # stored only once, in the float32 file
        num_crops = np.count_nonzero(golden["input_ids"] == IMAGE_SLOT)
        pixels = processed.pixels[:num_crops].transpose(0, 3, 1, 2)
    inputs = processor.convert_hf_inputs(golden["input_ids"], pixels)
    stages = [StageResult("token ids", _distance(processed.tokens, inputs.tokens), 0)]
    if "pixel_values" in golden:
        stages.append(StageResult("crops", _distance(processed.pixels, inputs.pixels), 0))
    compare = _compare_stages if meta.get("compute") == "bf16" else _compare_end_to_end
    return stages + list(compare(model, params, inputs, golden))


def _compare_end_to_end(
    model: Ovis, params: Params, inputs: Inputs, golden: GoldenFile
) -> Iterator[StageResult]:
    """Compare all stages of one forward pass, and the greedy tokens."""
    logits, states = forward(model, params, inputs, return_states=True)
    num_crops = golden.get("visual_embeds", np.zeros(0)).shape[0]
    length = len(golden["merged_mask"])
    if states.images is not None:
        tokens = states.images.tokens
        found = {
            "vision features": (tokens.features, "visual_features"),
            "visual logits": (tokens.logits, "visual_logits"),
            "visual embeddings": (states.images.embeddings, "visual_embeds"),
        }
        for name, (array, field) in found.items():
            difference = _distance(array[:num_crops], golden[field])
            yield StageResult(name, difference, VISUAL_TOLERANCE)
        probabilities = np.asarray(tokens.probabilities[:num_crops])
        top = np.take_along_axis(probabilities, golden["visual_top8_ids"], axis=-1)
        difference = _distance(top, golden["visual_top8_probs"])
        yield StageResult("visual probabilities", difference, VISUAL_TOLERANCE)
    difference = _distance(states.inputs_embeds[0, :length], golden["inputs_embeds"])
    yield StageResult("input embeddings", difference, VISUAL_TOLERANCE)
    for i, hidden in enumerate(states.hidden):
        difference = _distance(hidden[0, :length], golden["llm_blocks"][i])
        yield StageResult(f"block {i}", difference, DECODER_TOLERANCE)
    yield StageResult("logits", _distance(logits[0, :length], golden["logits"]), DECODER_TOLERANCE)
    margins = golden["gen_margins"][None]
    yield _compare_tokens(model, params, inputs, golden["gen_tokens"][None], margins)


def _compare_batch(
    processor: Processor, model: Ovis, params: Params, golden: GoldenFile
) -> Iterator[StageResult]:
    """Compare a batch of rows of different lengths."""
    rows = [GoldenFile(golden.path.with_name(f"{name}.npz")) for name in golden.meta["rows"]]
    pixels = np.concatenate([row["pixel_values"] for row in rows if "pixel_values" in row])
    inputs = processor.convert_hf_inputs(golden["input_ids"], pixels, golden["attention_mask"])
    logits, states = forward(model, params, inputs, return_states=True)
    lengths = golden["merged_mask"].sum(axis=1)
    embeds = [
        _distance(states.inputs_embeds[b, :length], golden["inputs_embeds"][b, -length:])
        for b, length in enumerate(lengths)
    ]
    yield StageResult("input embeddings", max(embeds), VISUAL_TOLERANCE)
    last = np.asarray(logits)[np.arange(len(rows)), lengths - 1]
    yield StageResult("logits", _distance(last, golden["first_logits"]), DECODER_TOLERANCE)
    yield _compare_tokens(model, params, inputs, golden["gen_tokens"], golden["gen_margins"])


def _compare_tokens(
    model: Ovis, params: Params, inputs: Inputs, tokens: np.ndarray, margins: np.ndarray
) -> StageResult:
    """Count greedy tokens that differ, in each row up to the first margin below the tolerance."""
    out = generate(model, params, inputs, max_new_tokens=tokens.shape[1], eos_ids=())
    decided = np.cumprod(margins > DECODER_TOLERANCE, axis=1).astype(bool)
    different = (np.asarray(out.tokens) != tokens) & decided
    return StageResult(f"{decided.sum()} greedy tokens", float(different.sum()), 0)


def _compare_stages(
    model: Ovis, params: Params, inputs: Inputs, golden: GoldenFile
) -> Iterator[StageResult]:
    """Compare each stage separately, with the stored output of the stage before as its input."""
    c = model.config

    def stored(field: str) -> jax.Array:
        return jnp.asarray(golden[field]).astype(params["decoder"]["embed"].dtype)

    def stage(name: str, found: jax.Array, expected: np.ndarray, tolerance: float) -> StageResult:
        difference = _distance(found, expected) / float(np.abs(expected).max())
        return StageResult(name, difference, tolerance)

    if "siglip_hidden" in golden:
        hidden = stored("siglip_hidden")
        for i in range(c.vision.depth):
            block = vision.VisionBlock(c.vision, hidden.dtype)
            found = apply(block, params["vision"][f"block_{i}"], hidden[i])
            expected = golden["siglip_hidden"][i + 1]
            yield stage(f"vision block {i}", found, expected, BLOCK_TOLERANCE_BF16)
        merged = merge_patches(hidden[-1], c.visual_tokenizer.hidden_stride)
        yield stage("vision features", merged, golden["visual_features"], 0)
    if "visual_features" in golden:
        head, norm = params["visual_tokenizer"]["head"], params["visual_tokenizer"]["norm"]
        x = linear(stored("visual_features"), head)
        x = layer_norm(x, norm["scale"], norm["bias"], c.visual_tokenizer.norm_eps)
        yield stage("visual logits", x, golden["visual_logits"], BLOCK_TOLERANCE_BF16)
        x = tokenize(stored("visual_logits"), c.visual_tokenizer.tokenize_function)
        x = embed_words(x, params["visual_embedding"])
        yield stage("visual embeddings", x, golden["visual_embeds"], BLOCK_TOLERANCE_BF16)
        length = len(golden["merged_mask"])
        x = model.embed_inputs(params, jnp.asarray(inputs.tokens), stored("visual_embeds"))
        yield stage("input embeddings", x[0, :length], golden["inputs_embeds"], 0)
    x = decoder.scale_embeddings(stored("inputs_embeds")[None])
    positions = jnp.asarray(golden["position_ids"], jnp.int32)[None]
    blocks = stored("llm_blocks")
    for i in range(c.decoder.depth):
        block = decoder.DecoderBlock(c.decoder, c.decoder.window(i), x.dtype)
        found, _ = apply(block, params["decoder"][f"block_{i}"], x, positions, None)
        yield stage(f"block {i}", found[0], golden["llm_blocks"][i], BLOCK_TOLERANCE_BF16)
        x = blocks[i][None]
    table = params["decoder"]["embed" if c.decoder.tie_embeddings else "unembed"]
    logits = decoder.unembed(c.decoder, x, params["decoder"]["final_norm"], table)
    yield stage("logits", logits[0], golden["logits"], LOGITS_TOLERANCE_BF16)


def _process(processor: Processor, meta: dict[str, Any], path: Path) -> Inputs:
    """Process the text and image files that the golden file names."""
    images = [open_image(_find_image(name, path)) for name in meta["images"]]
    text = meta["text"] if isinstance(meta["text"], str) else turns_from_sharegpt(meta["text"])
    return processor([text], [images], max_partition=meta["max_partition"])


def _find_image(name: str, path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / "images" / name).is_file():
            return folder / "images" / name
    raise RequestError(
        f"{path} needs the file images/{name}; no folder images next to it or above it has the file"
    )


def _distance(found: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return float(difference.max(initial=0.0))
