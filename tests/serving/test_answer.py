"""Ids become text that ends before a stop string, however the text is cut into pieces."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ovis_jax import Sampling
from ovis_jax.serving.answer import (
    Answer,
    Job,
    Piece,
    StopStrings,
    TokenText,
    Written,
    piece_text,
)

LETTERS = st.text("abc", max_size=12)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete, letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    finder, got, found = StopStrings(stops), "", False
    for n, piece in enumerate(pieces):
        text, found = finder.push(piece)
        got += text
        if found:
            break
        # What was given out is sure: no end of it, with what follows, could be a stop string.
        whole = "".join(pieces[: n + 1])
        assert whole.startswith(got)
        held = whole[len(got) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert (got + ("" if found else finder.finish()), found) == cut("".join(pieces), stops)


class Letters:
    """A tokenizer of single characters, with two halves of one."""

    pieces = ("<eos>", *"abcdef", "<0xC3>", "<0xA4>", "▁g")
    special_ids = frozenset({0})


def write(ids: list[int], **options) -> tuple[list[Piece], str | None, Job]:
    events = []
    given = {"max_new_tokens": 99, "sampling": Sampling(), "seed": 0, "deadline": 0.0}
    job = Job(None, None, emit=events.append, **(given | options))  # pyright: ignore
    answer, reason = Answer(job, 0, Letters(), (0,)), None  # pyright: ignore
    for i in ids:
        assert reason is None
        reason = answer.push(Written(TokenText(i, -i), ()))
    return events, reason, job


def test_an_answer_ends_at_a_stop_id():
    events, reason, job = write([1, 2, 0])
    assert [e.text for e in events] == ["a", "b", ""]
    assert [e.reason for e in events] == [None, None, "stop"] and reason == "stop"
    assert job.completion_tokens == 3


def test_an_answer_ends_at_its_length():
    events, reason, _ = write([1, 2, 3], max_new_tokens=3, whole=True)
    assert [(e.text, e.reason) for e in events] == [("abc", "length")] and reason == "length"
    # What could have become a stop string belongs to the answer after all.
    assert write([1, 2], max_new_tokens=2, stop=("bc",), whole=True)[0][0].text == "ab"


def test_a_stop_string_is_held_back_and_cut_off():
    events, reason, _ = write([1, 2, 3], stop=("bc",), top=0)
    assert [(e.text, e.reason) for e in events] == [("a", None), ("", "stop")]
    assert reason == "stop"
    assert [w.token.id for e in events for w in e.tokens] == [1]
    events, _, _ = write([1, 2, 4, 0], stop=("bc",), top=0)
    assert [e.text for e in events] == ["a", "bd", ""]
    assert [[w.token.id for w in e.tokens] for e in events] == [[1], [2, 4], []]


def test_halves_of_a_character_are_not_sent():
    events, _, _ = write([7, 8, 1, 0], top=0)
    assert [e.text for e in events] == ["äa", ""]
    assert [w.token.id for w in events[0].tokens] == [7, 8, 1]
    events, _, _ = write([7, 0], top=0)
    assert [e.text for e in events] == ["\ufffd"]
    assert [w.token.id for w in events[0].tokens] == [7]


@pytest.mark.parametrize("i, expected", [(1, ("a", b"a")), (9, (" g", b" g"))])
def test_a_token_as_text(i, expected):
    assert piece_text(Letters(), i) == expected  # pyright: ignore


def test_a_token_of_one_byte():
    assert piece_text(SimpleNamespace(pieces=["<0xC3>"]), 0)[1] == b"\xc3"  # pyright: ignore
