"""Greedy answers to dataset rows, compared with the expected answers by exact match."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inference.generate import generate
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Example, Inputs, pad_batch
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.dataset import DatasetRow
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis

Item = TypeVar("Item")


class ScoredAnswer(NamedTuple):
    """A model's answer to the last question of a dataset row, with the expected answer.

    Attributes:
      row: the dataset row.
      expected: the expected answer.
      text: the model's answer.
      tokens: int32 [n], the token ids of the model's answer, including the stop id.
    """

    row: DatasetRow
    expected: str
    text: str
    tokens: np.ndarray

    @property
    def is_correct(self) -> bool:
        """Whether both texts are equal, apart from surrounding white space."""
        return self.text.strip() == self.expected.strip()


class Accuracy(NamedTuple):
    """Counts of correct answers and of all answers."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """The share of correct answers."""
        return self.correct / self.total


def accuracy_by_kind(outcomes: Iterable[tuple[str, bool]]) -> dict[str, Accuracy]:
    """Count correct answers per kind.

    Args:
      outcomes: for each answer its kind and whether it is correct.

    Returns:
      The accuracy of each kind, sorted by kind.
    """
    counts: dict[str, Accuracy] = {}
    for kind, is_correct in outcomes:
        correct, total = counts.get(kind, (0, 0))
        counts[kind] = Accuracy(correct + bool(is_correct), total + 1)
    return dict(sorted(counts.items()))


def answer_rows(
    ovis: LoadedOvis,
    rows: Sequence[DatasetRow],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    max_partition: int = 9,
    skipped: dict[str, str] | None = None,
) -> Iterator[ScoredAnswer]:
    """Answer the last question of each row greedily, in batches of similar length.

    Args:
      ovis: the model.
      rows: conversations that end with the expected answer, or preference pairs.
      batch_size: number of rows per batch; each batch shape compiles once.
      max_new_tokens: maximum number of tokens per answer.
      max_partition: maximum number of cells that an image is split into.
      skipped: if given, a row that cannot be answered is left out, and its error message is
        added here under the row's name.

    Yields:
      One answer per row, shortest rows first.

    Raises:
      OvisError: a row does not end with an answer, an image cannot be read, or a prompt is too
        long, and `skipped` is None; names the row.
    """
    usable: list[DatasetRow] = []
    for row in rows:
        with _skip_on_error(row, skipped):
            check_has_expected_answer(row)
            usable.append(row)
    lengths = [conversation_length(row.image_paths, row.turns) for row in usable]
    for indices in group_by_length(lengths, batch_size):
        batch: list[DatasetRow] = []
        examples: list[Example] = []
        for row in (usable[i] for i in indices):
            with _skip_on_error(row, skipped):
                examples.append(encode_row_prompt(ovis.processor, row, max_partition))
                batch.append(row)
        if not batch:
            continue
        texts, tokens = answer_one_batch(
            ovis, examples, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        for row, text, ids in zip(batch, texts, tokens, strict=True):
            expected = row.preference.chosen if row.preference else row.turns[-1]["content"]
            yield ScoredAnswer(row, expected, text, ids)


def check_has_expected_answer(row: DatasetRow) -> None:
    """Check that a row has an expected answer to its last question.

    Raises:
      DataError: the conversation does not end with an answer.
    """
    if row.preference is None and row.turns[-1]["role"] != "assistant":
        raise DataError(f"{row.name}: the last turn is not from gpt, so nothing can be scored")


@contextmanager
def _skip_on_error(row: DatasetRow, skipped: dict[str, str] | None) -> Iterator[None]:
    """Record an error of a row in `skipped`, or raise it if `skipped` is None."""
    try:
        yield
    except OvisError as error:
        if skipped is None:
            raise
        skipped[row.name] = str(error) if row.name in str(error) else f"{row.name}: {error}"


def encode_row_prompt(processor: Processor, row: DatasetRow, max_partition: int) -> Example:
    """Encode a row up to its last question.

    Raises:
      OvisError: an image cannot be read, or the prompt is too long; names the row.
    """
    prompt = row.turns if row.preference else row.turns[:-1]
    return processor.encode(prompt, row.open_images(), max_partition=max_partition, name=row.name)


def conversation_length(images: Sequence[object], turns: Sequence[Turn]) -> tuple[int, int]:
    """Return a sort key for length: the number of images, then the number of characters."""
    return len(images), sum(len(turn["content"]) for turn in turns)


def group_by_length(lengths: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of `lengths` in batches, shortest first; the last batch may be short."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(lengths), batch_size):
        yield order[start : start + batch_size]


def repeat_last(items: Sequence[Item], count: int) -> list[Item]:
    """Repeat the last item until there are `count` items.

    A short batch then has the shape of a full one and causes no recompilation.

    Args:
      items: at least one item and at most `count`.
      count: the length of the result.
    """
    return [*items, *[items[-1]] * (count - len(items))]


def pad_to_batch(processor: Processor, examples: Sequence[Example], batch_size: int) -> Inputs:
    """Pad examples to a batch of `batch_size` rows, of which the last are repeated."""
    padded = repeat_last(examples, batch_size)
    pixels = np.concatenate([example.pixels for example in padded])
    tokens = [example.tokens for example in padded]
    return pad_batch(tokens, pixels, processor.config, processor.buckets)


def answer_one_batch(
    ovis: LoadedOvis,
    prompts: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
) -> tuple[list[str], list[np.ndarray]]:
    """Answer at most `batch_size` encoded prompts.

    Returns:
      The texts, and the token ids of each answer, int32 [n], including the stop id.
    """
    count = len(prompts)
    inputs = pad_to_batch(ovis.processor, prompts, batch_size)
    out = generate(
        ovis.model, ovis.params, inputs, key, max_new_tokens=max_new_tokens, sampling=sampling
    )
    tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    texts = ovis.processor.decode(tokens[:count])
    return list(texts), [tokens[n, : lengths[n]] for n in range(count)]
