"""Answers are parsed independently of the code that writes them, and compared with the scene."""

import random
import re
from collections import Counter

import pytest

from recipes.ovis_tiny import dataset_rows, questions
from recipes.ovis_tiny.languages import LANGUAGES

SHAPES = {
    "circle": "Kreis",
    "square": "Quadrat",
    "triangle": "Dreieck",
    "star": "Stern",
    "cross": "Kreuz",
    "ring": "Ring",
    "heart": "Herz",
    "diamond": "Raute",
}
COLOURS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "lila",
    "orange": "orange",
    "black": "schwarz",
    "pink": "rosa",
}
SIZES = {"big": "groß", "small": "klein"}
NUMBERS = {
    "en": "no one two three four five six".split(),
    "de": "keine eine zwei drei vier fünf sechs".split(),
}
# The row and column of each place.
PLACES = {
    "en": {
        "at the top left": (0, 0),
        "at the top": (0, 1),
        "at the top right": (0, 2),
        "on the left": (1, 0),
        "in the middle": (1, 1),
        "on the right": (1, 2),
        "at the bottom left": (2, 0),
        "at the bottom": (2, 1),
        "at the bottom right": (2, 2),
        "in the left half": "left",
        "in the right half": "right",
    },
    "de": {
        "oben links": (0, 0),
        "oben": (0, 1),
        "oben rechts": (0, 2),
        "links": (1, 0),
        "in der Mitte": (1, 1),
        "rechts": (1, 2),
        "unten links": (2, 0),
        "unten": (2, 1),
        "unten rechts": (2, 2),
        "in der linken Hälfte": "left",
        "in der rechten Hälfte": "right",
    },
}

_ENDINGS = ("", "e", "en", "er", "es")
WORDS = {
    "en": {"shape": {s: s for s in SHAPES}, "colour": {c: c for c in COLOURS}}
    | {"size": {s: s for s in SIZES}},
    "de": {
        "shape": {german: english for english, german in SHAPES.items()},
        "colour": {g + end: e for e, g in COLOURS.items() for end in _ENDINGS},
        "size": {g + end: e for e, g in SIZES.items() for end in _ENDINGS},
    },
}
"""The English word for each form."""


def _slots(language, pattern):
    words = WORDS[language]
    for name in ("shape", "colour", "size"):
        options = "|".join(sorted(words[name], key=len, reverse=True))
        pattern = pattern.replace(f"<{name}>", f"(?P<{name}>{options})")
    places = "|".join(sorted(PLACES[language], key=len, reverse=True))
    pattern = pattern.replace("<place>", f"(?P<place>{places})")
    pattern = pattern.replace("<number>", f"(?P<number>{'|'.join(NUMBERS[language])})")
    return re.compile(pattern, re.IGNORECASE)


