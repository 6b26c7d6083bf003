"""Comparing a checkpoint with results from the original code, stage by stage.

A golden file is an .npz file with the original's results for one prompt; tests/golden/README.md
lists its fields. Results in float32 are compared end to end. Results in bfloat16 are compared stage
by stage, where the input of each stage is the stored output of the previous stage. The reason is
that a difference in the last bit of one stage can change the tokens if the model's distributions
are peaked. For a quantized model, the distributions of the next token are compared.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ovis_jax.checkpoint.params import find_quantization
from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError, RequestError, count_noun
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs, pad_batch
from ovis_jax.inputs.conversation import turns_from_sharegpt
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis
from ovis_jax.model import decoder, vision
from ovis_jax.model.layers import layer_norm
from ovis_jax.model.linear import linear
from ovis_jax.model.ovis import activation_dtype, apply, forward
from ovis_jax.model.visual_tokenizer import embed_words, merge_patches, tokenize
from ovis_jax.quantization import Quantization, QuantizationFormat

VISUAL_TOLERANCE = 1e-4
DECODER_TOLERANCE = 1e-2
BLOCK_TOLERANCE_BF16 = 0.032
LOGITS_TOLERANCE_BF16 = 0.17
"""The bfloat16 tolerances are relative to the largest value. They are based on the differences
between two correct computations (tests/golden/README.md)."""
KL_TOLERANCE: dict[QuantizationFormat, float] = {"int8": 0.1, "int4": 0.5}
DIFFERENT_TOKENS_TOLERANCE: dict[QuantizationFormat, float] = {"int8": 0.1, "int4": 0.25}
"""Largest allowed mean KL divergence, in nats, and largest allowed share of different greedy tokens
when a quantized model is compared with the original before quantization.

