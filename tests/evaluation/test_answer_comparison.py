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
        ("A, B", ""),
        ("A, B and C", ""),
        ("A. wolf B. cat C. the black dog D. dog", ""),
        ("(A) or (B)", ""),
        ("The answer is A or B.", ""),
        ("The answer is B/C", ""),
        ("B. A cat", "B"),
        ("B. A dog is smaller than I thought.", "B"),
        ("The answer is C, not D.", "C"),
        ("C. The line from A to B is black.", "C"),
        ("Not B", ""),
        ("The answer is not B.", ""),
        ("B is not correct", ""),
        ("It isn't C", ""),
        ("No, it is B", "B"),
        ("There is no wolf, so B", "B"),
        ("It is not a cat.", ""),
        ("There is no wolf.", ""),
        ("A cat is not visible", ""),
        ("No, it is a cat.", "B"),
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


@pytest.mark.parametrize(
    "options, text, letter",
    [
        (("5 cups", "50 cups"), "It is 2.5 cups", ""),
        (("5 cups", "50 cups"), "It is -5 cups", ""),
        (("5 cups", "50 cups"), "It is 1/5 cups", ""),
        (("5 cups", "50 cups"), "It is 50 cups.", "B"),
        (("5", "-5"), "The answer is -5.", "B"),
        (("C++", "C#", "C", "Java"), "C++", "A"),
        (("P.M.", "A.M."), "A.M.", "B"),
        (("Hepatitis B", "Hepatitis A"), "It is hepatitis A", "B"),
        (("Hepatitis B", "Hepatitis A"), "B. Hepatitis A", "B"),
        (("visible", "not visible"), "It is not visible.", "B"),
        (("visible", "hidden"), "It is not visible.", ""),
        (("Yes", "No"), "No, it is not.", "B"),
        (("Yes", "No"), "Yes or no", ""),
    ],
)
def test_options_that_contain_each_other_letters_or_signs(options, text, letter):
    assert read_answer(text, "A", options) == letter


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
        ("Yes or no", ""),
        ("Yes/No", ""),
        ("**Yes** or **No**", ""),
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


@pytest.mark.parametrize(
    "text, expected",
    [("-5", "5"), ("Answer: -5", "5"), ("The answer is $5", "5"), ("2*3", "23"), ("a__b", "ab")],
)
def test_signs_matter(text, expected):
    assert read_answer(text, expected, ()) != read_answer(expected, expected, ())
    sign = text.rpartition(" ")[2]
    assert read_answer(text, sign, ()) == read_answer(sign, sign, ()) == sign
