"""Rows become micro-batches of few shapes, in an order that can be taken up again anywhere.

grain shuffles the rows anew in every epoch and reads ahead in threads. An example waits in the
bucket of its shape (positions and crops, both padded) until the bucket holds a step's worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

import grain
import numpy as np

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.batch import PADDING, Example, Inputs, pad_rows
from ovis_jax.inputs.buckets import bucket
from ovis_jax.inputs.conversation import IGNORED
from ovis_jax.inputs.processor import Processor
from ovis_jax.training.losses import Batch, Pairs
from ovis_jax.training.rows import Row

READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ExampleMaker:
    """Turns a row into one example, or two for a preference pair.

    A row that cannot be read gives None and is noted in `faults`, or raises.
    """

    processor: Processor
    max_partition: int = 9
    max_length: int | None = None
    truncate: bool = False
    skip_unreadable: bool = False
    faults: dict[str, str] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, row: Row) -> tuple[Example, ...] | None:
        """Make the examples of a row.

        Raises:
          DataError: the row cannot be read or cut to length, and is not to be skipped.
        """
        try:
            images = row.open_images()
            texts = [row.turns] if row.answers is None else map(row.conversation, row.answers)
            return tuple(
                self.processor.training_example(
                    turns,
                    images,
                    max_partition=self.max_partition,
                    max_length=self.max_length,
                    truncate=self.truncate,
                )
                for turns in texts
            )
        except OvisError as error:
            message = str(error) if row.name in str(error) else f"{row.name}: {error}"
            if not self.skip_unreadable:
                raise DataError(message) from error
            with self._lock:
                self.faults[row.name] = message
            return None


@dataclass(frozen=True)
class BatchShape:
    """How many rows a micro-batch has, how many of them a step, and the unit of its lengths."""

    rows: int
    accumulate: int = 1
    length_unit: int = 64


def batches(
    rows: Sequence[Row], make: ExampleMaker, shape: BatchShape, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of the steps' micro-batches; `get_state` and `set_state` resume it.

    Each is a `Batch`, or for preference pairs a `Pairs` whose reference log-probabilities are 0,
    with a leading axis [accumulate]. All rows must be of one of the two forms.

    Raises:
      DataError: conversations and preference pairs are mixed; or, in use, what `make` raises, or
        not one row of the whole dataset could be read.
    """
    if len({row.answers is None for row in rows}) != 1:
        raise DataError(f"{len(rows)} rows, expected conversations alone or preference pairs alone")
    examples = grain.MapDataset.source(rows).shuffle(seed).repeat().map(make)
    steps = _Buckets(examples, len(rows), make.processor.config.pad_id, shape)
    ahead = grain.experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(ahead)


class _Buckets(grain.IterDataset):
    """Joins examples of one shape into steps."""

    def __init__(self, examples: grain.MapDataset, epoch: int, pad_id: int, shape: BatchShape):
        super().__init__()
        self.examples, self.epoch, self.pad_id, self.shape = examples, epoch, pad_id, shape

    def __iter__(self) -> "_BucketIterator":
        return _BucketIterator(self)


class _BucketIterator(grain.DatasetIterator):
    """Its state is the number of the next example, and those of the examples that wait."""

    def __init__(self, dataset: _Buckets):
        super().__init__()
        self._dataset = dataset
        self._start(0)

    def _start(self, index: int) -> None:
        reader = self._dataset.examples.to_iter_dataset(READ_AHEAD, allow_nones=True)
        self._examples = iter(reader)
        grain.experimental.set_next_index(self._examples, index)
        self._next = index
        self._waiting: dict[str, list[tuple[int, tuple[Example, ...]]]] = {}

    def __next__(self) -> Batch | Pairs:
        shape, missed = self._dataset.shape, 0
        while missed < self._dataset.epoch:
            index, examples = self._next, next(self._examples)
            self._next += 1
            if examples is None:
                missed += 1
                continue
            missed = 0
            length = max(bucket(len(example.tokens), shape.length_unit) for example in examples)
            crops = bucket(len(examples[0].pixels), 1)
            waiting = self._waiting.setdefault(f"{length} {crops}", [])
            waiting.append((index, examples))
            if len(waiting) == shape.rows * shape.accumulate:
                del self._waiting[f"{length} {crops}"]
                return self._join([examples for _, examples in waiting], length, crops)
        raise DataError("not one row of the whole dataset could be read")

    def _join(self, examples: list[tuple[Example, ...]], length: int, crops: int) -> Batch | Pairs:
        shape, pad_id = self._dataset.shape, self._dataset.pad_id
        sides = [
            join_examples(list(side), shape, length=length, crops=crops, pad_id=pad_id)
            for side in zip(*examples, strict=True)
        ]
        if len(sides) == 1:
            return sides[0]
        unknown = cast(Any, np.zeros((shape.accumulate, shape.rows), np.float32))
        return Pairs(sides[0], sides[1], unknown, unknown)

    def get_state(self) -> dict[str, Any]:
        waiting = {key: [index for index, _ in held] for key, held in self._waiting.items()}
        return {"next": self._next, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start(state["next"])
        for key, indices in state["waiting"].items():
            self._waiting[key] = [(index, self._dataset.examples[index]) for index in indices]


def join_examples(
    examples: Sequence[Example], shape: BatchShape, *, length: int, crops: int, pad_id: int
) -> Batch:
    """Pad examples and put them into micro-batches.

    Args:
      examples: accumulate x rows of them, none longer and none with more crops than said.
      shape: of the result.
      length: T.
      crops: of each row; a micro-batch has I = rows x crops.
      pad_id: the id that pads a row.

    Returns:
      tokens, positions, labels int32 [accumulate, rows, T] and pixels float32
      [accumulate, I, H, W, C], the crops of a micro-batch in order of appearance, then zeros.
    """
    micro = (shape.accumulate, shape.rows, length)
    tokens = pad_rows([example.tokens for example in examples], length, pad_id)
    positions = pad_rows([np.arange(len(e.tokens)) for e in examples], length, PADDING)
    labels = pad_rows([example.labels for example in examples], length, IGNORED)
    pixels = np.zeros(
        (shape.accumulate, shape.rows * crops, *examples[0].pixels.shape[1:]), np.float32
    )
    for number in range(shape.accumulate):
        part = examples[number * shape.rows : (number + 1) * shape.rows]
        joined = np.concatenate([example.pixels for example in part])
        pixels[number, : len(joined)] = joined
    inputs = Inputs(tokens.reshape(micro), positions.reshape(micro), pixels)
    return Batch(inputs, cast(Any, labels.reshape(micro)))
