"""Encoding candidate answers for `score`."""

from collections.abc import Sequence

import numpy as np

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.errors import PromptError
from ovis_jax.inputs.batch import pad_rows
from ovis_jax.inputs.buckets import bucket_size
from ovis_jax.inputs.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, encode_turn_content
from ovis_jax.inputs.processor import Processor

ANSWER_BUCKET = 8
"""Answers are padded to 8, 16, ..., 64, 80, ... tokens, unless all answers have a single token."""


def encode_answers(
    processor: Processor,
    answers: Sequence[Sequence[str]],
    *,
    add_end_of_turn: bool = True,
    strip: bool = True,
    parse_special_tokens: bool = True,
) -> np.ndarray:
    """Encode the candidate answers to a batch of prompts.

    Each answer is encoded separately. With `add_end_of_turn` and `strip`, the encoding is exactly
    the same as in training.

    Args:
      processor: Processor of the model.
      answers: The answers to each prompt, at least one per prompt. Their number may differ between
        prompts.
      add_end_of_turn: Whether to add the end-of-turn token to each answer. Without this token, the
        score of "A" is the probability of all answers that begin with "A".
      strip: Whether to remove white space around an answer. Pass False for text that continues an
        `assistant_prefix`, such as " red" after "It is".
      parse_special_tokens: Whether special tokens such as "<eos>" in a text become their ids.

    Returns:
      The token ids, int32 [B, choices, n], padded on the right with -100. Missing choices contain
      only -100. The length n is rounded up, so that answers with similar lengths share a compiled
      program.

    Raises:
      PromptError: A prompt has no answers, or an answer is not a string, contains "<image>" or has
        no tokens.
      TypeError: `processor` has the wrong type.
    """
    check_argument_types("encode_answers", processor=(processor, Processor))
    if isinstance(answers, str) or not len(answers):
        raise PromptError("answers must be a list with a list of texts for each prompt")
    rows: list[list[np.ndarray]] = []
    for b, texts in enumerate(answers):
        if isinstance(texts, str) or not len(texts):
            raise PromptError(f"answers[{b}] is {texts!r}, expected a list of at least one text")
        rows.append([])
        for n, text in enumerate(texts):
            name = f"answers[{b}][{n}]"
            if not isinstance(text, str) or IMAGE_PLACEHOLDER in text:
                raise PromptError(
                    f"{name} is {text!r}, expected a text without {IMAGE_PLACEHOLDER}"
                )
            ids = encode_turn_content(
                [text.strip() if strip else text],
                processor.tokenizer,
                chat_format=processor.chat_format,
                add_end_of_turn=add_end_of_turn,
                parse_special_tokens=parse_special_tokens,
            )
            if not ids:
                raise PromptError(f"{name} is empty; write an answer, or set add_end_of_turn=True")
            rows[-1].append(np.array(ids))
    longest = max(len(row) for texts in rows for row in texts)
    length = longest if longest == 1 else bucket_size(longest, ANSWER_BUCKET)
    choices = max(map(len, rows))
    missing = np.zeros(0, np.int32)
    flat = [row for texts in rows for row in [*texts, *[missing] * (choices - len(texts))]]
    return pad_rows(flat, length, IGNORE_INDEX).reshape(len(rows), choices, length)
