"""Training configs: files, overrides, and messages about invalid fields."""

import re

import pytest

from ovis_jax.errors import TrainingError
from ovis_jax.training.config import read_train_config

TEXT = """
model = "some/folder"
output_dir = "runs/one"
trainable = ["llm"]
[data]
train_files = ["a.json"]
[training]
max_steps = 10
learning_rate = 1e-3
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def test_overrides(path):
    overrides = ["training.max_steps=20", "output_dir=runs/two", 'data.train_files=["b", "c"]']
    config = read_train_config(path, overrides)
    assert str(config.output_dir) == "runs/two"
    assert [str(p) for p in config.data.train_files] == ["b", "c"]
    step = config.training
    assert (step.learning_rate, step.max_steps, step.adam_beta1) == (1e-3, 20, 0.9)
    assert config.mesh is None and config.lora_scale == 1.0
    assert read_train_config(path, ["mesh.data=2"]).mesh is not None


def test_single_strings_are_lists(path):
    config = read_train_config(path, ["trainable=visual_tokenizer", "data.train_files=b.json"])
    assert config.trainable == ("visual_tokenizer",)
    assert [str(p) for p in config.data.train_files] == ["b.json"]


def test_max_partition_depends_on_the_number_of_images(path):
    """The original's `max_partitions`: one image, several images, video."""

    def partitions(*overrides):
        data = read_train_config(path, overrides).data
        return [data.max_partition_for(number) for number in (0, 1, 2, 5)]

    assert partitions() == partitions("data.max_partition=9|1|1") == [9, 9, 1, 1]
    assert partitions("data.max_partition= 4 | 2 | 1") == [4, 4, 2, 2]
    assert partitions("data.max_partition=6") == [6, 6, 6, 6]


def test_the_folder_of_images_is_relative_to_the_current_folder(path, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(read_train_config(path, ["data.images=pictures"]).data.images) == "pictures"


def test_lora_scale_is_alpha_over_rank(path):
    lora = ["trainable=[]", "lora.rank=4"]
    assert read_train_config(path, lora).lora_scale == 1.0
    assert read_train_config(path, [*lora, "lora.alpha=8"]).lora_scale == 2.0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["training.max_steps=0"],
            "training.max_steps is 0, expected a number greater than or equal to 1, for example"
            " training.max_steps=1000",
        ),
        (
            ["training.steps=1"],
            "training.steps is not a field, expected one of training.max_steps, training.learning",
        ),
        (
            ["learn.parts=llm"],
            "learn is not a field, expected one of model, quantization, output_dir, trainable",
        ),
        (["max_steps=1"], "max_steps is not a field, expected training.max_steps"),
        (["data.seed=1"], "data.seed is not a field, expected run.seed"),
        (["training.adam_beta2=1.0"], "training.adam_beta2 is 1.0, expected a number less than 1"),
        (["training.adam_beta2=x"], 'training.adam_beta2 is "x", expected a valid number, for'),
        (
            ["training.compute_dtype=float16"],
            "training.compute_dtype is \"float16\", expected 'float32' or 'bfloat16', for example"
            ' training.compute_dtype="float32"',
        ),
        (
            ["trainable=head"],
            "trainable is \"head\", expected 'visual_tokenizer', 'visual_embedding' or 'llm', for"
            ' example trainable=["llm"]',
        ),
        (["trainable=3"], 'trainable is 3, expected a list, for example trainable=["llm"]'),
        (["trainable=[]"], "trainable and lora are both missing, expected one of them"),
        (
            ["lora.rank=4"],
            "trainable and lora are both given, expected one of them: set trainable=[] to train"
            " adapters, or remove lora",
        ),
        (["lora=4"], "lora is 4, expected a table, for example lora.rank=16"),
        (["lora.rank=4", "lora.alpha=0"], "lora.alpha is 0, expected a number greater than 0"),
        (["lora.rank=4", "lora.alpha=inf"], "lora.alpha is Infinity, expected a finite number"),
        (["data.train_files=[]"], "data.train_files is [], expected at least one entry"),
        (
            ["data.max_partition=9|1"],
            'data.max_partition is "9|1", expected a number of at least 1, or three such numbers',
        ),
        (
            ["data.train_weights=[1, 2]"],
            "data.train_weights has 2 numbers, expected one for each of the 1 data.train_files",
        ),
        (["data.train_weights=[0]"], "data.train_weights is 0, expected a number greater than 0"),
        (["data.max_partition=0"], "data.max_partition is 0, expected a number of at least 1"),
        (["data.max_partition=9|1|0"], 'data.max_partition is "9|1|0", expected a number'),
        (["data.max_partition=true"], "data.max_partition is true, expected a number"),
        (["data.images=nowhere"], 'data.images is "nowhere", expected an existing folder, for'),
        (["steps"], "expected FIELD=VALUE, for example training.max_steps=1000"),
        (["model.name=x"], "model is not a table"),
    ],
)
def test_invalid_overrides(path, overrides, message):
    """The message names the override and not the file, which is valid."""
    with pytest.raises(TrainingError, match=re.escape(f"override {overrides[-1]}: {message}")):
        read_train_config(path, overrides)


def test_all_invalid_fields_are_reported(path):
    path.write_text(TEXT + "adam_beta1 = -1\nadam_beta2 = 2\n")
    with pytest.raises(TrainingError) as raised:
        read_train_config(path, ["training.max_steps=0"])
    in_override, in_file = str(raised.value).split(f"; {path}: ")
    assert in_override.startswith("override training.max_steps=0: training.max_steps is 0, ")
    assert in_file.startswith("training.adam_beta1 is -1, expected")
    assert "; training.adam_beta2 is 2, expected" in in_file


def test_files_that_cannot_be_read(path, tmp_path):
    with pytest.raises(TrainingError, match=r"none\.toml cannot be read"):
        read_train_config(tmp_path / "none.toml")
    path.write_text("model =")
    with pytest.raises(TrainingError, match=r"run\.toml cannot be read as TOML"):
        read_train_config(path)
    path.write_text("")
    message = (
        'model is missing; add it, for example model="ovis-tiny"; output_dir is missing; add it,'
        ' for example output_dir="runs/first"; data is missing; add it, for example'
        ' data.train_files=["train.jsonl"]; training is missing; add it, for example'
        " training.max_steps=1000"
    )
    with pytest.raises(TrainingError, match=re.escape(message)):
        read_train_config(path)
