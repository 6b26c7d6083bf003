"""Converting text to token ids and back, with tokenizer.model (SentencePiece) or tokenizer.json.

The original's fast tokenizer, tokenizer.json, is the reference. It first splits a text at the added
tokens (special tokens, runs of newlines and others), then encodes the ordinary text between them by
byte pair encoding. SentencePiece encodes ordinary text in the same way, but it never recognizes
special tokens, and it splits differently at a literal U+2581. Therefore, this module splits the
text for both backends, and the backends only see ordinary text. Decoding only needs the vocabulary.

Gemma's pieces are text, with byte pieces for characters that are not in the vocabulary. Llama's
pieces are bytes, each written as one character.
"""

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece
import tokenizers

from ovis_jax.errors import ConfigError, PromptError
from ovis_jax.json_fields import JsonObject, read_json
from ovis_jax.user_files import GIT_LFS_POINTER, is_git_lfs_pointer, read_text

TURN_START = "<start_of_turn>"
TURN_END = "<end_of_turn>"
HEADER_START = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
EOT = "<|eot_id|>"

SPACE = "▁"
"""The character that stands for a space in a piece."""

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
"""The pieces for single bytes, which encode characters that are not in the vocabulary."""

DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""The decoder of Gemma's tokenizer.json."""

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHER)
}
"""The byte that each character of a byte-level piece stands for (GPT-2's table)."""

SPACE_CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""The strings from which transformers' clean-up removes the spaces, one string after another."""

_UNDECIDED = re.compile(r"(?:(?:'?n|[vr]'?|')? )*")
"""Matches the beginning of a reversed text, which is the end of the text. The match is the part
that the clean-up may still change when more text follows: spaces, and beginnings of the strings in
`SPACE_CLEAN_UPS`."""


