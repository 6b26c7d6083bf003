"""Batches: shapes, order, resuming, and invalid rows."""

import dataclasses
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from image_files import exif_orientation
from PIL import Image, ImageFile
from pyarrow import parquet

from ovis_jax.errors import DataError, OvisError
from ovis_jax.evaluation.batch_answering import answer_rows
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.inputs.open_image import open_image
from ovis_jax.server.preprocess import convert_messages
from ovis_jax.server.request_schema import ChatMessage
from ovis_jax.training import batches as batches_module
from ovis_jax.training.batches import RowEncoder, StepBatches, measure_rows
from ovis_jax.training.config import DataConfig
from ovis_jax.training.epoch_plan import make_planner

BAD = {"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWho?"}]}
BAD["conversations"].append({"from": "gpt", "value": "Nobody."})


@pytest.fixture(scope="module")
def processor(load_golden):
    return load_golden("tiny-f32", "float32").processor


def row_encoder(processor, **options) -> RowEncoder:
    return RowEncoder(processor, DataConfig(train_files=["not read"], **options))


def step_batches(rows, encode: RowEncoder, seed: int = 0) -> StepBatches:
    measured = measure_rows(rows, encode)
    planner = make_planner(
        measured.sizes,
        micro_batch_size=encode.config.micro_batch_size,
        gradient_accumulation_steps=encode.config.gradient_accumulation_steps,
        pad_to_multiple_of=encode.config.pad_to_multiple_of,
        tokens_per_crop=9,
        seed=seed,
    )
    return StepBatches(measured.rows, planner, encode)


def next_steps(data: StepBatches, count: int) -> list[list]:
    return [list(micro_batches) for micro_batches in itertools.islice(data, count)]


def leaves(batch) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(batch)]


def texts(step: list) -> list[bytes]:
    """The rows of a step, without padding."""
    rows = [row for batch in step for row in batch.inputs.tokens[0]]
    places = [row for batch in step for row in batch.inputs.positions[0]]
    return [row[p >= 0].tobytes() for row, p in zip(rows, places, strict=True) if p[0] == 0]


def encode_or_error(encode: RowEncoder, row) -> tuple:
    """The size of the encoded row, or the error message."""
    try:
        examples = encode(row)
    except DataError as error:
        return (str(error),)
    return max(len(x.tokens) for x in examples), len(examples[0].pixels)


def record_encoding(monkeypatch) -> list[str]:
    """The names of the rows that are decoded from now on."""
    names, call = [], RowEncoder.__call__

    def record(self, row):
        names.append(row.name)
        return call(self, row)

    monkeypatch.setattr(RowEncoder, "__call__", record)
    return names


def turned_row(tmp_path) -> dict:
    """A row about a wide picture, whose file is tall and has an EXIF orientation."""
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 140, 3)).astype(np.uint8))
    wide.save(tmp_path / "wide.png")
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    tall.save(tmp_path / "tall.png")
    tall.save(tmp_path / "turned.png", exif=exif_orientation(6))
    return {**BAD, "image": str(tmp_path / "turned.png")}


@pytest.mark.parametrize("exact, name", [(False, "wide"), (True, "tall")])
def test_image_files_are_read_as_the_config_says(
    processor, load_golden, write_dataset, tmp_path, exact, name
):
    """Steps and validation read the same pixels."""
    *_, row = read_dataset([write_dataset("a.jsonl", 0, turned_row(tmp_path))]).rows
    (found,) = row_encoder(processor, **({"exact_images": True} if exact else {}))(row)
    picture = open_image(tmp_path / f"{name}.png")
    expected = processor.encode_training_example(row.turns, [picture])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    seen = []

    class Recorder:
        config, buckets = processor.config, ()

        def encode(self, prompt, images, **options):
            seen.append(processor.encode(prompt, images, **options))
            raise OvisError("enough")

    ovis = dataclasses.replace(load_golden("tiny-f32", "float32"), processor=Recorder())
    assert not list(answer_rows(ovis, [row], exact_images=exact, skipped={}))
    expected = processor.encode(row.turns[:-1], [picture])
    np.testing.assert_array_equal(seen[0].pixels, expected.pixels)
    np.testing.assert_array_equal(seen[0].tokens, expected.tokens)


