"""How often does a model answer exactly as expected? Greedy answers to held-out rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ovis_jax.errors import DataError
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.processor import Processor
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.rows import Row


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
) -> Iterator[Answer]:
    """Let a model answer the last question of each row, in batches of rows of like length.

    Raises:
      DataError: a row does not end with an answer, or an image cannot be read.
    """
    for row in rows:
        if row.answers is None and row.turns[-1]["role"] != "assistant":
            raise DataError(f"{row.name}: the last turn is not from gpt, so nothing can be scored")
    length = [(len(row.images), sum(len(turn["content"]) for turn in row.turns)) for row in rows]
    order = sorted(range(len(rows)), key=length.__getitem__)
    for start in range(0, len(rows), batch):
        chosen = [rows[i] for i in order[start : start + batch]]
        # A short last batch is filled up, so that it compiles nothing.
        filled = chosen + chosen[-1:] * (batch - len(chosen))
        prompts = [list(row.turns if row.answers else row.turns[:-1]) for row in filled]
        images = [row.open_images() for row in filled]
        inputs = processor(prompts, images, max_partition=max_partition)
        out = generate(model, params, inputs, max_new_tokens=max_new_tokens)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for n, (row, text) in enumerate(zip(chosen, processor.decode(tokens), strict=False)):
            expected = row.answers[0] if row.answers else row.turns[-1]["content"]
            yield Answer(row, expected, text, tokens[n, : lengths[n]])


def scores(answers: Iterable[Answer]) -> dict[str, float]:
    """The share of right answers of each kind of row, in the order of their names."""
    return shares((answer.row.kind or "all", answer.right) for answer in answers)


def shares(named: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The share of each name's values that are true, in the order of the names."""
    values: dict[str, list[bool]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(values[name])) for name in sorted(values)}
