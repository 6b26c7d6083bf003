"""Training batches with few shapes, from dataset rows in an order that can be resumed.

The library grain shuffles the rows in every epoch and prefetches them in threads. Each example is
put into the bucket with its padded shape (positions and crops). A full bucket becomes the batch of
one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

import grain
import numpy as np

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.batch import PADDING_POSITION, Example, Inputs, pad_rows
from ovis_jax.inputs.buckets import bucket_size
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.inputs.dataset import DatasetRow
from ovis_jax.inputs.processor import Processor
from ovis_jax.training.config import DataConfig
from ovis_jax.training.losses import PreferenceBatch, TrainBatch

READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class RowEncoder:
    """Encodes a dataset row as one example, or as two examples for a preference pair.

    Attributes:
      processor: The model's processor.
      config: Config with the limits of examples and the handling of invalid rows.
      skipped: The error message of each skipped row, by row name.
    """

    processor: Processor
    config: DataConfig
    skipped: dict[str, str] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, row: DatasetRow) -> tuple[Example, ...] | None:
        """Encode a row.

        Returns:
          The examples, or None if the row is invalid and the config skips invalid rows.

        Raises:
          DataError: The row is invalid, and the config treats invalid rows as errors.
        """
        try:
            images = row.open_images(exact=self.config.exact_images)
            conversations = [row.turns]
            if row.preference is not None:
                conversations = [row.turns_with(answer) for answer in row.preference]
            return tuple(
                self.processor.encode_training_example(
                    turns,
                    images,
                    max_partition=self.config.max_partition_for(len(images)),
                    max_length=self.config.max_length,
                    truncate=self.config.truncate,
                )
                for turns in conversations
            )
        except OvisError as error:
            message = str(error) if row.name in str(error) else f"{row.name}: {error}"
            if self.config.invalid_rows == "error":
                raise DataError(message) from error
            with self._lock:
                self.skipped[row.name] = message
            return None


def iterate_step_batches(
    rows: Sequence[DatasetRow], encode_row: RowEncoder, seed: int
) -> grain.DatasetIterator:
    """Return an endless iterator over batches, which can be resumed with its state.

    Each batch is for one step and has a leading axis of micro-batches. It is a `TrainBatch`, or a
    `PreferenceBatch` whose reference log-probabilities are 0. `get_state` and `set_state` of the
    iterator save and restore the position in the data.

    Raises:
      DataError: Conversations and preference pairs are mixed. During iteration, this error is also
        raised if `encode_row` raises it, or if no row of the dataset is valid.
    """
    if len({row.preference is None for row in rows}) != 1:
        raise DataError(
            f"the {len(rows)} rows mix conversations and preference pairs, expected only one form"
        )
    examples = grain.MapDataset.source(rows).shuffle(seed).repeat().map(encode_row)
    pad_id = encode_row.processor.config.pad_id
    steps = _BucketDataset(examples, len(rows), pad_id, encode_row.config)
    prefetched = grain.experimental.ThreadPrefetchIterDataset(
        steps, prefetch_buffer_size=PREFETCHED_BATCHES
    )
    return iter(prefetched)


class _BucketDataset(grain.IterDataset):
    """Groups examples with the same padded shape into batches for one step."""

    def __init__(
        self, examples: grain.MapDataset, epoch_size: int, pad_id: int, config: DataConfig
    ):
        super().__init__()
        self.examples, self.epoch_size = examples, epoch_size
        self.pad_id, self.config = pad_id, config

    def __iter__(self) -> "_BucketIterator":
        return _BucketIterator(self)


class _BucketIterator(grain.DatasetIterator):
    """Iterates over batches. The state is the index of the next example and of all waiting ones."""

    def __init__(self, dataset: _BucketDataset):
        super().__init__()
        self._dataset = dataset
        self._start_at(0)

    def _start_at(self, index: int) -> None:
        reader = self._dataset.examples.to_iter_dataset(READ_OPTIONS, allow_nones=True)
        self._examples = iter(reader)
        grain.experimental.set_next_index(self._examples, index)
        self._next = index
        self._waiting: dict[str, list[tuple[int, tuple[Example, ...]]]] = {}

    def __next__(self) -> TrainBatch | PreferenceBatch:
        config, skipped_in_a_row = self._dataset.config, 0
        while skipped_in_a_row < self._dataset.epoch_size:
            index, examples = self._next, next(self._examples)
            self._next += 1
            if examples is None:
                skipped_in_a_row += 1
                continue
            skipped_in_a_row = 0
            length = max(bucket_size(len(x.tokens), config.pad_to_multiple_of) for x in examples)
            crops = bucket_size(len(examples[0].pixels), 1)
            waiting = self._waiting.setdefault(f"{length} {crops}", [])
            waiting.append((index, examples))
            if len(waiting) == config.micro_batch_size * config.gradient_accumulation_steps:
                del self._waiting[f"{length} {crops}"]
                return self._collate([examples for _, examples in waiting], length, crops)
        raise DataError("no row of the dataset is valid")

    def _collate(
        self, examples: list[tuple[Example, ...]], length: int, crops: int
    ) -> TrainBatch | PreferenceBatch:
        config, pad_id = self._dataset.config, self._dataset.pad_id
        batches = [
            collate_examples(list(column), config, length=length, crops=crops, pad_id=pad_id)
            for column in zip(*examples, strict=True)
        ]
        if len(batches) == 1:
            return batches[0]
        sizes = (config.gradient_accumulation_steps, config.micro_batch_size)
        zeros = cast(Any, np.zeros(sizes, np.float32))
        return PreferenceBatch(batches[0], batches[1], zeros, zeros)

    def get_state(self) -> dict[str, Any]:
        waiting = {key: [index for index, _ in pairs] for key, pairs in self._waiting.items()}
        return {"next": self._next, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start_at(state["next"])
        for key, indices in state["waiting"].items():
            self._waiting[key] = [(index, self._dataset.examples[index]) for index in indices]


def collate_examples(
    examples: Sequence[Example], config: DataConfig, *, length: int, crops: int, pad_id: int
) -> TrainBatch:
    """Pad examples and stack them into micro-batches.

    Args:
      examples: The gradient_accumulation_steps x micro_batch_size examples, each with at most
        `length` positions and `crops` crops.
      config: Config with the sizes of the batch.
      length: Number of positions per row, T.
      crops: Number of crops per row. A micro-batch has I = micro_batch_size x crops.
      pad_id: Token id of padding.

    Returns:
      A batch with tokens, positions and labels as int32 [micro-batches, B, T], and pixels as
      float32 [micro-batches, I, h, w, C]. In each micro-batch, the pixels are the crops in order of
      appearance, followed by zeros.
    """
    size, steps = config.micro_batch_size, config.gradient_accumulation_steps
    tokens = pad_rows([example.tokens for example in examples], length, pad_id)
    positions = pad_rows([np.arange(len(e.tokens)) for e in examples], length, PADDING_POSITION)
    labels = pad_rows([example.labels for example in examples], length, IGNORE_INDEX)
    pixels = np.zeros((steps, size * crops, *examples[0].pixels.shape[1:]), np.float32)
    for number in range(steps):
        micro_batch = examples[number * size : (number + 1) * size]
        joined = np.concatenate([example.pixels for example in micro_batch])
        pixels[number, : len(joined)] = joined
    rows = (steps, size, length)
    inputs = Inputs(tokens.reshape(rows), positions.reshape(rows), pixels)
    return TrainBatch(inputs, cast(Any, labels.reshape(rows)))
