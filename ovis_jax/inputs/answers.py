"""Texts become the answers that `score` takes, as training builds them."""

from collections.abc import Sequence

import numpy as np

from ovis_jax.errors import PromptError
from ovis_jax.inputs.batch import pad_rows
from ovis_jax.inputs.buckets import bucket
from ovis_jax.inputs.conversation import IGNORED, IMAGE_TEXT, encode_said
from ovis_jax.inputs.processor import Processor

ANSWER_BUCKET = 8
"""Answers are padded to 8, 16, ... 64, 80, ... tokens; those of one token alone are not."""


def encode_answers(
    processor: Processor,
    answers: Sequence[Sequence[str]],
    *,
    closed: bool = True,
    strip: bool = True,
    control: bool = True,
) -> np.ndarray:
    """Encode the answers to a batch of prompts.

    An answer is encoded by itself, as in training; with `closed` and `strip` it has the same ids.

    Args:
      processor: of the model.
      answers: for each prompt its answers, at least one; prompts may have different numbers.
      closed: whether an answer ends with the mark that closes a turn, which says that it is whole.
        Without it "A" is as likely as all answers that begin with it together.
      strip: whether white space around an answer is left out. Say False for what goes on after a
        preface, such as " red" after "It is".
      control: whether control marks such as "<eos>" in a text become control ids.

    Returns:
      int32 [B, choices, N], -100 behind the ids and where a prompt has fewer answers than another.
      Lengths are padded so that answers of near lengths have the same shape.

    Raises:
      PromptError: there is no answer, or one is not a text, holds "<image>" or has no tokens.
    """
    if isinstance(answers, str) or not len(answers):
        raise PromptError("answers must be a list of at least one list of texts")
    rows: list[list[np.ndarray]] = []
    for b, texts in enumerate(answers):
        if isinstance(texts, str) or not len(texts):
            raise PromptError(f"answers[{b}] is {texts!r}, expected a list of at least one text")
        rows.append([])
        for n, text in enumerate(texts):
            name = f"answers[{b}][{n}]"
            if not isinstance(text, str) or IMAGE_TEXT in text:
                raise PromptError(f"{name} is {text!r}, expected a text without {IMAGE_TEXT}")
            text = text.strip() if strip else text
            ids = encode_said(text, processor.tokenizer, closed=closed, control=control)
            if not ids:
                raise PromptError(f"{name} is empty; write an answer, or leave it closed")
            rows[-1].append(np.array(ids))
    longest = max(len(row) for texts in rows for row in texts)
    length = longest if longest == 1 else bucket(longest, ANSWER_BUCKET)
    choices = max(map(len, rows))
    nothing = np.zeros(0, np.int32)
    flat = [row for texts in rows for row in [*texts, *[nothing] * (choices - len(texts))]]
    return pad_rows(flat, length, IGNORED).reshape(len(rows), choices, length)
