"""The facts of questions are true of their scenes; `test_languages.py` checks their wording."""

import random
from collections import Counter

import pytest

from recipes.ovis_tiny import dataset_rows, questions
from recipes.ovis_tiny.languages import LANGUAGES, phrase_question

PICTURE_KINDS = [kind for kind in questions.KINDS if kind != "text"]


@pytest.fixture
def asked(monkeypatch):
    """The questions of the rows that a test makes, including the first one of a follow-up."""
    found = []

    def record(question, *arguments, **options):
        found.extend([question.first] if question.first else [])
        found.append(question)
        return phrase_question(question, *arguments, **options)

    monkeypatch.setattr(dataset_rows, "phrase_question", record)
    return found


def place_of(thing, columns):
    if columns == 3:
        rows = (("top ", "", "bottom ")[thing.row], ("left", "", "right")[thing.column])
        return "".join(rows).strip() or "middle"
    return "left half" if thing.column < 3 else "right half"


def subject_of(question, things):
    """The only thing with the shape and colour that a question names."""
    if question.kind == "follow_up":
        question = question.first
    (thing,) = (
        t
        for t in things
        if (question.kind == "shape" or t.shape == question.shape)
        and (question.kind == "colour" or question.colour in ("", t.colour))
    )
    return thing


def check(question, scenes):
    """Assert that the answer to a question is true of the scenes."""
    counts = [len(scene.things) for scene in scenes]
    if question.kind == "compare":
        first, second = counts
        assert question.number == (0 if first == second else 1 if first > second else 2)
        return
    if question.kind == "count_one":
        assert question.number == counts[("first", "second").index(question.asked)]
        return
    (scene,) = scenes
    things = scene.things
    if question.kind in ("digit", "word"):
        assert question.text == getattr(scene, question.kind) != ""
    elif question.kind == "count":
        assert question.number == len(things)
    elif question.kind == "count_colour":
        assert question.number == sum(t.colour == question.colour for t in things)
    elif question.kind == "exists":
        pairs = {(t.shape, t.colour) for t in things}
        assert question.yes == ((question.shape, question.colour) in pairs)
    elif question.kind == "describe":
        expected = [(thing, place_of(thing, scene.columns)) for thing in things]
        if scene.columns > 3:
            expected.sort(key=lambda pair: pair[1])
        assert list(question.things) == expected
    else:
        thing = subject_of(question, things)
        facts = vars(thing) | {"place": place_of(thing, scene.columns)}
        for name in ("shape", "colour", "size", "place"):
            assert getattr(question, name) in ("", facts[name]), name
        if question.kind == "follow_up":
            assert getattr(question, question.asked) and not getattr(question.first, question.asked)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_answers_are_true(kind, language, asked):
    rng = random.Random(f"{kind} {language}")
    for _ in range(60):
        asked.clear()
        row = dataset_rows.evaluation_row(rng, "test", kind, language, unseen=True)
        assert asked[-1].kind == row.entry["kind"] == kind
        assert row.entry["metadata"]["paraphrase"]
        for question in asked:
            check(question, row.scenes)


def test_answers_of_training_rows_are_true(asked):
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(600):
        asked.clear()
        row = dataset_rows.training_row(rng)
        if row.scenes:
            for question in asked:
                check(question, row.scenes)
            kinds.update(question.kind for question in asked)
        for scene in row.scenes:
            asked.clear()
            dataset_rows.description_row(rng, scene)
            for question in asked:
                check(question, [scene])
    assert kinds.keys() == {*PICTURE_KINDS, "count_one"}


def test_answers_about_the_new_colour_are_true(asked):
    rng = random.Random(0)
    for _ in range(100):
        asked.clear()
        row = dataset_rows.training_row(rng, "pink")
        for question in asked:
            check(question, row.scenes)
            if question.kind not in ("follow_up", "describe"):
                assert question.colour == "pink"


def test_answers_are_balanced():
    rng = random.Random(0)
    found = {
        kind: Counter(
            dataset_rows.evaluation_row(rng, "train", kind, "en", False).entry["conversations"][-1][
                "value"
            ]
            for _ in range(400)
        )
        for kind in ("exists", "compare", "count")
    }
    yes = sum(n for answer, n in found["exists"].items() if answer.startswith("Yes"))
    assert 160 < yes < 240
    assert all(100 < n < 166 for n in found["compare"].values())
    numbers = ("There are two", "There are three", "There are four", "There are five")
    assert all(found["count"][f"{number} shapes."] > 40 for number in numbers)
    assert found["count"]["There is one shape."] > 40


def test_denials_are_half_true(asked):
    rng = random.Random(0)
    near = 0
    for _ in range(200):
        (scene,) = dataset_rows.evaluation_row(rng, "train", "exists", "en", False).scenes
        question = asked[-1]
        if not question.yes:
            near += any(
                t.shape == question.shape or t.colour == question.colour for t in scene.things
            )
    assert near > 70
