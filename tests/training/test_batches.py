"""Batches: shapes, order, resuming, and invalid rows."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from image_files import exif_orientation
from PIL import Image
from pyarrow import parquet

from ovis_jax.errors import DataError, OvisError
from ovis_jax.evaluation.batch_answering import answer_rows
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.inputs.open_image import open_image
from ovis_jax.server.preprocess import convert_messages
from ovis_jax.server.request_schema import ChatMessage
from ovis_jax.training.batches import RowEncoder, collate_examples, iterate_step_batches
from ovis_jax.training.config import DataConfig

BAD = {"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWho?"}]}
BAD["conversations"].append({"from": "gpt", "value": "Nobody."})


@pytest.fixture(scope="module")
def processor(load_golden):
    return load_golden("tiny-f32", "float32").processor


def row_encoder(processor, **options) -> RowEncoder:
    return RowEncoder(processor, DataConfig(train_files=["not read"], **options))


def leaves(batch) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(batch)]


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
    data = iterate_step_batches(rows, encode, seed=0)
    known = {tuple(example.tokens): example for row in rows for example in encode(row)}
    seen = set()
    for batch in itertools.islice(data, 12):
        tokens, positions, pixels = batch.inputs
        micro, count, length = tokens.shape
        assert (micro, count) == (3, 2) and length % 16 == 0
        assert batch.labels.shape == positions.shape == tokens.shape
        assert pixels.shape[0] == 3 and pixels.shape[2:] == (70, 70, 3)
        for m in range(micro):
            crops = iter(pixels[m])
            for row, places, labels in zip(tokens[m], positions[m], batch.labels[m], strict=True):
                end = int(np.count_nonzero(places >= 0))
                assert places.tolist() == [*range(end), *[-1] * (length - end)]
                example = known[tuple(row[:end])]
                assert labels.tolist() == [*example.labels, *[-100] * (length - end)]
                assert np.count_nonzero(row == IMAGE_SLOT) == 9 * len(example.pixels)
                for pixel in example.pixels:
                    np.testing.assert_array_equal(next(crops), pixel)
                seen.add(tuple(row[:end]))
            assert all(not crop.any() for crop in crops)
    assert len(seen) > 25
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
        return iterate_step_batches(
            rows, row_encoder(processor, micro_batch_size=4, pad_to_multiple_of=16), seed=1
        )

    expected, found = start(jsonl), start(tmp_path / "a.parquet")
    for _ in range(3):
        assert leaves(next(found)) == leaves(next(expected))
    again = start(tmp_path / "a.parquet")
    again.set_state(found.get_state())
    assert [leaves(next(again)) for _ in range(4)] == [leaves(next(expected)) for _ in range(4)]
    for each in (expected, found, again):
        each.close()


def test_epochs_contain_every_row_once_in_different_orders(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 19)]).rows
    data = iterate_step_batches(rows, row_encoder(processor, micro_batch_size=1), seed=3)
    order = [batch.inputs.tokens.tobytes() for batch in itertools.islice(data, 40)]
    data.close()
    assert len(set(order[:20])) == len(set(order[20:])) == 20
    assert order[:20] != order[20:]


def test_resuming_continues_with_the_next_example(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 30)]).rows

    def start():
        return iterate_step_batches(
            rows, row_encoder(processor, micro_batch_size=4, pad_to_multiple_of=16), seed=1
        )

    data = start()
    for _ in range(5):
        next(data)
    state = data.get_state()
    assert any(state["waiting"].values())
    expected = [leaves(next(data)) for _ in range(8)]
    again = start()
    again.set_state(state)
    assert [leaves(next(again)) for _ in range(8)] == expected
    other = start()
    assert [leaves(next(other)) for _ in range(8)] != expected
    for each in (data, again, other):
        each.close()


def test_preference_pairs_share_a_shape(processor, write_dataset, golden):
    image = str(golden / "images/square.png")
    pair = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is I. " * 9}
    rows = read_dataset([write_dataset("a.jsonl", 0, pair)]).rows[1:]
    data = iterate_step_batches(
        rows, row_encoder(processor, micro_batch_size=2, pad_to_multiple_of=8), seed=0
    )
    pairs = next(data)
    data.close()
    assert pairs.chosen.inputs.tokens.shape == pairs.rejected.inputs.tokens.shape
    lengths = [np.count_nonzero(side.labels != -100) for side in (pairs.chosen, pairs.rejected)]
    assert 0 < lengths[0] < lengths[1]
    assert pairs.reference_chosen.shape == (1, 2)


def test_invalid_rows_raise_or_are_skipped(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 6, BAD)]).rows
    strict = iterate_step_batches(rows, row_encoder(processor, micro_batch_size=1), seed=0)
    with pytest.raises(DataError, match=r"a\.jsonl: row 8: .*none\.png"):
        list(itertools.islice(strict, 8))
    encode = row_encoder(processor, micro_batch_size=1, invalid_rows="skip")
    lenient = iterate_step_batches(rows, encode, seed=0)
    order = [batch.inputs.tokens.tobytes() for batch in itertools.islice(lenient, 14)]
    lenient.close()
    assert len(set(order)) == 7
    (name,) = encode.skipped
    assert name.endswith("row 8") and "none.png" in encode.skipped[name]


def test_no_valid_row(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 0, BAD)]).rows[1:]
    encode = row_encoder(processor, micro_batch_size=1, invalid_rows="skip")
    with pytest.raises(DataError, match="no row of the dataset is valid"):
        next(iterate_step_batches(rows, encode, seed=0))


def test_mixed_conversations_and_pairs(processor, write_dataset):
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "You."}
    rows = read_dataset([write_dataset("a.jsonl", 1, pair)]).rows
    with pytest.raises(DataError, match="the 3 rows mix conversations and preference pairs"):
        iterate_step_batches(rows, row_encoder(processor, micro_batch_size=1), seed=0)


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


def test_collate_pads(processor, write_dataset):
    rows = read_dataset([write_dataset("a.jsonl", 2)]).rows
    encode = row_encoder(processor, micro_batch_size=2)
    examples = [example for row in rows[:2] for example in encode(row)]
    batch = collate_examples(examples, encode.config, length=128, crops=3, pad_id=0)
    assert batch.inputs.tokens.shape == (1, 2, 128) and batch.inputs.pixels.shape[:2] == (1, 6)
