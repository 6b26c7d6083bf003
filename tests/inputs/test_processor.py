import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from image_files import encode, exif_orientation
from PIL import Image, ImageFile

from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError, ImageError, PromptError, PromptTooLongError
from ovis_jax.inputs.buckets import Bucket, bucket_size
from ovis_jax.inputs.conversation import turns_from_sharegpt
from ovis_jax.inputs.image_processing import crop_boxes_with_thumbnail, image_placeholder_ids
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "tiny-f32"
CASES = ["large", "large_mp1", "large_mp4", "multi_turn", "palette", "rgba", "square", "tall"]
CASES += ["tall_thin", "text_only", "tiny", "two_images", "wide"]
CONFIG = OvisConfig.from_folder(CHECKPOINT)
M = CONFIG.visual_tokenizer.tokens_per_crop
PICTURE = Image.new("RGB", (70, 70))
TALL = encode(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (210, 70, 3)).astype(np.uint8))
)


@functools.cache
def processor(limit=CONFIG.multimodal_max_length):
    config = dataclasses.replace(CONFIG, multimodal_max_length=limit)
    return Processor.from_folder(CHECKPOINT, config)


@functools.cache
def read(case):
    """Fields of a golden case, its prompt, its images and its max_partition."""
    golden = dict(np.load(GOLDEN / "cases" / "tiny-f32" / f"{case}.npz"))
    meta = json.loads(str(golden["meta"]))
    prompt = meta["text"] if isinstance(meta["text"], str) else turns_from_sharegpt(meta["text"])
    images = [
        open_image(GOLDEN / "images" / Path(name).name, exact=True) for name in meta["images"]
    ]
    return golden, prompt, images, meta["max_partition"] or 9


def expanded(ids, values=None):
    values = ids if values is None else values
    return np.repeat(values, np.where(ids == -300, M, 1))


def crops_of(golden):
    return golden.get("pixel_values", np.zeros((0, 3, 70, 70), np.float32)).transpose(0, 2, 3, 1)


def check_row(inputs, row, expected):
    length = len(expected)
    assert inputs.tokens[row, :length].tolist() == expected.tolist()
    assert inputs.positions[row, :length].tolist() == list(range(length))
    assert (inputs.tokens[row, length:] == 0).all() and (inputs.positions[row, length:] == -1).all()


