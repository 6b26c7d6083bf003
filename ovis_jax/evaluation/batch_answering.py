"""Answering prompts and scoring given answers, in batches of prompts with similar lengths."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from ovis_jax.errors import DataError, OvisError
from ovis_jax.global_arrays import gather_array, is_global
from ovis_jax.inference.generate import generate
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inference.score import score
from ovis_jax.inputs.batch import Inputs, pad_batch
from ovis_jax.inputs.candidate_answers import encode_answers
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER, Prompt
from ovis_jax.inputs.dataset import DatasetRow, read_image_source
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis
from ovis_jax.process_agreement import agree, checksum

MaxPartition = int | Callable[[int], int]
"""Maximum number of cells that an image is split into, or a function of the number of images."""


class EvalPrompt(NamedTuple):
    """A prompt in an evaluation.

    Attributes:
      text: A question, or a conversation.
      images: The prompt's images, as for `LoadedOvis.ask`.
      name: Name of the prompt in error messages.
      exact_images: Whether image files are read exactly as the original does; see `open_image`.
    """

    text: Prompt
    images: Sequence[Any] = ()
    name: str = ""
    exact_images: bool = False

    @property
    def length(self) -> tuple[int, int]:
        """A sort key for length: the number of images, then the number of characters."""
        texts = [self.text] if isinstance(self.text, str) else [t["content"] for t in self.text]
        return len(self.images), sum(map(len, texts))


def harness_prompt(text: str, images: Sequence[Any] = ()) -> EvalPrompt:
    """Return a harness's question as a prompt.

    If the number of "<image>" marks differs from the number of images, all marks are removed.
    """
    if text.count(IMAGE_PLACEHOLDER) != len(images):
        text = text.replace(IMAGE_PLACEHOLDER, "")
    return EvalPrompt(text, images)


class ScoredAnswer(NamedTuple):
    """A model's answer to the last question in a dataset row, with the expected answer.

    Attributes:
      row: The dataset row.
      expected: The expected answer.
      text: The model's answer.
      token_ids: Token ids of the model's answer, int32 [n], including the stop id.
    """

    row: DatasetRow
    expected: str
    text: str
    token_ids: np.ndarray

    @property
    def is_correct(self) -> bool:
        """Whether the model's text equals the expected answer, ignoring surrounding white space."""
        return self.text.strip() == self.expected.strip()


class Accuracy(NamedTuple):
    """The number of correct answers and the number of all answers."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """The fraction of answers that are correct."""
        return self.correct / self.total


def accuracy_by_kind(outcomes: Iterable[tuple[str, bool]]) -> dict[str, Accuracy]:
    """Compute the accuracy for each kind of question.

    Args:
      outcomes: The kind of each answer, and whether the answer is correct.

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
    max_partition: MaxPartition = 9,
    exact_images: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[ScoredAnswer]:
    """Answer the last question in each row greedily, in batches of rows with similar lengths.

    Args:
      ovis: The model.
      rows: Conversations that end with the expected answer, or preference pairs.
      batch_size: Number of rows per batch; each batch shape is compiled once.
      max_new_tokens: Maximum number of tokens per answer.
      max_partition: Maximum number of cells that an image is split into, or a function that returns
        it for the number of images in a row.
      exact_images: Whether image files are read exactly as the original does; see `open_image`.
      skipped: If given, rows that cannot be answered are left out, and their error messages are
        added to this dict by row name.

    Yields:
      One answer per row, starting with the shortest rows.

    Raises:
      OvisError: `skipped` is None, and a row does not end with an answer, an image cannot be read,
        or a prompt is too long. The error names the row.
    """
    usable: list[DatasetRow] = []
    for row in rows:
        try:
            check_has_expected_answer(row)
            usable.append(row)
        except DataError as error:
            if skipped is None:
                raise
            skipped[row.name] = str(error)
    prompts = [
        EvalPrompt(
            row.turns if row.preference else row.turns[:-1],
            row.images,
            row.name,
            exact_images,
        )
        for row in usable
    ]
    for index, text, tokens in answer_prompts(
        ovis,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_partition=max_partition,
        skipped=skipped,
    ):
        row = usable[index]
        expected = row.preference.chosen if row.preference else row.turns[-1]["content"]
        yield ScoredAnswer(row, expected, text, tokens)


def check_has_expected_answer(row: DatasetRow) -> None:
    """Check that a row contains the expected answer to its last question.

    Raises:
      DataError: The conversation does not end with an answer.
    """
    if row.preference is None and row.turns[-1]["role"] != "assistant":
        raise DataError(f"{row.name}: the last turn is not from gpt, so nothing can be scored")


