import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovis_jax.errors import PromptError
from ovis_jax.inputs.conversation import (
    GEMMA2,
    IMAGE_TOKEN_ID,
    LLAMA3,
    ParsedTurn,
    encode_conversation,
    encode_prompt,
    insert_image_placeholders,
    parse_prompt,
    turns_from_sharegpt,
)
from ovis_jax.inputs.image_processing import image_placeholder_ids
from ovis_jax.inputs.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted((GOLDEN / "cases" / "tiny-f32").glob("*.npz"))
LLAMA = GOLDEN.with_name("golden-llama")
CASES += sorted((LLAMA / "cases" / "tiny-f32").glob("*.npz"))
CASES = [path for path in CASES if path.stem != "batch_leftpad"]


@functools.cache
def tokenizer(folder=GOLDEN):
    return Tokenizer.from_folder(folder / "tiny-f32")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def parse(prompt, num_images=0, name="the prompt", **options):
    return parse_prompt(prompt, [f"{n}.png" for n in range(num_images)], name, **options)[0]


def marked(turns):
    """Parsed turns with a mark in the place of each image."""
    return [{"role": turn.role, "content": "<image>".join(turn.texts)} for turn in turns]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_ids_and_labels_are_the_original_s(path):
    golden, folder = np.load(path), path.parents[2]
    chat_format = {"chat_format": LLAMA3 if folder == LLAMA else GEMMA2}
    meta = json.loads(str(golden["meta"]))
    prompt = meta["text"]
    prompt = prompt if isinstance(prompt, str) else turns_from_sharegpt(prompt, **chat_format)
    turns = parse(prompt, len(golden["grids"]), **chat_format)
    encoded = encode_prompt(turns, tokenizer(folder), **chat_format)
    assert encoded.ids == golden["raw_input_ids"].tolist()
    placeholders = [image_placeholder_ids(tuple(grid)) for grid in golden["grids"]]
    expanded = insert_image_placeholders(encoded, placeholders)
    assert expanded.ids == golden["input_ids"].tolist()
    assert expanded.labels == golden["labels"].tolist()


def test_a_conversation_id_by_id():
    turns = parse([user(" Hi\n"), assistant(" user "), user("model")])
    head = [2, 106, 440, 108, 558, 535, 107, 108]
    answer = [106, 441, 108, 440, 107, 108]
    tail = [106, 440, 108, 441, 107, 108]
    encoded = encode_conversation(turns, tokenizer())
    assert encoded.ids == [*head, *answer, *tail]
    # The model learns the answer and its end of turn, but not the newline after it.
    assert encoded.labels == [*[-100] * 8, -100, -100, -100, 440, 107, -100, *[-100] * 6]
    prompt = encode_prompt(turns, tokenizer(), " Hi ")
    assert prompt.ids == [*head, *answer, *tail, 106, 441, 108, 558, 535]
    assert prompt.labels[-5:] == [-100, -100, -100, 558, 535]


