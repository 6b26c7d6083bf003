"""The example in the README runs, and the model gives the answers in its table."""

import re
from pathlib import Path

import pytest
from PIL import Image

import ovis_jax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.exhaustive
def test_the_python_example_runs(capsys, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    found = {}
    exec(compile(example, "README.md", "exec"), found)
    config = found["ovis"].config
    length = found["inputs"].tokens.shape[1]
    assert found["logits"].shape == (1, length, config.decoder.vocab_size)
    assert found["samples"].tokens.shape == (4, 1, 16)
    assert found["words"].shape[1:] == (9, config.visual_tokenizer.num_words)
    assert found["answer"] == "The diamond is orange."
    assert capsys.readouterr().out == found["texts"][0]


@pytest.mark.slow
def test_the_answers_in_the_table():
    rows = re.findall(r'^\| <img src="([^"]+)"[^>]*> \| (.*) \| (.*) \|$', README, re.M)
    assert len(rows) == 4
    ovis = ovis_jax.load("ovis-tiny")
    images = [[Image.open(ROOT / picture)] for picture, _, _ in rows]
    inputs = ovis.processor([question for _, question, _ in rows], images)
    out = ovis_jax.generate(ovis.model, ovis.params, inputs, max_new_tokens=64)
    assert ovis.processor.decode(out.tokens) == [answer for _, _, answer in rows]