def answer_prompts(
    ovis: LoadedOvis,
    prompts: Sequence[EvalPrompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_partition: MaxPartition,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Answer prompts in batches of similar lengths; `answer_rows` documents the arguments.

    Yields:
      The index of a prompt, its answer, and the answer's token ids, int32 [n], including the stop
      id.

    Raises:
      OvisError: `skipped` is None, and an image or text cannot be processed.
    """
    for indices, inputs in _batch_prompts(ovis, prompts, batch_size, max_partition, skipped):
        out = generate(
            ovis.model, ovis.params, inputs, key, max_new_tokens=max_new_tokens, sampling=sampling
        )
        tokens, lengths = gather_array(out.tokens), gather_array(out.lengths)
        texts = ovis.processor.decode(tokens[: len(indices)])
        for row, (index, text) in enumerate(zip(indices, texts, strict=True)):
            yield index, text, tokens[row, : lengths[row]]


def score_answers(
    ovis: LoadedOvis,
    prompts: Sequence[EvalPrompt],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int,
    max_partition: int,
    add_end_of_turn: bool = True,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Compute the log-probabilities of given answers, in batches of prompts with similar lengths.

    Args:
      ovis: The model.
      prompts: The prompts.
      answers: The answers to each prompt, at least one per prompt.
      batch_size: Number of prompts per batch.
      max_partition: Maximum number of cells that an image is split into.
      add_end_of_turn: Whether to add the end-of-turn token to each answer.

    Yields:
      The index of a prompt, and `log_probs`, `mean_log_probs` and `greedy` for its answers, as in
      `Scores`, each with the shape [choices].

    Raises:
      OvisError: An image or text cannot be processed.
    """
    for indices, inputs in _batch_prompts(ovis, prompts, batch_size, max_partition):
        texts = _repeat_last([answers[i] for i in indices], batch_size)
        encoded = encode_answers(ovis.processor, texts, add_end_of_turn=add_end_of_turn)
        scores = score(ovis.model, ovis.params, inputs, encoded)
        columns = map(gather_array, (scores.log_probs, scores.mean_log_probs, scores.greedy))
        for index, *found in zip(indices, *columns, strict=False):
            yield index, *found


def _batch_prompts(
    ovis: LoadedOvis,
    prompts: Sequence[EvalPrompt],
    batch_size: int,
    max_partition: MaxPartition,
    skipped: dict[str, str] | None = None,
) -> Iterator[tuple[list[int], Inputs]]:
    """Yield the batches of `_encode_batches`, which must be equal in processes that share a model.

    Raises:
      OvisError: A process has a different batch or cannot read its batch.
    """
    batches = _encode_batches(ovis.processor, prompts, batch_size, max_partition, skipped)
    if not any(map(is_global, jax.tree.leaves(ovis.params))):
        yield from batches
        return
    for number in itertools.count(1):
        with agree(f"batch {number} of prompts") as values:
            batch = next(batches, None)
            if batch is not None:
                values["shape"] = f"{list(batch[1].tokens.shape)}, {list(batch[1].pixels.shape)}"
                values["prompts"] = checksum([np.asarray(batch[1].tokens).tobytes()])
        if batch is None:
            return
        yield batch


def _encode_batches(
    processor: Processor,
    prompts: Sequence[EvalPrompt],
    batch_size: int,
    max_partition: MaxPartition,
    skipped: dict[str, str] | None = None,
) -> Iterator[tuple[list[int], Inputs]]:
    """Yield batches of prompt indices and model inputs, starting with the shortest prompts.

    An incomplete batch is padded to the shape of a full batch, so it causes no recompilation.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    for start in range(0, len(order), batch_size):
        indices, examples = [], []
        for index in order[start : start + batch_size]:
            text, images, name, exact_images = prompts[index]
            try:
                images = [read_image_source(image) for image in images]
                if exact_images:
                    images = [open_image(image, exact=True) for image in images]
                limit = max_partition(len(images)) if callable(max_partition) else max_partition
                example = processor.encode(
                    text, images, max_partition=limit, name=name or "the prompt"
                )
            except OvisError as error:
                message = str(error) if name in str(error) else f"{name}: {error}"
                if skipped is None:
                    raise DataError(message) from error
                skipped[name] = message
                continue
            indices.append(index)
            examples.append(example)
        if indices:
            padded = _repeat_last(examples, batch_size)
            pixels = np.concatenate([example.pixels for example in padded])
            tokens = [example.tokens for example in padded]
            yield indices, pad_batch(tokens, pixels, processor.config, processor.buckets)


def _repeat_last(items: Sequence[Any], count: int) -> list[Any]:
    return [*items, *[items[-1]] * (count - len(items))]
