"""Encoding conversations as token ids, with one IMAGE_TOKEN_ID per image, and labels.

Source: `GemmaConversationFormatter` and `Llama3ConversationFormatter` in
ovis/model/conversation_formatter.py of AIDC-AI/Ovis, commit d248e34.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from ovis_jax.errors import PromptError
from ovis_jax.inputs.open_image import IMAGE_TYPES, ImageSource, is_data_url
from ovis_jax.inputs.tokenizer import (
    EOT,
    HEADER_END,
    HEADER_START,
    TURN_END,
    TURN_START,
    Tokenizer,
)

IMAGE_PLACEHOLDER = "<image>"
"""The string that marks the place of an image in a text."""
IMAGE_TOKEN_ID = -200
"""The id that represents an image until the image's placeholder ids replace it."""
IGNORE_INDEX = -100
"""The label of a position that does not contribute to the loss."""

Turn = Mapping[str, Any]
"""`{"role": "user" | "assistant", "content": CONTENT}`; CONTENT is a string or a list of parts.

With Llama, the role may also be "system", in any turn but the last.

A part is one of the following; `{"type": "image"}` stands for the next of the images that are
passed separately.

    {"type": "text", "text": str}
    {"type": "image_url", "image_url": {"url": "data:..."}}
    {"type": "image", "image": ImageSource}
    {"type": "image"}

An assistant turn with `"loss": False` does not become labels in training.
"""
Prompt = str | Sequence[Turn]
"""The user's text, or a conversation that ends with a user turn."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class ChatFormat:
    """The text around the turns of a conversation.

    Attributes:
      model: Name of the language model in error messages.
      bos: The token that starts every prompt.
      pad: The padding token, which is dropped if a text contains it.
      openings: The beginning of a turn, by role. Other roles are not supported.
      end_of_turn: The token after a turn's text. At the end of an assistant turn, this token is a
        label.
      separator: Text after `end_of_turn`. It does not contribute to the loss.
      default_system: Text of the system turn that is added to a conversation without one; None if
        no turn is added.
    """

    model: str
    bos: str
    pad: str
    openings: Mapping[str, str]
    end_of_turn: str
    separator: str = ""
    default_system: str | None = None

    @property
    def has_system_turns(self) -> bool:
        """Whether a conversation may have system turns."""
        return "system" in self.openings


GEMMA2 = ChatFormat(
    model="Gemma2",
    bos="<bos>",
    pad="<pad>",
    openings={"user": f"{TURN_START}user\n", "assistant": f"{TURN_START}model\n"},
    end_of_turn=TURN_END,
    separator="\n",
)
LLAMA3 = ChatFormat(
    model="Llama",
    bos="<|begin_of_text|>",
    pad="<|end_of_text|>",
    openings={
        role: f"{HEADER_START}{role}{HEADER_END}\n\n" for role in ("system", "user", "assistant")
    },
    end_of_turn=EOT,
    default_system="You are a helpful and honest multimodal assistant.",
)
CHAT_FORMATS: Mapping[str, ChatFormat] = {"gemma2": GEMMA2, "llama": LLAMA3}
"""The format of conversations, by the decoder's model type."""


class ParsedTurn(NamedTuple):
    """A turn whose text is split at the places of its images."""

    role: str
    texts: tuple[str, ...]
    """The texts before, between and after the images: one more than the number of images."""
    loss: bool = True
    """Whether the tokens of an assistant turn are labels in training."""


class EncodedConversation(NamedTuple):
    """The token ids and the labels of a conversation, both with the same length."""

    ids: list[int]
    labels: list[int]


