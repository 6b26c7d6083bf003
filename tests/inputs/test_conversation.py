import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovis_jax.errors import PromptError
from ovis_jax.inputs.conversation import (
    format_conversation,
    format_prompt,
    from_original,
    place_images,
    read_turns,
)
from ovis_jax.inputs.image import placeholders
from ovis_jax.inputs.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted((GOLDEN / "cases" / "tiny-f32").glob("*.npz"))
CASES = [path for path in CASES if path.stem != "batch_leftpad"]


@functools.cache
def tokenizer():
    return Tokenizer.from_folder(GOLDEN / "tiny-f32")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_ids_and_labels_are_the_original_s(path):
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    prompt = meta["text"] if isinstance(meta["text"], str) else from_original(meta["text"])
    formatted = format_prompt(read_turns(prompt, len(golden["grids"])), tokenizer())
    assert formatted.ids == golden["raw_input_ids"].tolist()
    placed = place_images(formatted, [placeholders(tuple(grid)) for grid in golden["grids"]])
    assert placed.ids == golden["input_ids"].tolist()
    assert placed.labels == golden["labels"].tolist()


def test_a_conversation_spelled_out():
    turns = read_turns([user(" Hi\n"), assistant(" user "), user("model")], 0)
    head = [2, 106, 440, 108, 558, 535, 107, 108]
    answer = [106, 441, 108, 440, 107, 108]
    tail = [106, 440, 108, 441, 107, 108]
    formatted = format_conversation(turns, tokenizer())
    assert formatted.ids == [*head, *answer, *tail]
    # The answer and the mark that ends it are learned, the newline after it is not.
    assert formatted.labels == [*[-100] * 8, -100, -100, -100, 440, 107, -100, *[-100] * 6]
    prompt = format_prompt(turns, tokenizer(), " Hi ")
    assert prompt.ids == [*head, *answer, *tail, 106, 441, 108, 558, 535]
    assert prompt.labels[-5:] == [-100, -100, -100, 558, 535]


contents = st.lists(
    st.sampled_from(["a", " ", "\n", "<image>", "<eos>", "<end_of_turn>", "▁", "图", "the", "\t"]),
    max_size=8,
).map("".join)


@given(st.lists(contents, min_size=1, max_size=4), contents)
def test_turns_are_tokenised_as_in_the_original(texts, preface):
    # The original tokenises each turn as one text, split at "<image>" alone.
    turns = [(user, assistant)[n % 2](text) for n, text in enumerate(texts)]
    expected = [2]
    for turn in turns:
        name = "user" if turn["role"] == "user" else "model"
        text = f"<start_of_turn>{name}\n{turn['content'].strip()}<end_of_turn>\n"
        first, *rest = map(tokenizer().encode, text.split("<image>"))
        expected += first + [i for part in rest for i in [-200, *part]]
    assert format_conversation(turns, tokenizer()).ids == expected
    if turns[-1]["role"] == "user":
        preface = preface.replace("<image>", "")
        expected += tokenizer().encode(f"<start_of_turn>model\n{preface.strip()}")
        assert format_prompt(turns, tokenizer(), preface).ids == expected


def test_safe_reading_leaves_the_template_its_marks():
    turns = read_turns("<end_of_turn><eos>", 0)
    ids = format_prompt(turns, tokenizer(), "<bos>", control=False).ids
    assert ids[:4] == [2, 106, 440, 108]
    assert [i for i in ids if i in tokenizer().special_ids] == [2, 106, 107, 106]
    assert format_prompt(turns, tokenizer()).ids == [
        2,
        106,
        440,
        108,
        107,
        1,
        107,
        108,
        106,
        441,
        108,
    ]


def test_images_stand_first_where_no_place_is_given():
    assert read_turns("Hi", 2) == [user("<image>\n<image>\nHi")]
    assert read_turns("Hi", 0) == [user("Hi")]
    assert read_turns("Hi <image>", 1) == [user("Hi <image>")]
    turns = [user("Hi"), assistant("Yes"), user("And?")]
    assert read_turns(turns, 1) == [user("<image>\nHi"), *turns[1:]]
    assert turns[0] == user("Hi")


def test_images_in_an_answer_are_not_learned():
    turns = read_turns([user("Hi"), assistant("a<image>b")], 1)
    formatted = format_conversation(turns, tokenizer())
    assert formatted.ids[-6:] == [108, 534, -200, 545, 107, 108]
    assert formatted.labels[-6:] == [-100, 534, -100, 545, 107, -100]
    placed = place_images(formatted, [[-301, -300, -302, -305]])
    assert placed.ids[-8:] == [534, -301, -300, -302, -305, 545, 107, 108]
    assert placed.labels[-8:] == [534, -100, -100, -100, -100, 545, 107, -100]


@pytest.mark.parametrize(
    "prompt, num_images, message",
    [
        ("", 0, "prompts.2. is empty"),
        (" \n", 1, "prompts.2. is empty"),
        ([], 0, "prompts.2. has no turns"),
        ([user("Hi"), assistant("a"), user(" ")], 0, "turn 3 of prompts.2. is empty"),
        ([{"role": "system", "content": "a"}], 0, "turn 1 of prompts.2. is a system turn"),
        ([{"role": "human", "content": "a"}], 0, "the role 'human', expected user or assistant"),
        (
            [{"from": "human", "value": "a"}],
            0,
            r"\['from', 'value'\], expected .* role and content",
        ),
        (["Hi"], 0, "turn 1 of prompts.2. is str"),
        ([user(3)], 0, "holds a int, expected a string"),
        ("<image> <image>", 1, "prompts.2. holds <image> 2 times, but 1 image comes"),
        ("<image>", 2, "prompts.2. holds <image> once, but 2 images come"),
        ("<image>", 0, "holds <image> once, but 0 images come"),
        ([assistant("a")], 1, "holds <image> 0 times, but 1 image comes"),
    ],
)
def test_malformed_prompts_are_refused(prompt, num_images, message):
    with pytest.raises(PromptError, match=message):
        read_turns(prompt, num_images, "prompts[2]")


def test_an_answered_conversation_is_no_prompt():
    turns = read_turns([user("Hi"), assistant("Yes")], 0)
    with pytest.raises(PromptError, match="last turn of prompts.0. is the assistant's.*preface"):
        format_prompt(turns, tokenizer(), name="prompts[0]")


def test_an_image_in_the_preface_is_refused():
    with pytest.raises(PromptError, match="preface of the prompt holds <image>"):
        format_prompt(read_turns("Hi", 0), tokenizer(), "<image>")


def test_turns_of_the_original_s_data():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    assert from_original(turns) == [user("Hi"), assistant("Yes")]
    with pytest.raises(PromptError, match="turn 1 is from 'system'"):
        from_original([{"from": "system", "value": "a"}])
    with pytest.raises(PromptError, match=r"turn 1 has the keys \['role'\]"):
        from_original([{"role": "user"}])
