"""A conversation becomes ids in which IMAGE_MARK still stands for each image, and labels.

Source: `GemmaConversationFormatter` in ovis/model/conversation_formatter.py of AIDC-AI/Ovis, commit
d248e34.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ovis_jax.errors import PromptError
from ovis_jax.inputs.tokenizer import TURN_END, TURN_START, Tokenizer

IMAGE_TEXT = "<image>"
"""What stands in a prompt for an image."""
IMAGE_MARK = -200
"""What stands in the ids for an image."""
IGNORED = -100
"""The label of a position that is not learned."""

Turn = Mapping[str, str]
"""`{"role": "user" | "assistant", "content": str}`."""
Prompt = str | Sequence[Turn]
"""What the user says, or a conversation whose last turn is the user's."""

OPENINGS = {"user": f"{TURN_START}user\n", "assistant": f"{TURN_START}model\n"}
CLOSING = f"{TURN_END}\n"

ROLES_OF_ORIGINAL = {"human": "user", "gpt": "assistant"}


class Formatted(NamedTuple):
    """Ids and labels of a conversation, of the same length; IMAGE_MARK is one id an image."""

    ids: list[int]
    labels: list[int]


def read_turns(prompt: Prompt, num_images: int, name: str = "the prompt") -> list[Turn]:
    """Check a prompt, and give its images their places.

    A prompt without any "<image>" gets one a line for each image, before its first user turn.

    Args:
      prompt: a string, or turns.
      num_images: how many images come with it.
      name: what complaints call the prompt.

    Raises:
      PromptError: it is empty, holds a turn that the model does not know, or holds more or fewer
        "<image>" than there are images.
    """
    turns: list[Turn] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    if not turns:
        raise PromptError(f"{name} has no turns; give at least one of the user's")
    for number, turn in enumerate(turns, 1):
        _check_turn(turn, name if isinstance(prompt, str) else f"turn {number} of {name}")
    num_marks = sum(turn["content"].count(IMAGE_TEXT) for turn in turns)
    first_user = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if num_marks == 0 and first_user is not None:
        content = f"{IMAGE_TEXT}\n" * num_images + turns[first_user]["content"]
        turns[first_user] = {"role": "user", "content": content}
    elif num_marks != num_images:
        raise PromptError(
            f"{name} holds {IMAGE_TEXT} {_times(num_marks)}, but {num_images} "
            f"image{'s come' if num_images != 1 else ' comes'} with it; give one image for each "
            f"{IMAGE_TEXT}, or write none and every image is put first"
        )
    return turns


def format_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    preface: str = "",
    *,
    control: bool = True,
    name: str = "the prompt",
) -> Formatted:
    """Format turns that the model is to answer.

    Args:
      turns: what `read_turns` gives.
      tokenizer: text -> ids.
      preface: how the answer begins.
      control: whether control marks spelled out in a turn become control ids.
      name: what complaints call the prompt.

    Raises:
      PromptError: the last turn is not the user's, or the preface holds "<image>".
    """
    if turns[-1]["role"] != "user":
        raise PromptError(
            f"the last turn of {name} is the assistant's, so nothing is left to answer; end with "
            "a user turn, and give the beginning of an answer as preface"
        )
    if IMAGE_TEXT in preface:
        raise PromptError(f"the preface of {name} holds {IMAGE_TEXT}; images stand in turns only")
    asked = format_conversation(turns, tokenizer, control=control)
    opening = tokenizer.encode(OPENINGS["assistant"])
    answer = tokenizer.encode(preface.strip(), control=control)
    return Formatted(
        [*asked.ids, *opening, *answer], [*asked.labels, *[IGNORED] * len(opening), *answer]
    )


def format_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, control: bool = True
) -> Formatted:
    """Format a whole conversation: the labels are the assistant's text and its closing mark."""
    ids = [tokenizer.id_of("<bos>")]
    labels = [IGNORED]
    *_, newline = tokenizer.encode(CLOSING)
    for turn in turns:
        opening = tokenizer.encode(OPENINGS[turn["role"]])
        said = encode_said(turn["content"].strip(), tokenizer, control=control)
        ids += [*opening, *said, newline]
        learned = _learned(said) if turn["role"] == "assistant" else [IGNORED] * len(said)
        labels += [*[IGNORED] * len(opening), *learned, IGNORED]
    return Formatted(ids, labels)


def encode_said(
    text: str, tokenizer: Tokenizer, *, closed: bool = True, control: bool = True
) -> list[int]:
    """Encode what stands in a turn, an IMAGE_MARK for each "<image>", and the mark that closes it.

    Without `closed` the mark is left out.
    """
    *mark, _ = tokenizer.encode(CLOSING)
    return [*_encode_with_images(text, tokenizer, control), *(mark if closed else [])]


def place_images(formatted: Formatted, marks: Sequence[Sequence[int]]) -> Formatted:
    """Put the ids `marks[n]` in the place of the n-th IMAGE_MARK; none of them is learned."""
    ids: list[int] = []
    labels: list[int] = []
    remaining = iter(marks)
    for i, label in zip(formatted.ids, formatted.labels, strict=True):
        placed = next(remaining) if i == IMAGE_MARK else [i]
        ids += placed
        labels += [IGNORED] * len(placed) if i == IMAGE_MARK else [label]
    return Formatted(ids, labels)


def from_original(turns: Sequence[Turn]) -> list[Turn]:
    """Convert turns `{"from": "human" | "gpt", "value": str}` of the original's data.

    Raises:
      PromptError: a turn lacks one of the two, or is from somebody else.
    """
    converted: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        if not {"from", "value"} <= turn.keys():
            raise PromptError(f"turn {number} has the keys {sorted(turn)}, expected from and value")
        if turn["from"] not in ROLES_OF_ORIGINAL:
            raise PromptError(
                f"turn {number} is from {turn['from']!r}, expected human or gpt: "
                "Gemma2 knows no other, and no system turn"
            )
        converted.append({"role": ROLES_OF_ORIGINAL[turn["from"]], "content": turn["value"]})
    return converted


def _check_turn(turn: Turn, name: str) -> None:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        found = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise PromptError(f"{name} is {found}, expected an object with role and content")
    if turn["role"] == "system":
        raise PromptError(
            f"{name} is a system turn, which Gemma2 does not have; "
            "write its text at the beginning of the first user turn"
        )
    if turn["role"] not in OPENINGS:
        raise PromptError(f"{name} has the role {turn['role']!r}, expected user or assistant")
    if not isinstance(turn["content"], str):
        raise PromptError(f"{name} holds a {type(turn['content']).__name__}, expected a string")
    if turn["role"] == "user" and not turn["content"].strip():
        raise PromptError(f"{name} is empty; write what the model is to answer")


def _encode_with_images(text: str, tokenizer: Tokenizer, control: bool) -> list[int]:
    """Encode the text on each side of an "<image>" by itself, IMAGE_MARK between."""
    first, *rest = [tokenizer.encode(part, control=control) for part in text.split(IMAGE_TEXT)]
    ids = first
    for part in rest:
        ids += [IMAGE_MARK, *part]
    return ids


def _learned(ids: list[int]) -> list[int]:
    """Labels of what the assistant said; an image in it is not learned."""
    return [IGNORED if i == IMAGE_MARK else i for i in ids]


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