ANSWERS = {
    "en": {
        "shape": r"The <colour> shape is an? <shape>\.",
        "colour": r"The <shape> is <colour>\.",
        "count": r"There (is|are) <number> shapes?\.",
        "count_one": r"There (is|are) <number> shapes? in the (?P<nth>first|second) picture\.",
        "count_colour": r"<number> shapes? (is|are) <colour>\.",
        "exists": r"(?P<yes>Yes|No), there is (an?|no) <colour> <shape>\.",
        "where": r"The (<colour> )?<shape> is <place>\.",
        "size": r"The (<colour> )?<shape> is <size>\.",
        "digit": r"The digit is (?P<text>\d)\.",
        "word": r"The word is (?P<text>[A-Z]+)\.",
        "more": r"The (?P<nth>first|second) picture has more shapes\.",
        "same": r"Both pictures have the same number of shapes\.",
        "describe": r"There is (?P<list>.*)\.",
        "follow_up": r"It is (<colour>|<size>|<place>)\.",
    },
    "de": {
        "shape": r"Die <colour> Form ist eine? <shape>\.",
        "colour": r"D(er|ie|as) <shape> ist <colour>\.",
        "count": r"Es gibt <number> Form(en)?\.",
        "count_one": r"Es gibt im (?P<nth>ersten|zweiten) Bild <number> Form(en)?\.",
        "count_colour": r"<number> Form(en)? (ist|sind) <colour>\.",
        "exists": r"(?P<yes>Ja|Nein), es gibt k?ein(en|e)? <colour> <shape>\.",
        "where": r"D(er|ie|as) (<colour> )?<shape> ist <place>\.",
        "size": r"D(er|ie|as) (<colour> )?<shape> ist <size>\.",
        "digit": r"Die Ziffer ist (?P<text>\d)\.",
        "word": r"Das Wort ist (?P<text>[A-Z]+)\.",
        "more": r"Das (?P<nth>erste|zweite) Bild zeigt mehr Formen\.",
        "same": r"Beide Bilder zeigen gleich viele Formen\.",
        "describe": r"Es gibt (?P<list>.*)\.",
        "follow_up": r"(Er|Sie|Es) ist (<colour>|<size>|<place>)\.",
    },
}
PATTERNS = {
    language: {kind: _slots(language, pattern) for kind, pattern in patterns.items()}
    for language, patterns in ANSWERS.items()
}
ITEM = {
    "en": _slots("en", "an? <size> <colour> <shape> <place>"),
    "de": _slots("de", "ein(en|e)? <size> <colour> <shape> <place>"),
}


def parse(answer):
    """The language, kind and facts of an answer about pictures, by the first matching pattern."""
    for language, patterns in PATTERNS.items():
        for kind, pattern in patterns.items():
            if found := pattern.fullmatch(answer):
                return language, kind, _facts(language, found)
    raise AssertionError(f"no known answer: {answer!r}")


def _facts(language, found):
    facts = {name: value for name, value in found.groupdict().items() if value}
    for name in ("shape", "colour", "size"):
        if name in facts:
            facts[name] = WORDS[language][name][facts[name]]
    if "place" in facts:
        facts["place"] = PLACES[language][facts["place"]]
    if "number" in facts:
        facts["number"] = NUMBERS[language].index(facts["number"].lower())
    if "nth" in facts:
        facts["nth"] = 0 if facts["nth"] in ("first", "erste", "ersten") else 1
    if "yes" in facts:
        facts["yes"] = facts["yes"] in ("Yes", "Ja")
    return facts


def mentioned(text, language):
    """The shapes, colours and sizes that a text mentions, in English."""
    words = re.findall(r"\w+", text)
    return {
        name: {forms[word] for word in words if word in forms}
        for name, forms in WORDS[language].items()
    }


def place_of(thing, columns):
    if columns == 3:
        return thing.row, thing.column
    return "left" if thing.column < 3 else "right"


def check(scenes, answer, subject=None):
    """Assert that an answer is true of the scenes; return the thing that it is about, if any."""
    language, kind, facts = parse(answer)
    counts = [len(scene.things) for scene in scenes]
    if kind == "more":
        assert counts[facts["nth"]] > counts[1 - facts["nth"]], answer
        return None
    if kind == "same":
        assert counts[0] == counts[1], answer
        return None
    if kind == "count_one":
        assert counts[facts["nth"]] == facts["number"], answer
        return None
    (scene,) = scenes
    things = scene.things
    if kind in ("digit", "word"):
        assert scene.text == facts["text"], answer
    elif kind == "count":
        assert counts[0] == facts["number"], answer
    elif kind == "count_colour":
        assert sum(t.colour == facts["colour"] for t in things) == facts["number"], answer
    elif kind == "exists":
        pairs = {(t.colour, t.shape) for t in things}
        assert ((facts["colour"], facts["shape"]) in pairs) == facts["yes"], answer
    elif kind == "describe":
        listed = re.split(", | and | und ", facts["list"])
        found = [_facts(language, ITEM[language].fullmatch(item)) for item in listed]
        expected = [
            {
                "size": t.size,
                "colour": t.colour,
                "shape": t.shape,
                "place": place_of(t, scene.columns),
            }
            for t in things
        ]
        if scene.columns > 3:
            expected.sort(key=lambda item: item["place"])
        assert found == expected, answer
    else:
        if kind == "shape":
            about = [t for t in things if t.colour == facts["colour"]]
        elif kind == "colour":
            about = [t for t in things if t.shape == facts["shape"]]
        elif kind == "follow_up":
            about = [subject]
        else:
            about = [
                t
                for t in things
                if t.shape == facts["shape"] and facts.get("colour", t.colour) == t.colour
            ]
        assert len(about) == 1, f"{answer} is about {len(about)} things"
        for name in facts.keys() - {"place"}:
            assert getattr(about[0], name) == facts[name], answer
        if "place" in facts:
            assert place_of(about[0], scene.columns) == facts["place"], answer
        return about[0]
    return None


