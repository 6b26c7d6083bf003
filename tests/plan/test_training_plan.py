"""Plans for training recipes: arrays, estimates against the compilers, and the command."""

import json
import math
from io import StringIO

import jax
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ovis_jax.cli import app
from ovis_jax.errors import OvisError
from ovis_jax.plan import aot_compile
from ovis_jax.plan.topologies import GIB
from ovis_jax.sharding import param_shapes
from ovis_jax.training import make_training_plan as training_plan
from ovis_jax.training.abstract_step import abstract_step
from ovis_jax.training.make_training_plan import make_training_plan
from ovis_jax.training.memory_estimate import estimate_training_memory
from ovis_jax.training.plan_report import print_training_plan, training_summary_line
from ovis_jax.training.workload_from_recipe import read_training_workload

RECIPE = """
model = "9b"
output_dir = "runs/one"
lora = { rank = 16 }
[data]
train_files = ["a.jsonl"]
max_length = 2048
micro_batch_size = 1
[training]
max_steps = 10
compute_dtype = "bfloat16"
[run]
remat = true
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def full_recipe(tmp_path):
    path = tmp_path / "full.toml"
    parts = 'trainable = ["visual_tokenizer", "visual_embedding", "llm"]'
    path.write_text(RECIPE.replace("lora = { rank = 16 }", parts))
    return path


def test_the_row_follows_from_the_recipe(recipe):
    workload = read_training_workload(recipe, (), "a100:1")
    assert (workload.length, workload.crops_per_row) == (2048, 10)
    workload = read_training_workload(recipe, ["data.max_partition=3"], "a100:1", 2)
    assert workload.crops_per_row == 2 * 4
    workload = read_training_workload(recipe, ["data.max_length=1000"], "a100:1")
    assert (workload.length, workload.crops_per_row) == (1024, 1024 // 196)
    assert read_training_workload(recipe, (), "a100:1", 0).crops_per_row == 0


def test_arrays_of_full_fine_tuning(full_recipe):
    """Weights and two moments in float32, an eighth on each device."""
    overrides = ["mesh.data=8", "data.micro_batch_size=8"]
    workload = read_training_workload(full_recipe, overrides, "v5p:2x2x2")
    step = abstract_step(workload, workload.abstract_mesh)
    size = sum(map(math.prod, param_shapes(workload.config).values()))
    assert sum(x.size for x in step.state.trainable.values()) == size and not step.frozen
    local = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(step.state)]
    assert 3 * size / 8 < sum(local) < 3 * size / 8 * 1.001
    assert step.batch.inputs.pixels.sharding.shard_shape(step.batch.inputs.pixels.shape)[1] == 10
    dpo = read_training_workload(full_recipe, [*overrides, "training.objective=dpo"], "v5p:2x2x2")
    assert estimate_training_memory(dpo).reference == pytest.approx(2 * size / 8, rel=1e-3)


def test_arrays_of_adapters(recipe):
    overrides = ["mesh.data=8", "data.micro_batch_size=8"]
    workload = read_training_workload(recipe, overrides, "v5p:2x2x2")
    step = abstract_step(workload, workload.abstract_mesh)
    assert len(step.state.trainable) == 42 * 4 * 2
    assert step.frozen.keys() == param_shapes(workload.config).keys()
    a = step.state.trainable["decoder/block_0/attn/q/lora_a"]
    assert a.shape == (16, 3584) and a.sharding.shard_shape(a.shape) == (16, 448)


@pytest.mark.parametrize(
    ("topology", "overrides", "images", "gib"),
    [
        ("a100:1", ["quantization=int8"], 1, 13.343),
        ("v5e:2x4", ["mesh.data=8", "data.micro_batch_size=8", "data.max_partition=1"], 4, 7.283),
    ],
)
def test_estimate_is_close_to_the_compiler(recipe, topology, overrides, images, gib):
    """The estimate is between XLA's peak and one and a half times XLA's peak."""
    workload = read_training_workload(recipe, overrides, topology, images)
    assert gib <= estimate_training_memory(workload).peak / GIB <= 1.5 * gib


def test_changes_that_fit(full_recipe):
    plan = make_training_plan(read_training_workload(full_recipe, (), "v5e:2x4"), "arithmetic")
    assert not plan["fits"]
    assert plan["over_by"] == plan["bytes"]["peak"] - plan["bytes"]["usable"] > 0
    line = training_summary_line(plan)
    assert f"{plan['over_by'] / GIB:.2f} GiB short per device" in line
    for change in plan["changes"]:
        assert change["options"] in line and change["peak"] <= plan["bytes"]["usable"]
    assert any("'trainable=[]' lora.rank=16" in x["options"] for x in plan["changes"])
    assert any("quantization=int8" in x["options"] for x in plan["changes"])


def test_smaller_micro_batches_come_before_other_methods(recipe):
    overrides = ["data.micro_batch_size=32", "quantization=int8"]
    plan = make_training_plan(read_training_workload(recipe, overrides, "rtx4090:1"), "arithmetic")
    options = plan["changes"][0]["options"]
    assert options.startswith("data.micro_batch_size=")
    rows, steps = (int(x.partition("=")[2]) for x in options.split())
    assert rows * steps == 32


def test_with_a_compiler(recipe, monkeypatch):
    """Memory that the program does not read is added to the compiler's peak."""
    sizes = dict.fromkeys(("arguments", "output", "aliased", "temp"), 0)
    program = {**sizes, "peak": 5 * GIB, "collectives": {}, "kernels": {}, "compile_seconds": 1.0}
    monkeypatch.setattr(aot_compile, "installed_compiler", lambda platform: "libtpu 1")
    monkeypatch.setattr(training_plan, "analyze_train_step", lambda workload: program)
    workload = read_training_workload(recipe, ["data.gradient_accumulation_steps=2"], "v6e:1x1")
    plan = make_training_plan(workload, notify=lambda message: None)
    assert plan["bytes"]["peak"] == 5 * GIB + plan["bytes"]["optimizer state"] and plan["fits"]
    console = Console(file=StringIO())
    print_training_plan(plan, console)
    assert "compile time" in console.file.getvalue()
    program |= {"error": "RESOURCE_EXHAUSTED: hbm", "peak": 40 * GIB}
    plan = make_training_plan(workload, notify=lambda message: None)
    assert not plan["fits"] and plan["over_by"] > 8 * GIB and plan["changes"]


