"""Tokens as OpenAI's API writes them."""

from types import SimpleNamespace

import pytest

from ovis_jax.server.responses import token_text


@pytest.mark.parametrize(
    "piece, expected",
    [("a", ("a", b"a")), ("▁g", (" g", b" g")), ("<0xC3>", ("bytes:\\xc3", b"\xc3"))],
)
def test_token_text(piece, expected):
    assert token_text(SimpleNamespace(pieces=[piece]), 0) == expected  # pyright: ignore