def turns(row):
    values = [turn["value"] for turn in row.entry["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def check_row(row):
    subject = None
    for question, answer in turns(row):
        language, kind, facts = parse(answer)
        subject = check(row.scenes, answer, subject)
        # A question mentions the properties that the answer repeats, and no others.
        named = {name: set() for name in ("shape", "colour", "size")}
        if kind in ("colour", "where", "size", "exists"):
            named["shape"] = {facts["shape"]}
        if kind in ("shape", "where", "size", "exists", "count_colour") and "colour" in facts:
            named["colour"] = {facts["colour"]}
        found = mentioned(question, language)
        if re.search(r"[Hh]ow big|[Ww]ie groß|big or small|groß oder klein", question):
            found["size"] = set()
        assert found == named, f"{question} {answer}"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in questions.KINDS if kind != "text"])
def test_answers_are_true(kind, language, unseen):
    rng = random.Random(f"{kind} {language} {unseen}")
    for _ in range(60):
        row = dataset_rows.evaluation_row(rng, "test", kind, language, unseen)
        check_row(row)
        answer_language, answer_kind, _ = parse(turns(row)[-1][1])
        assert answer_language == language
        assert {"more": "compare", "same": "compare"}.get(answer_kind, answer_kind) == kind
        assert row.entry["paraphrase"] is unseen


def test_answers_of_training_rows_are_true():
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(600):
        row = dataset_rows.training_row(rng)
        if row.scenes:
            check_row(row)
            kinds.update(parse(answer)[1] for _, answer in turns(row))
        for scene in row.scenes:
            check_row(dataset_rows.description_row(rng, scene))
    assert kinds.keys() == PATTERNS["en"].keys()


def test_answers_about_the_new_colour_are_true():
    rng = random.Random(0)
    for _ in range(100):
        row = dataset_rows.training_row(rng, "pink")
        check_row(row)
        for question, answer in turns(row):
            if parse(answer)[1] != "follow_up":
                assert re.search("pink|rosa", question + answer)


def test_answers_are_balanced():
    rng = random.Random(0)
    found = {
        kind: Counter(
            turns(dataset_rows.evaluation_row(rng, "train", kind, "en", False))[-1][1]
            for _ in range(400)
        )
        for kind in ("exists", "compare", "count", "size")
    }
    yes = sum(n for answer, n in found["exists"].items() if answer.startswith("Yes"))
    assert 160 < yes < 240
    assert all(100 < n < 166 for n in found["compare"].values())
    assert all(found["count"][f"There are {n} shapes."] > 40 for n in NUMBERS["en"][2:6])
    assert found["count"]["There is one shape."] > 40


def test_denials_are_half_true():
    rng = random.Random(0)
    near = 0
    for _ in range(200):
        row = dataset_rows.evaluation_row(rng, "train", "exists", "en", False)
        _, _, facts = parse(turns(row)[0][1])
        (scene,) = row.scenes
        if not facts["yes"]:
            near += any(
                t.shape == facts["shape"] or t.colour == facts["colour"] for t in scene.things
            )
    assert near > 70