def test_micro_batches_contain_the_rows(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 40)]).rows
    encode = row_encoder(
        processor, micro_batch_size=2, gradient_accumulation_steps=3, pad_to_multiple_of=16
    )
    data = step_batches(rows, encode)
    known = {tuple(example.tokens): example for row in rows for example in encode(row)}
    seen = []
    steps = next_steps(data, 7)
    assert [len(step) for step in steps] == [3] * 7
    for batch in itertools.chain(*steps):
        tokens, positions, pixels = (x[0] for x in batch.inputs)
        count, length = tokens.shape
        assert count == 2 and length % 16 == 0
        assert batch.labels.shape == (1, *positions.shape) == (1, *tokens.shape)
        assert pixels.shape[1:] == (70, 70, 3)
        crops = iter(pixels)
        for row, places, labels in zip(tokens, positions, batch.labels[0], strict=True):
            end = int(np.count_nonzero(places >= 0))
            assert places.tolist() == [*range(end), *[-1] * (length - end)]
            if not end:
                assert set(row) == {0} and set(labels) == {-100}
                continue
            example = known[tuple(row[:end])]
            assert labels.tolist() == [*example.labels, *[-100] * (length - end)]
            assert np.count_nonzero(row == IMAGE_SLOT) == 9 * len(example.pixels)
            for pixel in example.pixels:
                np.testing.assert_array_equal(next(crops), pixel)
            seen.append(tuple(row[:end]))
        assert all(not crop.any() for crop in crops)
    assert sorted(seen) == sorted(known)  # an epoch has 41 rows, so one row of a batch is padding
    data.close()


def test_several_images_are_cut_into_fewer_cells(processor, write_dataset, golden):
    """As in the original, an image in a row with several is a single crop by default."""
    paths = [str(golden / f"images/{name}.png") for name in ("wide", "tall")]
    turns = BAD["conversations"]
    both = [{"from": "human", "value": "<image><image>\nWho?"}, turns[1]]
    more = [{"image": path, "conversations": turns} for path in paths]
    more.append({"image": paths, "conversations": both})
    rows = read_dataset([write_dataset("a.jsonl", 0, *more)]).rows[1:]

    def crops(**options):
        return [len(row_encoder(processor, **options)(row)[0].pixels) for row in rows]

    wide, tall, two = crops()
    assert wide > 1 and tall > 1 and two == 2
    assert crops(max_partition="9|1|1") == [wide, tall, 2]
    assert crops(max_partition=9) == [wide, tall, wide + tall]
    assert crops(max_partition="1|9|1") == [1, 1, wide + tall]


def test_validation_reads_parquet_images_and_cuts_them_like_training(
    processor, load_golden, golden, tmp_path
):
    images = [{"bytes": (golden / f"images/{name}.png").read_bytes()} for name in ("wide", "tall")]
    columns = {"images": [images, images[:1]], "conversations": [BAD["conversations"]] * 2}
    columns["conversations"][0] = [
        {"from": "human", "value": "<image><image>\nWho?"},
        BAD["conversations"][1],
    ]
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    encode, seen = row_encoder(processor), []

    class Recorder:
        def encode(self, prompt, images, **options):
            seen.append(processor.encode(prompt, images, **options))
            raise OvisError("enough")

    ovis = dataclasses.replace(load_golden("tiny-f32", "float32"), processor=Recorder())
    rows = read_dataset([tmp_path / "a.parquet"]).rows
    partition = encode.config.max_partition_for
    assert not list(answer_rows(ovis, rows, max_partition=partition, skipped={}))
    one, two = seen  # the shortest row comes first
    assert len(one.pixels) > 1 and len(two.pixels) == 2
    for row, example in zip(rows, (two, one), strict=True):
        np.testing.assert_array_equal(example.pixels, encode(row)[0].pixels)


TEXT, MORE = ({"type": "text", "text": text} for text in ("Who?", "And here?"))


@pytest.mark.parametrize("system", [(), ("Be brief.",), ("Be brief.", "Be kind.")])
@pytest.mark.parametrize("parts", ["it", "ti", "iti", "titi", "t", "tt", "tti", "itt"])
def test_rows_are_encoded_like_requests_to_the_server(
    processor, write_dataset, golden, system, parts
):
    path = str(golden / "images/tiny.png")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    texts = iter((TEXT, MORE))
    content = [image if part == "i" else next(texts) for part in parts]
    messages = [{"role": "system", "content": text} for text in system]
    messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "I."}]
    served, _, _ = convert_messages([ChatMessage.model_validate(x) for x in messages[:-1]])
    images = [path] * parts.count("i")
    expected = processor.encode(served, images, parse_image_placeholders=False)
    image["image_url"]["url"] = path
    row = read_dataset([write_dataset("a.jsonl", 0, {"messages": messages})]).rows[1]
    assert list(row.images) == images
    assert processor.encode(row.turns[:-1], images).tokens.tolist() == expected.tokens.tolist()


def test_turns_without_loss_are_not_labels(processor, write_dataset):
    answers = [{"from": "gpt", "value": text} for text in ("I am not learned.", "I am.")]
    human = {"from": "human", "value": "Who?"}

    def learned(first):
        row = {"conversations": [human, answers[0] | first, human, answers[1]]}
        (example,) = row_encoder(processor)(
            read_dataset([write_dataset("a.jsonl", 0, row)]).rows[1]
        )
        return processor.tokenizer.decode(example.labels[example.labels != -100].tolist())

    assert "not learned" in learned({}) and "not learned" in learned({"weight": 1})
    for excluded in ({"weight": 0}, {"loss": False}, {"train": False}):
        text = learned(excluded)
        assert "not learned" not in text and "I am." in text


