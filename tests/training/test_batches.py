"""Batches: shapes, order, resuming, and invalid rows."""

import itertools

import jax
import numpy as np
import pytest

from ovis_jax.errors import DataError
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.inputs.image_processing import IMAGE_SLOT
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
