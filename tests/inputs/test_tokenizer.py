import functools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ovis_jax.errors import ConfigError, PromptError
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))
LLAMA = GOLDEN.with_name("golden-llama")
LLAMA_ROWS = json.loads((LLAMA / "tokenizer_cases.json").read_text(encoding="utf-8"))

# tiny-f32 holds its merges as strings, tiny-bf16-sharded as pairs.
READERS = {
    "sentencepiece": lambda: Tokenizer.from_sentencepiece(GOLDEN / "tiny-f32"),
    "merges as strings": lambda: Tokenizer.from_json(GOLDEN / "tiny-f32"),
    "merges as pairs": lambda: Tokenizer.from_json(GOLDEN / "tiny-bf16-sharded"),
    "llama": lambda: Tokenizer.from_folder(LLAMA / "tiny-f32"),
}
GEMMA_READERS = [name for name in READERS if name != "llama"]


@functools.cache
def read(name):
    return READERS[name]()


@functools.cache
def original():
    return tokenizers.Tokenizer.from_file(str(GOLDEN / "tiny-f32" / "tokenizer.json"))


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]

# Complete, cut and joined special tokens, all kinds of spaces, bytes, and parts of words.
INTERESTING = [
    *SPECIAL,
    *["<", ">", "bos>", "<bo", "start_of_turn>", "<mask>", "<unused1", "0>", "<unused10>"],
    *[" ", "  ", " " * 33, "▁", "▁▁", "\n", "\n\n", "\n" * 33, "\t", "\r", "\v", "\u2028"],
    *["user", "model", "the", " left", "ing", "a", "Z", "12", "3.", "é", "e\u0301", "图", "的"],
    *["𝄞", "👩\u200d🚀", "\ufeff", "\0", "\ufffd", "<0x41>", "<0x", "▅", "<image>", "..."],
]
texts = st.lists(st.sampled_from(INTERESTING) | st.text(max_size=4), max_size=12).map("".join)


CASES = [(reader, row) for reader in GEMMA_READERS for row in ROWS]
CASES += [("llama", row) for row in LLAMA_ROWS]


@pytest.mark.parametrize("reader, row", CASES, ids=lambda x: x if isinstance(x, str) else "row")
def test_ids_and_texts_are_the_original_s(reader, row):
    tokenizer = read(reader)
    assert tokenizer.encode(row["text"]) == row["ids"]
    assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decoded"]
    assert tokenizer.decode(row["ids"]) == row["decoded_skip_special"]


@given(texts)
def test_backends_encode_as_the_original(text):
    expected = original().encode(text, add_special_tokens=False).ids
    assert read("sentencepiece").encode(text) == expected
    assert read("merges as strings").encode(text) == expected


@given(texts)
def test_ignoring_special_tokens_is_the_same_on_both_backends(text):
    tokenizer = read("sentencepiece")
    ids = tokenizer.encode(text, parse_special_tokens=False)
    assert ids == read("merges as strings").encode(text, parse_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    # The text is complete; pieces write a space as U+2581.
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    if not any(token in text for token in SPECIAL):
        assert ids == tokenizer.encode(text)


LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]


@pytest.mark.parametrize(
    "reader, token",
    [(reader, token) for reader in GEMMA_READERS for token in SPECIAL]
    + [("llama", token) for token in LLAMA_SPECIAL],
)
def test_special_tokens(reader, token):
    tokenizer = read(reader)
    assert tokenizer.encode(token) == [tokenizer.token_to_id(token)]
    assert tokenizer.token_to_id(token) in tokenizer.special_ids
    assert len(tokenizer.encode(token, parse_special_tokens=False)) > 1


def test_other_added_tokens_are_always_parsed():
    tokenizer = read("sentencepiece")
    for text in ("\n\n\n", "<mask>", "▁▁▁"):
        assert tokenizer.encode(text, parse_special_tokens=False) == tokenizer.encode(text)
        assert len(tokenizer.encode(text)) == 1


@given(st.lists(st.integers(0, 599) | st.integers(169, 424), max_size=16), st.booleans())
def test_backends_decode_as_the_original(ids, skip_special_tokens):
    expected = original().decode(ids, skip_special_tokens=skip_special_tokens)
    assert read("sentencepiece").decode(ids, skip_special_tokens=skip_special_tokens) == expected
    assert (
        read("merges as strings").decode(ids, skip_special_tokens=skip_special_tokens) == expected
    )


@given(texts)
def test_the_detokenizer_never_splits_characters(text):
    tokenizer = read("sentencepiece")
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text.replace("▁", " ")


def test_the_detokenizer_holds_back_partial_characters():
    tokenizer = read("sentencepiece")
    detokenizer = IncrementalDetokenizer(tokenizer)
    clef = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "𝄞".encode()]
    assert [detokenizer.push(i) for i in [*clef, tokenizer.token_to_id("a")]] == [
        "",
        "",
        "",
        "",
        "𝄞a",
    ]
    assert [detokenizer.push(i) for i in clef[:2]] == ["", ""]
    assert detokenizer.finish() == "\ufffd\ufffd"
    assert detokenizer.finish() == ""