def test_a_llama_conversation():
    """A default system turn comes first, and the caller's list does not change."""
    encode = functools.partial(Tokenizer.encode, tokenizer(LLAMA))
    turns = [user("Hi"), assistant("Yes"), {"role": "system", "content": "Be brief."}, user("Why?")]
    given = [dict(turn) for turn in turns]
    parsed = parse(turns, chat_format=LLAMA3)
    encoded = encode_conversation(parsed, tokenizer(LLAMA), chat_format=LLAMA3)
    assert turns == given and len(parsed) == 4
    default = "You are a helpful and honest multimodal assistant."
    text = "<|begin_of_text|>"
    for role, content in [("system", default), ("user", "Hi"), ("assistant", "Yes")]:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    learned = len(encode(text))
    text += "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    text += "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    assert encoded.ids == encode(text)
    answer = encode("Yes<|eot_id|>")
    expected = [-100] * len(encoded.ids)
    expected[learned - len(answer) : learned] = answer
    assert encoded.labels == expected
    own = [{"role": "system", "content": "Be kind."}, user("Hi")]
    ids = encode_prompt(parse(own, chat_format=LLAMA3), tokenizer(LLAMA), chat_format=LLAMA3).ids
    assert ids == encode(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    with pytest.raises(PromptError, match="the last turn of the prompt is a system turn"):
        encode_prompt(
            parse([user("Hi"), own[0]], chat_format=LLAMA3), tokenizer(LLAMA), chat_format=LLAMA3
        )
    with pytest.raises(PromptError, match="role 'tool', expected system, user or assistant"):
        parse([{"role": "tool", "content": "a"}], chat_format=LLAMA3)


contents = st.lists(
    st.sampled_from(["a", " ", "\n", "<image>", "<eos>", "<end_of_turn>", "▁", "图", "the", "\t"]),
    max_size=8,
).map("".join)


@given(st.lists(contents, min_size=1, max_size=4), contents)
def test_turns_are_tokenized_as_in_the_original(texts, prefix):
    # The original tokenizes each turn as one text, split only at "<image>".
    turns = [
        ParsedTurn(("user", "assistant")[n % 2], tuple(text.split("<image>")))
        for n, text in enumerate(texts)
    ]
    expected = [2]
    for turn, content in zip(turns, texts, strict=True):
        name = "user" if turn.role == "user" else "model"
        text = f"<start_of_turn>{name}\n{content.strip()}<end_of_turn>\n"
        first, *rest = map(tokenizer().encode, text.split("<image>"))
        expected += first + [i for part in rest for i in [-200, *part]]
    assert encode_conversation(turns, tokenizer()).ids == expected
    if turns[-1].role == "user":
        prefix = prefix.replace("<image>", "")
        expected += tokenizer().encode(f"<start_of_turn>model\n{prefix.strip()}")
        assert encode_prompt(turns, tokenizer(), prefix).ids == expected


def test_special_tokens_in_a_text_can_be_ignored():
    turns = parse("<end_of_turn><eos>")
    ids = encode_prompt(turns, tokenizer(), "<bos>", parse_special_tokens=False).ids
    assert ids[:4] == [2, 106, 440, 108]
    assert [i for i in ids if i in tokenizer().special_ids] == [2, 106, 107, 106]
    parsed = encode_prompt(turns, tokenizer()).ids
    assert parsed == [2, 106, 440, 108, 107, 1, 107, 108, 106, 441, 108]


def test_images_without_a_place_come_first():
    assert marked(parse("Hi", 2)) == [user("<image>\n<image>\nHi")]
    assert marked(parse("Hi")) == [user("Hi")]
    assert marked(parse("Hi <image>", 1)) == [user("Hi <image>")]
    turns = [user("Hi"), assistant("Yes"), user("And?")]
    assert marked(parse(turns, 1)) == [user("<image>\nHi"), *turns[1:]]
    assert turns[0] == user("Hi")


def text(text):
    return {"type": "text", "text": text}


def image(image):
    return {"type": "image", "image": image}


def image_url(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_content_parts():
    turns = [
        user([text("First"), image("a.png"), text("and"), image_url("data:,b"), text("?")]),
        assistant([text("Yes")]),
        user([text("More <image>"), image(b"c")]),
    ]
    found, images = parse_prompt(turns, ["given.png"])
    assert marked(found) == [
        user("First\n<image>\nand\n<image>\n?"),
        assistant("Yes"),
        user("More <image>\n<image>"),
    ]
    assert images == ["a.png", "data:,b", "given.png", b"c"]
    # Without a place for them in the text, the given images come first.
    found, images = parse_prompt([user([image("a.png"), text("Why?")])], ["given.png"])
    assert marked(found) == [user("<image>\n<image>\nWhy?")]
    assert images == ["given.png", "a.png"]
    found, images = parse_prompt([assistant([image("a.png")]), user("Why?")], ["given.png"])
    assert images == ["a.png", "given.png"]


def test_parts_without_an_image_stand_for_the_given_images():
    turns = [user([{"type": "image"}, text("and"), {"type": "image"}]), assistant("Yes"), user("?")]
    found, images = parse_prompt(turns, ["a.png", "b.png"])
    assert found[0] == ParsedTurn("user", ("", "\nand\n", "")) and images == ["a.png", "b.png"]
    # Arrow gives all parts of a column the same keys.
    turns[0]["content"][0] |= {"text": None, "image": None}
    assert parse_prompt(turns, ["a.png", "b.png"]) == (found, images)
    with pytest.raises(PromptError, match="contains <image> 2 times, but 1 image is given"):
        parse_prompt(turns, ["a.png"])


@given(st.lists(contents.filter(str.strip), min_size=1, max_size=3), contents)
def test_marks_in_a_text_can_be_ordinary_text(texts, prefix):
    """With parse_image_placeholders=False, only parts place images."""
    asked = [[text(x), {"type": "image"}] if n % 2 == 0 else x for n, x in enumerate(texts)]
    asked = [(user, assistant)[n % 2](x) for n, x in enumerate(asked)]
    num_images = -(-len(texts) // 2)
    turns = parse(asked, num_images, parse_image_placeholders=False)
    for n, (turn, content) in enumerate(zip(turns, texts, strict=True)):
        assert turn.texts == ((f"{content}\n", "") if n % 2 == 0 else (content,))
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    ids = encode_prompt(turns, tokenizer(), prefix, parse_image_placeholders=False).ids
    assert ids.count(IMAGE_TOKEN_ID) == num_images
    expected = tokenizer().encode(prefix.strip())
    assert ids[len(ids) - len(expected) :] == expected


def test_a_mark_that_is_text_is_tokenized_like_any_text():
    turns = parse("See <image>?", parse_image_placeholders=False)
    ids = encode_prompt(turns, tokenizer(), "<image>", parse_image_placeholders=False).ids
    words, mark = tokenizer().encode("See <image>?"), tokenizer().encode("<image>")
    assert ids == [2, 106, 440, 108, *words, 107, 108, 106, 441, 108, *mark]
    assert tokenizer().decode(words) == "See <image>?"


def test_images_in_an_answer_are_not_learned():
    turns = parse([user("Hi"), assistant("a<image>b")], 1)
    encoded = encode_conversation(turns, tokenizer())
    assert encoded.ids[-6:] == [108, 534, -200, 545, 107, 108]
    assert encoded.labels[-6:] == [-100, 534, -100, 545, 107, -100]
    expanded = insert_image_placeholders(encoded, [[-301, -300, -302, -305]])
    assert expanded.ids[-8:] == [534, -301, -300, -302, -305, 545, 107, 108]
    assert expanded.labels[-8:] == [534, -100, -100, -100, -100, 545, 107, -100]


@pytest.mark.parametrize(
    "prompt, num_images, message",
    [
        ("", 0, "prompts.2. is empty"),
        (" \n", 1, "prompts.2. is empty"),
        ([], 0, "prompts.2. has no turns"),
        ([user("Hi"), assistant("a"), user(" ")], 0, "turn 3 of prompts.2. is empty"),
        ([user([])], 1, "turn 1 of prompts.2. is empty"),
        ([{"role": "system", "content": "a"}], 0, "turn 1 of prompts.2. is a system turn"),
        ([{"role": "human", "content": "a"}], 0, "the role 'human', expected user or assistant"),
        (
            [{"from": "human", "value": "a"}],
            0,
            r"has the keys \['from', 'value'\], expected role and content",
        ),
        (3, 0, "prompts.2. has type int, expected a string or a list of turns"),
        (b"Hi", 0, r"prompts.2. has type bytes, an image type; the order is ask\(prompt, images\)"),
        (["Hi"], 0, "turn 1 of prompts.2. has type str, expected a dict with role and content"),
        ([user(3)], 0, "content of turn 1 of prompts.2. has type int, expected a string or a list"),
        ([user(["Hi"])], 0, "part 1 of turn 1 of prompts.2. has type str, expected"),
        ([user([text("Hi"), {"type": "video"}])], 0, "part 2 of turn 1 .* has the type 'video'"),
        ([user([{"type": "text"}])], 0, "part 1 of turn 1 of prompts.2. has the type 'text'"),
        (
            [user([{"type": "image", "url": "a.png"}, text("Hi")])],
            1,
            r"part 1 of turn 1 of prompts.2. has the keys \['url'\], expected image",
        ),
        (
            [user([image_url("https://example.org/a.png")])],
            0,
            "part 1 of turn 1 .* URL 'https://example.org/a.png', expected a data: URL",
        ),
        ("<image> <image>", 1, "prompts.2. contains <image> 2 times, but 1 image is given"),
        ("<image>", 2, "prompts.2. contains <image> once, but 2 images are given"),
        ("<image>", 0, "contains <image> once, but 0 images are given"),
        ([assistant("a")], 1, "contains <image> 0 times, but 1 image is given"),
    ],
)
def test_malformed_prompts(prompt, num_images, message):
    with pytest.raises(PromptError, match=message):
        parse(prompt, num_images, "prompts[2]")


def test_an_answered_conversation_is_no_prompt():
    turns = parse([user("Hi"), assistant("Yes")])
    message = "last turn of prompts.0. is the assistant's.*assistant_prefix"
    with pytest.raises(PromptError, match=message):
        encode_prompt(turns, tokenizer(), name="prompts[0]")


def test_an_image_in_the_assistant_prefix():
    with pytest.raises(PromptError, match="assistant_prefix of the prompt contains <image>"):
        encode_prompt(parse("Hi"), tokenizer(), "<image>")


def test_sharegpt_turns():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    assert turns_from_sharegpt(turns) == [user("Hi"), assistant("Yes")]
    with pytest.raises(PromptError, match="turn 1 is from 'system'"):
        turns_from_sharegpt([{"from": "system", "value": "a"}])
    with pytest.raises(PromptError, match=r"turn 1 has the keys \['role'\]"):
        turns_from_sharegpt([{"role": "user"}])