def check_pixels(inputs, expected):
    np.testing.assert_array_equal(
        inputs.pixels[: len(expected)].view(np.int32), np.ascontiguousarray(expected).view(np.int32)
    )
    assert not inputs.pixels[len(expected) :].any()


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_the_original_s(case):
    golden, prompt, images, max_partition = read(case)
    inputs = processor()([prompt], [images], max_partition=max_partition)
    assert [a.dtype.name for a in inputs] == ["int32", "int32", "float32"]
    ids = expanded(golden["input_ids"])
    check_row(inputs, 0, ids)
    check_pixels(inputs, crops_of(golden))
    assert inputs.tokens.shape == inputs.positions.shape == (1, bucket_size(len(ids), 64))
    assert inputs.pixels.shape == (bucket_size(len(crops_of(golden)), 1), 70, 70, 3)
    valid = inputs.positions[0] >= 0
    assert valid.sum() == golden["merged_mask"].sum()
    assert inputs.positions[0, valid].tolist() == golden["position_ids"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_hf_inputs_give_the_same(case):
    golden, prompt, images, max_partition = read(case)
    expected = processor()([prompt], [images], max_partition=max_partition)
    pixel_values = golden.get("pixel_values")
    for input_ids in (golden["input_ids"], golden["input_ids"][None], [list(golden["input_ids"])]):
        found = processor().convert_hf_inputs(input_ids, pixel_values)
        assert_equal(found, expected)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_padded_batch_of_hf_inputs(with_mask):
    golden = np.load(GOLDEN / "cases" / "tiny-f32" / "batch_leftpad.npz")
    rows = [read(case) for case in ("rgba", "text_only", "tiny")]
    expected = processor()([row[1] for row in rows], [row[2] for row in rows])
    found = processor().convert_hf_inputs(
        golden["input_ids"],
        np.concatenate([rows[0][0]["pixel_values"], rows[2][0]["pixel_values"]]),
        golden["attention_mask"] if with_mask else None,
    )
    assert_equal(found, expected)
    assert (found.positions >= 0).sum(axis=1).tolist() == golden["merged_mask"].sum(1).tolist()


def test_a_batch_holds_its_rows_in_order():
    names = ["two_images", "text_only", "multi_turn", "large_mp4"]
    rows = [read(name) for name in names]
    inputs = processor()(
        [row[1] for row in rows], [row[2] for row in rows], max_partition=[row[3] for row in rows]
    )
    for number, row in enumerate(rows):
        check_row(inputs, number, expanded(row[0]["input_ids"]))
    check_pixels(inputs, np.concatenate([crops_of(row[0]) for row in rows]))


def test_training_examples():
    golden, prompt, images, max_partition = read("multi_turn")
    example = processor().encode_training_example(prompt, images, max_partition=max_partition)
    ids = golden["input_ids"]
    # The golden prompt ends with "<start_of_turn>model\n" for an answer; an example does not.
    assert example.tokens.tolist() == expanded(ids)[:-3].tolist()
    assert example.labels.tolist() == expanded(ids, golden["labels"])[:-3].tolist()
    assert (example.labels != -100).sum() == (golden["labels"] != -100).sum() > 0
    assert example.tokens.dtype == example.labels.dtype == np.int32
    np.testing.assert_array_equal(example.pixels, crops_of(golden))
    for turns in (prompt[:1], [prompt[0], prompt[1] | {"loss": False}]):
        with pytest.raises(PromptError, match="no assistant turn that contributes to the loss"):
            processor().encode_training_example(turns, images)


def test_assistant_prefixes():
    inputs = processor()(["Hi", "Hi"], assistant_prefix=["", " Hi "])
    assert (inputs.positions >= 0).sum(1).tolist() == [11, 13]
    assert inputs.tokens[1, 8:13].tolist() == [106, 441, 108, 558, 535]


def test_special_tokens_in_a_text():
    assert (processor()(["a<eos>"]).tokens[0] == 1).any()
    assert not (processor()(["a<eos>"], parse_special_tokens=False).tokens[0] == 1).any()


def test_one_prompt_without_lists():
    expected = processor()(["Who?"], [[PICTURE]], assistant_prefix=["It"], max_partition=[4])
    turns = [{"role": "user", "content": [{"type": "text", "text": "<image>\nWho?"}]}]
    for prompt in ("Who?", turns):
        for images in (PICTURE, [PICTURE], np.zeros((70, 70, 3), np.uint8)):
            found = processor()(prompt, images, assistant_prefix="It", max_partition=4)
            assert_equal(found, expected)
    turns[0]["content"].insert(0, {"type": "image", "image": PICTURE})
    turns[0]["content"][1]["text"] = "Who?"
    assert_equal(processor()(turns, assistant_prefix="It", max_partition=4), expected)
    assert_equal(processor()("Who?"), processor()(["Who?"]))
    assert_equal(
        processor()(["Who?", "Why?"], [PICTURE, None]),
        processor()(["Who?", "Why?"], [[PICTURE], []]),
    )


def test_each_image_may_have_its_own_max_partition():
    images = [Image.new("RGB", (210, 70)), Image.new("RGB", (210, 70))]
    few, many = (
        processor().encode("<image>", [images[0]], max_partition=n).pixels.shape[0] for n in (1, 9)
    )
    assert few == 1 < many
    both = processor().encode("<image><image>", images, max_partition=[1, 9])
    assert len(both.pixels) == few + many
    slots = np.flatnonzero(both.tokens == -300)
    assert len(slots) == M * (few + many)
    with pytest.raises(PromptError, match="max_partition has length 1, expected 2: one entry for"):
        processor().encode("<image><image>", images, max_partition=[1])


@pytest.mark.parametrize("case", CASES)
def test_encode_gives_the_batch_without_padding(case):
    _, prompt, images, max_partition = read(case)
    options = dict(max_partition=max_partition, assistant_prefix="It is")
    inputs = processor()([prompt], [images], **options)
    example = processor().encode(prompt, images, **options)
    check_row(inputs, 0, example.tokens)
    check_pixels(inputs, example.pixels)
    assert len(example.labels) == len(example.tokens)
    slots = np.count_nonzero(example.tokens == -300)
    assert slots == M * len(example.pixels)
    indicators = np.count_nonzero(example.tokens < -300)
    assert processor().count_image_tokens(images, max_partition) == slots + indicators


def test_the_layout_of_an_image():
    single = processor().image_layout(Image.new("RGB", (70, 50)))
    assert single == ((1, 1), [(0, 0, 70, 50)], [-301, -300, -302, -305], 3 + M)
    several = processor().image_layout(Image.new("RGB", (141, 70)), 2)
    assert several.grid == (1, 2)
    assert several.boxes == [(0, 0, 141, 70), (0, 0, 70, 70), (70, 0, 141, 70)]
    assert several.boxes == crop_boxes_with_thumbnail(141, 70, (1, 2))
    assert several.placeholder_ids == image_placeholder_ids((1, 2))
    assert several.num_tokens == 4 + 3 * M


def test_the_length_is_checked_before_an_image_is_decoded():
    damaged = Image.open(io.BytesIO((GOLDEN / "images" / "wide.png").read_bytes()[:500]))
    with pytest.raises(PromptTooLongError, match="the chat is .* more than the 20 allowed"):
        processor().encode("Hi", damaged, max_length=20, name="the chat")
    with pytest.raises(ImageError, match="cannot be decoded"):
        processor().encode("Hi", damaged)
    with pytest.raises(PromptError, match="max_length is 0"):
        processor().encode("Hi", max_length=0)


class TurnedWhenDecoded(ImageFile.ImageFile):
    """A file that swaps its width and height when it is decoded, as TIFF files in Pillow 11 do."""

    format = "TURNED"

    def _open(self):
        self._mode, self._size = "RGB", (70, 210)
        self.tile = []

    def load(self):
        if self.size == (70, 210):
            turned = Image.open(io.BytesIO(TALL)).transpose(Image.Transpose.ROTATE_90)
            self.im, self._size = turned.im, turned.size


def test_the_grid_is_chosen_after_decoding():
    opened = TurnedWhenDecoded(io.BytesIO(TALL))
    loaded = Image.open(io.BytesIO(TALL)).transpose(Image.Transpose.ROTATE_90)
    assert (opened.size, loaded.size) == ((70, 210), (210, 70))
    assert processor().image_layout(loaded).grid == (1, 3)
    assert_equal(processor()("Who?", opened), processor()("Who?", loaded))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_files_that_are_not_yet_decoded(orientation, compression):
    stored = Image.open(io.BytesIO(TALL)).transpose(Image.Transpose.ROTATE_90)
    data = encode(stored, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    grid = (1, 3) if orientation < 5 else (3, 1)
    assert processor().image_layout(loaded).grid == grid
    assert processor().image_layout(Image.open(io.BytesIO(data))).grid == grid
    assert_equal(processor()("Who?", Image.open(io.BytesIO(data))), processor()("Who?", loaded))


def test_images_of_the_caller_are_read_as_by_the_original():
    """PIL images and arrays keep their orientation and lose their alpha channel; files do not."""
    tall = Image.open(io.BytesIO(TALL))
    turned = encode(tall, exif=exif_orientation(6))
    upright = tall.transpose(Image.Transpose.ROTATE_270)
    assert_equal(processor()("Who?", Image.open(io.BytesIO(turned))), processor()("Who?", tall))
    assert_equal(processor()("Who?", turned), processor()("Who?", upright))
    transparent = Image.new("RGBA", (70, 70))
    black, white = (Image.new("RGB", (70, 70), color) for color in ("black", "white"))
    assert_equal(processor()("Who?", transparent), processor()("Who?", black))
    assert_equal(processor()("Who?", np.asarray(transparent)), processor()("Who?", black))
    assert_equal(processor()("Who?", encode(transparent)), processor()("Who?", white))


def test_repr_is_short():
    with_buckets = dataclasses.replace(processor(), buckets=(Bucket(1, 64, 2),))
    assert repr(with_buckets) == (
        "Processor(600 text tokens, 70 x 70 pixel crops with 9 visual tokens each, at most 8,192 "
        "positions, buckets: 1x64x2)"
    )


def test_padding_tokens_in_a_text_have_no_position():
    assert_equal(processor()(["ab<pad>\t"]), processor()(["ab\t"]))


def test_no_row_is_longer_than_the_model_s_limit():
    golden, prompt, images, _ = read("large")
    length = len(expanded(golden["input_ids"]))
    inputs = processor(length)([prompt], [images])
    assert inputs.tokens.shape == (1, length)
    with pytest.raises(PromptError, match=rf"prompts.0. is {length} .* than the {length - 1} "):
        processor(length - 1)([prompt], [images])


def test_errors_for_long_prompts_name_a_max_partition_that_fits():
    lengths = {}
    for case in ("large", "large_mp4", "large_mp1"):
        lengths[case] = len(expanded(read(case)[0]["input_ids"]))
    _, prompt, images, _ = read("large")
    for limit, smaller in [("large_mp4", 4), ("large_mp1", 1)]:
        fitting = processor(lengths[limit])
        with pytest.raises(PromptError) as error:
            fitting(["Hi", prompt], [[], images])
        assert f"prompts[1] is {lengths['large']} positions long" in str(error.value)
        suggested = int(str(error.value).split("max_partition=")[1].split(",")[0])
        assert suggested >= smaller
        fitting([prompt], [images], max_partition=suggested)
        with pytest.raises(PromptError):
            fitting([prompt], [images], max_partition=suggested + 1)
    with pytest.raises(PromptTooLongError, match="shorten the text or pass fewer images$"):
        processor(lengths["large_mp1"] - 1)([prompt], [images])
    with pytest.raises(PromptTooLongError, match="shorten the text$"):
        processor(30)(["word " * 40])


@pytest.mark.parametrize("limit", range(5, 60))
def test_truncated_prompts_keep_complete_crops_at_the_end(limit):
    golden, prompt, images, max_partition = read("two_images")
    full = expanded(golden["input_ids"])
    pixels = crops_of(golden)
    inputs = processor(limit)([prompt], [images], max_partition=max_partition, truncate=True)
    tokens = inputs.tokens[0, inputs.positions[0] >= 0]
    assert inputs.tokens.shape[1] <= limit
    assert tokens.tolist() == full[len(full) - len(tokens) :].tolist()
    num_crops, rest = divmod(int((tokens == -300).sum()), M)
    assert rest == 0
    check_pixels(inputs, pixels[len(pixels) - num_crops :])
    # Beyond the limit, only the slots of a crop that the cut goes through are dropped.
    dropped = full[len(full) - limit : len(full) - len(tokens)]
    assert len(dropped) < M and (dropped == -300).all()


def test_prompts_that_fit_are_not_truncated():
    assert_equal(processor()(["Hi"], truncate=True), processor()(["Hi"]))


def test_decode_stops_at_the_first_stop_id():
    golden, *_ = read("palette")
    tokens = golden["original_generate_tokens"]
    text = processor().tokenizer.decode(tokens[:-1].tolist())
    assert tokens[-1] == 1
    assert processor().decode(tokens) == text == str(golden["original_generate_text"])
    ids = [558, 535]
    batch = np.array([[*ids, 107, 558], [*ids, 1, -1], [*ids, 0, 0], [2, *ids, 106]])
    assert processor().decode(batch) == ["Hi"] * 4
    assert processor().decode([]) == ""


@pytest.mark.parametrize("case", CASES)
def test_generated_text_is_the_original_s(case):
    golden, *_ = read(case)
    text = str(golden["original_generate_text"])
    assert processor().decode(golden["original_generate_tokens"]) == text
    detokenizer = IncrementalDetokenizer(processor().tokenizer)
    pieces = [detokenizer.push(int(i)) for i in golden["original_generate_tokens"]]
    assert "".join(pieces) + detokenizer.finish() == text


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([],), {}, r"prompts are \[\], expected at least one prompt"),
        ((3,), {}, "the prompt has type int, expected a string or a list of turns"),
        ((b"a", PICTURE), {}, r"the prompt has type bytes, .* order is ask\(prompt, images\)"),
        ((["a", "b"], [[]]), {}, "images has length 1, expected 2: one entry for each prompt"),
        ((["a", "b"],), {"max_partition": [1]}, "max_partition has length 1, expected 2"),
        ((["a"],), {"assistant_prefix": ["", ""]}, "assistant_prefix has length 2, expected 1"),
        ((["a", "<image>"], [[], []]), {}, r"prompts\[1\] contains <image> once, but 0 images"),
        ((["a", "b"], PICTURE), {}, "images has length 1, expected 2"),
        (("<image>",), {}, "the prompt contains <image> once, but 0 images"),
        (("Hi",), {"max_partition": [1, 2]}, "max_partition has length 2, expected 1"),
    ],
)
def test_malformed_batches(arguments, options, message):
    with pytest.raises(PromptError, match=message):
        processor()(*arguments, **options)