def parse_prompt(
    prompt: Prompt,
    images: Sequence[ImageSource] = (),
    name: str = "the prompt",
    *,
    chat_format: ChatFormat = GEMMA2,
    parse_image_placeholders: bool = True,
) -> tuple[list[ParsedTurn], list[ImageSource]]:
    """Check a prompt, and match the images with their places.

    Args:
      prompt: A string, or a list of turns.
      images: One image for each "<image>" in the text and each part `{"type": "image"}`. If the
        prompt has neither of these, the images are placed at the beginning of the first user turn,
        one per line. Images in content parts are not included here.
      name: Name of the prompt in error messages.
      chat_format: Format that determines the supported roles.
      parse_image_placeholders: Whether "<image>" in a text marks the place of an image, as in the
        original. Otherwise it is ordinary text.

    Returns:
      The turns, and all images in order of appearance.

    Raises:
      PromptError: The prompt is empty, a turn is malformed, or the number of "<image>" marks
        differs from the number of images.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise _type_error(prompt, name, "a string or a list of turns")
    given: list[Turn] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    if not given:
        raise PromptError(f"{name} has no turns; pass at least one user turn")
    turns: list[ParsedTurn] = []
    slots: list[list[ImageSource | None]] = []  # per turn; None stands for the next of `images`
    for number, turn in enumerate(given, 1):
        texts, found = _read_turn(
            turn,
            name if isinstance(prompt, str) else f"turn {number} of {name}",
            chat_format,
            parse_image_placeholders,
        )
        turns.append(ParsedTurn(turn["role"], tuple(texts), turn.get("loss", True)))
        slots.append(found)
    num_places = sum(image is None for found in slots for image in found)
    first_user = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if images and num_places == 0 and first_user is not None:
        first, *rest = turns[first_user].texts
        texts = ("", *["\n"] * (len(images) - 1), f"\n{first}", *rest)
        turns[first_user] = ParsedTurn("user", texts)
        slots[first_user] = [*images, *slots[first_user]]
    elif num_places != len(images):
        times = "once" if num_places == 1 else f"{num_places} times"
        come = "1 image is" if len(images) == 1 else f"{len(images)} images are"
        raise PromptError(
            f"{name} contains {IMAGE_PLACEHOLDER} {times}, but {come} given; pass one image for "
            f"each {IMAGE_PLACEHOLDER}, or write none to put all images first"
        )
    remaining = iter(images)
    ordered = [next(remaining) if x is None else x for found in slots for x in found]
    return turns, ordered


def encode_prompt(
    turns: Sequence[ParsedTurn],
    tokenizer: Tokenizer,
    assistant_prefix: str = "",
    *,
    chat_format: ChatFormat = GEMMA2,
    parse_special_tokens: bool = True,
    parse_image_placeholders: bool = True,
    name: str = "the prompt",
) -> EncodedConversation:
    """Encode turns as a prompt that the model answers.

    Args:
      turns: The turns that `parse_prompt` returns.
      tokenizer: The model's tokenizer.
      assistant_prefix: Text that the answer begins with.
      chat_format: The model's format.
      parse_special_tokens: Whether special tokens spelled out in a text become their ids.
      parse_image_placeholders: Whether "<image>" marks the place of an image. If so, the prefix
        must not contain "<image>".
      name: Name of the prompt in error messages.

    Raises:
      PromptError: The last turn is not a user turn, or the prefix contains an "<image>" mark.
    """
    if turns[-1].role != "user":
        role = "the assistant's" if turns[-1].role == "assistant" else "a system turn"
        raise PromptError(
            f"the last turn of {name} is {role}, so there is nothing to answer; end with "
            "a user turn, and pass the beginning of an answer as assistant_prefix"
        )
    if parse_image_placeholders and IMAGE_PLACEHOLDER in assistant_prefix:
        raise PromptError(
            f"the assistant_prefix of {name} contains {IMAGE_PLACEHOLDER}; put images into turns"
        )
    prompt = encode_conversation(
        turns, tokenizer, chat_format=chat_format, parse_special_tokens=parse_special_tokens
    )
    opening = tokenizer.encode(chat_format.openings["assistant"])
    prefix = tokenizer.encode(assistant_prefix.strip(), parse_special_tokens=parse_special_tokens)
    return EncodedConversation(
        [*prompt.ids, *opening, *prefix], [*prompt.labels, *[IGNORE_INDEX] * len(opening), *prefix]
    )


def encode_conversation(
    turns: Sequence[ParsedTurn],
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat = GEMMA2,
    parse_special_tokens: bool = True,
) -> EncodedConversation:
    """Encode a conversation for training; assistant texts and end-of-turn tokens become labels.

    The format's default system turn, if any, is prepended unless the first turn is a system turn.
    """
    if chat_format.default_system is not None and turns[0].role != "system":
        turns = [ParsedTurn("system", (chat_format.default_system,)), *turns]
    ids = [tokenizer.token_to_id(chat_format.bos)]
    labels = [IGNORE_INDEX]
    separator = tokenizer.encode(chat_format.separator)
    for turn in turns:
        opening = tokenizer.encode(chat_format.openings[turn.role])
        *texts, last = turn.texts
        texts = [*texts, last.rstrip()]
        texts[0] = texts[0].lstrip()
        content = encode_turn_content(
            texts, tokenizer, chat_format=chat_format, parse_special_tokens=parse_special_tokens
        )
        ids += [*opening, *content, *separator]
        learned = turn.role == "assistant" and turn.loss
        labels += [IGNORE_INDEX] * len(opening)
        # An image in an answer does not contribute to the loss.
        labels += [i if learned and i != IMAGE_TOKEN_ID else IGNORE_INDEX for i in content]
        labels += [IGNORE_INDEX] * len(separator)
    return EncodedConversation(ids, labels)


def encode_turn_content(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat = GEMMA2,
    add_end_of_turn: bool = True,
    parse_special_tokens: bool = True,
) -> list[int]:
    """Encode the texts of a turn, with an IMAGE_TOKEN_ID between each two consecutive texts.

    The texts are encoded separately, as in the original.
    """
    ids: list[int] = []
    for number, text in enumerate(texts):
        ids += [IMAGE_TOKEN_ID] if number else []
        ids += tokenizer.encode(text, parse_special_tokens=parse_special_tokens)
    return [*ids, *tokenizer.encode(chat_format.end_of_turn)] if add_end_of_turn else ids


def insert_image_placeholders(
    encoded: EncodedConversation, placeholder_ids: Sequence[Sequence[int]]
) -> EncodedConversation:
    """Replace the n-th IMAGE_TOKEN_ID with `placeholder_ids[n]`, whose labels are -100."""
    ids: list[int] = []
    labels: list[int] = []
    remaining = iter(placeholder_ids)
    for i, label in zip(encoded.ids, encoded.labels, strict=True):
        inserted = next(remaining) if i == IMAGE_TOKEN_ID else [i]
        ids += inserted
        labels += [IGNORE_INDEX] * len(inserted) if i == IMAGE_TOKEN_ID else [label]
    return EncodedConversation(ids, labels)


def turns_from_sharegpt(
    conversations: Sequence[Mapping[str, str]], chat_format: ChatFormat = GEMMA2
) -> list[Turn]:
    """Convert turns from `{"from": "human" | "gpt", "value": str}`, the original's data format.

    With Llama's format, a turn may also be from "system".

    Raises:
      PromptError: A turn lacks a key or has an unknown role.
    """
    converted: list[Turn] = []
    for number, turn in enumerate(conversations, 1):
        if not {"from", "value"} <= turn.keys():
            raise PromptError(f"turn {number} has the keys {sorted(turn)}, expected from and value")
        role = SHAREGPT_ROLES.get(turn["from"])
        if role not in chat_format.openings:
            known = "system, human or gpt" if chat_format.has_system_turns else "human or gpt"
            raise PromptError(
                f"turn {number} is from {turn['from']!r}, expected {known}: "
                f"{chat_format.model} has no other roles"
                f"{'' if chat_format.has_system_turns else ' and no system turn'}"
            )
        converted.append({"role": role, "content": turn["value"]})
    return converted


def _type_error(value: object, name: str, expected: str) -> PromptError:
    found = f"has type {type(value).__name__}"
    if isinstance(value, IMAGE_TYPES):
        return PromptError(f"{name} {found}, an image type; the order is ask(prompt, images)")
    return PromptError(f"{name} {found}, expected {expected}")


def _read_turn(
    turn: Turn, name: str, chat_format: ChatFormat, parse_image_placeholders: bool
) -> tuple[list[str], list[ImageSource | None]]:
    """Check a turn, and return its texts and images; None stands for a separately passed image."""
    if not isinstance(turn, Mapping):
        raise _type_error(turn, name, "a dict with role and content")
    if not {"role", "content"} <= turn.keys():
        raise PromptError(f"{name} has the keys {sorted(turn)}, expected role and content")
    if turn["role"] == "system" and not chat_format.has_system_turns:
        raise PromptError(
            f"{name} is a system turn, which {chat_format.model} does not have; "
            "put its text at the beginning of the first user turn"
        )
    if turn["role"] not in chat_format.openings:
        roles = " or ".join(chat_format.openings).replace(
            " or ", ", ", len(chat_format.openings) - 2
        )
        raise PromptError(f"{name} has the role {turn['role']!r}, expected {roles}")
    content = turn["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(
            f"the content of {name} has type {type(content).__name__}, "
            "expected a string or a list of parts"
        )
    texts = [""]
    images: list[ImageSource | None] = []
    for number, part in enumerate(content, 1):
        (first, *rest), found = _read_part(
            part, f"part {number} of {name}", parse_image_placeholders
        )
        texts[-1] += f"\n{first}" if number > 1 else first  # each part has a line of its own
        texts += rest
        images += found
    if turn["role"] == "user" and not images and not texts[0].strip():
        raise PromptError(f"{name} is empty; write the text that the model should answer")
    return texts, images


def _read_part(
    part: Any, name: str, parse_image_placeholders: bool
) -> tuple[list[str], list[ImageSource | None]]:
    """Check a content part, and return its texts and images in the form of `_read_turn`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    match part:
        case {"type": "text", "text": str(text)}:
            texts = text.split(IMAGE_PLACEHOLDER) if parse_image_placeholders else [text]
            return texts, [None] * (len(texts) - 1)
        case {"type": "image", "image": image} if image is not None:
            return ["", ""], [cast(ImageSource, image)]
        # Any other value, such as a URL, would be an image that this function does not read.
        case {"type": "image", **rest} if all(value is None for value in rest.values()):
            return ["", ""], [None]
        case {"type": "image", **rest}:
            keys = sorted(key for key, value in rest.items() if value is not None)
            raise PromptError(
                f"{name} has the keys {keys}, expected image; pass a file as "
                '{"type": "image", "image": PATH}'
            )
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            if is_data_url(url):
                return ["", ""], [url]
            raise PromptError(
                f"{name} has the URL {url[:100]!r}, expected a data: URL: images are not "
                'downloaded here; pass a file as {"type": "image", "image": PATH}'
            )
    found = f"has the type {kind!r}" if kind is not None else f"has type {type(part).__name__}"
    raise PromptError(
        f'{name} {found}, expected {{"type": "text", "text": ...}}, {{"type": "image", "image": '
        '...} or {"type": "image_url", "image_url": {"url": ...}}'
    )