def test_parquet_files_give_the_same_batches_and_resume(processor, write_dataset, tmp_path):
    """Rows are shuffled over all row groups, and images are read when they are used."""
    jsonl = write_dataset("a.jsonl", 15)
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    images = [
        {"bytes": Path(line["image"]).read_bytes(), "path": "x.png"} if "image" in line else None
        for line in lines
    ]
    columns = {"image": images, "conversations": [line["conversations"] for line in lines]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)

    def start(path):
        rows = read_dataset([path]).rows
        encode = row_encoder(processor, micro_batch_size=4, pad_to_multiple_of=16)
        return step_batches(rows, encode, seed=1)

    expected, found = start(jsonl), start(tmp_path / "a.parquet")
    assert leaves(next_steps(found, 3)) == leaves(next_steps(expected, 3))
    again = start(tmp_path / "a.parquet")
    again.set_state(found.get_state())
    assert leaves(next_steps(again, 4)) == leaves(next_steps(expected, 4))
    for each in (expected, found, again):
        each.close()


def test_epochs_contain_every_row_once_in_different_orders(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 19)]).rows
    data = step_batches(rows, row_encoder(processor, micro_batch_size=1), seed=3)
    order = [text for step in next_steps(data, 40) for text in texts(step)]
    data.close()
    assert len(set(order[:20])) == len(set(order[20:])) == 20
    assert order[:20] != order[20:]


@pytest.mark.parametrize("num_steps", [2, 4, 5])
def test_resuming_decodes_only_what_comes_next(processor, write_dataset, monkeypatch, num_steps):
    """An epoch has 8 micro-batches in 4 steps."""
    rows = read_dataset([write_dataset("a.jsonl", 30)]).rows
    encode = row_encoder(
        processor, micro_batch_size=4, gradient_accumulation_steps=2, pad_to_multiple_of=128
    )
    data = step_batches(rows, encode, seed=1)
    next_steps(data, num_steps)
    state = data.get_state()
    assert state == {"epoch": num_steps // 4, "step": num_steps % 4}
    expected = leaves(next_steps(data, 8))
    data.close()
    monkeypatch.setattr(batches_module, "MAX_MICRO_BATCHES_AHEAD", 1)
    again, other = step_batches(rows, encode, seed=1), step_batches(rows, encode, seed=1)
    decoded = record_encoding(monkeypatch)
    again.set_state(state)
    assert not decoded
    steps = next_steps(again, 1)
    assert len(decoded) <= 3 * 4  # one micro-batch ahead
    assert leaves([*steps, *next_steps(again, 7)]) == expected
    assert leaves(next_steps(other, 8)) != expected
    again.close()
    other.close()


def test_preference_pairs_share_a_shape(processor, write_dataset, golden):
    image = str(golden / "images/square.png")
    pair = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is I. " * 9}
    rows = read_dataset([write_dataset("a.jsonl", 0, pair)]).rows[1:]
    data = step_batches(rows[:1], row_encoder(processor, micro_batch_size=2, pad_to_multiple_of=8))
    ((pairs,),) = next_steps(data, 1)
    data.close()
    assert pairs.chosen.inputs.tokens.shape == pairs.rejected.inputs.tokens.shape
    lengths = [np.count_nonzero(side.labels != -100) for side in (pairs.chosen, pairs.rejected)]
    assert 0 < lengths[0] < lengths[1]
    assert pairs.reference_chosen.shape == (1, 2)


def test_invalid_rows_raise_or_are_skipped(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 6, BAD)]).rows
    measured = measure_rows(rows, row_encoder(processor))
    assert measured.rows == rows[:7] and measured.kept.tolist() == [*range(7)]
    (message,) = measured.errors
    assert re.search(r"a\.jsonl: row 8: .*none\.png", message)


def test_images_that_are_damaged_after_their_header(processor, write_dataset, golden, tmp_path):
    """They are found when their micro-batch is built, and become padding rows."""
    data = (golden / "images/square.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    rows = read_dataset(
        [write_dataset("a.jsonl", 6, {**BAD, "image": "cut.png"}, text_row=False)]
    ).rows
    options = {"micro_batch_size": 4, "pad_to_multiple_of": 128, "max_partition": 1}
    strict = step_batches(rows, row_encoder(processor, **options))
    with pytest.raises(DataError, match=r"a\.jsonl: row 7: .*cut\.png"):
        next_steps(strict, 2)
    encode = row_encoder(processor, **options, invalid_rows="skip")
    lenient = step_batches(rows, encode)
    steps = next_steps(lenient, 4)
    lenient.close()
    for epoch in (steps[:2], steps[2:]):
        found = [text for step in epoch for text in texts(step)]
        assert len(found) == len(set(found)) == 6
    (name,) = encode.skipped
    assert name.endswith("row 7") and "cut.png" in encode.skipped[name]


