"""The bundled checkpoint is small, matches its card, and gives correct answers."""

import re

import numpy as np
import pytest

import ovis_jax
from ovis_jax.checkpoint.resolve import BUNDLED, resolve_checkpoint
from recipes.ovis_tiny import init_checkpoint, measure_accuracy

pytestmark = pytest.mark.optimized

FOLDER = BUNDLED["ovis-tiny"]


@pytest.fixture(scope="module")
def ovis():
    return ovis_jax.load("ovis-tiny")


def test_it_has_at_most_8_mb_in_the_hub_s_layout():
    assert resolve_checkpoint("ovis-tiny").folder == FOLDER
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 8_000_000
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
    } < files.keys()


def test_its_config_is_the_recipe_s(ovis):
    assert ovis.config == init_checkpoint.ovis_tiny_config(ovis.config.decoder.vocab_size)
    assert len(ovis.processor.tokenizer.pieces) == ovis.config.decoder.vocab_size


@pytest.mark.exhaustive
def test_it_gives_correct_answers(ovis, draw_test):
    """The card uses 100 questions per kind. With 20 here, a kind at 85 % may score lower."""
    answers = list(measure_accuracy.answer_test_questions(ovis, draw_test(rounds=10)))
    assert len(answers) == 260
    summary = measure_accuracy.summarize_accuracy(answers)
    accuracy = {kind: columns[measure_accuracy.ALL] for kind, columns in summary.items()}
    mean = accuracy.pop(measure_accuracy.MEAN)
    assert len(accuracy) == 13
    assert mean >= 0.95 and min(accuracy.values()) >= 0.75, accuracy


def test_the_card_meets_the_requirements():
    text = (FOLDER / "README.md").read_text()
    number = int(re.search(r"to ([\d,]+) questions about test scenes", text)[1].replace(",", ""))
    rows = dict(re.findall(r"^\| (\w[\w ]*) \| ([\d.]+)%", text, re.M))
    mean = float(rows.pop(measure_accuracy.MEAN))
    assert number >= 1000 and len(rows) == 13
    assert mean >= 95 and min(map(float, rows.values())) >= 85
    assert mean == pytest.approx(np.mean(list(map(float, rows.values()))), abs=0.1)


@pytest.mark.slow
def test_a_second_turn_and_another_language(ovis, draw_test):
    """A follow-up question in German."""
    (answer, line) = next(
        pair
        for pair in measure_accuracy.answer_test_questions(ovis, draw_test(rounds=1))
        if pair[1]["kind"] == "follow_up" and pair[1]["metadata"]["language"] == "de"
    )
    assert len(line["conversations"]) == 4
    assert answer.text == line["conversations"][-1]["value"]
