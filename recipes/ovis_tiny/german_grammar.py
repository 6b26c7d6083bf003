"""German words for colours, sizes, places and shapes, with gender, case and endings."""

COLOUR_WORDS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "lila",
    "orange": "orange",
    "black": "schwarz",
    "pink": "rosa",
}
SIZE_WORDS = {"big": "groß", "small": "klein"}
PLACE_WORDS = {
    "top left": "oben links",
    "top": "oben",
    "top right": "oben rechts",
    "left": "links",
    "middle": "in der Mitte",
    "right": "rechts",
    "bottom left": "unten links",
    "bottom": "unten",
    "bottom right": "unten rechts",
    "left half": "in der linken Hälfte",
    "right half": "in der rechten Hälfte",
}

_UNINFLECTED = ("lila", "orange", "rosa")
"""Adjectives without endings."""

_NOUNS = {
    "circle": ("der", "Kreis"),
    "square": ("das", "Quadrat"),
    "triangle": ("das", "Dreieck"),
    "star": ("der", "Stern"),
    "cross": ("das", "Kreuz"),
    "ring": ("der", "Ring"),
    "heart": ("das", "Herz"),
    "diamond": ("die", "Raute"),
}

# Endings after ein and kein, which do not show the gender.
_INDEFINITE_ENDINGS = {"der": "er", "das": "es", "die": "e"}


def inflect_adjective(adjective: str, ending: str) -> str:
    """Add an ending to a German adjective, unless it is never inflected."""
    return adjective if adjective in _UNINFLECTED else adjective + ending


def definite_nominative(shape: str, colour: str = "") -> str:
    """Name a shape in the nominative: der rote Kreis, das rote Quadrat, die rote Raute."""
    article, noun = _NOUNS[shape]
    return _join(article, _inflected_colour(colour, "e"), noun)


def definite_accusative(shape: str, colour: str = "") -> str:
    """Name a shape in the accusative: den roten Kreis, das rote Quadrat, die rote Raute."""
    article, noun = _NOUNS[shape]
    if article == "der":
        return _join("den", _inflected_colour(colour, "en"), noun)
    return definite_nominative(shape, colour)


def indefinite_nominative(shape: str, colour: str = "") -> str:
    """Name a shape in the nominative: ein roter Kreis, ein rotes Quadrat, eine rote Raute."""
    article, noun = _NOUNS[shape]
    return _join(
        "eine" if article == "die" else "ein",
        _inflected_colour(colour, _INDEFINITE_ENDINGS[article]),
        noun,
    )


def indefinite_accusative(shape: str, *adjectives: str) -> str:
    """Name a shape in the accusative: einen roten Kreis, ein rotes Quadrat, eine rote Raute.

    Adjectives are German words. A preceding "k" makes keinen, kein and keine.
    """
    article, noun = _NOUNS[shape]
    article, ending = {"der": ("einen", "en"), "das": ("ein", "es"), "die": ("eine", "e")}[article]
    return _join(article, *[inflect_adjective(adjective, ending) for adjective in adjectives], noun)


def pronoun_nominative(shape: str) -> str:
    """Return the nominative pronoun: er, es or sie."""
    return {"der": "er", "das": "es", "die": "sie"}[_NOUNS[shape][0]]


def pronoun_accusative(shape: str) -> str:
    """Return the accusative pronoun: ihn, es or sie."""
    return {"der": "ihn", "das": "es", "die": "sie"}[_NOUNS[shape][0]]


def _inflected_colour(colour: str, ending: str) -> str:
    return inflect_adjective(COLOUR_WORDS[colour], ending) if colour else ""


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
