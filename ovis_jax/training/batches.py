"""Micro-batches of dataset rows, in the order of the epochs' plans.

All rows are measured when a run starts, by their texts and the headers of their image files. Images
are decoded when their micro-batch is built, in threads and a bounded number of bytes ahead of
training. A resumed run decodes nothing that it skips.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.batch import PADDING_POSITION, Example, Inputs, pad_rows
from ovis_jax.inputs.conversation import IGNORE_INDEX, Turn
from ovis_jax.inputs.dataset import DatasetRow
from ovis_jax.inputs.processor import Processor
from ovis_jax.training.config import DataConfig
from ovis_jax.training.epoch_plan import EpochPlanner, MicroBatch, RowShape, RowSizes
from ovis_jax.training.losses import PreferenceBatch, TrainBatch

MAX_BYTES_AHEAD = 2**29
"""Maximum size of the pixels in micro-batches that are built ahead of training, in bytes."""
MAX_MICRO_BATCHES_AHEAD = 16
"""Maximum number of micro-batches that are built ahead of training."""
NUM_THREADS = min(8, os.cpu_count() or 1)
"""Number of threads that measure rows and build micro-batches."""
ROWS_PER_ROUND = 4096
"""Number of rows that are given to the threads at once."""


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
            options = self._options(row)
            return tuple(
                self.processor.encode_training_example(turns, images, **options)
                for turns in _conversations(row)
            )
        except OvisError as error:
            self.reject(row, error)
            return None

    def measure(self, row: DatasetRow) -> tuple[int, int]:
        """Return a row's number of positions and of crops, mostly without decoding its images.

        For a preference pair, the number of positions is that of the longer conversation.

        Raises:
          DataError: The row is invalid.
        """
        try:
            sizes = row.image_sizes(exact=self.config.exact_images)
            options = self._options(row)
            measured = [
                self.processor.measure_training_example(turns, sizes, **options)
                for turns in _conversations(row)
            ]
        except OvisError as error:
            raise DataError(error_message(row, error)) from error
        return max(measured)

    def reject(self, row: DatasetRow, error: OvisError) -> None:
        """Record an invalid row as skipped.

        Raises:
          DataError: The config treats invalid rows as errors.
        """
        if self.config.invalid_rows == "error":
            raise DataError(error_message(row, error)) from error
        with self._lock:
            self.skipped[row.name] = error_message(row, error)

    def _options(self, row: DatasetRow) -> dict[str, Any]:
        return {
            "max_partition": self.config.max_partition_for(len(row.images)),
            "max_length": self.config.max_length,
            "truncate": self.config.truncate,
        }


def _conversations(row: DatasetRow) -> list[Sequence[Turn]]:
    if row.preference is None:
        return [row.turns]
    return [row.turns_with(answer) for answer in row.preference]


def error_message(row: DatasetRow, error: OvisError) -> str:
    """Return the message of an error, with the name of the row that it concerns."""
    return str(error) if row.name in str(error) else f"{row.name}: {error}"


class MeasuredRows(NamedTuple):
    """The valid rows of a training set with their sizes.

    Attributes:
      rows: The rows whose texts and image headers are valid.
      sizes: The sizes of these rows.
      kept: The indices of these rows in the training set, int64 [n].
      errors: An error message for each other row.
    """

    rows: tuple[DatasetRow, ...]
    sizes: RowSizes
    kept: np.ndarray
    errors: tuple[str, ...]


def measure_rows(rows: Sequence[DatasetRow], encode_row: RowEncoder) -> MeasuredRows:
    """Measure all rows by their texts and the headers of their image files."""

    def measure(row: DatasetRow) -> tuple[int, int] | DataError:
        try:
            return encode_row.measure(row)
        except DataError as error:
            return error

    measured = list(map_in_threads(measure, rows))
    errors = tuple(str(found) for found in measured if isinstance(found, DataError))
    kept = [n for n, found in enumerate(measured) if not isinstance(found, DataError)]
    sizes = np.array([measured[n] for n in kept], np.int64).reshape(-1, 2)
    valid = tuple(rows[n] for n in kept)
    return MeasuredRows(valid, RowSizes(*sizes.T), np.array(kept, np.int64), errors)


def map_in_threads(
    function: Callable[[DatasetRow], Any], rows: Sequence[DatasetRow]
) -> Iterator[Any]:
    """Yield the results of a function for all rows, in order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(rows), ROWS_PER_ROUND):
            yield from pool.map(function, rows[start : start + ROWS_PER_ROUND])


