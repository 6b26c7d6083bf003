"""The dataset rows of a run: read, checked and measured before the model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ovis_jax.errors import DataError, count_noun
from ovis_jax.evaluation.batch_answering import check_has_expected_answer
from ovis_jax.inputs.dataset import Dataset, DatasetRow, read_dataset
from ovis_jax.training.batches import RowEncoder, measure_rows
from ovis_jax.training.config import TrainConfig
from ovis_jax.training.epoch_plan import EpochPlanner, make_planner


class TrainingSet(NamedTuple):
    """The training rows of a run.

    Attributes:
      rows: The valid rows.
      planner: Planner of the epochs.
      errors: An error message for each invalid row.
    """

    rows: tuple[DatasetRow, ...]
    planner: EpochPlanner
    errors: tuple[str, ...]


def read_training_rows(config: TrainConfig, system_turns: bool, paths: Sequence[Path]) -> Dataset:
    """Read training files. Rows that do not match the objective are invalid.

    Raises:
      DataError: A file cannot be read.
    """
    dataset = read_dataset(paths, config.data.images, system_turns=system_turns)
    needs_pairs = config.training.objective == "dpo"
    fields = "prompt, chosen and rejected" if needs_pairs else "conversations"
    problem = f"training.objective={config.training.objective} needs rows with {fields}"
    found = [
        f"{row.name}: {problem}" if (row.preference is not None) != needs_pairs else ""
        for row in dataset.rows
    ]
    return _without_invalid(dataset, found)


def read_validation_rows(config: TrainConfig, system_turns: bool, paths: Sequence[Path]) -> Dataset:
    """Read validation files. Rows without expected answer or with missing images are invalid.

    Raises:
      DataError: A file cannot be read.
    """
    if not paths:
        return Dataset((), (), ())
    dataset = read_dataset(paths, config.data.images, system_turns=system_turns)
    return _without_invalid(dataset, [_validation_problem(row) for row in dataset.rows])


def _validation_problem(row: DatasetRow) -> str:
    try:
        check_has_expected_answer(row)
    except DataError as error:
        return str(error)
    missing = row.find_missing_file()
    return f"{row.name}: image file {missing} does not exist" if missing else ""


def _without_invalid(dataset: Dataset, problems: Sequence[str]) -> Dataset:
    """Return a dataset without the rows for which there is a problem."""
    kept = [n for n, problem in enumerate(problems) if not problem]
    return Dataset(
        tuple(dataset.rows[n] for n in kept),
        (*dataset.errors, *filter(None, problems)),
        tuple(dataset.sources[n] for n in kept),
    )


def plan_training_set(config: TrainConfig, dataset: Dataset, encode_row: RowEncoder) -> TrainingSet:
    """Measure training rows, and plan their epochs."""
    measured = measure_rows(dataset.rows, encode_row)
    data = config.data
    planner = make_planner(
        measured.sizes,
        micro_batch_size=data.micro_batch_size,
        gradient_accumulation_steps=data.gradient_accumulation_steps,
        pad_to_multiple_of=data.pad_to_multiple_of,
        tokens_per_crop=encode_row.processor.config.visual_tokenizer.tokens_per_crop,
        seed=config.run.seed,
        sources=np.array(dataset.sources, np.int64)[measured.kept],
        weights=data.train_weights or (1.0,) * len(data.train_files),
    )
    return TrainingSet(measured.rows, planner, (*dataset.errors, *measured.errors))


def raise_if_invalid(config: TrainConfig, dataset: Dataset | TrainingSet) -> None:
    """Check that rows are valid, or that the config skips invalid rows and others are valid.

    Raises:
      DataError: There are invalid rows that must not be skipped, or no valid row.
    """
    errors = dataset.errors
    if errors and config.data.invalid_rows == "error":
        more = len(errors) - 1
        rest = f" (and {count_noun(more, 'more invalid row')})" if more else ""
        raise DataError(
            f"{errors[0]}{rest}; fix the row, or skip invalid rows with"
            ' data.invalid_rows="skip"; ovis-jax train --check lists all invalid rows'
        )
    if errors and not dataset.rows:
        raise DataError(f"no row is valid; {errors[0]}")
