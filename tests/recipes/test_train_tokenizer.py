import json
import random
import string
from pathlib import Path

import pytest

from ovis_jax.inputs.image_processing import ImageProcessorConfig
from ovis_jax.inputs.tokenizer import Tokenizer
from recipes.ovis_tiny import dataset_rows, generate_dataset, train_tokenizer


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(0)
    return [
        turn["value"]
        for _ in range(800)
        for turn in dataset_rows.training_row(rng).entry["conversations"]
    ]


@pytest.fixture(scope="module")
def folder(sentences, tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.write_tokenizer(iter([*sentences, *["user\nmodel"] * 500]), made)
    return made


@pytest.fixture(scope="module")
def texts(sentences):
    """Sentences, unseen words, umlauts, bytes, special tokens, and runs of newlines and spaces."""
    rng = random.Random(1)
    parts = [
        *["\n" * 33, "\n", "\n\n", " " * 33, " ", "  ", "▁", "\t", "\r\n", "\0", "\ufeff"],
        *["ÄÖÜäöüß", "Straße", "über", "grö", "é", "e\u0301", "图", "🚀", "👩\u200d🚀", "𝄞"],
        *["pink", "rosa", "12", "3.", "<image>", "<0x41>", "<mask>", "<unused1", "model", "user"],
        *["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<", "..."],
        *string.ascii_letters,
    ]
    mixed = ["".join(rng.choices([*parts, *sentences], k=rng.randint(1, 8))) for _ in range(2000)]
    letters = ["".join(rng.choices(string.printable + "äöüß", k=20)) for _ in range(500)]
    return [*sentences[:1000], *mixed, *letters, ""]


def test_both_tokenizer_files_encode_alike_and_decode(folder, texts):
    slow, fast = Tokenizer.from_sentencepiece(folder), Tokenizer.from_json(folder)
    assert len(texts) > 3000
    for text in texts:
        ids = slow.encode(text)
        assert fast.encode(text) == ids, text
        assert slow.encode(text, parse_special_tokens=False) == fast.encode(
            text, parse_special_tokens=False
        ), text
        # Pieces write a space as U+2581, as in Gemma.
        for each in (slow, fast):
            assert each.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.slow
def test_transformers_agrees(folder, texts):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in texts:
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == fast.decode(ids, skip_special_tokens=True)
    assert fast("a")["input_ids"][0] == fast.bos_token_id == 2


def test_ids_are_those_of_gemma(folder):
    ours = Tokenizer.from_folder(folder)
    assert len(ours.pieces) == train_tokenizer.VOCAB_SIZE
    for i, piece in [
        *enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]),
        *[(7, "<unused0>"), (105, "<unused98>"), (106, "<start_of_turn>"), (107, "<end_of_turn>")],
        *[(108, "\n"), (138, "\n" * 31), (139, "▁▁"), (168, "▁" * 31), (169, "<0x00>")],
        *[(178, "\t"), (424, "<0xFF>")],
    ]:
        assert ours.token_to_id(piece) == i
    assert ours.special_ids == {0, 1, 2, 3, 106, 107}


def test_frequent_words_and_all_characters_are_pieces(folder):
    ours = Tokenizer.from_folder(folder)
    for text in ("user", "model", "▁circle", "▁Dreieck", "▁grün", "▁Größe"):
        ours.token_to_id(text)
    for character in string.ascii_letters + string.digits + "äöüÄÖÜß.,?!":
        assert len(ours.encode(character)) == 1
    assert len(ours.encode("2026")) == 4


def test_the_same_corpus_gives_the_same_files(folder, sentences, tmp_path):
    train_tokenizer.write_tokenizer(iter([*sentences, *["user\nmodel"] * 500]), tmp_path)
    for made in folder.iterdir():
        assert (tmp_path / made.name).read_bytes() == made.read_bytes(), made.name


def test_read_conversations(tmp_path):
    generate_dataset.write_dataset(tmp_path, lambda folder, index: LINES, 1, num_workers=1)
    assert list(train_tokenizer.read_conversations(tmp_path / "train.jsonl")) == [
        "user\nWhat?\nmodel\nThat."
    ]


LINES = {
    "train": [
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "That."},
            ]
        }
    ]
}


def test_crops_have_the_size_of_square_pictures(folder):
    settings = ImageProcessorConfig.from_folder(folder, 84)
    assert settings.crop_size == 84
    golden = Path(__file__).parents[1] / "golden" / "tiny-f32" / "preprocessor_config.json"
    expected = json.loads(golden.read_text(encoding="utf-8"))
    made = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert made == {**expected, "size": {"height": 84, "width": 84}}