# All beginnings and ends of the words whose spaces the clean-up removes, and parts of characters.
PARTS = [" ", " ", "'", "n", "t", "m", "s", "v", "r", "e", ".", "?", "!", ",", "a", "é", "👩", "\n"]


@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.booleans())
def test_streamed_text_is_cleaned_up_like_the_decoded_text(text, skip_special_tokens):
    tokenizer = read("llama")
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    expected = text
    for old, new in [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")]:
        expected = expected.replace(old, new)
    for word in ("n't", "'m", "'s", "'ve", "'re"):
        expected = expected.replace(f" {word}", word)
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == expected


@given(st.lists(st.integers(0, 511), max_size=16), st.booleans())
def test_llama_decodes_as_the_original(ids, skip_special_tokens):
    """Any bytes, also such that are no characters."""
    path = LLAMA / "tiny-f32" / "tokenizer.json"
    original = tokenizers.Tokenizer.from_file(str(path))
    expected = original.decode(ids, skip_special_tokens=skip_special_tokens)
    detokenizer = IncrementalDetokenizer(
        read("llama"), skip_special_tokens=skip_special_tokens, keep_spaces=True
    )
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == expected


def test_words_are_not_held_back():
    """Only a space and the beginning of a contraction wait for the next text."""
    tokenizer = read("llama")
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [tokenizer.encode(text) for text in ("a", " n", "o", " ", ".", " b", " n", "'t", "!")]
    found = ["".join(map(detokenizer.push, ids)) for ids in pieces]
    assert found == ["a", "", " no", "", ".", " b", "", "n't", "!"]
    assert detokenizer.finish() == ""


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["the red circle\n", "<", "a", " ", "<bos>", "图"])
@pytest.mark.parametrize("parse_special_tokens", [True, False])
def test_long_texts(reader, text, parse_special_tokens):
    """These would take hours if the time grew with the square of the length."""
    tokenizer = read(reader)
    text *= 200_000 // len(text)
    ids = tokenizer.encode(text, parse_special_tokens=parse_special_tokens)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("number", [-300, -1, 600])
def test_decoding_an_unknown_id(number):
    with pytest.raises(PromptError, match=f"{number} is not the id of a piece"):
        read("sentencepiece").decode([5, number])


@pytest.mark.parametrize("reader", READERS)
def test_half_a_surrogate_pair(reader):
    with pytest.raises(PromptError, match=r"character 2 of the text is '\\ud800'"):
        read(reader).encode("ab\ud800")


def test_the_id_of_an_unknown_piece():
    with pytest.raises(ConfigError, match="no piece '<nothing>'"):
        read("sentencepiece").token_to_id("<nothing>")


def copy_files(folder, *names):
    for name in names:
        shutil.copy(GOLDEN / "tiny-f32" / name, folder)
    return folder


def test_the_files_decide_the_backend(tmp_path):
    with pytest.raises(ConfigError, match="neither tokenizer.model with tokenizer_config.json nor"):
        Tokenizer.from_folder(tmp_path)
    copy_files(tmp_path, "tokenizer.model")
    with pytest.raises(ConfigError, match="neither tokenizer.model with tokenizer_config.json nor"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("nothing")
    with pytest.raises(ConfigError, match="tokenizer.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    copy_files(tmp_path, "tokenizer.json")
    assert Tokenizer.from_folder(tmp_path).encode("Hi") == [558, 535]
    copy_files(tmp_path, "tokenizer_config.json")
    (tmp_path / "tokenizer.json").write_text("nothing")
    assert Tokenizer.from_folder(tmp_path).encode("Hi") == [558, 535]


def test_tokenizer_config_without_added_tokens(tmp_path):
    """transformers 5 writes such a file; tokenizer.model may be left from an older version."""
    copy_files(tmp_path, "tokenizer.model", "tokenizer.json")
    config = {"backend": "tokenizers", "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for row in ROWS:
        assert tokenizer.encode(row["text"]) == row["ids"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer_config.json: added_tokens_decoder is missing"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_files_are_named(tmp_path):
    copy_files(tmp_path, "tokenizer_config.json")
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="tokenizer.model cannot be read"):
        Tokenizer.from_sentencepiece(tmp_path)
    content = json.loads((GOLDEN / "tiny-f32" / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "model": {}}))
    with pytest.raises(ConfigError, match="tokenizer.json cannot be read"):
        Tokenizer.from_json(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "decoder": None}))
    with pytest.raises(ConfigError, match="tokenizer.json: decoder is None, expected"):
        Tokenizer.from_json(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lstrip": True}, "lstrip is True"),
        ({"normalized": True}, "normalized is True"),
        ({"content": "<other>"}, "content is '<other>', expected the piece"),
    ],
)
def test_unsupported_added_tokens(tmp_path, changes, message):
    copy_files(tmp_path, "tokenizer.model")
    config = json.loads((GOLDEN / "tiny-f32" / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["4"] |= changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"added_tokens_decoder: 4: {message}"):
        Tokenizer.from_folder(tmp_path)
