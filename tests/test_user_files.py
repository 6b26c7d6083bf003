"""Files as Windows and Git leave them: byte order marks, and pointers of Git LFS."""

import codecs
import json
from pathlib import Path

import pytest
from golden_copies import GOLDEN, copy_golden

from ovis_jax import presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.tensor_index import read_tensor_index
from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError, DataError
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.evaluation.results_file import ResultsFile
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.inputs.processor import Processor
from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.json_fields import read_json
from ovis_jax.loading import load
from ovis_jax.training.config import read_train_config

ENCODINGS = {
    "UTF-8": (codecs.BOM_UTF8, "utf-8"),
    "UTF-16 LE": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "UTF-16 BE": (codecs.BOM_UTF16_BE, "utf-16-be"),
}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4be2fe245c4c3c52ce9cf1447c39a283d49c4cb902ddf7709fcec4dfae0275ce\n"
    b"size 4911635952\n"
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=ENCODINGS)
def add_mark(request):
    """Write a UTF-8 file again, with a byte order mark and Windows' line ends."""
    mark, encoding = ENCODINGS[request.param]

    def add_mark(path: Path) -> Path:
        text = path.read_text(encoding="utf-8")
        path.write_bytes(mark + text.replace("\n", "\r\n").encode(encoding))
        return path

    return add_mark


def test_every_json_file_of_a_checkpoint(add_mark, tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "in")
    names = [add_mark(path).name for path in sorted(folder.glob("*.json"))]
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = OvisConfig.from_folder(folder)
    assert config == presets.tiny()
    assert len(read_tensor_index(folder).tensors) == 98
    processor = Processor.from_folder(folder, config)
    original = Processor.from_folder(GOLDEN / "tiny-bf16-sharded", config)
    assert processor.image_config == original.image_config
    for tokenizer in (processor.tokenizer, Tokenizer.from_json(folder)):
        assert tokenizer.encode("<bos>Hi") == original.tokenizer.encode("<bos>Hi") == [2, 558, 535]


def test_rows_and_questions(add_mark, tmp_path):
    turns = [{"from": "human", "value": "Ä?"}, {"from": "gpt", "value": "Ö."}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]), "utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n", "utf-8")
    for name in ("a.json", "a.jsonl"):
        dataset = read_dataset([add_mark(tmp_path / name)])
        assert (dataset.errors, len(dataset.rows)) == ((), 1)
        assert [turn["content"] for turn in dataset.rows[0].turns] == ["Ä?", "Ö."]
    (tmp_path / "q.jsonl").write_text('{"question": "Ä?", "answer": "Ö"}\n', "utf-8")
    (question,) = read_questions(add_mark(tmp_path / "q.jsonl"), raw_prompts=True)
    assert (question.prompt[0]["content"], question.expected) == ("Ä?", "Ö")


def test_training_config(add_mark, tmp_path):
    original = ROOT / "recipes/ovis_tiny/short.toml"
    copy = tmp_path / "a.toml"
    copy.write_bytes(original.read_bytes())
    assert read_train_config(add_mark(copy)) == read_train_config(original)


def test_results_file_is_resumed(tmp_path):
    path, header = tmp_path / "results.jsonl", {"model": "a"}
    with ResultsFile(path, header) as file:
        file.add({"id": 1, "answer": "Ä"})
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    with ResultsFile(path, header) as file:
        assert file.results == [{"id": 1, "answer": "Ä"}]


def test_a_mark_in_the_middle_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(codecs.BOM_UTF8 + '{"a": "\ufeffb"}'.encode())
    assert read_json(path) == {"a": "\ufeffb"}


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json"])
def test_git_lfs_pointer_of_a_small_file(tmp_path, name):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ConfigError, match="it is a Git LFS pointer, not the file itself; run `git"):
        load(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as JSON: it is a Git L"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_git_lfs_pointer_of_a_dataset(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(POINTER)
    for read in (read_questions, lambda path: read_dataset([path])):
        with pytest.raises(DataError, match=rf"^{path} is a Git LFS pointer, not the file itself"):
            read(path)


@pytest.mark.parametrize("name", ["tiny-f32", "tiny-bf16-sharded"])
def test_git_lfs_pointers_of_weights(tmp_path, name):
    folder = copy_golden(name, tmp_path / "in")
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        path.write_bytes(POINTER)
    with pytest.raises(CheckpointValidationError) as caught:
        load(folder)
    rows = caught.value.problems
    assert [(row.file, row.problem) for row in rows if not row.key] == [
        (path.name, "Git LFS pointer") for path in shards
    ]
    assert "run `git lfs pull` in its folder" in rows[0].found
