"""What the README shows runs as it is printed, and says what it says."""

import re
from pathlib import Path

import pytest
from PIL import Image

import ovis_jax
from ovis_jax.training.config import read_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(capsys, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) == 3
    monkeypatch.chdir(ROOT)
    found = {}
    exec(compile("\n".join(examples), "README.md", "exec"), found)
    config = found["ovis"].config
    length = found["inputs"].tokens.shape[1]
    assert found["logits"].shape == (1, length, config.decoder.vocab_size)
    assert found["draws"].tokens.shape == (4, 1, 16)
    assert found["words"].shape[1:] == (9, config.visual_tokenizer.num_words)
    assert [warm.bucket for warm in found["warm"]] == list(found["buckets"])
    assert found["processor"](["Hi"]).tokens.shape == (1, 64)
    assert found["metrics"].loss > 1.0 and found["params"].keys() == found["ovis"].params.keys()
    assert capsys.readouterr().out.startswith(found["texts"][0][:5])


def test_the_pictures_get_the_answers_that_are_printed():
    rows = re.findall(r'^\| <img src="([^"]+)"[^>]*> \| (.*) \| (.*) \|$', README, re.M)
    assert len(rows) == 4
    ovis = ovis_jax.load("ovis-tiny")
    images = [[Image.open(ROOT / picture)] for picture, _, _ in rows]
    inputs = ovis.processor([question for _, question, _ in rows], images)
    out = ovis_jax.generate(ovis.model, ovis.params, inputs, max_new_tokens=64)
    assert ovis.processor.decode(out.tokens) == [answer for _, _, answer in rows]


def test_the_training_config_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    config = read_config(path)
    assert config.mesh is not None and config.mesh.data * config.mesh.model == 8
    lora = re.search(r"^# (lora = .*)$", text, re.M)
    assert lora
    path.write_text(re.sub(r"^parts = .*$", lora[1], text, flags=re.M))
    assert read_config(path).learn.lora is not None


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
