"""Train the tokenizer of ovis-tiny: `python -m recipes.ovis_tiny.train_tokenizer TRAIN.jsonl DST`.

Writes tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json, and
preprocessor_config.json with the size of the crops.

The structure is that of Gemma's tokenizer: byte pair encoding with byte fallback, single digits,
preserved spaces, and the same control tokens, unused tokens and runs of newlines and spaces, with
the same ids. Gemma's HTML tags are omitted. tokenizer.json equals what transformers would convert
tokenizer.model to.
"""

import argparse
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER
from ovis_jax.inputs.tokenizer import DECODER, SPACE, TURN_END, TURN_START
from recipes.ovis_tiny.scenes import CELL, ROWS

VOCAB_SIZE = 1024
SIDE = ROWS * CELL
"""Side of a crop in pixels, equal to that of a square picture."""

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
FILLERS = ["<mask>", "<2mass>", "[@BOS@]", *[f"<unused{i}>" for i in range(99)]]
NEWLINES = ["\n" * length for length in range(1, 32)]
SPACES = [SPACE * length for length in range(2, 32)]
ADDED = [*CONTROL, *FILLERS, TURN_START, TURN_END, *NEWLINES, *SPACES]
"""Added tokens; the index of a token is its id."""
SPECIAL = [*CONTROL, TURN_START, TURN_END]

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "äöüÄÖÜß"
"""Characters that always have a piece; others that the corpus lacks fall back to bytes."""


def train_sentencepiece(sentences: Iterator[str]) -> bytes:
    """Train the SentencePiece model and return the content of tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=ADDED[len(CONTROL) :],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        **dict(zip(("pad_piece", "eos_piece", "bos_piece", "unk_piece"), CONTROL, strict=True)),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars=CHARACTERS,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def read_conversations(path: Path) -> Iterator[str]:
    """Yield each conversation of a JSON lines file as one text, with the names of the speakers."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield "\n".join(
                f"{'user' if turn['from'] == 'human' else 'model'}\n"
                f"{turn['value'].replace(IMAGE_PLACEHOLDER, '').strip()}"
                for turn in json.loads(line)["conversations"]
            )


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """Convert the content of tokenizer.model to that of tokenizer.json.

    Every way to merge two pieces into a third becomes a merge, in the order of the third piece's
    score. Runs of newlines or spaces all score 0; merges with a longer left part come first, so
    that a run is encoded greedily from the left.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    # As in Gemma's file, a tab is an ordinary piece.
    pieces = ["\t" if (p := processor.id_to_piece(i)) == "<0x09>" else p for i in ids]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (processor.get_score(i), piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added_token(piece)} for i, piece in enumerate(ADDED)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # Matches nothing after the normalizer; kept because Gemma's file has it.
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _added_token(piece) for i, piece in enumerate(ADDED)},
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), CONTROL, strict=True)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "sp_model_kwargs": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }


def special_tokens_map() -> dict[str, Any]:
    """Return the content of special_tokens_map.json."""
    tokens = {}
    for name, piece in zip(("pad", "eos", "bos", "unk"), CONTROL, strict=True):
        token = _added_token(piece)
        del token["special"]
        tokens[f"{name}_token"] = token
    return tokens


def preprocessor_config() -> dict[str, Any]:
    """Return the content of preprocessor_config.json: SigLIP normalization and crop size."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }


def write_tokenizer(sentences: Iterator[str], folder: Path) -> None:
    """Train on sentences and write all files to a folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train_sentencepiece(sentences)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in (
        ("tokenizer", tokenizer_json(model)),
        ("tokenizer_config", tokenizer_config()),
        ("special_tokens_map", special_tokens_map()),
        ("preprocessor_config", preprocessor_config()),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _added_token(piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": piece, **flags, "special": piece in SPECIAL}


def main() -> None:
    """Parse the command line and write the tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", type=Path, metavar="TRAIN.jsonl", help="training conversations")
    parser.add_argument("folder", type=Path, metavar="DST", help="folder to write to")
    args = parser.parse_args()
    write_tokenizer(read_conversations(args.corpus), args.folder)
    print(f"{args.folder}: tokenizer with {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    main()
