"""Question files: parsing, prompts, and which answers are correct."""

import json

import pytest

from ovis_jax.errors import DataError
from ovis_jax.evaluation.batch_answering import Accuracy
from ovis_jax.evaluation.evaluate import accuracy_table
from ovis_jax.evaluation.published_prompts_and_scores import load_published_benchmarks
from ovis_jax.evaluation.questions import read_questions

CHOICES = ["A heart", "A star.", "No shape"]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name: str = "some.jsonl"):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return write


def test_prompts_are_the_published_ones(write):
    """Word for word: SPEC section 8, and the class Ovis1_6 of VLMEvalKit."""
    path = write(
        {"question": "Which?", "choices": CHOICES, "answer": "B", "hint": "Look."},
        {"question": "Is it red?", "answer": "Yes"},
        {"question": "What {is} it?", "answer": "A star."},
    )
    asked = [q.prompt[0]["content"] for q in read_questions(path)]
    assert asked == [
        "Look.\nWhich?\nA. A heart\nB. A star.\nC. No shape"
        "\nAnswer with the option's letter from the given choices directly.",
        "Is it red?\nAnswer the question using a single word or phrase.",
        "What {is} it?",
    ]
    plain = [q.prompt[0]["content"] for q in read_questions(path, raw_prompts=True)]
    assert plain == ["Which?", "Is it red?", "What {is} it?"]


@pytest.mark.parametrize("answer", ["B", 1, "A star."])
def test_the_answer_to_options(write, answer):
    """As a letter, a number or a text; compared with what a model's text names."""
    path = write({"question": "Which?", "choices": CHOICES, "answer": answer})
    (question,) = read_questions(path)
    assert question.expected == "B"
    for text in ("B", "B.", " (B) the star", "B: A star", "a star"):
        assert question.is_correct(text, strict=True) and question.is_correct(text), text
    for text in ("A", "C. A star", "Both", "", "D"):
        assert not question.is_correct(text, strict=True) and not question.is_correct(text), text
    for text in ("A star is there", "b", "**B**", "Answer: B", "The answer is B.", "THE STAR"):
        assert not question.is_correct(text, strict=True) and question.is_correct(text), text
    assert question.parse_answer("A heart is there", strict=True) == ""
    assert question.parse_answer("A heart is there") == "A"


def test_other_answers(write):
    yes, text = read_questions(
        write({"question": "Is it?", "answer": "Yes"}, {"question": "What?", "answer": "A star."})
    )
    for strict in (True, False):
        assert all(yes.is_correct(said, strict=strict) for said in ("yes", "Yes.", " YES"))
        assert not yes.is_correct("No", strict=strict)
        assert yes.is_correct("Yes, it is", strict=strict) == (not strict)
        assert text.is_correct(" A star.\n", strict=strict)
        assert text.is_correct("a STAR", strict=strict) == (not strict)
        assert not text.is_correct("A heart.", strict=strict)


@pytest.mark.parametrize("choices", [CHOICES, dict(zip("ABC", CHOICES, strict=True))])
@pytest.mark.parametrize("key", ["choices", "options"])
def test_spellings_of_options(write, choices, key):
    (question,) = read_questions(write({"question": "Which?", key: choices, "answer": "A star."}))
    assert (question.options, question.expected) == (tuple(CHOICES), "B")
    assert question.prompt[0]["content"].startswith("Which?\nA. A heart\nB. A star.")


def test_empty_hints_and_options_are_ignored(write):
    """Exported tables give every row all keys."""
    row = {"question": "What?", "answer": "It", "hint": "", "choices": [], "image": ""}
    (question,) = read_questions(write(row))
    assert (question.options, question.answer_type, question.row.images) == ((), "text", ())
    assert question.prompt[0]["content"] == "What?"
    (question,) = read_questions(write(row | {"options": ["It", "Me"]}))
    assert (question.options, question.expected) == (("It", "Me"), "A")