class Tokenizer:
    """Converts between text and ids; create it with `from_folder`.

    Args:
      pieces: The piece of each token id.
      added_tokens: The id of each added token, by text. A text is first split at these tokens.
      special_tokens: The added tokens that decoding can skip.
      encode_ordinary: Function that encodes text without added tokens.
      byte_level: Whether each character of a piece stands for a byte.
      clean_up_spaces: Whether decoding applies the function `clean_up_spaces`.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        added_tokens: Mapping[str, int],
        special_tokens: Collection[str],
        encode_ordinary: Callable[[str], list[int]],
        *,
        byte_level: bool = False,
        clean_up_spaces: bool = False,
    ):
        self.pieces = pieces
        self.byte_level = byte_level
        self.clean_up_spaces = clean_up_spaces
        self.special_ids = frozenset(added_tokens[piece] for piece in special_tokens)
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._added_tokens = added_tokens
        self._encode_ordinary = encode_ordinary
        self._splitter = _split_pattern(added_tokens, broken=())
        # The turn markers are always special tokens here, even if the tokenizer's file does not
        # mark them as special.
        turn_markers = {TURN_START, TURN_END, HEADER_START, HEADER_END, EOT} & added_tokens.keys()
        self._safe_splitter = _split_pattern(added_tokens, broken={*special_tokens, *turn_markers})

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.model and tokenizer_config.json if they exist, otherwise tokenizer.json.

        transformers 5 writes a tokenizer_config.json without the added tokens, which only
        tokenizer.json then contains. Such a folder is read from tokenizer.json, even if it still
        has a tokenizer.model.

        Raises:
          ConfigError: The folder has no tokenizer, or a file cannot be read or is not supported.
        """
        has_json = (folder / "tokenizer.json").exists()
        if all((folder / name).exists() for name in ("tokenizer.model", "tokenizer_config.json")):
            listed = "added_tokens_decoder" in read_json(folder / "tokenizer_config.json")
            if listed or not has_json:
                return cls.from_sentencepiece(folder)
        if has_json:
            return cls.from_json(folder)
        raise ConfigError(
            f"{folder} contains neither tokenizer.model with tokenizer_config.json nor "
            "tokenizer.json; copy them from the original checkpoint"
        )

    @classmethod
    def from_sentencepiece(cls, folder: Path) -> Self:
        """Read tokenizer.model, and the added tokens in tokenizer_config.json.

        Raises:
          ConfigError: A file cannot be read or is not supported.
        """
        model = folder / "tokenizer.model"
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            reason = f"it is {GIT_LFS_POINTER}" if is_git_lfs_pointer(model) else error
            raise ConfigError(f"{model} cannot be read by SentencePiece: {reason}") from error
        name = "tokenizer_config.json"
        listed = JsonObject(read_json(folder / name), name).get_object("added_tokens_decoder")
        pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
        # In tokenizer.json, a tab is an ordinary piece, so it is never part of a run of byte
        # pieces.
        pieces = ["\t" if piece == "<0x09>" else piece for piece in pieces]
        entries = [(i, listed.get_object(i)) for i in listed.values]
        return cls(
            pieces,
            *_read_added_tokens(entries, pieces),
            processor.encode,
            clean_up_spaces=_read_clean_up(folder),
        )

    @classmethod
    def from_json(cls, folder: Path) -> Self:
        """Read tokenizer.json; the merges in it may be strings or pairs.

        Raises:
          ConfigError: The file cannot be read or is not supported.
        """
        path = folder / "tokenizer.json"
        fields = JsonObject(read_json(path), "tokenizer.json")
        decoder = fields.get("decoder")
        byte_level = isinstance(decoder, Mapping) and decoder.get("type") == "ByteLevel"
        if not byte_level and decoder != DECODER:
            raise fields.error("decoder", decoder, f"{DECODER} (Gemma) or ByteLevel (Llama)")
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path))
        # The library raises plain Exception.
        except Exception as error:
            raise ConfigError(f"{path} cannot be read by tokenizers: {error}") from error
        ids = backend.get_vocab(with_added_tokens=True)
        pieces = sorted(ids, key=ids.__getitem__)
        if [ids[piece] for piece in pieces] != list(range(len(pieces))):
            raise ConfigError(f"{path}: the ids of the pieces are not 0 to {len(pieces) - 1}")
        entries = [
            (token["id"], JsonObject(token, f"tokenizer.json: added_tokens {token['id']}"))
            for token in fields.get("added_tokens")
        ]
        return cls(
            pieces,
            *_read_added_tokens(entries, pieces),
            lambda text: backend.encode(text, add_special_tokens=False).ids,
            byte_level=byte_level,
            clean_up_spaces=_read_clean_up(folder),
        )

    def encode(self, text: str, *, parse_special_tokens: bool = True) -> list[int]:
        """Encode a text, without adding special tokens before or after it.

        Args:
          text: Any text that can be encoded as UTF-8.
          parse_special_tokens: Whether a special token such as "<eos>" that is spelled out in the
            text becomes its id, as in the original. Otherwise it is encoded as ordinary text.

        Raises:
          PromptError: The text contains an unpaired surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start} of the text is {text[error.start]!r}, half of a "
                "surrogate pair, which is not a character; remove it or add its other half"
            ) from None
        ids: list[int] = []
        splitter = self._splitter if parse_special_tokens else self._safe_splitter
        for stretch in splitter.split(text):
            if stretch in self._added_tokens:
                ids.append(self._added_tokens[stretch])
            elif stretch:
                ids += self._encode_ordinary(stretch)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids.

        Raises:
          PromptError: A number is not a token id.
        """
        detokenizer = IncrementalDetokenizer(
            self, skip_special_tokens=skip_special_tokens, keep_spaces=True
        )
        text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
        return clean_up_spaces(text) if self.clean_up_spaces else text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of the text of a token id, which may be part of a character."""
        piece = self.pieces[token]
        if self.byte_level and all(x in BYTE_OF_CHARACTER for x in piece):
            return bytes(BYTE_OF_CHARACTER[x] for x in piece)
        if self.byte_level:
            return piece.encode()
        return bytes([BYTES[piece]]) if piece in BYTES else piece.replace(SPACE, " ").encode()

    def token_to_id(self, piece: str) -> int:
        """Return the token id of a piece.

        Raises:
          ConfigError: There is no such piece.
        """
        if piece not in self._ids:
            raise ConfigError(
                f"the tokenizer has no piece {piece!r}; use the tokenizer of this checkpoint"
            )
        return self._ids[piece]


class IncrementalDetokenizer:
    """Decodes ids one by one; joined together, the texts equal the result of `Tokenizer.decode`.

    An incomplete character is held back until its last byte, and so is a space that the tokenizer's
    clean-up may remove. At the end, `finish` returns the text that is still held back.

    Args:
      tokenizer: The tokenizer.
      skip_special_tokens: Whether special tokens are left out of the text.
      keep_spaces: Whether to skip the tokenizer's clean-up of spaces.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep_spaces: bool = False
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._cleans_up = tokenizer.clean_up_spaces and not keep_spaces
        self._bytes = bytearray()  # of a run of byte pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # of byte-level pieces
        self._held = ""  # text whose spaces the clean-up may still remove

    def push(self, token: int) -> str:
        """Add an id, and return the text that can be output now, which is often empty.

        Raises:
          PromptError: `token` is not a token id.
        """
        pieces = self._tokenizer.pieces
        if not 0 <= token < len(pieces):
            raise PromptError(
                f"{token} is not the id of a piece; only 0 to {len(pieces) - 1} have a text"
            )
        if token in self._skipped:
            return ""
        text = self._held + self._decode(token)
        if not self._cleans_up:
            return text
        undecided = _UNDECIDED.match(text[::-1])
        end = len(text) - (undecided.end() if undecided else 0)
        text, self._held = text[:end], text[end:]
        return clean_up_spaces(text)

    def finish(self) -> str:
        """Return the text that is still held back; bytes that are not UTF-8 become U+FFFD."""
        text = self._held + self._end_byte_run() + self._utf8.decode(b"", final=True)
        self._held = ""
        return clean_up_spaces(text) if self._cleans_up else text

    def _decode(self, token: int) -> str:
        """Return the text up to the last complete character."""
        data = self._tokenizer.token_bytes(token)
        if self._tokenizer.byte_level:
            return self._utf8.decode(data)
        if self._tokenizer.pieces[token] in BYTES:
            self._bytes += data
            return ""
        return self._end_byte_run() + data.decode()

    def _end_byte_run(self) -> str:
        """Return the text of a run of byte pieces; invalid UTF-8 becomes one U+FFFD per byte."""
        run, self._bytes = self._bytes, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def clean_up_spaces(text: str) -> str:
    """Remove spaces before punctuation and contractions, as transformers does after decoding."""
    for pattern in SPACE_CLEAN_UPS:
        text = text.replace(pattern, pattern.strip(" "))
    return text


