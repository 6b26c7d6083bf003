"""Make the tokenizer of ovis-tiny: `python -m recipes.ovis_tiny.tokenizer TRAIN.jsonl DST`.

DST then holds tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json, and
preprocessor_config.json, which says how large the crops are.

The structure is Gemma's: byte pair encoding with byte fallback, digits apart, spaces kept, and the
same control marks, fillers and runs of newlines and spaces, with Gemma's ids. Gemma's HTML tags
are left out. tokenizer.json is what transformers would make of tokenizer.model.
"""

import argparse
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from ovis_jax.inputs.conversation import IMAGE_TEXT
from ovis_jax.inputs.tokenizer import DECODER, SPACE, TURN_END, TURN_START
from recipes.ovis_tiny.scenes import CELL, ROWS

VOCAB_SIZE = 1024
SIDE = ROWS * CELL
"""The side of a crop, as large as a square picture."""

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
FILLERS = ["<mask>", "<2mass>", "[@BOS@]", *[f"<unused{i}>" for i in range(99)]]
NEWLINES = ["\n" * length for length in range(1, 32)]
SPACES = [SPACE * length for length in range(2, 32)]
ADDED = [*CONTROL, *FILLERS, TURN_START, TURN_END, *NEWLINES, *SPACES]
"""The added tokens; their places are their ids."""
SPECIAL = [*CONTROL, TURN_START, TURN_END]

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "äöüÄÖÜß"
"""Characters that get a piece even where the corpus lacks them; others fall back to bytes."""


def train(sentences: Iterator[str]) -> bytes:
    """Train the SentencePiece model; the bytes of tokenizer.model."""
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


def corpus(path: Path) -> Iterator[str]:
    """Each conversation of a JSON lines file as one text, with the names of those who speak."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield "\n".join(
                f"{'user' if turn['from'] == 'human' else 'model'}\n"
                f"{turn['value'].replace(IMAGE_TEXT, '').strip()}"
                for turn in json.loads(line)["conversations"]
            )


def fast_tokenizer(model: bytes) -> dict[str, Any]:
    """The content of the tokenizer.json that encodes as a tokenizer.model does.

    A piece is made by a merge of any two pieces, the pieces of higher score first. Of the runs,
    which all score 0, the longer left part comes first, so a run is read greedily from the left.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    # As in Gemma's own file: a tab is an ordinary piece.
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
        # It finds no space any more; it stands there as in Gemma's own file.
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
    """The content of tokenizer_config.json."""
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
    """The content of special_tokens_map.json."""
    tokens = {}
    for name, piece in zip(("pad", "eos", "bos", "unk"), CONTROL, strict=True):
        token = _added_token(piece)
        del token["special"]
        tokens[f"{name}_token"] = token
    return tokens


def preprocessor_config() -> dict[str, Any]:
    """The content of preprocessor_config.json: SigLIP's normalisation, crops of SIDE pixels."""
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


def write(sentences: Iterator[str], folder: Path) -> None:
    """Train on sentences and write all files into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train(sentences)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in (
        ("tokenizer", fast_tokenizer(model)),
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
    """Read the command line and write the tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", type=Path, metavar="TRAIN.jsonl")
    parser.add_argument("folder", type=Path, metavar="DST")
    args = parser.parse_args()
    write(corpus(args.corpus), args.folder)
    print(f"{args.folder}: a tokenizer of {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    main()
