import json
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from ovis_jax.config import OvisConfig
from ovis_jax.inputs.conversation import turns_from_sharegpt
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from recipes.ovis_tiny import generate_dataset
from recipes.ovis_tiny.dataset_rows import training_row
from recipes.ovis_tiny.languages import LANGUAGES
from recipes.ovis_tiny.questions import COLOUR_KINDS, KINDS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny-f32"
CONFIGS = ("config.json", "generation_config.json")


def write_rows(folder, make_lines, num_rows):
    generate_dataset.write_dataset(folder, make_lines, num_rows, num_workers=1)
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob("*.jsonl")
    }


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def pictures(row):
    image = row.get("image", [])
    return [image] if isinstance(image, str) else image


def texts_of(row):
    """The texts of a row's turns, or of the prompt of a preference row."""
    turns = row["conversations"] if "conversations" in row else row["prompt"]
    return [turns] if isinstance(turns, str) else [turn["value"] for turn in turns]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the data sets, and their rows."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for make, number in (
        (partial(generate_dataset.training_lines, seed=0), 400),
        (partial(generate_dataset.evaluation_lines, split="validation", seed=0), 52),
        (partial(generate_dataset.evaluation_lines, split="test", seed=0), 520),
        (partial(generate_dataset.preference_lines, seed=0), 60),
    ):
        found |= write_rows(folder, make, number)
    return folder, found


@pytest.mark.exhaustive
def test_the_number_of_workers_does_not_change_the_data(tmp_path):
    options = ["--train", "12", "--validation", "3", "--test", "3", "--pairs", "3", "--seed", "5"]
    for workers in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "recipes.ovis_tiny.generate_dataset",
            str(tmp_path / workers),
        ]
        subprocess.run([*command, *options, "--workers", workers], check=True, cwd=ROOT)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    names = {path.name for path in (tmp_path / "1").glob("*.jsonl")}
    sets = ("train", "validation", "test", "describe", "pairs")
    assert names == {f"{name}.jsonl" for name in sets}


def test_seeds_differ(tmp_path):
    for seed in (0, 1):
        write_rows(tmp_path / str(seed), partial(generate_dataset.training_lines, seed=seed), 5)
    assert not set(files(tmp_path / "0").values()) & set(files(tmp_path / "1").values())


@pytest.mark.slow
def test_rows_have_trainable_labels(data):
    folder, found = data
    read = [json.loads((GOLDEN / name).read_text(encoding="utf-8")) for name in CONFIGS]
    processor = Processor.from_folder(GOLDEN, OvisConfig.from_hf(*read))
    for name in ("train", "describe", "validation", "test"):
        for row in found[name][:60]:
            images = [open_image(folder / path) for path in pictures(row)]
            example = processor.encode_training_example(
                turns_from_sharegpt(row["conversations"]), images
            )
            assert (example.labels >= 0).any()


@pytest.mark.slow
def test_pictures_exist_and_precede_the_first_question(data):
    folder, found = data
    for rows in found.values():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            first, *rest = texts_of(row)
            named = pictures(row)
            assert first.startswith("<image>\n" * len(named))
            assert sum(text.count("<image>") for text in (first, *rest)) == len(named)
            for path in named:
                assert open_image(folder / path).size in ((84, 84), (168, 84))
    assert {len(pictures(row)) for row in found["train"]} == {0, 1, 2}
    drawn = [
        path for name in found if name != "describe" for r in found[name] for path in pictures(r)
    ]
    assert len(set(drawn)) == len(drawn)
    assert {path for row in found["describe"] for path in pictures(row)} == {
        path for row in found["train"] for path in pictures(row)
    }


@pytest.mark.slow
def test_training_rows_have_several_turns_and_both_languages(data):
    _, found = data
    with_one_picture = [row for row in found["train"] if isinstance(row.get("image"), str)]
    turns = Counter(len(row["conversations"]) // 2 for row in with_one_picture)
    assert sum(n for number, n in turns.items() if number >= 3) > 0.6 * len(with_one_picture)
    assert max(turns) <= 8
    without = sum("image" not in row for row in found["train"])
    assert 0.04 < without / len(found["train"]) < 0.13
    german = sum(
        bool(re.search(r" (ist|gibt|sind|zeig\w+) ", texts_of(row)[1])) for row in found["train"]
    )
    assert 0.3 < german / len(found["train"]) < 0.7


def test_evaluation_rows_are_balanced_and_labelled(data):
    _, found = data
    for name, each in (("validation", 2), ("test", 20)):
        counts = Counter((row["kind"], row["metadata"]["language"]) for row in found[name])
        assert counts == {(kind, lang): each for kind in KINDS for lang in LANGUAGES}
        for row in found[name]:
            assert len(row["conversations"]) == (4 if row["kind"] == "follow_up" else 2)
            assert len(row["metadata"]["short"]) <= len(texts_of(row)[-1])
    assert not any(row["metadata"]["paraphrase"] for row in found["validation"])
    unseen = Counter(row["kind"] for row in found["test"] if row["metadata"]["paraphrase"])
    assert unseen == dict.fromkeys(KINDS, 6)


def test_training_lacks_the_phrasings_of_the_test_set(data):
    _, found = data
    learned = {
        text
        for name in ("train", "describe", "validation", "pairs")
        for row in found[name]
        for text in texts_of(row)[::2]
    }
    for row in found["test"]:
        if row["metadata"]["paraphrase"]:
            asked = texts_of(row)[-2].removeprefix("<image>\n").removeprefix("<image>\n")
            assert not any(text.endswith(asked) for text in learned), asked


def test_pairs_prefer_the_short_answer(data):
    _, found = data
    for row in found["pairs"]:
        assert len(row["chosen"]) <= len(row["rejected"])
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in found["pairs"])
    assert shorter > 0.9 * len(found["pairs"])


PINK = re.compile(r"\b(pink|rosa)\b", re.IGNORECASE)


def test_the_held_out_colour_occurs_only_on_request(data, tmp_path):
    _, found = data
    assert not any(PINK.search(json.dumps(row)) for rows in found.values() for row in rows)
    train = write_rows(
        tmp_path, partial(generate_dataset.training_lines, seed=0, colour="pink"), 200
    )["train"]
    assert [bool(PINK.search(" ".join(texts_of(row)))) for row in train] == [False, True] * 100
    test = write_rows(
        tmp_path,
        partial(generate_dataset.evaluation_lines, split="test", seed=0, colour="pink"),
        96,
    )["test"]
    assert {row["kind"] for row in test} == {*COLOUR_KINDS, "follow_up"}
    assert all(PINK.search(" ".join(texts_of(row))) for row in test)


def test_frequencies_of_kinds():
    def count_where_questions(**frequencies: float) -> int:
        rows = [training_row(random.Random(seed), frequencies=frequencies) for seed in range(300)]
        turns = [turn for row in rows for turn in row.entry["conversations"]]
        return sum(" where " in f" {turn['value'].lower()} " for turn in turns)

    assert count_where_questions(where=5) > 1.5 * count_where_questions() > 0
