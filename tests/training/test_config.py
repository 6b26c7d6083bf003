"""What a training run may be told."""

import pytest

from ovis_jax.errors import ConfigError
from ovis_jax.training.config import read_config

TEXT = """
model = "some/folder"
output = "runs/one"
[learn]
parts = ["llm"]
[data]
train = ["a.json"]
[optimizer]
learning_rate = 1e-3
[run]
steps = 10
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def test_the_file_and_what_overrides_it(path):
    config = read_config(path, ["run.steps=20", "output=runs/two", 'data.train=["b", "c"]'])
    assert config.run.steps == 20 and str(config.output) == "runs/two"
    assert [str(p) for p in config.data.train] == ["b", "c"]
    recipe = config.recipe()
    assert (recipe.learning_rate, recipe.total_steps, recipe.b1) == (1e-3, 20, 0.9)
    lora = read_config(path, ["learn.parts=[]", "learn.lora.rank=4", "learn.lora.scale=2"])
    assert lora.learn.lora and lora.learn.lora.rank == 4 and lora.recipe().adapter_scale == 2
    assert read_config(path, ["mesh.data=2"]).mesh is not None and config.mesh is None


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["run.steps=0"], r"run\.steps: .*greater than or equal to 1"),
        (["run.stepss=1"], r"run\.stepss: Extra inputs are not permitted"),
        (["optimizer.b2=1.0"], r"optimizer\.b2: .*less than 1"),
        (["run.compute_dtype=float16"], r"run\.compute_dtype: .*'float32' or 'bfloat16'"),
        (["learn.parts=[]"], "learn: .*give parts or lora, one of the two"),
        (["learn.lora.rank=4"], "learn: .*give parts or lora, one of the two"),
        (['learn.parts=["head"]'], r"learn: .*\['head'\]: expected some of visual_tokenizer"),
        (["learn.lora.rank=4", "learn.lora.scale=0"], r"scale: .*greater than 0"),
        (["learn.lora.rank=4", "learn.lora.scale=inf"], r"scale: .*finite number"),
        (["data.train=[]"], r"data\.train: .*at least 1 item"),
        (["run.steps=0", "optimizer.b1=-1"], r"optimizer\.b1: .*; run\.steps: "),
        (["steps"], "'steps': expected section.field=value"),
        (["model.name=x"], "model is not a section"),
    ],
)
def test_what_is_wrong_is_named(path, overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_config(path, overrides)


def test_files_that_cannot_be_read(path, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        read_config(tmp_path / "none.toml")
    path.write_text("model =")
    with pytest.raises(ConfigError, match=r"run\.toml cannot be read as TOML"):
        read_config(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="model: Field required; output: Field required"):
        read_config(path)