def test_invalid_images():
    with pytest.raises(
        ImageError, match=r"image 2 of prompts\[1\] has type float, expected a path"
    ):
        processor()(["a", "b"], cast(Any, [[], [PICTURE, 0.5]]))
    with pytest.raises(ImageError, match=r"images of prompts\[0\] have type int, expected a path"):
        processor()(["a"], cast(Any, [3]))
    message = (
        "image 1 of the prompt has type list, expected a path.*; lists of images belong to a list"
    )
    with pytest.raises(ImageError, match=message):
        processor()("a", cast(Any, [[PICTURE]]))
    with pytest.raises(ImageError, match="cat.png cannot be read"):
        processor()(["a"], [["cat.png"]])
    with pytest.raises(ImageError, match="max_partition is 0"):
        processor()(["a"], [[PICTURE]], max_partition=0)


@pytest.mark.parametrize(
    "input_ids, mask, message",
    [
        ([], None, "input_ids is empty"),
        ([[5, 600]], None, "row 0 of input_ids contains 600"),
        ([[5], [-200]], None, "row 1 of input_ids contains -200"),
        ([[5], [0, 0]], None, "row 1 of input_ids contains only padding"),
        ([[5, 6]], [[True]], "attention_mask and input_ids have different shapes"),
    ],
)
def test_malformed_hf_ids(input_ids, mask, message):
    with pytest.raises(PromptError, match=message):
        processor().convert_hf_inputs(input_ids, None, mask)