def test_an_image_that_changes_during_a_run(processor, write_dataset, golden, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes((golden / "images/square.png").read_bytes())
    rows = read_dataset([write_dataset("a.jsonl", 0, {**BAD, "image": str(path)})]).rows[1:]
    data = step_batches(rows, row_encoder(processor))
    path.write_bytes((golden / "images/wide.png").read_bytes())
    with pytest.raises(DataError, match="row 2: the row has .* crops, but it had .* and 1 when"):
        next_steps(data, 1)


def test_no_valid_row(processor, write_dataset, golden, tmp_path):
    rows = read_dataset([write_dataset("a.jsonl", 0, BAD)]).rows[1:]
    encode = row_encoder(processor, micro_batch_size=1, invalid_rows="skip")
    with pytest.raises(DataError, match="no row of the dataset is valid"):
        step_batches(rows, encode)
    (tmp_path / "none.png").write_bytes((golden / "images/square.png").read_bytes()[:200])
    with pytest.raises(DataError, match="no row of the dataset is valid"):
        next_steps(step_batches(rows, encode), 1)


def test_mixed_conversations_and_pairs(processor, write_dataset):
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "You."}
    rows = read_dataset([write_dataset("a.jsonl", 1, pair)]).rows
    with pytest.raises(DataError, match="the 3 rows mix conversations and preference pairs"):
        step_batches(rows, row_encoder(processor, micro_batch_size=1))


def test_truncation(processor, write_dataset):
    row = read_dataset([write_dataset("a.jsonl", 1)]).rows[0]
    (whole,) = row_encoder(processor)(row)
    answer = int(np.flatnonzero(whole.labels != -100)[0])
    (cut,) = row_encoder(processor, max_length=answer + 2, truncate=True)(row)
    assert len(cut.tokens) == answer + 2
    assert cut.labels.tolist() == whole.labels[: answer + 2].tolist()
    with pytest.raises(DataError, match=rf"row 1: .*{len(whole.tokens)} positions long"):
        row_encoder(processor, max_length=answer + 2)(row)
    with pytest.raises(DataError, match="row 1: no answer begins within the"):
        row_encoder(processor, max_length=answer, truncate=True)(row)
    with pytest.raises(DataError, match="row 1: its images reach position 13"):
        row_encoder(processor, max_length=8, truncate=True)(row)


@pytest.mark.parametrize("max_bytes, ahead", [(3 * 117_600, 3), (1, 1), (2**40, 16)])
def test_micro_batches_are_built_a_bounded_size_ahead(
    processor, write_dataset, monkeypatch, max_bytes, ahead
):
    rows = read_dataset([write_dataset("a.jsonl", 40, text_row=False)]).rows
    monkeypatch.setattr(batches_module, "MAX_BYTES_AHEAD", max_bytes)
    started = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function, *arguments):
            started.append(arguments)
            return super().submit(function, *arguments)

    data = step_batches(rows, row_encoder(processor, micro_batch_size=2, max_partition=1))
    monkeypatch.setattr(batches_module, "ThreadPoolExecutor", Pool)
    for number, (batch,) in enumerate(itertools.islice(data, 30), 1):
        assert batch.inputs.pixels.nbytes == 117_600
        # This includes the micro-batch that training has.
        assert len(started) == number - 1 + ahead
    data.close()


def test_rows_are_measured_without_decoding(
    processor, write_dataset, golden, tmp_path, monkeypatch
):
    wide, tall = (str(golden / f"images/{name}.png") for name in ("wide", "tall"))
    turns = BAD["conversations"]
    both = [{"from": "human", "value": "<image> or <image>?"}, turns[1]]
    pair = {"image": tall, "prompt": "<image>Who?", "chosen": "I.", "rejected": "It is I. " * 9}
    more = [{"image": [wide, tall], "conversations": both}, pair, turned_row(tmp_path)]
    rows = read_dataset([write_dataset("a.jsonl", 5, *more)]).rows
    for options in ({}, {"exact_images": True}, {"max_length": 60, "truncate": True}):
        encode = row_encoder(processor, **options)
        expected = [encode_or_error(encode, row) for row in rows]
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", None)
            measured = [measure_rows([row], encode) for row in rows]
        assert [
            found.errors or tuple(int(x[0]) for x in found.sizes) for found in measured
        ] == expected
    assert any(isinstance(found[0], str) for found in expected)
