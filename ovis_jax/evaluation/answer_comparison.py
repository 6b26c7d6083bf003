"""Reading the part of a model's text that is compared with the expected answer.

`read_answer` reads an answer like a person who grades it. Its rules for options and for yes or no
follow VLMEvalKit (`can_infer` and `YOrN_Extraction`), so that the scores are similar to those of
VLMEvalKit. `read_answer_strictly` accepts only answers in the form that the prompt asks for.
"""

import re
from collections.abc import Sequence
from typing import Literal

from ovis_jax.evaluation.published_prompts_and_scores import OPTION_LETTERS

AnswerType = Literal["text", "yes_no", "multiple_choice"]
"""How answers are compared: as text, as yes or no, or as the letter of an option."""

ANSWER_PREFIX = re.compile(
    r"(?:so|therefore|thus|hence)?\W*(?:the|my)? ?(?:(?:final|correct|right|best) )*"
    # A minus sign, a currency or a parenthesis after it belongs to the answer.
    r"(?:answer|option|choice)\b(?: is| would be)?[\s:=\"'“„]*(?:[-–—] )?(?:option |choice )?",
    re.IGNORECASE,
)
"""Pattern for the beginning of texts such as "The answer is C." and "Answer: (B)"."""

LAST_WORDS = 4
"""A letter in a sentence names an option if it is among this many last words, as in VLMEvalKit."""

NEGATION = re.compile(
    r"\b(?:no|not|nor|neither|never|cannot|except|wrong|incorrect)\b|n['’]t\b", re.IGNORECASE
)


def read_answer_strictly(text: str, answer_type: AnswerType, options: Sequence[str]) -> str:
    """Return the answer in a text, which must have the form that the prompt asks for.

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
    """Return the answer in a text, as a person would read it.

    Case, Markdown emphasis, articles, the last punctuation mark and introductions such as "The
    answer is" are ignored.

    Args:
      text: The text of the model, or an expected answer.
      expected: The expected answer, which determines the kind of answer: yes or no, a letter, or
        any text.
      options: The options of a multiple-choice question; empty for other questions.

    Returns:
      For a multiple-choice question or an expected letter: the letter in the text, or "" if the
      text names no option or several options, or negates the option that it names. For an expected
      yes or no: "yes", "no" or "". Otherwise: the text without the parts that are ignored.
    """
    if options:
        return _read_letter(text, OPTION_LETTERS[: len(options)], options)
    if re.fullmatch("[A-Z]", expected.strip()):
        return _read_letter(text, OPTION_LETTERS, ())
    if _plain(expected) in ("yes", "no"):
        return _read_yes_or_no(text)
    return _plain(text)


def _read_letter(text: str, letters: str, options: Sequence[str]) -> str:
    text = _without_emphasis(text)
    prefix = ANSWER_PREFIX.match(text)
    rest = text[prefix.end() :] if prefix else text
    texts: list[str] = []
    for simplify in (str.casefold, _plain):
        texts = [simplify(option.strip()) for option in options]
        answer = simplify(rest)
        if texts.count(answer) == 1 and answer.upper() not in [*letters]:
            return letters[texts.index(answer)]
    if match := re.fullmatch(rf"\W*([{letters}])\W*", rest, re.IGNORECASE):  # "b", "(B)."
        return match[1].upper()
    if match := re.match(rf"\(?([{letters}])(?!\w)([).:,]*)\s*(.*)", rest):
        letter, mark, more = match.groups()
        if options and _plain(more) == texts[letters.index(letter)]:  # "B the dog"
            return letter
        if mark or (prefix and prefix[0].rstrip()[-1].isalpha()):  # "The answer is B because"
            return "" if _other_letters(more, letters, letter) else letter
    plain = _plain(text)
    found = [option for option in texts if re.search(_whole(option), plain)]
    found = [x for x in found if not any(x in other and x != other for other in found)]
    for option in found:
        if len(option) > 1:  # the B of the option "Hepatitis B" is not the letter of an option
            text = re.sub(
                _whole(option), lambda match: re.sub(r"\b\w\b", "_", match[0]), text, flags=re.I
            )
    words = re.sub(r"[.()\[\],:;!?*#{}]", " ", text).split()
    named = {word for word in words if len(word) == 1 and word in letters}
    if len(words) > 1 and words[0] == "I":  # "I see a dog"
        named.discard("I")
    if named == {"A"} and words[-1] != "A":  # "A dog"
        named.clear()
    if named:
        letter = min(named)
        is_last = words.index(letter) >= len(words) - LAST_WORDS
        is_named = len(named) == 1 and is_last and not _is_negated(rf"\b{letter}\b", text)
        return letter if is_named else ""
    if {*texts} == {"yes", "no"} and (answer := _read_yes_or_no(text)):
        return letters[texts.index(answer)]
    if len(found) != 1 or len(text) > 2 * sum(map(len, options)):
        return ""
    return "" if _is_negated(_whole(found[0]), plain) else letters[texts.index(found[0])]


def _other_letters(text: str, letters: str, letter: str) -> set[str]:
    """Return the other letters that are listed after a letter, as in "or B" and "B. a cat"."""
    text = re.sub(r"\b[AI] (?!(?:or|and)\b)(?=\w\w)", "", text)  # "A dog", "I think"
    listed = rf"(?:^|\b(?:and|or) |[/,&] ?)\(?([{letters}])(?!\w)|\b([{letters}])[).:](?=\s*\w)"
    return {first or second for first, second in re.findall(listed, text)} - {letter}


def _whole(option: str) -> str:
    """Return a pattern that finds an option, but not as part of a longer word or number."""
    return rf"(?<![\w/-])(?<!\d[.,:]){re.escape(option)}(?![\w/-]|[.,:]\d)"


def _is_negated(pattern: str, text: str) -> bool:
    """Return whether one of the two words before or after a match negates it, as in "not B"."""
    before, after = re.split(pattern, text, maxsplit=1)
    before, after = re.split(r"[.,:;!?]", before)[-1], re.split(r"[.,:;!?]", after)[0]
    return any(map(NEGATION.search, [*before.split()[-2:], *after.split()[:2]]))


def _read_yes_or_no(text: str) -> str:
    text = _without_emphasis(text).casefold()
    words = re.findall(r"\w+", text)
    found = {"yes", "no"} & set(words)
    is_both = re.match(r"\W*(?:yes|no)\s*(?:or\b|and\b|/)\s*(?:yes|no)\b", text)
    if words[:1] in (["yes"], ["no"]) and not is_both:
        return words[0]
    return found.pop() if len(found) == 1 else ""


def _without_emphasis(text: str) -> str:
    """Return a text without Markdown emphasis, surrounding quotes and repeated spaces."""
    without = re.sub(r"(?<!\w)(?:[*`]|__)+|(?:[*`]|__)+(?!\w)", "", text)  # "2*3" stays
    text = " ".join((without if without.strip() else text).split())
    return text.strip("\"'“”„ ") or text


def _plain(text: str) -> str:
    """Return a text without the parts that `read_answer` ignores; at least one word remains."""
    text = _without_emphasis(text)
    for pattern in (ANSWER_PREFIX, re.compile(r"(?:an?|the) ", re.IGNORECASE)):
        if (match := pattern.match(text)) and text[match.end() :].strip(" .!"):
            text = text[match.end() :]
    return (text.rstrip(" .!").strip("\"'“”„ ") or text).casefold()
