"""Plans by arithmetic: figures of the 9B that were measured, what does not fit, and bad input."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ovis_jax import presets
from ovis_jax.cli import app
from ovis_jax.errors import OvisError
from ovis_jax.plan import compiler
from ovis_jax.plan.advice import fits, smallest_change
from ovis_jax.plan.arguments import default_mesh
from ovis_jax.plan.command import find_config, make_case
from ovis_jax.plan.devices import DEVICES, GIB, find_topology, parse_mesh
from ovis_jax.plan.estimate import floors, needs, prefill_flops, usable_bytes, vision_temp
from ovis_jax.plan.report import make_plan, verdict
from ovis_jax.sharding import param_shapes

NINE = presets.ovis1_6_gemma2_9b()


def case(topology="v5e:2x4", batch=8, max_length=8192, **more):
    return make_case(NINE, topology, batch, max_length, **more)


@pytest.mark.parametrize(
    ("topology", "batch", "max_length", "gib"),
    [
        # What XLA counts as the arguments of the compiled decode step.
        ("v5e:2x4", 8, 8192, 4.1217),
        ("h100:1", 1, 8192, 19.1828),
        ("v6e:1x1", 1, 4096, 18.5267),
    ],
)
def test_arguments_of_decode_are_those_of_the_compiler(topology, batch, max_length, gib):
    found = make_plan(case(topology, batch, max_length), "arithmetic")
    assert found["arithmetic"]["decode_arguments"] / GIB == pytest.approx(gib, rel=1e-3)
    assert found["fits"] and found["bytes"]["peak"] < found["bytes"]["usable"]


@pytest.mark.parametrize(
    ("topology", "batch", "max_length", "gib"),
    [
        ("v5e:2x4", 8, 8192, 2.2199),
        ("v6e:1x1", 1, 4224, 0.3488),
        ("v6e:2x2", 8, 8192, 1.7864),
        ("v5p:2x2x1", 8, 8192, 2.1770),
        ("h100:1", 1, 4096, 0.3028),
        ("h100:8", 8, 8192, 2.0627),
        ("a100:1", 1, 4096, 0.3009),
    ],
)
def test_temporary_arrays_of_prefill_are_about_those_of_the_compiler(
    topology, batch, max_length, gib
):
    """An estimate: never below what XLA made of it, and not twice as much."""
    found = needs(case(topology, batch, max_length)).prefill_temp / GIB
    assert gib <= found <= 2 * gib


def test_weights_are_cut_over_model_and_the_cache_over_both_axes():
    whole, cut = needs(case("h100:1", 8)), needs(case(mesh="data=2,model=4"))
    size = 2 * sum(map(math.prod, param_shapes(NINE).values()))
    assert sum(whole.weights.values()) == size
    assert sum(cut.weights.values()) == pytest.approx(size / 4, rel=2e-3)
    # A ring of 4096 in every other block; the rest is int32 lengths.
    slots = 21 * 4096 + 21 * 8192
    assert 0 <= whole.cache - 8 * slots * 2 * 8 * 256 * 2 <= 8 * 4
    assert cut.cache == pytest.approx(whole.cache / 8, rel=1e-6)


def test_floors():
    one = case("v5e:2x4", 8)
    found = floors(one, needs(one))
    assert found.decode_seconds == pytest.approx(4.1215 * GIB / 0.819e12, rel=1e-3)
    # 85 sums of [8, 3584] bfloat16, of which a device sends 2 x 7/8.
    assert found.decode_link_bytes == 85 * 8 * 3584 * 2 * 7 // 4
    alone = case("h100:1", 1)
    assert floors(alone, needs(alone)).decode_link_bytes == 0
    # Two operations a weight of the blocks and position, and attention; images come on top.
    blocks = 42 * (2 * 24 * 256 * 3584 + 3 * 14336 * 3584)
    assert 1 < prefill_flops(alone) / (2 * 8192 * blocks) < 1.2
    assert prefill_flops(replace(alone, images=1)) > prefill_flops(alone)


def test_a_large_batch_is_bound_by_products():
    many = case("v5p:2x2x2", 8 * 512, 128)
    need = needs(many)
    assert floors(many, need).decode_seconds > need.weights["decoder"] / 2.765e12


def test_default_mesh():
    assert default_mesh(NINE, 8) == (1, 8)
    assert default_mesh(NINE, 16) == (2, 8)  # 8 key heads
    assert default_mesh(NINE, 3) == (3, 1)
    assert default_mesh(presets.tiny(), 8) == (4, 2)


def test_too_large_for_one_chip():
    one = case("v5e:1x1", 1)
    assert not fits(one)
    found = make_plan(one, "arithmetic")
    assert not found["fits"]
    assert found["over_by"] == found["bytes"]["peak"] - usable_bytes(one) > 0
    assert found["change"]["options"] == "--topology v5e:2x2"
    assert "GiB a device too much" in verdict(found) and "--topology v5e:2x2" in verdict(found)


def test_the_smallest_change_comes_first():
    options, changed = smallest_change(case("v6e:2x4", 8, mesh="data=8,model=1", images=1))
    assert options == "--mesh data=4,model=2" and fits(changed)
    options, changed = smallest_change(case("v5e:2x4", 64))
    assert options.startswith("--batch ") and fits(changed)
    assert not fits(replace(changed, batch=changed.batch + 1))
    options, changed = smallest_change(case("v6e:1x1", 1, 100_000))
    assert options.startswith("--max-length ") and fits(changed)
    assert not fits(replace(changed, max_length=changed.max_length + 128))


def test_images_leave_little_room_for_shorter_rows():
    """Rows shorter than their images are not possible, which is no reason to give up."""
    options, changed = smallest_change(case("v6e:1x1", 1, 45_000, images=15))
    assert options.startswith("--max-length ") and fits(changed)
    assert changed.max_length >= changed.visual_positions
    assert not fits(replace(changed, max_length=changed.max_length + 128))


def test_crops_are_cut_over_data():
    """Eight devices with eight times the rows: each has what one device alone has."""
    one, eight = case("h100:1", 4, images=1), case("h100:8", 32, images=1, mesh="data=8,model=1")
    assert vision_temp(eight) == vision_temp(one)


def test_nothing_of_the_kind_fits():
    """One key head cannot be cut, so that every device has all of the model."""
    config = replace(NINE, decoder=replace(NINE.decoder, num_kv_heads=1))
    found = make_plan(make_case(config, "v5e:4x4", 16, 512), "arithmetic")
    assert found["mesh"] == {"data": 16, "model": 1} and found["change"] is None
    assert "no topology of this kind" in verdict(found)


def test_unknown_topology_names_all():
    with pytest.raises(OvisError, match="'v5e:3x3'") as raised:
        find_topology("v5e:3x3")
    for kind, device in DEVICES.items():
        assert f"{kind}:{', '.join(device.shapes)}" in str(raised.value)
    with pytest.raises(OvisError, match="v9:1x1"):
        find_topology("v9:1x1")


def test_devices_of_topologies():
    assert find_topology("V5E:2x4").num_devices == 8
    assert find_topology("tpu7x:2x2x1").num_devices == 8  # two a chip
    assert find_topology("v4:2x2x1").num_devices == 4
    assert find_topology("a100:3").num_devices == 3
    assert [one.name for one in find_topology("v6e:2x4").larger()] == ["v6e:4x4", "v6e:4x8"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mesh": "data=1,model=16", "topology": "v5e:4x4"}, r"letter K has size 8.*'model'.*16"),
        ({"mesh": "data=2,model=4", "batch": 3}, r"letter B has size 3.*'data' of size 2"),
        ({"mesh": "data=2,model=2"}, r"4 places and v5e:2x4 has 8 devices"),
        ({"images": 5}, r"take 9800 positions, max-length is 8192"),
        ({"batch": 0}, r"at least 1"),
    ],
)
def test_what_does_not_go_together(arguments, named):
    with pytest.raises(OvisError, match=named):
        make_plan(case(**arguments), "arithmetic")


@pytest.mark.parametrize("text", ["model", "model=0", "rows=2", "data=1;model=8", ""])
def test_mesh_is_spelled_wrong(text):
    with pytest.raises(OvisError, match="data=1,model=8"):
        parse_mesh(text)


def test_mesh_may_leave_an_axis_out():
    assert parse_mesh("model=8") == {"data": 1, "model": 8}


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "find_compiler", lambda platform: None)
    assert "ovis-jax[tpu]" in make_plan(case())["source"]
    assert "ovis-jax[cuda12]" in make_plan(case("h100:1"))["source"]
    with pytest.raises(OvisError, match=r"pip install 'ovis-jax\[tpu\]'"):
        make_plan(case(), "compiler")


def step(peak, **more):
    sizes = {"arguments": peak, "output": 0, "aliased": 0, "temp": 7, "peak": peak}
    weight_sized = {"copies": 0, "all-gathers": 0, "all-reduces": 0}
    hlo = {"collectives": {}, "all_reduces_a_block": 2, "kernels": {}}
    return {**sizes, **hlo, "weight_sized": weight_sized, "compile_seconds": 1.0, **more}


def test_with_a_compiler(monkeypatch):
    """Its peak, and the weights that a program does not read, are what must fit."""
    steps = {"decode": step(5 * GIB), "prefill": step(4 * GIB)}
    monkeypatch.setattr(compiler, "find_compiler", lambda platform: "libtpu 1")
    monkeypatch.setattr(compiler, "facts", lambda case, name: steps[name])
    told = []
    found = make_plan(case(), tell=told.append)
    weights = needs(case()).weights
    beside = sum(weights.values()) - weights["decoder"]
    assert found["source"] == "libtpu 1" and len(told) == 2
    assert found["bytes"]["peak"] == 5 * GIB + beside and found["fits"]
    # Arithmetic had taken it to fit; the advice takes over what the compiler found on top.
    steps["prefill"] = {"error": "RESOURCE_EXHAUSTED: 17G of 15G hbm", "peak": 17 * GIB}
    found = make_plan(case(), tell=told.append)
    unread = weights["vision"] + weights["visual_tokenizer"]
    assert found["over_by"] == 17 * GIB + unread - usable_bytes(case()) and not found["fits"]
    batch = int(found["change"]["options"].removeprefix("--batch "))
    more = found["bytes"]["peak"] - needs(case()).peak
    assert fits(case(batch=batch), more) and not fits(case(batch=batch + 1), more)
    steps["decode"] = {"error": "RESOURCE_EXHAUSTED: 18G of 15G hbm", "peak": 18 * GIB}
    assert make_plan(case(), tell=told.append)["bytes"]["peak"] == 18 * GIB + beside
    steps["decode"] = step(5 * GIB)
    steps["prefill"] = {"error": "RESOURCE_EXHAUSTED: vmem", "peak": None}
    found = make_plan(case(), tell=told.append)
    assert not found["fits"] and "the compiler refuses it" in verdict(found)
    assert "arithmetic" in make_plan(case("v5e:1x1", 1), tell=told.append)["source"]


def test_command_prints_tables():
    result = CliRunner().invoke(
        app, ["plan", "--topology", "v5e:2x4", "--batch", "8", "--by", "arithmetic"]
    )
    assert result.exit_code == 0, result.output
    for text in ("figures from: arithmetic", "weights: decoder", "2.15", "all-reduces", "fits"):
        assert text in result.stdout


def test_command_prints_json():
    options = ["--images", "1", "--mesh", "data=2,model=4", "--by", "arithmetic", "--json"]
    result = CliRunner().invoke(
        app, ["plan", "--config", "27b", "--topology", "h100:8", "--batch", "2", *options]
    )
    found = json.loads(result.stdout)
    assert found["config"] == "27b" and found["mesh"] == {"data": 2, "model": 4}
    assert found["crops"] == 20 and found["fits"] is True
    assert found["bytes"]["peak"] == sum(
        found["bytes"][name] for name in ("weights", "cache", "activations")
    )


def test_command_says_what_does_not_fit():
    options = ["--topology", "v5e:1x1", "--by", "arithmetic", "--json"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert isinstance(result.exception, OvisError)
    assert "--topology v5e:2x2" in str(result.exception)
    assert json.loads(result.stdout)["fits"] is False


def test_config_of_a_folder(tmp_path):
    with pytest.raises(OvisError, match="expected 9b, 27b, or a folder"):
        find_config("8b")
    with pytest.raises(OvisError, match=r"config\.json"):
        find_config(str(tmp_path))