The tolerances separate rounding from mistakes. On ovis-tiny, rounding costs at most 0.003 nats in
int8 and 0.05 nats in int4, and changes no token; other models may lose more. Rows or inputs in the
wrong order cost 5 to 7 nats if this affects all matrices of the decoder. In a single matrix, they
cost 3 to 9 nats in a table or the visual head, 0.2 to 2.2 nats in a decoder block (at most 0.4 for
queries and keys), and 0.03 to 0.7 nats in the vision encoder. Scales that are wrong by the same
factor are not detected if a norm follows, because the norm removes the factor.
"""


@dataclass(frozen=True)
class StageResult:
    """The result of comparing one stage.

    Attributes:
      name: Name of the stage.
      difference: The maximum difference that was found; for a quantized model, a mean KL divergence
        or a share of tokens.
      tolerance: The maximum difference that is allowed.
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
      path: The .npz file.

    Attributes:
      path: The path of the .npz file.
      meta: Metadata: the prompt, the names of the images, and the dtype of the results.
      dtype: Dtype that the results were computed in.
      is_dequantized: Whether the weights were the dequantized weights of a quantized checkpoint.

    Raises:
      RequestError: The file is not a golden file. The error is also raised later, when a missing
        field is looked up.
    """

    def __init__(self, path: Path):
        if path.is_dir():
            raise RequestError(f"{path} is a folder; pass golden files, such as {path}/*.npz")
        if not zipfile.is_zipfile(path):
            found = "is not an .npz file" if path.exists() else "does not exist"
            raise RequestError(f"{path} {found}; pass golden files of tools/make_goldens.py")
        self.path = path
        try:
            with np.load(path) as file:
                super().__init__(file)
            self.meta: dict[str, Any] = json.loads(str(self["meta"]))
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise RequestError(f"{path} is damaged or not a golden file: {error}") from error
        keys = self.meta.keys() if isinstance(self.meta, dict) else set()
        if "rows" not in keys and not {"text", "images", "max_partition"} <= keys:
            raise RequestError(
                f"{path}: the field meta has {', '.join(keys) or 'no keys'}, expected rows, or"
                " text, images and max_partition; make the file again with tools/make_goldens.py"
            )
        self.dtype = "bfloat16" if self.meta.get("compute") == "bf16" else "float32"
        self.is_dequantized = "weights" in self.meta

    def __missing__(self, field: str) -> np.ndarray:
        raise RequestError(f"{self.path} has no field {field}, so it is not a golden file")


def compare_with_golden(ovis: LoadedOvis, golden: GoldenFile) -> list[StageResult]:
    """Compare a model with a golden file.

    If the model is quantized and the results are those of the model before quantization, only ids,
    crops, distributions of the next token and greedy tokens are compared.

    Args:
      ovis: The model, whose parameters must have the dtype `golden.dtype`.
      golden: The golden file.

    Raises:
      RequestError: The file contains results from a different model, a field is missing, or the
        images are not in a folder named `images` next to the file or above it.
    """
    _check_model(golden, ovis.config)
    try:
        return list(_compare(ovis, golden))
    except OvisError as error:
        named = str(golden.path) in str(error)
        raise RequestError(str(error) if named else f"{golden.path}: {error}") from error


def _check_model(golden: GoldenFile, config: OvisConfig) -> None:
    """Check that the shapes in a golden file match the sizes of a model."""
    vision, tokenizer, decoder = config.vision, config.visual_tokenizer, config.decoder
    sizes = (
        ("decoder depth", "llm_blocks", 0, decoder.depth),
        ("decoder width", "inputs_embeds", -1, decoder.width),
        ("vocabulary size", "logits", -1, decoder.vocab_size),
        ("vocabulary size", "first_logits", -1, decoder.vocab_size),
        ("image size", "pixel_values", -1, vision.image_size),
        ("vision depth + 1", "siglip_hidden", 0, vision.depth + 1),
        ("vision width", "siglip_hidden", -1, vision.width),
        ("number of visual tokens per crop", "visual_logits", 1, tokenizer.tokens_per_crop),
        ("width of visual features", "visual_features", -1, tokenizer.merged_width),
        ("number of visual words", "visual_logits", -1, tokenizer.num_words),
    )
    differences = [
        f"the {name} is {found} in the file and {size} in the checkpoint"
        for name, field, axis, size in sizes
        if field in golden and (found := next(iter(golden[field].shape[axis:]), None)) != size
    ]
    if differences:
        raise RequestError(
            f"{golden.path} has results from a different model: {'; '.join(differences)}; pass"
            " goldens of this checkpoint"
        )


def _compare(ovis: LoadedOvis, golden: GoldenFile) -> Iterator[StageResult]:
    if "rows" in golden.meta:
        inputs, compare = _convert_batch(ovis.processor, golden), _compare_batch
    else:
        processed = _process(ovis.processor, golden)
        pixels = golden.get("pixel_values")
        if pixels is None:  # the pixels are stored only in the float32 file
            num_crops = np.count_nonzero(golden["input_ids"] == IMAGE_SLOT)
            pixels = processed.pixels[:num_crops].transpose(0, 3, 1, 2)
        inputs = ovis.processor.convert_hf_inputs(golden["input_ids"], pixels)
        yield StageResult("token ids", _distance(processed.tokens, inputs.tokens), 0)
        if "pixel_values" in golden:
            yield StageResult("crops", _distance(processed.pixels, inputs.pixels), 0)
        compare = _compare_stages if golden.dtype == "bfloat16" else _compare_end_to_end
    quantization = find_quantization(flatten_dict(ovis.params, sep="/"))
    if quantization and not (quantization.decoder_only and golden.is_dequantized):
        compare = partial(_compare_distributions, quantization)
    yield from compare(ovis, inputs, golden)


def _compare_end_to_end(
    ovis: LoadedOvis, inputs: Inputs, golden: GoldenFile
) -> Iterator[StageResult]:
    """Compare all stages of a forward pass, and the tokens from greedy decoding."""
    logits, states = forward(ovis.model, ovis.params, inputs, return_states=True)
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
    yield _compare_tokens(ovis, inputs, golden["gen_tokens"][None], golden["gen_margins"][None])


def _convert_batch(processor: Processor, golden: GoldenFile) -> Inputs:
    """Convert the inputs of a batch; the crops of its rows are in separate golden files."""
    rows = [GoldenFile(golden.path.with_name(f"{name}.npz")) for name in golden.meta["rows"]]
    pixels = np.concatenate([row["pixel_values"] for row in rows if "pixel_values" in row])
    return processor.convert_hf_inputs(golden["input_ids"], pixels, golden["attention_mask"])


def _compare_batch(ovis: LoadedOvis, inputs: Inputs, golden: GoldenFile) -> Iterator[StageResult]:
    """Compare a batch whose rows have different lengths."""
    logits, states = forward(ovis.model, ovis.params, inputs, return_states=True)
    lengths = golden["merged_mask"].sum(axis=1)
    embeds = [
        _distance(states.inputs_embeds[b, :length], golden["inputs_embeds"][b, -length:])
        for b, length in enumerate(lengths)
    ]
    yield StageResult("input embeddings", max(embeds), VISUAL_TOLERANCE)
    last = np.asarray(logits)[np.arange(len(lengths)), lengths - 1]
    yield StageResult("logits", _distance(last, golden["first_logits"]), DECODER_TOLERANCE)
    yield _compare_tokens(ovis, inputs, golden["gen_tokens"], golden["gen_margins"])


def _compare_tokens(
    ovis: LoadedOvis, inputs: Inputs, tokens: np.ndarray, margins: np.ndarray
) -> StageResult:
    """Count the greedy tokens that differ, up to each row's first margin within the tolerance."""
    num_tokens = tokens.shape[1]
    out = generate(ovis.model, ovis.params, inputs, max_new_tokens=num_tokens, eos_ids=())
    decided = np.cumprod(margins > DECODER_TOLERANCE, axis=1).astype(bool)
    different = (np.asarray(out.tokens) != tokens) & decided
    name = count_noun(int(decided.sum()), "greedy token")
    return StageResult(name, float(different.sum()), 0)


