"""Plans by arithmetic against measurements of the 9B, workloads that do not fit, and bad input."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ovis_jax import presets
from ovis_jax.cli import app
from ovis_jax.errors import OvisError
from ovis_jax.plan import aot_compile
from ovis_jax.plan.latency_bounds import latency_bounds, total_prefill_flops
from ovis_jax.plan.make_plan import make_plan
from ovis_jax.plan.memory_estimate import estimate_memory, usable_bytes, vision_temp_bytes
from ovis_jax.plan.report import plan_summary_line
from ovis_jax.plan.suggestions import fits_in_memory, smallest_fitting_change
from ovis_jax.plan.topologies import (
    DEVICES,
    GIB,
    find_peak_flops,
    parse_mesh_sizes,
    parse_topology,
)
from ovis_jax.plan.workload import default_mesh_sizes
from ovis_jax.plan.workload_from_names import load_config, make_workload
from ovis_jax.sharding import param_shapes

CONFIG_9B = presets.ovis1_6_gemma2_9b()


def workload_9b(topology="v5e:2x4", batch_size=8, max_length=8192, **options):
    return make_workload(CONFIG_9B, topology, batch_size, max_length, **options)


@pytest.mark.parametrize(
    ("topology", "batch_size", "max_length", "gib"),
    [
        # XLA's argument bytes of the compiled decode step.
        ("v5e:2x4", 8, 8192, 4.1217),
        ("h100:1", 1, 8192, 19.1828),
        ("v6e:1x1", 1, 4096, 18.5267),
    ],
)
def test_decode_arguments_equal_those_of_the_compiler(topology, batch_size, max_length, gib):
    plan = make_plan(workload_9b(topology, batch_size, max_length), "arithmetic")
    assert plan["arithmetic"]["decode_arguments"] / GIB == pytest.approx(gib, rel=1e-3)
    assert plan["fits"] and plan["bytes"]["peak"] < plan["bytes"]["usable"]


@pytest.mark.parametrize(
    ("topology", "batch_size", "max_length", "gib"),
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
def test_prefill_estimate_is_close_to_the_compiler(topology, batch_size, max_length, gib):
    """The estimate is at least XLA's figure and at most twice as large."""
    memory = estimate_memory(workload_9b(topology, batch_size, max_length))
    assert gib <= memory.prefill_temp / GIB <= 2 * gib


def test_weights_are_sharded_over_model_and_the_cache_over_both_axes():
    single = estimate_memory(workload_9b("h100:1", 8))
    sharded = estimate_memory(workload_9b(mesh="data=2,model=4"))
    size = 2 * sum(map(math.prod, param_shapes(CONFIG_9B).values()))
    assert sum(single.weights.values()) == size
    assert sum(sharded.weights.values()) == pytest.approx(size / 4, rel=2e-3)
    # Every other block has a ring of 4096 slots. The difference is the int32 lengths.
    slots = 21 * 4096 + 21 * 8192
    assert 0 <= single.cache - 8 * slots * 2 * 8 * 256 * 2 <= 8 * 4
    assert sharded.cache == pytest.approx(single.cache / 8, rel=1e-6)


def test_latency_bounds():
    workload = workload_9b("v5e:2x4", 8)
    bounds = latency_bounds(workload, estimate_memory(workload))
    assert bounds.decode_seconds == pytest.approx(4.1215 * GIB / 0.819e12, rel=1e-3)
    # 85 all-reduces of [8, 3584] bfloat16; each device sends 2 x 7/8 of an array.
    assert bounds.decode_bytes_sent == 85 * 8 * 3584 * 2 * 7 // 4
    single = workload_9b("h100:1", 1)
    assert latency_bounds(single, estimate_memory(single)).decode_bytes_sent == 0
    int8 = replace(single, quantization="int8", kv_cache_dtype="int8")
    decode_seconds = latency_bounds(int8, estimate_memory(int8)).decode_seconds
    assert decode_seconds == pytest.approx(9.613 * GIB / 3.352e12, rel=1e-3)
    # Two FLOPs per weight of a block and position, plus attention. Images add to that.
    blocks = 42 * (2 * 24 * 256 * 3584 + 3 * 14336 * 3584)
    assert 1 < total_prefill_flops(single) / (2 * 8192 * blocks) < 1.2
    assert total_prefill_flops(replace(single, images_per_row=1)) > total_prefill_flops(single)