@pytest.mark.parametrize("shape", [(1, 3, 70, 70), (2, 70, 70, 3), (2, 3, 84, 84)])
def test_malformed_hf_pixels(shape):
    with pytest.raises(ImageError, match=r"expected \[2, 3, 70, 70\]"):
        processor().convert_hf_inputs([[2, -300], [-300]], np.zeros(shape))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bos_id": 3}, "gives <bos> the id 2, but generation_config.json gives it 3"),
        ({"pad_id": 1}, "gives <pad> the id 0"),
        (
            {"decoder": dataclasses.replace(CONFIG.decoder, vocab_size=599)},
            "tokenizer has 600 pieces, more than vocab_size 599",
        ),
    ],
)
def test_tokenizers_of_another_model(changes, message):
    with pytest.raises(ConfigError, match=message):
        Processor.from_folder(CHECKPOINT, dataclasses.replace(CONFIG, **changes))


def test_only_color_images_are_supported():
    vision = dataclasses.replace(CONFIG.vision, num_channels=1)
    visual_tokenizer = dataclasses.replace(CONFIG.visual_tokenizer, vision=vision)
    with pytest.raises(ConfigError, match="num_channels is 1, expected 3"):
        Processor.from_folder(
            CHECKPOINT, dataclasses.replace(CONFIG, visual_tokenizer=visual_tokenizer)
        )


def test_tokenizer_json_is_enough(tmp_path):
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    _, prompt, images, _ = read("wide")
    found = Processor.from_folder(tmp_path, CONFIG)([prompt], [images])
    assert_equal(found, processor()([prompt], [images]))
