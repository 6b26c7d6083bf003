import random
import re
import string

import pytest

from recipes.ovis_tiny import german_grammar, questions
from recipes.ovis_tiny.languages import LANGUAGES, phrase_question
from recipes.ovis_tiny.questions import TOPICS, Question
from recipes.ovis_tiny.scenes import COLOURS, Thing


def phrasings(language):
    yield from LANGUAGES[language].phrases.items()
    for topic, entry in LANGUAGES[language].topics.items():
        yield f"text {topic}", entry.phrasings


def words(phrases):
    return set(re.findall(r"\w+", " ".join(phrases).lower()))


SLOTS = {"shape": "colour", "count_colour": "colour", "exists": "a"} | dict.fromkeys(
    ("colour", "where", "size"), "the"
)
"""The slot of each kind of question that names a thing or a colour."""


@pytest.mark.parametrize("language", LANGUAGES)
def test_unseen_phrasings_are_new_but_their_words_are_not(language):
    learned = words(phrase for _, entry in phrasings(language) for phrase in entry.seen)
    seen = {phrase for _, entry in phrasings(language) for phrase in entry.seen}
    for name, entry in phrasings(language):
        if name in ("count_one", "echo"):
            continue
        assert len(set(entry.seen)) >= 6 and len(set(entry.unseen)) == 2, name
        assert not seen & set(entry.unseen), name
        assert words(entry.unseen) <= learned, name
        slots = [
            sorted(slot for _, slot, _, _ in string.Formatter().parse(phrase) if slot)
            for phrase in (*entry.seen, *entry.unseen)
        ]
        # Every phrasing has the same slots, in one of their forms.
        (found,) = {tuple(re.sub("_.*", "", slot) for slot in each) for each in slots}
        if name in questions.PICTURE_KINDS:
            assert found == ((SLOTS[name],) if name in SLOTS else ()), name


def test_languages_have_the_same_questions():
    english, german = LANGUAGES["en"], LANGUAGES["de"]
    assert english.phrases.keys() == german.phrases.keys()
    assert english.topics.keys() == german.topics.keys() == TOPICS.keys()
    for topic, texts in TOPICS.items():
        assert [*english.topics[topic].entries] == [*german.topics[topic].entries] == [*texts]
    kinds = {phrasing.split()[0] for phrasing in english.phrases} | {"text"}
    assert kinds == {*questions.KINDS, "count_one", "echo"}


def test_the_seed_determines_the_phrasing():
    question = Question("shape", shape="star", colour="red")
    said = [
        [phrase_question(question, "de", random.Random(seed)) for seed in range(30)]
        for _ in range(2)
    ]
    assert said[0] == said[1]
    assert len({each.question for ((each,),) in zip(said[0], strict=True)}) > 5


@pytest.mark.parametrize(
    "shape, forms",
    [
        ("circle", "der rote Kreis, den roten Kreis, ein roter Kreis, einen roten Kreis, er, ihn"),
        ("star", "der rote Stern, den roten Stern, ein roter Stern, einen roten Stern, er, ihn"),
        ("ring", "der rote Ring, den roten Ring, ein roter Ring, einen roten Ring, er, ihn"),
        (
            "square",
            "das rote Quadrat, das rote Quadrat, ein rotes Quadrat, ein rotes Quadrat, es, es",
        ),
        (
            "triangle",
            "das rote Dreieck, das rote Dreieck, ein rotes Dreieck, ein rotes Dreieck, es, es",
        ),
        ("cross", "das rote Kreuz, das rote Kreuz, ein rotes Kreuz, ein rotes Kreuz, es, es"),
        ("heart", "das rote Herz, das rote Herz, ein rotes Herz, ein rotes Herz, es, es"),
        ("diamond", "die rote Raute, die rote Raute, eine rote Raute, eine rote Raute, sie, sie"),
    ],
)
def test_german_shapes(shape, forms):
    assert forms.split(", ") == [
        german_grammar.definite_nominative(shape, "red"),
        german_grammar.definite_accusative(shape, "red"),
        german_grammar.indefinite_nominative(shape, "red"),
        german_grammar.indefinite_accusative(shape, "rot"),
        german_grammar.pronoun_nominative(shape),
        german_grammar.pronoun_accusative(shape),
    ]


def test_some_german_colours_have_no_endings():
    assert german_grammar.definite_accusative("circle", "purple") == "den lila Kreis"
    assert german_grammar.indefinite_nominative("square", "orange") == "ein orange Quadrat"
    assert german_grammar.indefinite_nominative("ring", "pink") == "ein rosa Ring"
    assert german_grammar.indefinite_nominative("ring") == "ein Ring"


THINGS = (
    (Thing("circle", "orange", "big", 0, 0), "top left"),
    (Thing("square", "black", "small", 0, 2), "top right"),
    (Thing("diamond", "green", "small", 1, 1), "middle"),
)