def test_peak_flops_by_device_kind():
    assert find_peak_flops("TPU v5 lite") == 197e12
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert find_peak_flops("Tesla T4") == 8.1e12  # bfloat16 is computed in float32
    for unknown in ("cpu", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb"):
        assert find_peak_flops(unknown) is None


def test_a_large_batch_is_compute_bound():
    workload = workload_9b("v5p:2x2x2", 8 * 512, 128)
    memory = estimate_memory(workload)
    seconds = latency_bounds(workload, memory).decode_seconds
    assert seconds > memory.weights["decoder"] / 2.765e12


def test_int8_arguments_equal_those_of_the_compiler():
    """XLA's argument bytes of the int8 decode step for v5e:1x1 are 9.93 GiB."""
    memory = estimate_memory(workload_9b("v5e:1x1", 1, 4096, quantization="int8"))
    assert (memory.weights["decoder"] + memory.cache) / GIB == pytest.approx(9.93, abs=5e-3)


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=1,model=8"])
def test_quantized_bytes(mesh):
    """All matrices but those of the decoder's blocks are int8 in both formats."""
    devices = parse_mesh_sizes(mesh).model
    full, int8, int4 = (
        estimate_memory(workload_9b(f"h100:{devices}", 1, mesh=mesh, **options))
        for options in (
            {},
            {"quantization": "int8", "kv_cache_dtype": "int8"},
            {"quantization": "int4"},
        )
    )
    blocks = 42 * (2 * 24 * 256 * 3584 + 3 * 14336 * 3584) // devices
    # One byte per int8 weight; half a byte, and four bytes for each group of 128, per int4 weight.
    saved = int8.weights["decoder"] - int4.weights["decoder"]
    assert saved == pytest.approx(blocks * (1 - 0.5 - 4 / 128), rel=5e-3)
    assert int8.weights["decoder"] == pytest.approx(full.weights["decoder"] / 2, rel=5e-3)
    assert int4.weights["visual_embedding"] == int8.weights["visual_embedding"]
    # Per position and head: 256 bytes and a float32 scale, instead of 512 bytes.
    assert int8.cache == pytest.approx(full.cache * 260 / 512, rel=1e-6)


def test_default_mesh_sizes():
    assert default_mesh_sizes(CONFIG_9B, 8) == (1, 8)
    assert default_mesh_sizes(CONFIG_9B, 16) == (2, 8)  # 8 key/value heads
    assert default_mesh_sizes(CONFIG_9B, 3) == (3, 1)
    assert default_mesh_sizes(presets.tiny(), 8) == (4, 2)


def test_too_large_for_one_chip():
    workload = workload_9b("v5e:1x1", 1)
    assert not fits_in_memory(workload)
    plan = make_plan(workload, "arithmetic")
    assert not plan["fits"]
    assert plan["over_by"] == plan["bytes"]["peak"] - usable_bytes(workload.topology) > 0
    assert plan["change"]["options"] == "--quantization int8"
    shortfall = f"{plan['over_by'] / GIB:.2f} GiB short per device"
    summary = plan_summary_line(plan)
    assert shortfall in summary and "--quantization int8" in summary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "batch_size", "options"),
    [
        ("9b", "rtx4090:1", 1, "--quantization int8"),
        ("9b", "a100:1", 26, "--kv-cache-dtype int8"),
        ("27b", "v6e:1x1", 1, "--quantization int8 --kv-cache-dtype int8"),
        ("27b", "l4:1", 1, "--quantization int4"),
        ("27b", "t4:1", 1, "--topology t4:2 --quantization int4"),
        ("27b", "v5e:1x1", 1, "--topology v5e:2x2"),
    ],
)
def test_quantization_comes_before_more_devices(config, topology, batch_size, options):
    workload = make_workload(load_config(config), topology, batch_size, 8192)
    found, changed = smallest_fitting_change(workload)
    assert found == options and fits_in_memory(changed)


