"""A checkpoint held against results of the original code, stage by stage.

A golden file is an .npz with the results of one prompt; tests/golden/README.md of the repository
names its fields. Results that were computed in float32 are compared end to end. Results computed in
bfloat16 are compared one stage at a time, each fed with the stored output of the stage before,
since a difference in the last bit of one stage may change the tokens of a sharp model.
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
from ovis_jax.inputs.conversation import from_original
from ovis_jax.inputs.image import IMAGE_SLOT, open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.model import decoder, vision
from ovis_jax.model.layers import layer_norm, linear
from ovis_jax.model.ovis import Ovis, Params, apply, forward
from ovis_jax.model.visual_tokenizer import embed_words, merge_patches, tokenize

VISUAL_TOLERANCE = 1e-4
DECODER_TOLERANCE = 1e-2
BLOCK_TOLERANCE_BF16 = 0.032
LOGITS_TOLERANCE_BF16 = 0.17
"""The bfloat16 tolerances are shares of the largest value, as measured between two correct
computations (tests/golden/README.md)."""


@dataclass(frozen=True)
class Stage:
    """One line of the comparison: the largest difference found, and the largest allowed."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference, which must be a number, is within the tolerance."""
        return self.difference <= self.tolerance


class Case(dict[str, np.ndarray]):
    """The fields of a golden file, which says which one it lacks."""

    def __init__(self, golden: Path):
        try:
            file = np.load(golden)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with file:
                super().__init__(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise RequestError(f"{golden} cannot be read as an .npz file: {error}") from error
        self.golden = golden

    def __missing__(self, field: str) -> np.ndarray:
        raise RequestError(f"{self.golden} has no field {field}: it is no golden file of this kind")

    @property
    def meta(self) -> dict[str, Any]:
        """What the results are of."""
        try:
            return json.loads(str(self["meta"]))
        except ValueError as error:
            raise RequestError(f"{self.golden}: the field meta is not JSON: {error}") from error

    def check_blocks(self, depth: int) -> None:
        """Refuse a model of another depth, whose blocks cannot be compared."""
        if (found := len(self["llm_blocks"])) != depth:
            raise RequestError(
                f"{self.golden} has results of {found} decoder blocks, the model has {depth}: it is"
                " of another model"
            )


def is_bfloat16(golden: Path) -> bool:
    """Whether a golden file was computed in bfloat16, so that the checkpoint is to be too."""
    return Case(golden).meta.get("compute") == "bf16"


def verify(processor: Processor, model: Ovis, params: Params, golden: Path) -> list[Stage]:
    """Compare a model, in the dtype that the golden file was computed in, with that file.

    Raises:
      RequestError: the file is not a golden file, or is of another model, or images that it names
        are not found in a folder `images` beside it or above it.
    """
    case = Case(golden)
    meta = case.meta
    if "rows" in meta:
        return list(_batch_stages(processor, model, params, case))
    case.check_blocks(model.config.decoder.depth)
    made = _make_inputs(processor, meta, golden)
    pixels = case.get("pixel_values")
    if pixels is None:  # stored once, with the float32 results
        num_crops = np.count_nonzero(case["input_ids"] == IMAGE_SLOT)
        pixels = made.pixels[:num_crops].transpose(0, 3, 1, 2)
    inputs = processor.from_reference(case["input_ids"], pixels)
    stages = [Stage("token ids", _distance(made.tokens, inputs.tokens), 0)]
    if "pixel_values" in case:
        stages.append(Stage("crops", _distance(made.pixels, inputs.pixels), 0))
    compare = _separate_stages if meta.get("compute") == "bf16" else _joint_stages
    return stages + list(compare(model, params, inputs, case))


def _joint_stages(model: Ovis, params: Params, inputs: Inputs, case: Case) -> Iterator[Stage]:
    """The whole model, each stage reading what the one before has given."""
    logits, states = forward(model, params, inputs, return_states=True)
    num_crops, length = case.get("visual_embeds", np.zeros(0)).shape[0], len(case["merged_mask"])
    if states.images is not None:
        found = {
            "vision features": (states.images.tokens.features, "visual_features"),
            "visual logits": (states.images.tokens.logits, "visual_logits"),
            "visual embeddings": (states.images.embeddings, "visual_embeds"),
        }
        for name, (array, field) in found.items():
            yield Stage(name, _distance(array[:num_crops], case[field]), VISUAL_TOLERANCE)
        top = np.take_along_axis(
            np.asarray(states.images.tokens.probabilities[:num_crops]),
            case["visual_top8_ids"],
            axis=-1,
        )
        difference = _distance(top, case["visual_top8_probs"])
        yield Stage("visual probabilities", difference, VISUAL_TOLERANCE)
    embeds = states.inputs_embeds[0, :length]
    yield Stage("input embeddings", _distance(embeds, case["inputs_embeds"]), VISUAL_TOLERANCE)
    for i, hidden in enumerate(states.hidden):
        difference = _distance(hidden[0, :length], case["llm_blocks"][i])
        yield Stage(f"block {i}", difference, DECODER_TOLERANCE)
    yield Stage("logits", _distance(logits[0, :length], case["logits"]), DECODER_TOLERANCE)
    yield _token_stage(model, params, inputs, case["gen_tokens"][None], case["gen_margins"][None])


def _batch_stages(processor: Processor, model: Ovis, params: Params, case: Case) -> Iterator[Stage]:
    """Rows of different lengths in one batch, against the same rows alone."""
    rows = [Case(case.golden.with_name(f"{name}.npz")) for name in case.meta["rows"]]
    pixels = np.concatenate([row["pixel_values"] for row in rows if "pixel_values" in row])
    inputs = processor.from_reference(case["input_ids"], pixels, case["attention_mask"])
    logits, states = forward(model, params, inputs, return_states=True)
    lengths = case["merged_mask"].sum(axis=1)
    embeds = [
        _distance(states.inputs_embeds[b, :length], case["inputs_embeds"][b, -length:])
        for b, length in enumerate(lengths)
    ]
    yield Stage("input embeddings", max(embeds), VISUAL_TOLERANCE)
    last = np.asarray(logits)[np.arange(len(rows)), lengths - 1]
    yield Stage("logits", _distance(last, case["first_logits"]), DECODER_TOLERANCE)
    yield _token_stage(model, params, inputs, case["gen_tokens"], case["gen_margins"])


def _token_stage(
    model: Ovis, params: Params, inputs: Inputs, tokens: np.ndarray, margins: np.ndarray
) -> Stage:
    """Greedy tokens that differ, each row counted up to where its margin leaves the choice open."""
    out = generate(model, params, inputs, max_new_tokens=tokens.shape[1], eos_ids=())
    decided = np.cumprod(margins > DECODER_TOLERANCE, axis=1).astype(bool)
    different = (np.asarray(out.tokens) != tokens) & decided
    return Stage(f"{decided.sum()} greedy tokens", float(different.sum()), 0)


def _separate_stages(model: Ovis, params: Params, inputs: Inputs, case: Case) -> Iterator[Stage]:
    """Each stage by itself, fed with the stored output of the one before."""
    c, tree = model.config, params

    def stored(field: str) -> jax.Array:
        return jnp.asarray(case[field]).astype(tree["decoder"]["embed"].dtype)

    def stage(name: str, found: jax.Array, expected: np.ndarray, share: float) -> Stage:
        return Stage(name, _distance(found, expected) / float(np.abs(expected).max()), share)

    if "siglip_hidden" in case:
        hidden = stored("siglip_hidden")
        for i in range(c.vision.depth):
            block = vision.Block(c.vision, hidden.dtype)
            found = apply(block, tree["vision"][f"block_{i}"], hidden[i])
            yield stage(
                f"vision block {i}", found, case["siglip_hidden"][i + 1], BLOCK_TOLERANCE_BF16
            )
        merged = merge_patches(hidden[-1], c.visual_tokenizer.hidden_stride)
        yield stage("vision features", merged, case["visual_features"], 0)
    if "visual_features" in case:
        head = tree["visual_tokenizer"]
        x = linear(stored("visual_features"), head["head"])
        norm = head["norm"]
        x = layer_norm(x, norm["scale"], norm["bias"], c.visual_tokenizer.norm_eps)
        yield stage("visual logits", x, case["visual_logits"], BLOCK_TOLERANCE_BF16)
        x = tokenize(stored("visual_logits"), c.visual_tokenizer.tokenize_function)
        x = embed_words(x, tree["visual_embedding"])
        yield stage("visual embeddings", x, case["visual_embeds"], BLOCK_TOLERANCE_BF16)
        length = len(case["merged_mask"])
        x = model.embed_inputs(tree, jnp.asarray(inputs.tokens), stored("visual_embeds"))
        yield stage("input embeddings", x[0, :length], case["inputs_embeds"], 0)
    x = decoder.scale_embeddings(stored("inputs_embeds")[None])
    positions = jnp.asarray(case["position_ids"], jnp.int32)[None]
    blocks = stored("llm_blocks")
    for i in range(c.decoder.depth):
        block = decoder.Block(c.decoder, c.decoder.window(i), x.dtype)
        found, _ = apply(block, tree["decoder"][f"block_{i}"], x, positions, None)
        yield stage(f"block {i}", found[0], case["llm_blocks"][i], BLOCK_TOLERANCE_BF16)
        x = blocks[i][None]
    table = tree["decoder"]["embed" if c.decoder.tie_embeddings else "unembed"]
    logits = decoder.unembed(c.decoder, x, tree["decoder"]["final_norm"], table)
    yield stage("logits", logits[0], case["logits"], LOGITS_TOLERANCE_BF16)


def _make_inputs(processor: Processor, meta: dict[str, Any], golden: Path) -> Inputs:
    """What the processor makes of the case's own text and image files."""
    images = [open_image(_find_image(name, golden)) for name in meta["images"]]
    text = meta["text"] if isinstance(meta["text"], str) else from_original(meta["text"])
    return processor([text], [images], max_partition=meta["max_partition"])


def _find_image(name: str, golden: Path) -> Path:
    for folder in golden.resolve().parents:
        if (folder / "images" / name).is_file():
            return folder / "images" / name
    raise RequestError(f"{golden} needs images/{name} in a folder beside it or above it; none is")


def _distance(found: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return float(difference.max(initial=0.0))
