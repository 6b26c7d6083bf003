"""Simple facts, sums and greetings in German."""

from recipes.ovis_tiny import german
from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.small_talk import Topic, sum_entries, topic_entries

TOPICS = {
    "sum": Topic(
        Phrasings(
            (
                "Was ist {x} plus {y}?",
                "Wie viel ist {x} plus {y}?",
                "Was ergibt {x} plus {y}?",
                "Addiere {x} und {y}.",
                "Wie viel ist {x} und {y}?",
                "Sag mir, was {x} plus {y} ist.",
            ),
            ("Wie viel ergibt {x} plus {y}?", "Sag mir, wie viel {x} plus {y} ist."),
        ),
        "{x} plus {y} ist {z}.",
        "{z}.",
        sum_entries(german.NUMBERS),
    ),
    "opposite": Topic(
        Phrasings(
            (
                "Was ist das Gegenteil von {x}?",
                "Nenne das Gegenteil von {x}.",
                "Welches Wort ist das Gegenteil von {x}?",
                "Was ist das Gegenteil des Wortes {x}?",
                "Sag mir das Gegenteil von {x}.",
                "Das Gegenteil von {x}, bitte.",
            ),
            ("Kannst du mir das Gegenteil von {x} sagen?", "Nenne das Gegenteil des Wortes {x}."),
        ),
        "Das Gegenteil von {x} ist {y}.",
        "{y}.",
        topic_entries(
            "opposite",
            "heiß/kalt, alt/jung, lang/kurz, Tag/Nacht, schnell/langsam, hell/dunkel, voll/leer, "
            "reich/arm, laut/leise, nass/trocken, dick/dünn, hoch/tief",
        ),
    ),
    "next_day": Topic(
        Phrasings(
            (
                "Welcher Tag kommt nach {x}?",
                "Was für ein Tag kommt nach {x}?",
                "Was ist der Tag nach {x}?",
                "Welcher Tag ist nach {x}?",
                "Nenne den Tag nach {x}.",
                "Sag mir, welcher Tag nach {x} kommt.",
            ),
            ("Was für ein Tag ist nach {x}?", "Sag mir, was der Tag nach {x} ist."),
        ),
        "Nach {x} kommt {y}.",
        "{y}.",
        topic_entries(
            "next_day",
            "Montag/Dienstag, Dienstag/Mittwoch, Mittwoch/Donnerstag, Donnerstag/Freitag, "
            "Freitag/Samstag, Samstag/Sonntag, Sonntag/Montag",
        ),
    ),
    "legs": Topic(
        Phrasings(
            (
                "Wie viele Beine hat {x}?",
                "Auf wie vielen Beinen geht {x}?",
                "Sag mir, wie viele Beine {x} hat.",
                "Kannst du sagen, wie viele Beine {x} hat?",
                "Was ist die Anzahl der Beine, die {x} hat?",
                "Nenne die Anzahl der Beine, die {x} hat.",
            ),
            ("Kannst du mir sagen, wie viele Beine {x} hat?", "Und wie viele Beine hat {x}?"),
        ),
        "{x} hat {y} Beine.",
        "{y}.",
        topic_entries(
            "legs",
            "ein Hund/vier, ein Vogel/zwei, eine Spinne/acht, eine Ameise/sechs, ein Pferd/vier, "
            "eine Katze/vier",
        ),
    ),
    "colour": Topic(
        Phrasings(
            (
                "Welche Farbe hat {x}?",
                "Was für eine Farbe hat {x}?",
                "Sag mir, welche Farbe {x} hat.",
                "Nenne die Farbe, die {x} hat.",
                "Bitte sag mir, welche Farbe {x} hat.",
                "Was ist die Farbe, die {x} hat?",
            ),
            ("Kannst du mir sagen, welche Farbe {x} hat?", "Bitte nenne die Farbe, die {x} hat."),
        ),
        "{x} ist {y}.",
        "{y}.",
        topic_entries(
            "colour",
            "der Himmel/blau, das Gras/grün, der Schnee/weiß, die Kohle/schwarz, "
            "die Banane/gelb, die Tomate/rot",
        ),
    ),
    "hello": Topic(
        Phrasings(
            (
                "Hallo!",
                "Guten Tag!",
                "Hallo, Ovis!",
                "Hallo, guten Tag!",
                "Hallo, wie geht es dir?",
                "Guten Tag, Ovis!",
            ),
            ("Hallo, guten Tag, Ovis!", "Guten Tag, wie geht es dir?"),
        ),
        "Hallo! Wie kann ich dir helfen?",
        "Hallo!",
        {"": ""},
    ),
    "morning": Topic(
        Phrasings(
            (
                "Guten Morgen!",
                "Guten Morgen, Ovis!",
                "Hallo, guten Morgen!",
                "Einen guten Morgen!",
                "Guten Morgen, wie geht es dir?",
                "Ich sage guten Morgen!",
            ),
            ("Hallo, guten Morgen, Ovis!", "Einen guten Morgen, Ovis!"),
        ),
        "Guten Morgen! Wie kann ich dir helfen?",
        "Guten Morgen!",
        {"": ""},
    ),
    "bye": Topic(
        Phrasings(
            (
                "Auf Wiedersehen!",
                "Tschüss!",
                "Auf Wiedersehen, Ovis!",
                "Tschüss, Ovis!",
                "Tschüss, bis morgen!",
                "Bis morgen!",
            ),
            ("Auf Wiedersehen, bis morgen!", "Bis morgen, Ovis!"),
        ),
        "Auf Wiedersehen!",
        "Tschüss!",
        {"": ""},
    ),
    "thanks": Topic(
        Phrasings(
            (
                "Danke!",
                "Vielen Dank!",
                "Danke, Ovis!",
                "Vielen Dank, Ovis!",
                "Vielen Dank für deine Hilfe!",
                "Danke, das war gut!",
            ),
            ("Danke für deine Hilfe!", "Vielen Dank, das war gut!"),
        ),
        "Gern geschehen!",
        "Gern!",
        {"": ""},
    ),
    "who": Topic(
        Phrasings(
            (
                "Wer bist du?",
                "Wie heißt du?",
                "Was ist dein Name?",
                "Sag mir, wer du bist.",
                "Nenne deinen Namen.",
                "Sag mir, wie du heißt.",
            ),
            ("Kannst du mir sagen, wer du bist?", "Bitte sag mir, wie du heißt."),
        ),
        "Ich bin Ovis, ein kleines Modell, das Bilder ansieht.",
        "Ich bin Ovis.",
        {"": ""},
    ),
}
