"""Simple facts, sums and greetings in English."""

from recipes.ovis_tiny import english
from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.small_talk import Topic, sum_entries, topic_entries

TOPICS = {
    "sum": Topic(
        Phrasings(
            (
                "What is {x} plus {y}?",
                "How much is {x} plus {y}?",
                "What is {x} and {y}?",
                "Add {x} and {y}.",
                "Can you add {x} and {y}?",
                "Tell me what {x} plus {y} is.",
            ),
            ("How much is {x} and {y}?", "Tell me how much {x} plus {y} is."),
        ),
        "{x} plus {y} is {z}.",
        "{z}.",
        sum_entries(english.NUMBERS),
    ),
    "opposite": Topic(
        Phrasings(
            (
                "What is the opposite of {x}?",
                "Name the opposite of {x}.",
                "Which word is the opposite of {x}?",
                "What is the opposite of the word {x}?",
                "Tell me the opposite of {x}.",
                "The opposite of {x}, please.",
            ),
            ("Can you tell me the opposite of {x}?", "Name the opposite of the word {x}."),
        ),
        "The opposite of {x} is {y}.",
        "{y}.",
        topic_entries(
            "opposite",
            "hot/cold, old/young, long/short, day/night, fast/slow, light/dark, full/empty, "
            "rich/poor, loud/quiet, wet/dry, thick/thin, high/low",
        ),
    ),
    "next_day": Topic(
        Phrasings(
            (
                "Which day comes after {x}?",
                "What day comes after {x}?",
                "What is the day after {x}?",
                "Which day is after {x}?",
                "Name the day after {x}.",
                "Tell me which day comes after {x}.",
            ),
            ("What day is after {x}?", "Can you name the day after {x}?"),
        ),
        "After {x} comes {y}.",
        "{y}.",
        topic_entries(
            "next_day",
            "Monday/Tuesday, Tuesday/Wednesday, Wednesday/Thursday, Thursday/Friday, "
            "Friday/Saturday, Saturday/Sunday, Sunday/Monday",
        ),
    ),
    "legs": Topic(
        Phrasings(
            (
                "How many legs does {x} have?",
                "How many legs has {x}?",
                "What is the number of legs of {x}?",
                "Tell me how many legs {x} has.",
                "Please say how many legs {x} has.",
                "On how many legs does {x} walk?",
            ),
            ("Can you say how many legs {x} has?", "Tell me the number of legs of {x}."),
        ),
        "{x} has {y} legs.",
        "{y}.",
        topic_entries(
            "legs",
            "a dog/four, a bird/two, a spider/eight, an ant/six, a horse/four, a cat/four",
        ),
    ),
    "colour": Topic(
        Phrasings(
            tuple(phrase.replace("{the}", "{x}") for phrase in english.PHRASES["colour"].seen),
            tuple(phrase.replace("{the}", "{x}") for phrase in english.PHRASES["colour"].unseen),
        ),
        "{x} is {y}.",
        "{y}.",
        topic_entries(
            "colour",
            "the sky/blue, the grass/green, the snow/white, the coal/black, the banana/yellow, "
            "the tomato/red",
        ),
    ),
    "hello": Topic(
        Phrasings(
            ("Hello!", "Hi!", "Hello there!", "Hello, Ovis!", "Hi, Ovis!", "Hello, how are you?"),
            ("Hi there!", "Hi, how are you?"),
        ),
        "Hello! How can I help you?",
        "Hello!",
        {"": ""},
    ),
    "morning": Topic(
        Phrasings(
            (
                "Good morning!",
                "Good morning, Ovis!",
                "Hello, good morning!",
                "A good morning to you!",
                "Good morning there!",
                "Good morning, how are you?",
            ),
            ("Hi, good morning!", "Good morning to you!"),
        ),
        "Good morning! How can I help you?",
        "Good morning!",
        {"": ""},
    ),
    "bye": Topic(
        Phrasings(
            (
                "Goodbye!",
                "Bye!",
                "Goodbye, Ovis!",
                "Bye, Ovis!",
                "Goodbye, see you!",
                "Bye, bye!",
            ),
            ("Bye, see you!", "Goodbye, bye!"),
        ),
        "Goodbye!",
        "Bye!",
        {"": ""},
    ),
    "thanks": Topic(
        Phrasings(
            (
                "Thank you!",
                "Thanks!",
                "Thank you, Ovis!",
                "Thanks, Ovis!",
                "Thank you for your help!",
                "Thanks, that was good!",
            ),
            ("Thanks for your help!", "Thank you, that was good!"),
        ),
        "You are welcome!",
        "Welcome!",
        {"": ""},
    ),
    "who": Topic(
        Phrasings(
            (
                "Who are you?",
                "What is your name?",
                "Tell me who you are.",
                "Please say who you are.",
                "Tell me your name.",
                "Who is there?",
            ),
            ("Can you tell me who you are?", "Please say your name."),
        ),
        "I am Ovis, a small model that looks at pictures.",
        "I am Ovis.",
        {"": ""},
    ),
}
