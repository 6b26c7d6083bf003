"""Character references for texts that are shown as typed."""

import re

from hypothesis import given
from hypothesis import strategies as st

from ovis_jax.ui.typed_text import escape_markup


@given(st.text())
def test_references_stand_for_the_text(text):
    escaped = escape_markup(text)
    assert re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), escaped) == text
    assert not set(escaped) & set("<>*_`[]$|~\\\n\t")


def test_ordinary_questions_are_not_changed():
    for text in ("What's in the picture?", "Is it well-known (or not): yes, 50%?", "你好 🙂!"):
        assert escape_markup(text) == text


def test_markup_is_replaced():
    assert escape_markup("*a* & 1. b") == "&#42;a&#42; &#38; 1&#46; b"
