"""Tokens as OpenAI's API writes them."""

import pytest

from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.server.responses import token_text


@pytest.mark.parametrize(
    "piece, byte_level, expected",
    [
        ("a", False, ("a", b"a")),
        ("▁g", False, (" g", b" g")),
        ("<0xC3>", False, ("bytes:\\xc3", b"\xc3")),
        ("Ġg", True, (" g", b" g")),
        ("Ã¼", True, ("ü", "ü".encode())),
        ("ĠÃ", True, ("bytes:\\x20\\xc3", b" \xc3")),
        ("▁", True, ("▁", "▁".encode())),
    ],
)
def test_token_text(piece, byte_level, expected):
    tokenizer = Tokenizer([piece], {}, (), lambda _: [], byte_level=byte_level)
    assert token_text(tokenizer, 0) == expected
