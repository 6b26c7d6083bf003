"""Conversations become token ids, with one IMAGE_TOKEN_ID per image, and labels.

Source: `GemmaConversationFormatter` in ovis/model/conversation_formatter.py of AIDC-AI/Ovis, commit
d248e34.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from ovis_jax.errors import PromptError
from ovis_jax.inputs.open_image import ImageSource
from ovis_jax.inputs.tokenizer import TURN_END, TURN_START, Tokenizer

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in a text."""
IMAGE_TOKEN_ID = -200
"""The id of an image before its placeholder ids are inserted."""
IGNORE_INDEX = -100
"""The label of a position that the model does not learn."""

Turn = Mapping[str, Any]
"""`{"role": "user" | "assistant", "content": CONTENT}`; CONTENT is a string or a list of parts.

A part is `{"type": "text", "text": str}`, `{"type": "image_url", "image_url": {"url": "data:..."}}`
or `{"type": "image", "image": ImageSource}`.
"""
Prompt = str | Sequence[Turn]
"""The user's text, or a conversation whose last turn is the user's."""

OPENINGS = {"user": f"{TURN_START}user\n", "assistant": f"{TURN_START}model\n"}
CLOSING = f"{TURN_END}\n"

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class EncodedConversation(NamedTuple):
    """Ids and labels of a conversation, of equal length."""

    ids: list[int]
    labels: list[int]


def parse_prompt(
    prompt: Prompt, images: Sequence[ImageSource] = (), name: str = "the prompt"
) -> tuple[list[Turn], list[ImageSource]]:
    """Check a prompt and match its images with their places.

    Args:
      prompt: A string, or turns.
      images: The images for each "<image>" in the text. If the text has none, the images come
        first, one per line before the first user turn. Images in content parts do not count here.
      name: How error messages call the prompt.

    Returns:
      The turns, whose content is a string with one "<image>" per image, and all images in order of
      appearance.

    Raises:
      PromptError: The prompt is empty, a turn is malformed, or the number of "<image>" differs from
        the number of images.
    """
    if not isinstance(prompt, Sequence):
        raise PromptError(f"{name} is a {type(prompt).__name__}, expected a string or turns")
    given: list[Turn] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    if not given:
        raise PromptError(f"{name} has no turns; pass at least one user turn")
    turns: list[Turn] = []
    slots: list[list[ImageSource | None]] = []  # per turn; None takes the next of `images`
    for number, turn in enumerate(given, 1):
        text, found = _read_turn(
            turn, name if isinstance(prompt, str) else f"turn {number} of {name}"
        )
        turns.append({"role": turn["role"], "content": text})
        slots.append(found)
    num_places = sum(image is None for found in slots for image in found)
    first_user = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if num_places == 0 and first_user is not None:
        content = f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[first_user]["content"]
        turns[first_user] = {"role": "user", "content": content}
        slots[first_user] = [*images, *slots[first_user]]
    elif num_places != len(images):
        times = "once" if num_places == 1 else f"{num_places} times"
        come = "1 image comes" if len(images) == 1 else f"{len(images)} images come"
        raise PromptError(
            f"{name} holds {IMAGE_PLACEHOLDER} {times}, but {come} with it; pass one image for "
            f"each {IMAGE_PLACEHOLDER}, or write none to put all images first"
        )
    remaining = iter(images)
    ordered = [next(remaining) if x is None else x for found in slots for x in found]
    return turns, ordered


def add_image_placeholders(text: str, num_images: int) -> str:
    """Put "<image>" lines before a text, unless the text places its images itself."""
    return text if IMAGE_PLACEHOLDER in text else f"{IMAGE_PLACEHOLDER}\n" * num_images + text


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    assistant_prefix: str = "",
    *,
    parse_special_tokens: bool = True,
    name: str = "the prompt",
) -> EncodedConversation:
    """Encode turns that the model answers.

    Args:
      turns: The turns that `parse_prompt` returns.
      tokenizer: The model's tokenizer.
      assistant_prefix: Text that the answer begins with.
      parse_special_tokens: Whether special tokens spelled out in a text become their ids.
      name: How error messages call the prompt.

    Raises:
      PromptError: The last turn is not the user's, or the prefix holds "<image>".
    """
    if turns[-1]["role"] != "user":
        raise PromptError(
            f"the last turn of {name} is the assistant's, so there is nothing to answer; end with "
            "a user turn, and pass the beginning of an answer as assistant_prefix"
        )
    if IMAGE_PLACEHOLDER in assistant_prefix:
        raise PromptError(
            f"the assistant_prefix of {name} holds {IMAGE_PLACEHOLDER}; put images into turns"
        )
    prompt = encode_conversation(turns, tokenizer, parse_special_tokens=parse_special_tokens)
    opening = tokenizer.encode(OPENINGS["assistant"])
    prefix = tokenizer.encode(assistant_prefix.strip(), parse_special_tokens=parse_special_tokens)
    return EncodedConversation(
        [*prompt.ids, *opening, *prefix], [*prompt.labels, *[IGNORE_INDEX] * len(opening), *prefix]
    )


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, parse_special_tokens: bool = True
) -> EncodedConversation:
    """Encode a finished conversation; the model learns the assistant's text and end of turn."""
    ids = [tokenizer.token_to_id("<bos>")]
    labels = [IGNORE_INDEX]
    *_, newline = tokenizer.encode(CLOSING)
    for turn in turns:
        opening = tokenizer.encode(OPENINGS[turn["role"]])
        content = encode_turn_content(
            turn["content"].strip(), tokenizer, parse_special_tokens=parse_special_tokens
        )
        ids += [*opening, *content, newline]
        learned = turn["role"] == "assistant"
        labels += [IGNORE_INDEX] * len(opening)
        # An image in an answer is not learned.
        labels += [i if learned and i != IMAGE_TOKEN_ID else IGNORE_INDEX for i in content]
        labels.append(IGNORE_INDEX)
    return EncodedConversation(ids, labels)