def test_suggestions_keep_the_quantization():
    options, changed = smallest_fitting_change(workload_9b("l4:1", 6, quantization="int4"))
    assert options == "--kv-cache-dtype int8" and changed.quantization == "int4"


@pytest.mark.slow
def test_the_smallest_change_comes_first():
    workload = workload_9b("v6e:2x4", 8, mesh="data=8,model=1", images_per_row=1)
    options, changed = smallest_fitting_change(workload)
    assert options == "--mesh data=4,model=2" and fits_in_memory(changed)
    options, changed = smallest_fitting_change(workload_9b("v5e:2x4", 512))
    assert options == f"--batch-size {changed.batch_size}" and fits_in_memory(changed)
    assert not fits_in_memory(replace(changed, batch_size=changed.batch_size + 1))
    options, changed = smallest_fitting_change(workload_9b("v6e:1x1", 1, 1_000_000))
    assert options == f"--max-model-len {changed.max_length}" and fits_in_memory(changed)
    assert not fits_in_memory(replace(changed, max_length=changed.max_length + 128))


@pytest.mark.slow
def test_a_shorter_length_still_holds_the_images():
    """The search skips lengths below the visual tokens, which are invalid."""
    options, changed = smallest_fitting_change(
        workload_9b("v6e:1x1", 1, 1_000_000, images_per_row=15)
    )
    assert options == f"--max-model-len {changed.max_length}" and fits_in_memory(changed)
    assert changed.max_length >= changed.visual_tokens_per_row
    assert not fits_in_memory(replace(changed, max_length=changed.max_length + 128))


def test_crops_are_sharded_over_data():
    """Eight devices with eight times the rows need as much memory each as one device."""
    one = workload_9b("h100:1", 4, images_per_row=1)
    eight = workload_9b("h100:8", 32, images_per_row=1, mesh="data=8,model=1")
    assert vision_temp_bytes(eight) == vision_temp_bytes(one)


def test_no_topology_of_the_kind_fits():
    """A single key/value head cannot be sharded, so every device holds the full model."""
    config = presets.ovis1_6_gemma2_27b()
    config = replace(config, decoder=replace(config.decoder, num_kv_heads=1))
    plan = make_plan(make_workload(config, "t4:8", 8, 512), "arithmetic")
    assert plan["mesh"] == {"data": 8, "model": 1} and plan["change"] is None
    assert "no known topology" in plan_summary_line(plan)


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("v5e:3x3", "v5e:4x4"),
        ("rtx-4090:1", "rtx4090:1"),
        ("4090:2", "rtx4090:2"),
        ("v5e", "v5e:1x1"),
        ("h100:64", "h100:8"),
        ("gh100:2", "h100:2"),
        ("foo:3", "h100:3"),
        ("", "v4:1x1x1"),
    ],
)
def test_an_unknown_topology_suggests_the_closest_and_lists_all(name, closest):
    with pytest.raises(OvisError) as raised:
        parse_topology(name)
    message = str(raised.value)
    assert repr(name) in message and f"the closest known one is {closest}." in message
    for kind, device in DEVICES.items():
        shapes = ", ".join(device.shapes) if device.platform == "tpu" else "1 to 8"
        assert f"{kind}:{shapes}" in message


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-8", "v5e:2x4"),
        ("v5e-8", "v5e:2x4"),
        ("V6E-1", "v6e:1x1"),
        ("v5p-8", "v5p:2x2x1"),
        ("v4-16", "v4:2x2x2"),
    ],
)
def test_names_of_google_cloud(name, topology):
    assert parse_topology(name).name == topology


def test_an_unknown_number_in_a_name_of_google_cloud():
    for name, known in (
        ("v5e-7", "chips: v5e-1, v5e-4, v5e-8, v5e-16, v5e-32"),
        ("v5p-4", "TensorCores, two per chip: v5p-8, v5p-16, v5p-32, v5p-64"),
    ):
        with pytest.raises(OvisError) as raised:
            parse_topology(name)
        assert f"topology '{name}' is unknown" in str(raised.value)
        assert str(raised.value).endswith(known)


