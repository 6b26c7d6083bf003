"""The checkpoint that comes with the library is small, true to its card, and gives true answers."""

import re

import numpy as np
import pytest

import ovis_jax
from ovis_jax.checkpoint.source import BUILT_IN, find_source
from recipes.ovis_tiny import score, start

FOLDER = BUILT_IN["ovis-tiny"]


@pytest.fixture(scope="module")
def ovis():
    return ovis_jax.load("ovis-tiny")


def test_it_is_at_most_8_mb_in_the_hubs_layout():
    assert find_source("ovis-tiny").folder == FOLDER
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


def test_its_config_is_the_recipes(ovis):
    assert ovis.config == start.config(ovis.config.decoder.vocab_size)
    assert len(ovis.processor.tokenizer.pieces) == ovis.config.decoder.vocab_size


def test_it_gives_true_answers(ovis, draw_test):
    """The card has 100 questions a kind; here are 20, so that a kind at 85 % may come out lower."""
    found = list(score.answers(ovis, draw_test(rounds=10)))
    assert len(found) == 260
    shares = {kind: columns[score.ALL] for kind, columns in score.shares_by_kind(found).items()}
    mean = shares.pop(score.MEAN)
    assert len(shares) == 13
    assert mean >= 0.95 and min(shares.values()) >= 0.75, shares


def test_the_card_says_what_was_asked_of_it():
    text = (FOLDER / "README.md").read_text()
    number = int(re.search(r"to ([\d,]+) questions about test scenes", text)[1].replace(",", ""))
    rows = dict(re.findall(r"^\| (\w[\w ]*) \| ([\d.]+)%", text, re.M))
    mean = float(rows.pop(score.MEAN))
    assert number >= 1000 and len(rows) == 13
    assert mean >= 95 and min(map(float, rows.values())) >= 85
    assert mean == pytest.approx(np.mean([float(share) for share in rows.values()]), abs=0.1)


def test_a_second_turn_and_another_language(ovis, draw_test):
    """What the README's reader does next: go on talking."""
    (answer, line) = next(
        pair
        for pair in score.answers(ovis, draw_test(rounds=1))
        if pair[1]["kind"] == "follow_up" and pair[1]["language"] == "de"
    )
    assert len(line["conversations"]) == 4
    assert answer.text == line["conversations"][-1]["value"]