class StepBatches:
    """An endless iterator over the micro-batches of each step, which can be resumed.

    Each item is an iterator over the micro-batches of one step, which must be consumed before the
    next step. A micro-batch is a `TrainBatch`, or a `PreferenceBatch` whose reference
    log-probabilities are 0. It has a leading axis of size 1, as `train_step` expects.

    Args:
      rows: The rows.
      planner: Planner of the epochs, with the sizes of these rows.
      encode_row: Encoder of the rows.

    Raises:
      DataError: There are no rows, or conversations and preference pairs are mixed. During
        iteration, this error is also raised if `encode_row` raises it, or if no row is valid.
    """

    def __init__(self, rows: Sequence[DatasetRow], planner: EpochPlanner, encode_row: RowEncoder):
        if not rows:
            raise DataError("no row of the dataset is valid")
        if len({row.preference is None for row in rows}) != 1:
            raise DataError(
                f"the {len(rows)} rows mix conversations and preference pairs, expected only one"
                " form"
            )
        self._rows, self._encode_row = rows, encode_row
        self._sizes, self._shapes = planner.sizes, planner.shapes
        self._plan = lru_cache(maxsize=2)(planner.plan)
        self._start_at(0, 0)

    def __iter__(self) -> "StepBatches":
        return self

    def __next__(self) -> Iterator[TrainBatch | PreferenceBatch]:
        steps = self._plan(self._epoch)
        num_micro_batches = len(steps[self._step])
        self._step += 1
        if self._step == len(steps):
            self._epoch, self._step = self._epoch + 1, 0
        return islice(self._batches, num_micro_batches)

    def get_state(self) -> dict[str, int]:
        """Return the position in the data: the epoch and the step in it that come next."""
        return {"epoch": self._epoch, "step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue at a position that `get_state` returned. Nothing before it is decoded."""
        self.close()
        self._start_at(state["epoch"], state["step"])

    def close(self) -> None:
        """Stop the threads."""
        self._batches.close()

    def upcoming_shapes(self, num_steps: int) -> list[RowShape]:
        """Return the shapes of the next `num_steps` steps, or all if they go beyond an epoch."""
        steps = self._plan(self._epoch)[self._step :][:num_steps]
        if len(steps) < num_steps:
            return list(self._shapes)
        return sorted({micro_batch.shape for step in steps for micro_batch in step})

    def padding_batch(self, shape: RowShape) -> TrainBatch | PreferenceBatch:
        """Return a micro-batch of padding rows, with which a shape can be compiled."""
        return self._build(MicroBatch((), shape))

    def _start_at(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step
        self._batches = self._build_ahead(epoch, step)

    def _build_ahead(
        self, epoch: int, step: int
    ) -> Generator[TrainBatch | PreferenceBatch, None, None]:
        """Yield all micro-batches from a step on, which threads build ahead."""
        ahead: deque[tuple[int, Future[TrainBatch | PreferenceBatch]]] = deque()
        num_bytes = 0
        pool = ThreadPoolExecutor(NUM_THREADS)
        try:
            for micro_batch in self._micro_batches_from(epoch, step):
                size = pixels_nbytes(self._encode_row, micro_batch.shape)
                while ahead and (
                    num_bytes + size > MAX_BYTES_AHEAD or len(ahead) == MAX_MICRO_BATCHES_AHEAD
                ):
                    yield ahead[0][1].result()
                    num_bytes -= ahead.popleft()[0]
                ahead.append((size, pool.submit(self._build, micro_batch)))
                num_bytes += size
        finally:
            pool.shutdown(cancel_futures=True)

    def _micro_batches_from(self, epoch: int, step: int) -> Iterator[MicroBatch]:
        for number in count(epoch):
            for micro_batches in self._plan(number)[step if number == epoch else 0 :]:
                yield from micro_batches

    def _build(self, micro_batch: MicroBatch) -> TrainBatch | PreferenceBatch:
        """Decode the images of a micro-batch, and pad it. Invalid rows become padding rows."""
        length, crops = micro_batch.shape
        config, processor = self._encode_row.config, self._encode_row.processor
        pixels = np.zeros(_pixels_shape(self._encode_row, micro_batch.shape), np.float32)
        num_crops = 0
        encoded: list[list[Example]] = []
        for index in micro_batch.rows:
            examples = self._encode_row(self._rows[index])
            if examples is None or not self._has_planned_size(index, examples):
                continue
            found = examples[0].pixels  # a pair has the same images twice
            pixels[0, num_crops : num_crops + len(found)] = found
            num_crops += len(found)
            encoded.append([example._replace(pixels=found[:0]) for example in examples])
        skipped = self._encode_row.skipped
        if micro_batch.rows and not encoded and all(row.name in skipped for row in self._rows):
            raise DataError("no row of the dataset is valid")
        is_pair = self._rows[0].preference is not None
        batches = [
            pad_examples(
                [examples[side] for examples in encoded],
                pixels,
                num_rows=config.micro_batch_size,
                length=length,
                pad_id=processor.config.pad_id,
            )
            for side in range(1 + is_pair)
        ]
        if not is_pair:
            return batches[0]
        zeros = cast(Any, np.zeros((1, config.micro_batch_size), np.float32))
        return PreferenceBatch(batches[0], batches[1], zeros, zeros)

    def _has_planned_size(self, index: int, examples: Sequence[Example]) -> bool:
        """Return whether a row still has the size that it was measured with; reject it if not."""
        found = max(len(x.tokens) for x in examples), len(examples[0].pixels)
        planned = int(self._sizes.lengths[index]), int(self._sizes.crops[index])
        if found == planned:
            return True
        error = DataError(
            f"the row has {found[0]} positions and {found[1]} crops, but it had {planned[0]} and"
            f" {planned[1]} when the run started; do not change image files during a run"
        )
        self._encode_row.reject(self._rows[index], error)
        return False


def pixels_nbytes(encode_row: RowEncoder, shape: RowShape) -> int:
    """Return the size of a micro-batch's pixels in bytes."""
    return 4 * math.prod(_pixels_shape(encode_row, shape))


def _pixels_shape(encode_row: RowEncoder, shape: RowShape) -> tuple[int, ...]:
    size = encode_row.processor.image_config.crop_size
    return 1, encode_row.config.micro_batch_size * shape.crops, size, size, 3


def pad_examples(
    examples: Sequence[Example], pixels: np.ndarray, *, num_rows: int, length: int, pad_id: int
) -> TrainBatch:
    """Pad the texts of examples to a micro-batch.

    Args:
      examples: At most `num_rows` examples, each with at most `length` positions.
      pixels: The crops of the examples in order of appearance, float32 [1, I, h, w, C], followed by
        zeros.
      num_rows: Number of rows, B. Rows without an example are padding.
      length: Number of positions per row, T.
      pad_id: Token id of padding.

    Returns:
      A micro-batch with tokens, positions and labels as int32 [1, B, T].
    """
    rest = [np.zeros(0, np.int32)] * (num_rows - len(examples))
    tokens = pad_rows([*(x.tokens for x in examples), *rest], length, pad_id)
    positions = [np.arange(len(x.tokens)) for x in examples]
    positions = pad_rows([*positions, *rest], length, PADDING_POSITION)
    labels = pad_rows([*(x.labels for x in examples), *rest], length, IGNORE_INDEX)
    return TrainBatch(Inputs(tokens[None], positions[None], pixels), cast(Any, labels[None]))
