"""Text to ids and back, with tokenizer.model (SentencePiece) or tokenizer.json.

The fast tokenizer of the original, tokenizer.json, is the truth. It first cuts a text at its added
tokens (control marks, runs of newlines, ...), then encodes each stretch of ordinary text by byte
pair encoding. SentencePiece encodes ordinary text alike, but never reads control marks, and cuts
at other places where U+2581 itself is typed. So the cutting is done here, for both alike, and a
backend only ever sees ordinary text. Decoding needs nothing but the table of pieces.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece
import tokenizers

from ovis_jax.errors import ConfigError, PromptError
from ovis_jax.fields import Fields, read_json

TURN_START = "<start_of_turn>"
TURN_END = "<end_of_turn>"

SPACE = "▁"
"""How pieces write a space."""

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
"""The pieces that stand for one byte of a character without a piece of its own."""

DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""What a tokenizer.json must say of decoding, because `TextStream` does it."""


class Tokenizer:
    """Text <-> ids; made by `from_folder`.

    Args:
      pieces: the text of every id.
      added: the ids of the added tokens, by their text; a text is first cut at these.
      special: the added tokens that decoding leaves out.
      encode_ordinary: text in which no added token occurs -> ids.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        added: Mapping[str, int],
        special: Collection[str],
        encode_ordinary: Callable[[str], list[int]],
    ):
        self.pieces = pieces
        self.special_ids = frozenset(added[piece] for piece in special)
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._added = added
        self._encode_ordinary = encode_ordinary
        self._cuts = _cut_pattern(added, broken=())
        # The marks that build a conversation are control marks whatever the tokenizer calls them.
        self._safe_cuts = _cut_pattern(
            added, broken={*special, *({TURN_START, TURN_END} & added.keys())}
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.model with tokenizer_config.json, or else tokenizer.json, of a folder.

        Raises:
          ConfigError: neither is there, or one cannot be read or asks for what is not supported.
        """
        if all((folder / name).exists() for name in ("tokenizer.model", "tokenizer_config.json")):
            return cls.from_sentencepiece(folder)
        if (folder / "tokenizer.json").exists():
            return cls.from_json(folder)
        raise ConfigError(
            f"{folder} holds neither tokenizer.model with tokenizer_config.json nor "
            "tokenizer.json; copy them from the checkpoint it was made from"
        )

    @classmethod
    def from_sentencepiece(cls, folder: Path) -> Self:
        """Read tokenizer.model, and the added tokens that tokenizer_config.json lists.

        Raises:
          ConfigError: one of them cannot be read or asks for what is not supported.
        """
        model = folder / "tokenizer.model"
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{model} cannot be read by SentencePiece: {error}") from error
        name = "tokenizer_config.json"
        listed = Fields(read_json(folder / name), name).section("added_tokens_decoder")
        pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
        # tokenizer.json holds a tab as an ordinary piece, so it never joins a run of bytes.
        pieces = ["\t" if piece == "<0x09>" else piece for piece in pieces]
        entries = [(i, listed.section(i)) for i in listed.values]
        return cls(pieces, *_added_tokens(entries, pieces), processor.encode)

    @classmethod
    def from_json(cls, folder: Path) -> Self:
        """Read tokenizer.json; its merges may be strings or pairs.

        Raises:
          ConfigError: it cannot be read or asks for what is not supported.
        """
        path = folder / "tokenizer.json"
        fields = Fields(read_json(path), "tokenizer.json")
        fields.require("decoder", DECODER)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        # The class that the library raises is Exception itself.
        except Exception as error:
            raise ConfigError(f"{path} cannot be read by tokenizers: {error}") from error
        ids = backend.get_vocab(with_added_tokens=True)
        pieces = sorted(ids, key=ids.__getitem__)
        if [ids[piece] for piece in pieces] != list(range(len(pieces))):
            raise ConfigError(f"{path}: the ids of the pieces are not 0 to {len(pieces) - 1}")
        entries = [
            (token["id"], Fields(token, f"tokenizer.json: added_tokens {token['id']}"))
            for token in fields.get("added_tokens")
        ]
        return cls(
            pieces,
            *_added_tokens(entries, pieces),
            lambda text: backend.encode(text, add_special_tokens=False).ids,
        )

    def encode(self, text: str, *, control: bool = True) -> list[int]:
        """Encode a text; no id is put before or after it.

        Args:
          text: any text that has a UTF-8 form.
          control: whether a control mark such as "<eos>" that is spelled out in the text becomes
            its control id, as in the original; else it is encoded as ordinary text.

        Raises:
          PromptError: the text holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start} of the text is {text[error.start]!r}, half of a "
                "surrogate pair, which is no character; remove it or add its other half"
            ) from None
        ids: list[int] = []
        cuts = self._cuts if control else self._safe_cuts
        for stretch in cuts.split(text):
            if stretch in self._added:
                ids.append(self._added[stretch])
            elif stretch:
                ids += self._encode_ordinary(stretch)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode ids; `skip_special` leaves control ids out, else they give their names.

        Raises:
          PromptError: a number is not the id of a piece.
        """
        stream = TextStream(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def id_of(self, piece: str) -> int:
        """The id of a piece.

        Raises:
          ConfigError: there is no such piece.
        """
        if piece not in self._ids:
            raise ConfigError(
                f"the tokenizer has no piece {piece!r}; use the tokenizer of an Ovis1.6-Gemma2"
            )
        return self._ids[piece]


class TextStream:
    """Decodes ids one by one; what it gives joins to what `Tokenizer.decode` gives for all.

    Bytes are held back until the run of bytes they stand in ends, so no half of a character is
    ever given out. `finish` gives the bytes that are still held back at the end.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._bytes = bytearray()

    def push(self, token: int) -> str:
        """The text that is sure once `token` is known, often empty.

        Raises:
          PromptError: `token` is not the id of a piece.
        """
        pieces = self._tokenizer.pieces
        if not 0 <= token < len(pieces):
            raise PromptError(
                f"{token} is not the id of a piece; only 0 to {len(pieces) - 1} have a text"
            )
        if token in self._skipped:
            return ""
        piece = pieces[token]
        if piece in BYTES:
            self._bytes.append(BYTES[piece])
            return ""
        return self.finish() + piece.replace(SPACE, " ")

    def finish(self) -> str:
        """The text of the bytes held back; U+FFFD for each byte of a run that is not UTF-8."""
        run, self._bytes = self._bytes, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def _cut_pattern(added: Collection[str], broken: Collection[str]) -> re.Pattern[str]:
    """A pattern that cuts a text at added tokens: leftmost first, then the longest.

    Of a `broken` token only the first character is cut out, and the rest is left to be read on:
    neither part is the token any more, so no backend can see it.
    """
    parts = [
        f"{re.escape(token[0])}(?={re.escape(token[1:])})" if token in broken else re.escape(token)
        for token in sorted(added, key=len, reverse=True)
    ]
    return re.compile(f"({'|'.join(parts)})" if parts else "(?!)")


def _added_tokens(
    entries: Iterable[tuple[Any, Fields]], pieces: Sequence[str]
) -> tuple[dict[str, int], set[str]]:
    """The ids of the added tokens by their text, and the texts of the special ones."""
    added: dict[str, int] = {}
    special: set[str] = set()
    for key, token in entries:
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            token.require(flag, False)
        i, text = int(key), token.get("content")
        if not 0 <= i < len(pieces) or pieces[i] != text:
            raise token.error(
                "content", text, f"the piece that the vocabulary of {len(pieces)} has at id {i}"
            )
        added[text] = i
        if token.get("special"):
            if len(text) < 2:
                raise token.error("content", text, "two characters or more in a special token")
            special.add(text)
    return added, special