def encode_turn_content(
    text: str,
    tokenizer: Tokenizer,
    *,
    add_end_of_turn: bool = True,
    parse_special_tokens: bool = True,
) -> list[int]:
    """Encode the text of a turn, with IMAGE_TOKEN_ID for each "<image>".

    The stretches between images are encoded separately, as in the original.
    """
    ids: list[int] = []
    for number, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        ids += [IMAGE_TOKEN_ID] if number else []
        ids += tokenizer.encode(part, parse_special_tokens=parse_special_tokens)
    *end_of_turn, _ = tokenizer.encode(CLOSING)
    return [*ids, *end_of_turn] if add_end_of_turn else ids


def insert_image_placeholders(
    encoded: EncodedConversation, placeholder_ids: Sequence[Sequence[int]]
) -> EncodedConversation:
    """Replace the n-th IMAGE_TOKEN_ID with `placeholder_ids[n]`, which the model does not learn."""
    ids: list[int] = []
    labels: list[int] = []
    remaining = iter(placeholder_ids)
    for i, label in zip(encoded.ids, encoded.labels, strict=True):
        inserted = next(remaining) if i == IMAGE_TOKEN_ID else [i]
        ids += inserted
        labels += [IGNORE_INDEX] * len(inserted) if i == IMAGE_TOKEN_ID else [label]
    return EncodedConversation(ids, labels)


def turns_from_sharegpt(conversations: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Convert turns `{"from": "human" | "gpt", "value": str}`, the format of the original's data.

    Raises:
      PromptError: A turn lacks a key, or has another role.
    """
    converted: list[Turn] = []
    for number, turn in enumerate(conversations, 1):
        if not {"from", "value"} <= turn.keys():
            raise PromptError(f"turn {number} has the keys {sorted(turn)}, expected from and value")
        if turn["from"] not in SHAREGPT_ROLES:
            raise PromptError(
                f"turn {number} is from {turn['from']!r}, expected human or gpt: "
                "Gemma2 has no other roles and no system turn"
            )
        converted.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return converted


def _read_turn(turn: Turn, name: str) -> tuple[str, list[ImageSource | None]]:
    """Check a turn and return its text and, for each "<image>", its image or None if unknown."""
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        found = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise PromptError(f"{name} is {found}, expected an object with role and content")
    if turn["role"] == "system":
        raise PromptError(
            f"{name} is a system turn, which Gemma2 does not have; "
            "put its text at the beginning of the first user turn"
        )
    if turn["role"] not in OPENINGS:
        raise PromptError(f"{name} has the role {turn['role']!r}, expected user or assistant")
    content = turn["content"]
    if isinstance(content, str):
        text = content
        images: list[ImageSource | None] = [None] * content.count(IMAGE_PLACEHOLDER)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [_read_part(part, f"part {n} of {name}") for n, part in enumerate(content, 1)]
        text = "\n".join(text for text, _ in parts)
        images = [image for _, found in parts for image in found]
    else:
        raise PromptError(
            f"the content of {name} is a {type(content).__name__}, "
            "expected a string or a list of parts"
        )
    if turn["role"] == "user" and not text.strip():
        raise PromptError(f"{name} is empty; write the text that the model should answer")
    return text, images


def _read_part(part: Any, name: str) -> tuple[str, list[ImageSource | None]]:
    """Check a content part and return what `_read_turn` returns for a turn."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    match part:
        case {"type": "text", "text": str(text)}:
            return text, [None] * text.count(IMAGE_PLACEHOLDER)
        case {"type": "image", "image": image}:
            return IMAGE_PLACEHOLDER, [cast(ImageSource, image)]
        case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith("data:"):
            return IMAGE_PLACEHOLDER, [url]
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            raise PromptError(
                f"{name} has the URL {url[:100]!r}, expected a data: URL: images are not "
                'downloaded here; pass a file as {"type": "image", "image": PATH}'
            )
    found = f"has the type {kind!r}" if kind is not None else f"is a {type(part).__name__}"
    raise PromptError(
        f'{name} {found}, expected {{"type": "text", "text": ...}}, {{"type": "image", "image": '
        '...} or {"type": "image_url", "image_url": {"url": ...}}'
    )
