"""The parts of tools/make_goldens.py that need neither PyTorch nor the original code."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_copies import GOLDEN
from PIL import Image

from ovis_jax.verify_goldens import GoldenFile, compare_with_golden
from tools import make_goldens as tool
from tools.make_goldens import Case, GoldenError

SCRIPT = Path(__file__).parents[2] / "tools" / "make_goldens.py"
WIDE = str(GOLDEN / "images" / "wide.png")
TALL = str(GOLDEN / "images" / "tall.png")
SUPPORTED = {"torch": "2.13.0+cpu", "transformers": "4.46.2", "pillow": "10.3.0"}


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def stored(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Meta and the other fields of a golden file of the original code."""
    with np.load(GOLDEN / "cases" / f"{case}.npz") as file:
        fields = dict(file)
    return json.loads(str(fields.pop("meta"))), fields


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def test_imports_nothing_of_this_project():
    others = imported(SCRIPT) - set(sys.stdlib_module_names)
    assert others == {"numpy", "PIL", "torch", "transformers"}


def test_cases_take_the_images_in_front_of_them():
    cases = tool.read_cases(
        [
            ("image", WIDE),
            ("prompt", "Who?"),
            ("prompt", "Why?"),
            ("image", WIDE),
            ("image", TALL),
            ("prompt", "Is <image> like <image>?"),
        ]
    )
    assert cases == [
        Case("1-wide", "<image>\nWho?", (Path(WIDE),)),
        Case("2-text", "Why?", ()),
        Case("3-wide", "Is <image> like <image>?", (Path(WIDE), Path(TALL))),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no prompt is given; add --prompt"),
        ([("prompt", "Who?"), ("image", WIDE)], "wide.png comes after the last --prompt"),
        ([("prompt", "Who?"), ("prompt", " ")], "prompt 2 is empty"),
        ([("image", WIDE), ("prompt", "<image><image>")], "2 <image> but 1 --image"),
        ([("prompt", "What is <image>?")], "1 <image> but 0 --image"),
        ([("image", "none.png"), ("prompt", "Who?")], "none.png does not exist; check the path"),
        ([("image", __file__), ("prompt", "Who?")], "cannot be decoded as an image"),
    ],
)
def test_cases_that_make_no_sense(options, message: str):
    with pytest.raises(GoldenError, match=message):
        tool.read_cases(options)


def test_image_that_the_original_misreads(tmp_path):
    Image.new("RGB", (30, 3)).save(tmp_path / "flat.png")
    with pytest.raises(GoldenError, match="flat.png is 3 pixels high"):
        tool.read_image(tmp_path / "flat.png")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transformers": "5.24.0"}, r"transformers is 5.24.0, expected 4.46.x.*==4.46.2"),
        ({"transformers": "4.5.1"}, "transformers is 4.5.1"),
        ({"pillow": "13.0.0"}, "Pillow is 13.0.0, expected a version before 13"),
        ({"torch": None}, "torch is not installed; install torch"),
    ],
)
def test_versions_it_was_not_made_for(changed, message: str):
    tool.check_versions(SUPPORTED)
    with pytest.raises(GoldenError, match=message):
        tool.check_versions(SUPPORTED | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llava"}, "model_type in config.json of DIR is 'llava', expected 'ovis'"),
        ({"llm_config": {"model_type": "qwen2"}}, "llm_config.model_type .* 'gemma2' or 'llama'"),
        ({"visual_tokenizer_config": {}}, "visual_tokenizer_config.model_type .* is None"),
        ({"quantization_config": {}}, "quantized weights are not supported"),
        ({"auto_map": {}}, "auto_map .* names no AutoModelForCausalLM"),
        (
            {
                "visual_tokenizer_config": {
                    "model_type": "siglip_visual_tokenizer",
                    "tokenize_function": "gumbel_argmax",
                }
            },
            "draws random numbers",
        ),
    ],
)
def test_configs_of_other_models(changed, message: str):
    config = json.loads((GOLDEN / "tiny-f32" / "config.json").read_text())
    tool.check_config(config, "DIR")
    with pytest.raises(GoldenError, match=message):
        tool.check_config(config | changed, "DIR")


def test_folder_without_its_code(tmp_path):
    config = json.loads((GOLDEN / "tiny-f32" / "config.json").read_text())
    with pytest.raises(GoldenError, match=r"modeling_ovis.py does not exist.*copy its .py files"):
        tool.check_config(config, str(tmp_path))
    (tmp_path / "modeling_ovis.py").touch()
    tool.check_config(config, str(tmp_path))


