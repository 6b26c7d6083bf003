"""Which part of a model's text is compared, as people grade it and strictly."""

import pytest

from ovis_jax.evaluation.answer_comparison import read_answer, read_answer_strictly

ANIMALS = ("wolf", "A cat", "the black dog", "dog")


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"),
        ("b", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("**D.** dog", "D"),
        ("`D`", "D"),
        ('"D"', "D"),
        ("Answer: A", "A"),
        ("answer: b", "B"),
        ("**Answer:** B", "B"),
        ("Answer: (B)", "B"),
        ("Answer: A WOLF", "A"),
        ("The answer is C.", "C"),
        ("The correct answer is option C", "C"),
        ("So the final answer is **C**.", "C"),
        ("The answer is A because of its tail and its very long grey fur.", "A"),
        ("Option B", "B"),
        ("A WOLF", "A"),
        ("A cat", "B"),
        ("Cat.", "B"),
        ("THE CAT!", "B"),
        ("B cat", "B"),
        ("B: a cat", "B"),
        ("I think it is B", "B"),
        ("It is a black dog, so C", "C"),
        ("It is a cat.", "B"),
        ("It is the black dog.", "C"),
        ("A dog", "D"),
        ("", ""),
        ("E", ""),
        ("A or B?", ""),
        ("A bird", ""),
        ("I see a bird", ""),
        ("B is what I thought first but I am not sure", ""),
        ("It is a wolf or a cat", ""),
        ("catalogue", ""),
        ("Both", ""),
    ],
)
def test_options(text, letter):
    assert read_answer(text, "A", ANIMALS) == letter


@pytest.mark.parametrize("text", ["A", "B.", "(C) x", "D, dog", "WOLF", "a cat.", "A: dog"])
def test_what_the_strict_reading_finds_is_found(text):
    letter = read_answer_strictly(text, "multiple_choice", ANIMALS)
    assert letter and read_answer(text, "A", ANIMALS) == letter


@pytest.mark.parametrize(
    "text", ["b", "**D**", "Answer: A", "The answer is C.", "A WOLF", "It is a cat.", "A cat is"]
)
def test_the_strict_reading_finds_no_option(text):
    assert read_answer_strictly(text, "multiple_choice", ANIMALS) == ""


def test_pronouns_are_not_options():
    assert read_answer("I think it is B", "B", tuple("abcdefghij")) == "B"
    assert read_answer("I", "B", tuple("abcdefghij")) == "I"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Yes, it is.", "yes"),
        ("**Yes**", "yes"),
        ("Answer: no", "no"),
        ("No, there is no dog. Yes?", "no"),
        ("I would say yes", "yes"),
        ("There is no dog", "no"),
        ("Maybe", ""),
        ("It is yes or no", ""),
        ("Nothing", ""),
    ],
)
@pytest.mark.parametrize("expected", ["Yes", "no."])
def test_yes_or_no(text, answer, expected):
    assert read_answer(text, expected, ()) == answer


@pytest.mark.parametrize("text", ["C", "c", "C.", "**C**", "(C)", "C) a cat", "The answer is C."])
def test_a_letter_without_options(text):
    assert read_answer(text, "C", ()) == read_answer("C", "C", ()) == "C"


@pytest.mark.parametrize(
    "text",
    ["WOLF", "wolf.", "A wolf", "The wolf!", "**Wolf**", "Answer: wolf", "The answer is a wolf."],
)
def test_texts(text):
    assert read_answer(text, "Wolf", ()) == "wolf"
    assert read_answer_strictly(text, "text", ()) == text


@pytest.mark.parametrize("text", ["wolves", "the", "A", "!", "a wolf in the snow", "wolf cub"])
def test_other_texts_differ_and_do_not_become_empty(text):
    assert read_answer(text, "wolf", ()) not in ("wolf", "")