def test_command(recipe):
    options = ["plan", "--topology", "rtx4090:1", "--method", "arithmetic", "--train", str(recipe)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1 and "optimizer state" in result.stdout
    assert "GiB short per device" in result.stderr and "quantization=int8" in result.stderr
    result = CliRunner().invoke(app, [*options, "quantization=int8", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["training"] == "QLoRA of rank 16 on int8 matrices"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "2"], "--batch-size has no effect with --train; set data.micro_batch"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype has no effect with --train$"),
        (["mesh.data=4"], "data 4 x model 1 needs 4 devices, but v5e:1x1 has 1"),
        (["data.max_length=0"], "data.max_length is 0"),
        (["lora.target_modules=no"], "matches no matrix"),
    ],
)
def test_bad_input(recipe, arguments, message):
    options = ["plan", "--topology", "v5e:1x1", "--method", "arithmetic", "--train", str(recipe)]
    with pytest.raises(OvisError, match=message):
        CliRunner().invoke(app, [*options, *arguments], catch_exceptions=False)


def test_overrides_need_a_recipe():
    with pytest.raises(OvisError, match="overrides need --train RECIPE"):
        options = ["plan", "--topology", "v5e:1x1", "lora.rank=4"]
        CliRunner().invoke(app, options, catch_exceptions=False)