@pytest.mark.exhaustive
def test_verify_reads_what_is_written(load_golden, tmp_path):
    """The fields that the writer needs are all that verify reads."""
    meta, fields = stored("tiny-f32/square")
    fields = {name: fields[name] for name in (*tool.TEXT_FIELDS, *tool.IMAGE_FIELDS)}
    images = tuple(GOLDEN / "images" / name for name in meta["images"])
    golden = tmp_path / "out" / "case.npz"
    with tool.new_folder(golden.parent) as folder:
        names = tool.copy_images([Case("case", meta["text"], images)], folder / "images")
        meta["images"] = [names[path] for path in images]
        tool.write_golden(folder / golden.name, meta, fields)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in golden.parent.iterdir()} == {"case.npz", "images"}
    with np.load(golden) as file:
        assert json.loads(str(file["meta"])) == meta
        assert all(np.array_equal(file[name], array) for name, array in fields.items())
    ovis = load_golden("tiny-f32", "float32")
    stages = compare_with_golden(ovis, GoldenFile(golden))
    assert {"token ids", "crops", "vision features", "logits"} <= {stage.name for stage in stages}
    assert all(stage.passed for stage in stages), stages


def test_verify_reads_the_dtype(tmp_path):
    meta, fields = stored("tiny-f32/square")
    tool.write_golden(tmp_path / "a.npz", meta, fields)
    tool.write_golden(tmp_path / "b.npz", meta | {"compute": "bf16"}, fields)
    dtypes = [GoldenFile(tmp_path / f"{name}.npz").dtype for name in "ab"]
    assert dtypes == ["float32", "bfloat16"]


@pytest.mark.parametrize("name", [*tool.TEXT_FIELDS, *tool.IMAGE_FIELDS])
def test_missing_field_is_not_written(name: str, tmp_path):
    meta, fields = stored("tiny-f32/square")
    del fields[name]
    with pytest.raises(GoldenError, match=f"gave no {name}: this script does not fit that code"):
        tool.write_golden(tmp_path / "case.npz", meta, fields)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_needs_the_vision_blocks():
    _, fields = stored("tiny-f32/square")
    tool.check_fields(fields, bfloat16=True)
    del fields["siglip_hidden"]
    tool.check_fields(fields, bfloat16=False)
    with pytest.raises(GoldenError, match="gave no siglip_hidden"):
        tool.check_fields(fields, bfloat16=True)


def test_nan_is_not_written(tmp_path):
    meta, fields = stored("tiny-f32/text_only")
    fields["logits"][3, 5] = np.nan
    with pytest.raises(GoldenError, match="logits holds infinities or NaN"):
        tool.write_golden(tmp_path / "case.npz", meta, fields)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    meta, fields = stored("tiny-f32/text_only")

    def savez(file, **_arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space"), tool.new_folder(tmp_path / "out") as folder:
        tool.write_golden(folder / "case.npz", meta, fields)
    assert list(tmp_path.iterdir()) == []


def test_images_of_one_name_are_numbered(tmp_path):
    paths = [tmp_path / folder / "cat.png" for folder in "abc"]
    for n, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes([n]))
    cases = [Case("1", "", (paths[0], paths[1])), Case("2", "", (paths[0], paths[2]))]
    names = tool.copy_images(cases, tmp_path / "images")
    assert names == dict(zip(paths, ["cat.png", "cat-2.png", "cat-3.png"], strict=True))
    assert [(tmp_path / "images" / names[path]).read_bytes() for path in paths] == [
        b"\0",
        b"\1",
        b"\2",
    ]


def test_existing_output_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert tool.main(["DIR", str(out), "--prompt", "Who?"]) == 2
    assert f"error: {out} already exists; remove it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
    out.rename(tmp_path / "out.partial")
    with pytest.raises(GoldenError, match="another run is writing it, or one was killed"):
        tool.check_new(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-partition", "0"], "'0' is not a positive whole number"),
        (["--max-new-tokens", "few"], "'few' is not a positive whole number"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_options_with_wrong_values(options: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.parse_arguments(["DIR", "OUT", "--prompt", "Who?", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_refuses_the_transformers_of_this_environment(tmp_path):
    """It is 5.x next to PyTorch, and absent without it."""
    out = tmp_path / "out"
    result = run(GOLDEN / "tiny-f32", out, "--image", WIDE, "--prompt", "Who?")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "'transformers==4.46.2'" in result.stderr
    assert not out.exists()


def test_help_explains_the_order_of_options():
    result = run("--help")
    assert result.returncode == 0
    assert "Each --prompt takes the --image options in front of it" in result.stdout