def test_devices_of_topologies():
    assert parse_topology("V5E:2x4").num_devices == 8
    assert parse_topology("tpu7x:2x2x1").num_devices == 8  # two per chip
    assert parse_topology("v4:2x2x1").num_devices == 4
    assert parse_topology("a100:3").num_devices == 3
    assert [one.name for one in parse_topology("v6e:2x4").larger()] == ["v6e:4x4", "v6e:4x8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "data=1,model=16", "topology": "v5e:4x4"}, r"letter K has size 8.*'model'.*16"),
        ({"mesh": "data=2,model=4", "batch_size": 3}, r"letter B has size 3.*'data' of size 2"),
        ({"mesh": "data=2,model=2"}, r"data=2,model=2 needs 4 devices, but v5e:2x4 has 8"),
        ({"dtype": "float16"}, r"dtype float16: .* Gemma2 .* use bfloat16 or float32"),
        ({"images_per_row": 5}, r"5 images may take 9800 positions, but a prompt may take 8192"),
    ],
)
def test_invalid_workloads(options, message):
    with pytest.raises(OvisError, match=message):
        make_plan(workload_9b(**options), "arithmetic")


def test_a_mesh_that_cuts_an_int4_group():
    workload = make_workload(load_config("ovis-tiny"), "v5e:2x2", 2, 128, quantization="int4")
    with pytest.raises(OvisError, match=r"attn/o: mesh axis .model. .* would cut .* or int8"):
        make_plan(workload, "arithmetic")
    assert not fits_in_memory(workload)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model", "model"),
        ("model=0", "model=0"),
        ("data=2,rows=2", "rows=2"),
        ("data=1;model=8", "data=1;model=8"),
        ("", ""),
        ("data=2,data=4", "data"),
    ],
)
def test_malformed_mesh_sizes(text, part):
    with pytest.raises(OvisError) as raised:
        parse_mesh_sizes(text)
    message = str(raised.value)
    assert f"mesh {text!r}: " in message and repr(part) in message.partition(": ")[2]


def test_mesh_sizes_may_omit_an_axis():
    assert parse_mesh_sizes("model=8") == (1, 8)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(aot_compile, "installed_compiler", lambda platform: None)
    assert "pip install '.[tpu]'" in make_plan(workload_9b())["source"]
    assert "pip install '.[cuda12]'" in make_plan(workload_9b("h100:1"))["source"]
    with pytest.raises(OvisError, match=r"pip install '\.\[tpu\]'"):
        make_plan(workload_9b(), "compiler")


def compiled(peak, **changes):
    sizes = {"arguments": peak, "output": 0, "aliased": 0, "temp": 7, "peak": peak}
    weight_sized = {"copies": 0, "all-gathers": 0, "all-reduces": 0}
    hlo = {"collectives": {}, "all_reduces_per_block": 2, "kernels": {}}
    return {**sizes, **hlo, "weight_sized": weight_sized, "compile_seconds": 1.0, **changes}