def test_images_and_messages(write, golden):
    """Both were read as rows without images."""
    image = str(golden / "images/tiny.png")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A star."}]
    path = write(
        {"images": [image], "question": "What?", "answer": "It", "image": None},
        {"images": [image], "messages": turns},
    )
    assert [question.row.images for question in read_questions(path)] == [(image,), (image,)]
    path = write({"image": "tiny.png", "question": "What?", "answer": "It"})
    (question,) = read_questions(path, images=golden / "images")
    assert question.row.images == (image,)


def test_a_folder_and_conversations(write, golden, tmp_path):
    image = str(golden / "images/tiny.png")
    turns = ["What?", "A star.", "And now?", "A heart."]
    said = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(turns)]
    write({"image": image, "conversations": said, "kind": "talk", "id": "x"}, name="b.jsonl")
    write({"image": [image], "question": "What?", "answer": "It"}, name="a.jsonl")
    first, second = read_questions(tmp_path)
    assert (first.id, first.row.kind, first.row.images) == ("a-1", "a", (image,))
    assert (second.id, second.row.kind, second.expected) == ("x", "talk", "A heart.")
    assert [turn["content"] for turn in second.prompt] == ["<image>\nWhat?", *turns[1:3]]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ([1], "type list"),
        ({"answer": "A"}, "question is missing"),
        ({"question": "  ", "answer": "A"}, "question is '  '"),
        ({"question": "What?"}, "answer is missing"),
        ({"question": "What?", "choices": "AB", "answer": "A"}, "choices is 'AB'"),
        ({"question": "What?", "choices": ["x"], "answer": "A"}, "choices has 1"),
        ({"question": "What?", "choices": ["x", "y"], "answer": "C"}, "answer is 'C'"),
        ({"question": "What?", "choices": ["x", "y"], "answer": True}, "answer is True"),
        ({"question": "What?", "answer": "A", "image": 3}, "image is 3"),
        ({"question": "What?", "answer": "A", "video": "a.mp4"}, "the key 'video' is unknown"),
        ({"question": "What?", "answer": "A", "A": "cat", "B": "dog"}, "the key 'A' is unknown"),
        ({"question": "What?", "answers": ["A"]}, "the key 'answers' is unknown"),
        ({"question": "What?", "choices": ["x", "y"], "options": ["x", "y"]}, "both have a value"),
        ({"question": "What?", "options": {"A": "x", "C": "y"}, "answer": "A"}, "options is {"),
        (
            {"question": "What?", "answer": "A", "image": "none.png"},
            "none.png', which is not a file",
        ),
        ({"question": "What?", "answer": "A", "id": "one"}, "id is 'one', as in .*row 1"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "gpt"),
    ],
)
def test_bad_rows(write, row, message):
    path = write({"question": "What?", "answer": "It", "id": "one"}, row)
    with pytest.raises(DataError, match=f"some.jsonl: row 2: .*{message}"):
        read_questions(path)


def test_nothing_to_read(write, tmp_path):
    with pytest.raises(DataError, match="has no file whose name ends with .jsonl"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match="no questions"):
        read_questions(write(""))
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"row 1: not JSON.* \(and 1 more invalid row\)"):
        read_questions(write("{", "{"))


def test_published_scores_are_shown_for_known_benchmarks():
    published = load_published_benchmarks()
    for name in ("MMBench_DEV_EN_V11", "mmbench-1.1"):
        assert published.find_benchmark(name) == "MMBench-1.1"
    assert published.find_benchmark("shape") is None
    (scores,) = published.scores.values()
    mean = sum(scores.values()) / len(scores)
    assert mean == pytest.approx(published.average_scores["Ovis1.6-Gemma2-9B"], abs=0.05)
    assert set(published.aliases) | set(published.metric_notes) <= set(scores)
    table = accuracy_table({"AI2D_TEST": Accuracy(3, 4), "mine": Accuracy(1, 2)})
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["AI2D_TEST", "mine", "all"]
    assert cells[3] == ["75.0%", "50.0%", "66.7%"]
    assert cells[4] == ["84.4%", "", ""]
    assert len(accuracy_table({"mine": Accuracy(1, 2)}).columns) == 4
