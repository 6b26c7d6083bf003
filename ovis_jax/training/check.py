"""`ovis-jax train --check`: reads and decodes all rows of a recipe, and prints what a run would do.

No JAX device is used, and the weights of the model are not needed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.console import print_table
from ovis_jax.errors import DataError, OvisError, count_noun
from ovis_jax.inputs.dataset import Dataset, DatasetRow
from ovis_jax.inputs.processor import Processor
from ovis_jax.training.batches import (
    MAX_BYTES_AHEAD,
    RowEncoder,
    error_message,
    map_in_threads,
    pixels_nbytes,
)
from ovis_jax.training.config import TrainConfig
from ovis_jax.training.training_set import (
    TrainingSet,
    plan_training_set,
    read_training_rows,
    read_validation_rows,
)


def check_recipe(config: TrainConfig, console: Console) -> bool:
    """Read, measure and decode all rows of a recipe, and print their sizes and all problems.

    Args:
      config: Config of the run.
      console: Console on which the report is printed.

    Returns:
      True if all rows are valid.

    Raises:
      ConfigError: A config of the model is missing or not supported.
    """
    folder = resolve_checkpoint(config.model, weights=False).folder
    processor = Processor.from_folder(folder, OvisConfig.from_folder(folder))
    strict = config.data.model_copy(update={"invalid_rows": "error"})
    encode_row = RowEncoder(processor, strict)
    dataset, problems = _read_files(read_training_rows, config, processor, "train_files")
    validation, more = _read_files(read_validation_rows, config, processor, "validation_files")
    train_set = plan_training_set(config, dataset, encode_row)
    problems += [*train_set.errors, *more, *validation.errors]
    if train_set.rows:
        _print_plan(config, train_set, encode_row, console)
    console.print(count_noun(len(validation.rows), "validation row"), highlight=False)

    def encode_prompt(row: DatasetRow) -> None:
        images = row.open_images(exact=config.data.exact_images)
        turns = row.turns if row.preference else row.turns[:-1]
        limit = config.data.max_partition_for(len(images))
        processor.encode(turns, images, max_partition=limit, name=row.name)

    problems += _problems(encode_row, train_set.rows) + _problems(encode_prompt, validation.rows)
    for problem in problems:
        console.print(f"wrong: {problem}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{count_noun(len(problems), 'problem')} found", highlight=False)
    return not problems


def _read_files(
    read: Callable[[TrainConfig, bool, Sequence[Path]], Dataset],
    config: TrainConfig,
    processor: Processor,
    field: str,
) -> tuple[Dataset, list[str]]:
    """Read files one by one, and return an error message for each that cannot be read."""
    rows: list[DatasetRow] = []
    sources: list[int] = []
    errors: list[str] = []
    unreadable: list[str] = []
    for source, path in enumerate(getattr(config.data, field)):
        try:
            dataset = read(config, processor.chat_format.has_system_turns, [path])
        except DataError as error:
            unreadable.append(str(error))
            continue
        rows += dataset.rows
        errors += dataset.errors
        sources += [source] * len(dataset.rows)
    return Dataset(tuple(rows), tuple(errors), tuple(sources)), unreadable


def _problems(encode: Callable[[DatasetRow], object], rows: Sequence[DatasetRow]) -> list[str]:
    """Return an error message for each row that cannot be encoded."""

    def problem(row: DatasetRow) -> str:
        try:
            encode(row)
        except OvisError as error:
            return error_message(row, error)
        return ""

    return [found for found in map_in_threads(problem, rows) if found]


def _print_plan(
    config: TrainConfig, train_set: TrainingSet, encode_row: RowEncoder, console: Console
) -> None:
    """Print the rows of each file, their sizes, and the steps, shapes and padding of an epoch."""
    planner, data = train_set.planner, config.data
    steps = planner.plan(0)
    micro_batches = [micro_batch for step in steps for micro_batch in step]
    num_rows = np.bincount(planner.sources, minlength=len(planner.weights))
    chosen = planner.sources[planner.rows_of_epoch(0)]
    per_epoch = np.bincount(chosen, minlength=len(planner.weights))
    print_table(
        console,
        ["file", "valid rows", "weight", "rows per epoch"],
        [
            (str(path), f"{rows:,}", f"{weight:g}", f"{used:,}")
            for path, rows, weight, used in zip(
                data.train_files, num_rows, planner.weights, per_epoch, strict=True
            )
        ],
    )
    print_table(
        console,
        ["size of a row", "minimum", "median", "mean", "maximum"],
        [
            (name, f"{x.min():,}", f"{np.median(x):,.0f}", f"{x.mean():,.1f}", f"{x.max():,}")
            for name, x in zip(("positions", "crops"), planner.sizes, strict=True)
        ],
    )
    shapes = []
    for shape in planner.shapes:
        found = [x for x in micro_batches if x.shape == shape]
        if found:
            rows = sum(len(x.rows) for x in found)
            waste = planner.padding([tuple(found)])
            shapes.append((*shape, rows, len(found), *waste))
    print_table(
        console,
        ["positions", "crops", "rows", "micro-batches", "padded positions", "padded crops"],
        [(*(f"{n:,}" for n in row[:4]), *(f"{x:.1%}" for x in row[4:])) for row in shapes],
    )
    positions, crops = planner.padding(steps)
    largest = max(pixels_nbytes(encode_row, shape) for shape in planner.shapes)
    held = max(MAX_BYTES_AHEAD, largest) + 2 * largest
    epochs = config.training.max_steps / len(steps)
    console.print(
        f"an epoch: {count_noun(len(steps), 'step')}, {len(micro_batches):,} micro-batches"
        f" of {data.micro_batch_size} rows, {count_noun(len(shapes), 'shape')}; padding:"
        f" {positions:.1%} of positions, {crops:.1%} of crops\n"
        f"the run: {count_noun(config.training.max_steps, 'step')}, {epochs:,.2f} epochs\n"
        f"crops in memory: at most {held / 2**30:.2f} GiB",
        highlight=False,
        soft_wrap=True,
    )