def _read_clean_up(folder: Path) -> bool:
    """Return whether tokenizer_config.json asks for the clean-up of spaces."""
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(read_json(path).get("clean_up_tokenization_spaces", False))


def _split_pattern(added_tokens: Collection[str], broken: Collection[str]) -> re.Pattern[str]:
    """Compile a pattern that splits a text at added tokens, preferring leftmost, then longest ones.

    For a token in `broken`, only the first character is split off, and the rest stays in the text.
    Neither part equals the token, so no backend can recognize the token.
    """
    parts = [
        f"{re.escape(token[0])}(?={re.escape(token[1:])})" if token in broken else re.escape(token)
        for token in sorted(added_tokens, key=len, reverse=True)
    ]
    return re.compile(f"({'|'.join(parts)})" if parts else "(?!)")


def _read_added_tokens(
    entries: Iterable[tuple[Any, JsonObject]], pieces: Sequence[str]
) -> tuple[dict[str, int], set[str]]:
    """Return a dict from the text of each added token to its id, and the set of special tokens."""
    added: dict[str, int] = {}
    special: set[str] = set()
    for key, token in entries:
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            token.require_value(flag, False)
        i, text = int(key), token.get("content")
        if not 0 <= i < len(pieces) or pieces[i] != text:
            raise token.error(
                "content", text, f"the piece with id {i} in the vocabulary of {len(pieces)}"
            )
        added[text] = i
        if token.get("special"):
            if len(text) < 2:
                raise token.error("content", text, "at least two characters in a special token")
            special.add(text)
    return added, special