def _compare_distributions(
    quantization: Quantization, ovis: LoadedOvis, inputs: Inputs, golden: GoldenFile
) -> Iterator[StageResult]:
    """Compare a quantized model with the original before quantization.

    One forward pass reads the prompts, each followed by the original's greedy tokens.
    """
    answers, margins = (np.atleast_2d(golden[field]) for field in ("gen_tokens", "gen_margins"))
    lengths = np.sum(inputs.positions >= 0, axis=1)[: len(answers)]
    rows = [
        np.concatenate([tokens[:length], answer[:-1]])
        for tokens, length, answer in zip(inputs.tokens, lengths, answers, strict=False)
    ]
    batch = pad_batch(rows, inputs.pixels, ovis.config)
    logits = np.asarray(forward(ovis.model, ovis.params, batch))
    if "first_logits" in golden:
        found, expected = logits[np.arange(len(lengths)), lengths - 1], golden["first_logits"]
    else:
        found, expected = logits[0, : lengths[0]], golden["logits"][golden["merged_mask"]]
    divergence = mean_kl_divergence(expected, found)
    yield StageResult("KL divergence", divergence, KL_TOLERANCE[quantization.format])
    columns = lengths[:, None] - 1 + np.arange(answers.shape[1])
    greedy = logits[np.arange(len(lengths))[:, None], columns].argmax(axis=-1)
    different = (greedy != answers)[margins > DECODER_TOLERANCE]
    name = f"share of {count_noun(different.size, 'token')} that differ"
    share = float(np.mean(different)) if different.size else 0.0
    yield StageResult(name, share, DIFFERENT_TOKENS_TOLERANCE[quantization.format])


def mean_kl_divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the mean KL divergence of softmax(found) from softmax(expected), in nats.

    The result is infinite if the shapes differ.

    Args:
      expected: Logits [n, V] of the reference.
      found: Logits [n, V] of the model that approximates the reference.
    """
    if found.shape != expected.shape:
        return math.inf

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        x = logits.astype(np.float64)
        x -= x.max()
        return x - np.log(np.sum(np.exp(x)))

    pairs = ((log_softmax(p), log_softmax(q)) for p, q in zip(expected, found, strict=True))
    return float(np.mean([np.sum(np.exp(p) * (p - q)) for p, q in pairs]))


def _compare_stages(ovis: LoadedOvis, inputs: Inputs, golden: GoldenFile) -> Iterator[StageResult]:
    """Compare each stage separately; its input is the stored output of the previous stage."""
    c, params = ovis.config, ovis.params

    def stored(field: str) -> jax.Array:
        return jnp.asarray(golden[field]).astype(activation_dtype(params))

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
        x = ovis.model.embed_inputs(params, jnp.asarray(inputs.tokens), stored("visual_embeds"))
        yield stage("input embeddings", x[0, :length], golden["inputs_embeds"], 0)
    x = decoder.scale_embeddings(c.decoder, stored("inputs_embeds")[None])
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


def _process(processor: Processor, golden: GoldenFile) -> Inputs:
    """Process the prompt and the image files that a golden file names."""
    meta = golden.meta
    paths = [_find_image(name, golden.path) for name in meta["images"]]
    images = [open_image(path, exact=True) for path in paths]
    text = meta["text"]
    if not isinstance(text, str):
        text = turns_from_sharegpt(text, processor.chat_format)
    return processor([text], [images], max_partition=meta["max_partition"])


def _find_image(name: str, path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / "images" / name).is_file():
            return folder / "images" / name
    raise RequestError(
        f"{path} needs the file images/{name}; no folder images next to it or above it has the file"
    )


def _distance(found: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """Return the maximum absolute difference, or infinity if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return float(difference.max(initial=0.0))
