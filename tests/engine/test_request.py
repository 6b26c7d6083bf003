"""Tokens become text that ends before a stop string, however the text is split into pieces."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from ovis_jax import Sampling
from ovis_jax.engine.request import (
    Delta,
    Logprob,
    Request,
    Sequence,
    StopStringFilter,
    TokenLogprobs,
)
from ovis_jax.inputs.tokenizer import Tokenizer

LETTERS = st.text("abc", max_size=12)


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, checked letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stop):
    stop_filter, passed, found = StopStringFilter(stop), "", False
    for n, piece in enumerate(pieces):
        text, found = stop_filter.push(piece)
        passed += text
        if found:
            break
        # Only text that could be the beginning of a stop string is held back.
        so_far = "".join(pieces[: n + 1])
        assert so_far.startswith(passed)
        held = so_far[len(passed) :]
        assert held == "" or any(string.startswith(held) for string in stop)
    assert (passed + ("" if found else stop_filter.finish()), found) == cut("".join(pieces), stop)


class Letters(Tokenizer):
    """A tokenizer of single characters, and of the two bytes of another one."""

    def __init__(self):
        pass

    pieces = ("<eos>", *"abcdef", "<0xC3>", "<0xA4>", "▁g")
    special_ids = frozenset({0})
    byte_level = clean_up_spaces = False


class Llama(Letters):
    """A tokenizer of words, whose spaces are cleaned up."""

    pieces = ("<eos>", "do", "Ġn", "'t", "Ġgo", "Ġ", ".", "ot")
    byte_level = clean_up_spaces = True


def test_stop_strings_of_a_text_whose_spaces_are_cleaned_up():
    ids = [1, 2, 3, 4, 5, 6, 2, 7, 5]
    deltas, reason, _ = generate(ids, tokenizer=Llama(), max_new_tokens=len(ids))
    assert "".join(delta.text for delta in deltas) == "don't go. not "
    assert [delta.text for delta in deltas] == ["do", "n't", " go", ".", " not", " "]
    assert reason == "length"
    for stop, end in (("o.", 6), ("n't", 3), ("don't", 3)):
        deltas, reason, _ = generate(ids[:end], tokenizer=Llama(), stop=(stop,))
        assert "".join(delta.text for delta in deltas) == "don't go. not ".partition(stop)[0]
        assert reason == "stop"
    # " ." does not exist after the clean-up.
    _, reason, _ = generate(ids, tokenizer=Llama(), stop=(" .",), max_new_tokens=len(ids))
    assert reason == "length"


def generate(
    ids: list[int], *, tokenizer: Tokenizer | None = None, **options
) -> tuple[list[Delta], str | None, Request]:
    """Feed ids to a sequence that ends at id 0."""
    deltas = []
    defaults = {"max_new_tokens": 99, "sampling": Sampling(), "seed": 0, "deadline": 0.0}
    tokens, pixels = np.zeros(3, np.int32), np.zeros((0, 4, 4, 3), np.float32)
    request = Request(tokens, pixels, on_event=deltas.append, **(defaults | options))
    sequence, reason = Sequence(request, 0, tokenizer or Letters(), (0,)), None
    for i in ids:
        assert reason is None
        reason = sequence.append(TokenLogprobs(Logprob(i, -i), ()))
    return deltas, reason, request


def test_a_sequence_ends_at_a_stop_id():
    deltas, reason, request = generate([1, 2, 0])
    assert [d.text for d in deltas] == ["a", "b", ""]
    assert [d.finish_reason for d in deltas] == [None, None, "stop"] and reason == "stop"
    assert request.completion_tokens == 3


def test_a_sequence_ends_at_its_maximum_length():
    deltas, reason, _ = generate([1, 2, 3], max_new_tokens=3, stream=False)
    assert [(d.text, d.finish_reason) for d in deltas] == [("abc", "length")]
    assert reason == "length"
    # The beginning of a stop string that never became complete is part of the answer.
    deltas, _, _ = generate([1, 2], max_new_tokens=2, stop=("bc",), stream=False)
    assert deltas[0].text == "ab"


def test_own_stop_ids():
    deltas, reason, _ = generate([1, 3], stop_token_ids=(3,), stream=False)
    assert [(d.text, reason) for d in deltas] == [("a", "stop")]
    deltas, reason, _ = generate([1, 0, 2], ignore_eos=True, max_new_tokens=3, stream=False)
    assert [(d.text, reason) for d in deltas] == [("ab", "length")]
    deltas, reason, _ = generate([0, 3], ignore_eos=True, stop_token_ids=(3,), stream=False)
    assert [(d.text, reason) for d in deltas] == [("", "stop")]


def test_no_stop_string_ends_a_sequence_before_min_tokens():
    deltas, reason, _ = generate([1, 2, 2], stop=("b",), min_tokens=2, stream=False)
    assert [(d.text, reason) for d in deltas] == [("ab", "stop")]


def test_a_stop_string_is_held_back_and_cut_off():
    deltas, reason, _ = generate([1, 2, 3], stop=("bc",), top_logprobs=0)
    assert [(d.text, d.finish_reason) for d in deltas] == [("a", None), ("", "stop")]
    assert reason == "stop"
    assert [t.token.token_id for d in deltas for t in d.logprobs] == [1]
    deltas, _, _ = generate([1, 2, 4, 0], stop=("bc",), top_logprobs=0)
    assert [d.text for d in deltas] == ["a", "bd", ""]
    assert [[t.token.token_id for t in d.logprobs] for d in deltas] == [[1], [2, 4], []]


def test_an_incomplete_character_is_not_sent():
    deltas, _, _ = generate([7, 8, 1, 0], top_logprobs=0)
    assert [d.text for d in deltas] == ["äa", ""]
    assert [t.token.token_id for t in deltas[0].logprobs] == [7, 8, 1]
    deltas, _, _ = generate([7, 0], top_logprobs=0)
    assert [d.text for d in deltas] == ["\ufffd"]
    assert [t.token.token_id for t in deltas[0].logprobs] == [7]
