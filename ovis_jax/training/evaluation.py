"""How often does a model answer exactly as expected? Greedy answers to held-out rows."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inference.generate import generate
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import Prompt, Turn
from ovis_jax.inputs.image import Images
from ovis_jax.inputs.processor import Processor
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.rows import Row

Item = TypeVar("Item")


class Answer(NamedTuple):
    """What a model said to a row's last question.

    Attributes:
      row: the row.
      expected: its last answer.
      text: the model's.
      tokens: int32 [N], the model's answer as ids, the stop id included.
    """

    row: Row
    expected: str
    text: str
    tokens: np.ndarray

    @property
    def right(self) -> bool:
        """Whether the two texts are the same."""
        return self.text.strip() == self.expected.strip()


def answer_rows(
    processor: Processor,
    model: Ovis,
    params: Params,
    rows: Sequence[Row],
    *,
    batch: int = 16,
    max_new_tokens: int = 64,
    max_partition: int = 9,
    faults: dict[str, str] | None = None,
) -> Iterator[Answer]:
    """Let a model answer the last question of each row, in batches of rows of like length.

    With `faults` a row that cannot be answered is left out, and noted there by its name.

    Raises:
      DataError: a row does not end with an answer, an image cannot be read, or the model cannot be
        given the row; and no `faults` are taken.
    """
    usable: list[Row] = []
    for row in rows:
        with _noting(row, faults):
            check_answer(row)
            usable.append(row)
    for indices in like_length([turns_length(row.images, row.turns) for row in usable], batch):
        asked: list[tuple[Row, list[Turn], Images]] = []
        for row in (usable[i] for i in indices):
            with _noting(row, faults):
                prompt = list(row.turns if row.answers else row.turns[:-1])
                shown = row.open_images()
                if faults is not None:
                    processor([prompt], [shown], max_partition=max_partition)
                asked.append((row, prompt, shown))
        if not asked:
            continue
        chosen, prompts, images = (list(part) for part in zip(*asked, strict=True))
        with naming([row.name for row in chosen], processor, prompts, images, max_partition):
            texts, tokens = answer_batch(
                *(processor, model, params, prompts, images),
                batch=batch,
                max_new_tokens=max_new_tokens,
                max_partition=max_partition,
            )
        for row, text, ids in zip(chosen, texts, tokens, strict=True):
            expected = row.answers[0] if row.answers else row.turns[-1]["content"]
            yield Answer(row, expected, text, ids)


def check_answer(row: Row) -> None:
    """Hold a row to end with an answer.

    Raises:
      DataError: it does not.
    """
    if row.answers is None and row.turns[-1]["role"] != "assistant":
        raise DataError(f"{row.name}: the last turn is not from gpt, so nothing can be scored")


@contextmanager
def _noting(row: Row, faults: dict[str, str] | None) -> Iterator[None]:
    """Note a complaint about a row, if it is not to end the whole."""
    try:
        yield
    except OvisError as error:
        if faults is None:
            raise
        faults[row.name] = str(error) if row.name in str(error) else f"{row.name}: {error}"


@contextmanager
def naming(
    names: Sequence[str],
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Sequence[Images],
    max_partition: int,
) -> Iterator[None]:
    """Give a complaint about one prompt of a batch the name of its row.

    Raises:
      DataError: a prompt cannot be given to the model.
    """
    try:
        yield
    except OvisError:
        for name, prompt, shown in zip(names, prompts, images, strict=True):
            try:
                processor([prompt], [shown], max_partition=max_partition)
            except OvisError as error:
                raise DataError(f"{name}: {error}") from error
        raise


def turns_length(images: Sequence[object], turns: Sequence[Turn]) -> tuple[int, int]:
    """About how long a conversation is, to sort by: its images, then the characters of its text."""
    return len(images), sum(len(turn["content"]) for turn in turns)


def like_length(lengths: Sequence[tuple[int, int]], batch: int) -> Iterator[list[int]]:
    """Which go together, the shortest first: `batch` indices at a time, at the end maybe fewer."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(lengths), batch):
        yield order[start : start + batch]


def fill(items: Sequence[Item], batch: int) -> list[Item]:
    """As many as a batch has, the last one repeated: a short batch compiles nothing anew."""
    return [*items, *[items[-1]] * (batch - len(items))]


def answer_batch(
    processor: Processor,
    model: Ovis,
    params: Params,
    prompts: Sequence[Prompt],
    images: Sequence[Images],
    *,
    batch: int,
    max_new_tokens: int,
    max_partition: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
) -> tuple[list[str], list[np.ndarray]]:
    """Answer at most `batch` prompts: the texts, and the ids int32 [N], the stop id included.

    A short batch is filled up.
    """
    count = len(prompts)
    inputs = processor(fill(prompts, batch), fill(images, batch), max_partition=max_partition)
    out = generate(model, params, inputs, key, max_new_tokens=max_new_tokens, sampling=sampling)
    tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    texts = processor.decode(tokens[:count])
    return list(texts), [tokens[n, : lengths[n]] for n in range(count)]


def scores(answers: Iterable[Answer]) -> dict[str, float]:
    """The share of right answers of each kind of row, in the order of their names."""
    return shares((answer.row.kind or "all", answer.right) for answer in answers)


def shares(named: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The share of each name's values that are true, in the order of the names."""
    values: dict[str, list[bool]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(values[name])) for name in sorted(values)}