@pytest.mark.exhaustive
def test_with_a_compiler(monkeypatch):
    """The compiler's peak must fit, together with the weights that a program does not read."""
    programs = {"decode": compiled(5 * GIB), "prefill": compiled(4 * GIB)}
    monkeypatch.setattr(aot_compile, "installed_compiler", lambda platform: "libtpu 1")
    monkeypatch.setattr(aot_compile, "analyze_program", lambda _, program: programs[program])
    notices = []
    plan = make_plan(workload_9b(), notify=notices.append)
    memory = estimate_memory(workload_9b())
    weights = memory.weights
    unread = sum(weights.values()) - weights["decoder"]
    assert plan["source"] == "libtpu 1" and len(notices) == 2
    assert plan["bytes"]["peak"] == 5 * GIB + unread and plan["fits"]
    # The estimate fits but the compiler rejects the program. The suggestion adds the difference.
    programs["prefill"] = {"error": "RESOURCE_EXHAUSTED: 17G of 15G hbm", "peak": 17 * GIB}
    plan = make_plan(workload_9b(), notify=notices.append)
    vision = weights["vision"] + weights["visual_tokenizer"]
    assert (
        plan["over_by"] == 17 * GIB + vision - usable_bytes(workload_9b().topology)
        and not plan["fits"]
    )
    assert plan["change"]["options"] == "--quantization int4 --kv-cache-dtype int8"
    extra = plan["bytes"]["peak"] - memory.peak
    int4 = workload_9b(quantization="int4")
    assert fits_in_memory(replace(int4, kv_cache_dtype="int8"), extra)
    assert not fits_in_memory(int4, extra)
    programs["decode"] = {"error": "RESOURCE_EXHAUSTED: 18G of 15G hbm", "peak": 18 * GIB}
    assert make_plan(workload_9b(), notify=notices.append)["bytes"]["peak"] == 18 * GIB + unread
    programs["decode"] = compiled(5 * GIB)
    programs["prefill"] = {"error": "RESOURCE_EXHAUSTED: vmem", "peak": None}
    plan = make_plan(workload_9b(), notify=notices.append)
    assert not plan["fits"] and "the compiler rejects it: RESOURCE" in plan_summary_line(plan)
    # The compiler does not know these two GPUs.
    plan = make_plan(workload_9b("l40s:1", 1), notify=notices.append)
    assert plan["source"] == "libtpu 1, for the architecture of a100, the nearest known one"
    plan = make_plan(workload_9b("t4:1", 1, quantization="int8"), notify=notices.append)
    assert plan["source"] == "arithmetic; no compiler target is close to t4"
    # Weights and cache are too large, so nothing is compiled.
    plan = make_plan(workload_9b("v5e:1x1", 1), notify=notices.append)
    assert "arithmetic" in plan["source"] and plan["programs"] == {}


def test_command_prints_tables():
    options = ["--topology", "v5e:2x4", "--batch-size", "8", "--method", "arithmetic"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0, result.output
    for text in ("figures: arithmetic", "weights: decoder", "2.15", "all-reduces", "fits"):
        assert text in result.stdout


def test_command_prints_json():
    options = ["--images", "1", "--mesh", "data=2,model=4", "--method", "arithmetic", "--json"]
    result = CliRunner().invoke(
        app, ["plan", "--config", "27b", "--topology", "h100:8", "--batch-size", "2", *options]
    )
    plan = json.loads(result.stdout)
    assert plan["config"] == "27b" and plan["mesh"] == {"data": 2, "model": 4}
    assert plan["crops"] == 20 and plan["fits"] is True
    assert plan["bytes"]["peak"] == sum(
        plan["bytes"][name] for name in ("weights", "cache", "activations")
    )


def test_command_reports_a_workload_that_does_not_fit():
    options = ["--topology", "v5e:1x1", "--method", "arithmetic"]
    result = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["fits"] is False
    assert "--quantization int8" in result.stderr
    result = CliRunner().invoke(app, ["plan", *options])
    assert "v5e:1x1 (1 device), mesh data=1,model=1" in result.stdout
    options += ["--quantization", "int8", "--kv-cache-dtype", "int8"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0
    assert "bfloat16 with int8 weights, int8 KV cache, batch 1" in result.stdout


def test_a_gpu_without_bfloat16_units():
    """A T4 computes bfloat16 in float32; the plan says so, and its bounds follow from that."""
    workload = workload_9b("t4:1", 1, quantization="int8")
    plan = make_plan(workload, "arithmetic")
    assert plan["notes"][0].startswith("t4 has no bfloat16 units")
    bounds = plan["latency_bounds"]
    assert bounds["prefill_seconds"] == bounds["prefill_flops"] / 8.1e12
    with pytest.raises(OvisError, match="no compiler target is close to t4; use --method arith"):
        make_plan(workload, "compiler")
    assert (
        make_plan(replace(workload, topology=parse_topology("l4:1")), "arithmetic")["notes"] == []
    )


def test_configs(tmp_path):
    assert load_config("ovis-tiny").decoder.width == 128
    with pytest.raises(
        OvisError, match="8b is not a folder; give 9b, 27b, 3b, ovis-tiny, or a folder"
    ):
        load_config("8b")
    with pytest.raises(OvisError, match=r"config\.json"):
        load_config(str(tmp_path))