@pytest.mark.parametrize(
    "question, english, german",
    [
        (
            Question("shape", shape="circle", colour="orange"),
            ("The orange shape is a circle.", "A circle."),
            ("Die orange Form ist ein Kreis.", "Ein Kreis."),
        ),
        (
            Question("colour", shape="diamond", colour="blue"),
            ("The diamond is blue.", "Blue."),
            ("Die Raute ist blau.", "Blau."),
        ),
        (
            Question("count", number=1),
            ("There is one shape.", "One."),
            ("Es gibt eine Form.", "Eine."),
        ),
        (
            Question("count", number=3),
            ("There are three shapes.", "Three."),
            ("Es gibt drei Formen.", "Drei."),
        ),
        (
            Question("count_one", "second", number=1),
            ("There is one shape in the second picture.", "One."),
            ("Es gibt im zweiten Bild eine Form.", "Eine."),
        ),
        (
            Question("count_colour", colour="red"),
            ("No shape is red.", "None."),
            ("Keine Form ist rot.", "Keine."),
        ),
        (
            Question("count_colour", colour="red", number=1),
            ("One shape is red.", "One."),
            ("Eine Form ist rot.", "Eine."),
        ),
        (
            Question("count_colour", colour="red", number=2),
            ("Two shapes are red.", "Two."),
            ("Zwei Formen sind rot.", "Zwei."),
        ),
        (
            Question("exists", shape="star", colour="orange", yes=True),
            ("Yes, there is an orange star.", "Yes."),
            ("Ja, es gibt einen orange Stern.", "Ja."),
        ),
        (
            Question("exists", shape="diamond", colour="green"),
            ("No, there is no green diamond.", "No."),
            ("Nein, es gibt keine grüne Raute.", "Nein."),
        ),
        (
            Question("where", shape="heart", colour="red", place="top"),
            ("The red heart is at the top.", "At the top."),
            ("Das rote Herz ist oben.", "Oben."),
        ),
        (
            Question("where", shape="heart", place="left half"),
            ("The heart is in the left half.", "In the left half."),
            ("Das Herz ist in der linken Hälfte.", "In der linken Hälfte."),
        ),
        (
            Question("size", shape="star", size="big"),
            ("The star is big.", "Big."),
            ("Der Stern ist groß.", "Groß."),
        ),
        (
            Question("digit", text="7"),
            ("The digit is 7.", "7."),
            ("Die Ziffer ist 7.", "7."),
        ),
        (
            Question("word", text="TREE"),
            ("The word is TREE.", "TREE."),
            ("Das Wort ist TREE.", "TREE."),
        ),
        (
            Question("compare", number=2),
            ("The second picture has more shapes.", "The second."),
            ("Das zweite Bild zeigt mehr Formen.", "Das zweite."),
        ),
        (
            Question("compare", number=0),
            ("Both pictures have the same number of shapes.", "Both."),
            ("Beide Bilder zeigen gleich viele Formen.", "Beide."),
        ),
        (
            Question("describe", things=THINGS),
            (
                "There is a big orange circle at the top left, a small black square at the top "
                "right and a small green diamond in the middle.",
                "An orange circle, a black square and a green diamond.",
            ),
            (
                "Es gibt einen großen orange Kreis oben links, ein kleines schwarzes Quadrat oben "
                "rechts und eine kleine grüne Raute in der Mitte.",
                "Ein orange Kreis, ein schwarzes Quadrat und eine grüne Raute.",
            ),
        ),
        (
            Question("describe", things=THINGS[:1]),
            ("There is a big orange circle at the top left.", "An orange circle."),
            ("Es gibt einen großen orange Kreis oben links.", "Ein orange Kreis."),
        ),
        (
            Question("text", "sum", text="3 4"),
            ("Three plus four is seven.", "Seven."),
            ("Drei plus vier ist sieben.", "Sieben."),
        ),
        (
            Question("text", "legs", text="ant"),
            ("An ant has six legs.", "Six."),
            ("Eine Ameise hat sechs Beine.", "Sechs."),
        ),
        (
            Question("text", "next_day", text="sunday"),
            ("After Sunday comes Monday.", "Monday."),
            ("Nach Sonntag kommt Montag.", "Montag."),
        ),
        (Question("echo", text="bluk"), ("bluk.", "bluk."), ("bluk.", "bluk.")),
    ],
    ids=lambda value: f"{value.kind} {value.text}" if isinstance(value, Question) else "",
)
def test_answers(question, english, german):
    for language, expected in (("en", english), ("de", german)):
        (said,) = phrase_question(question, language, random.Random(0))
        assert (said.answer, said.short_answer) == expected
        if question.kind == "colour":  # the question must not contain its answer
            assert not re.search("blue|blau", said.question)


@pytest.mark.parametrize(
    "place, english, german",
    [
        ("top left", "at the top left", "oben links"),
        ("top", "at the top", "oben"),
        ("top right", "at the top right", "oben rechts"),
        ("left", "on the left", "links"),
        ("middle", "in the middle", "in der Mitte"),
        ("right", "on the right", "rechts"),
        ("bottom left", "at the bottom left", "unten links"),
        ("bottom", "at the bottom", "unten"),
        ("bottom right", "at the bottom right", "unten rechts"),
        ("left half", "in the left half", "in der linken Hälfte"),
        ("right half", "in the right half", "in der rechten Hälfte"),
    ],
)
def test_places(place, english, german):
    question = Question("where", shape="heart", place=place)
    for language, answer in (("en", f"The heart is {english}."), ("de", f"Das Herz ist {german}.")):
        assert phrase_question(question, language, random.Random(0))[0].answer == answer


def test_german_words():
    colours = "rot grün blau gelb lila orange schwarz rosa".split()
    assert german_grammar.COLOUR_WORDS == dict(zip((*COLOURS, "pink"), colours, strict=True))
    assert german_grammar.SIZE_WORDS == {"big": "groß", "small": "klein"}


def test_a_follow_up_refers_to_the_previous_answer():
    first = Question("shape", shape="diamond", colour="red")
    follow_up = Question("follow_up", "place", shape="diamond", place="bottom", first=first)
    before, said = phrase_question(follow_up, "de", random.Random(0))
    assert before.answer == "Die rote Form ist eine Raute."
    assert re.search(r"\bsie\b", said.question)
    assert (said.answer, said.short_answer) == ("Sie ist unten.", "Unten.")
    _, said = phrase_question(follow_up, "en", random.Random(0))
    assert (said.answer, said.short_answer) == ("It is at the bottom.", "At the bottom.")
