"""Reading the part of a model's text that is compared with the expected answer.

`read_answer` reads as people grade; its rules for options and for yes or no follow VLMEvalKit
(`can_infer` and `YOrN_Extraction`), so that both give similar scores for the same answers.
`read_answer_strictly` accepts only answers in the form that the prompt asks for.
"""

import re
from collections.abc import Sequence
from typing import Literal

from ovis_jax.evaluation.published_prompts_and_scores import OPTION_LETTERS

AnswerType = Literal["text", "yes_no", "multiple_choice"]
"""How answers are compared: as text, as yes or no, or as the letter of an option."""

ANSWER_PREFIX = re.compile(
    r"(?:so|therefore|thus|hence)?\W*(?:the|my)? ?(?:(?:final|correct|right|best) )*"
    r"(?:answer|option|choice)\b(?: is| would be)?\W*(?:option |choice )?",
    re.IGNORECASE,
)
"""The beginning of texts such as "The answer is C." and "Answer: (B)"."""

LAST_WORDS = 4
"""A letter in a sentence names an option if it is one of the last words, as in VLMEvalKit."""


def read_answer_strictly(text: str, answer_type: AnswerType, options: Sequence[str]) -> str:
    """Return the answer in a text that has the form which the prompt asks for.

    For a multiple-choice question, the result is the option's letter, or "" if the text names no
    option. A letter counts if it is the whole text or is followed by punctuation, as in "B." or
    "(B) the dog". The full text of an option also counts. "A dog" names no option, because the
    letter is not followed by punctuation.
    """
    text = text.strip()
    if answer_type == "yes_no":
        return text.rstrip(".").casefold()
    if answer_type == "multiple_choice":
        letters = OPTION_LETTERS[: len(options)]
        if match := re.match(rf"\(?([{letters}])([).:,]|$)", text):
            return match[1]
        texts = [option.strip().rstrip(".").casefold() for option in options]
        answer = text.rstrip(".").casefold()
        return letters[texts.index(answer)] if answer in texts else ""
    return text


def read_answer(text: str, expected: str, options: Sequence[str]) -> str:
    """Return the answer in a text as people grade it.

    Upper and lower case, Markdown emphasis, articles, the last punctuation mark and introductions
    such as "The answer is" do not matter.

    Args:
      text: The text of the model, or an expected answer.
      expected: The expected answer, which decides what the text may say: yes or no, a letter, or
        any text.
      options: The options of a multiple-choice question; empty for other questions.

    Returns:
      For a multiple-choice question or an expected letter, the letter, or "" if the text names no
      option or several. For an expected yes or no, "yes", "no" or "". Otherwise, the text without
      what does not matter.
    """
    if options:
        return _read_letter(text, OPTION_LETTERS[: len(options)], options)
    if re.fullmatch("[A-Z]", expected.strip()):
        return _read_letter(text, OPTION_LETTERS, ())
    if _plain(expected) in ("yes", "no"):
        return _read_yes_or_no(text)
    return _plain(text)


def _read_letter(text: str, letters: str, options: Sequence[str]) -> str:
    if options and (letter := read_answer_strictly(text, "multiple_choice", options)):
        return letter
    text = _without_emphasis(text)
    prefix = ANSWER_PREFIX.match(text)
    rest = text[prefix.end() :] if prefix else text
    texts = [_plain(option) for option in options]
    if texts.count(answer := _plain(rest)) == 1:
        return letters[texts.index(answer)]
    if match := re.fullmatch(rf"\W*([{letters}])\W*", rest, re.IGNORECASE):  # "b", "(B)."
        return match[1].upper()
    if match := re.match(rf"\(?([{letters}])[).:]", rest):  # "B) the dog"
        return match[1]
    if match := re.match(rf"([{letters}])\b\s*(.*)", rest):
        is_stated = prefix and prefix[0].rstrip()[-1].isalpha()  # "The answer is B because"
        if is_stated or _plain(match[2]) in texts[letters.index(match[1]) :][:1]:  # "B the dog"
            return match[1]
    words = re.sub(r"[.()\[\],:;!?*#{}]", " ", text).split()
    named = {word for word in words if len(word) == 1 and word in letters}
    if len(words) > 1 and words[0] == "I":  # "I see a dog"
        named.discard("I")
    if named == {"A"} and words[-1] != "A":  # "A dog"
        named.clear()
    if named:
        letter = min(named)
        is_last = words.index(letter) >= len(words) - LAST_WORDS
        return letter if len(named) == 1 and is_last else ""
    if len(text) > 2 * sum(map(len, options)):
        return ""
    found = [x for x in texts if re.search(rf"(?<!\w){re.escape(x)}(?!\w)", _plain(text))]
    found = [x for x in found if not any(x in other and x != other for other in found)]
    return letters[texts.index(found[0])] if len(found) == 1 else ""


def _read_yes_or_no(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    found = {"yes", "no"} & set(words)
    return found.pop() if len(found) == 1 else ""


def _without_emphasis(text: str) -> str:
    return " ".join(re.sub(r"[*`]|__", "", text).split()).strip("\"'“”„ ")


def _plain(text: str) -> str:
    """Return a text without what does not matter; at least one word remains."""
    text = _without_emphasis(text)
    for pattern in (ANSWER_PREFIX, re.compile(r"(?:an?|the) ", re.IGNORECASE)):
        if (match := pattern.match(text)) and text[match.end() :].strip(" .!"):
            text = text[match.end() :]
    return (text.rstrip(" .!").strip("\"'“”„ ") or text).casefold()
