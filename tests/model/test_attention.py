"""Every kernel against the plain attention, what it holds in memory, and which is chosen."""

import re
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import measured
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from shallow import shallow_config

from ovis_jax import Ovis, presets
from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import attention_kernels
from ovis_jax.model import blockwise_attention as blockwise
from ovis_jax.model import splash_attention as splash
from ovis_jax.model import tokamax_attention as tokamax
from ovis_jax.model.attention_kernels import KernelSetting, attention_report, choose_kernel
from ovis_jax.model.plain_attention import attend, visible

pytestmark = pytest.mark.optimized

B, N, K = 2, 4, 2
HOW = {"scale": 0.3, "cap": 5.0}
TOLERANCE = 1e-5
"""Of a module, relative to the largest value."""


def arrays(T: int, H: int, dtype=jnp.float32) -> list[jax.Array]:
    """Queries, keys, values and a cotangent."""
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(T), 4)
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def padded(T: int) -> jax.Array:
    """A row with padding on the left, and one with padding on the right."""
    columns = np.arange(T)
    return jnp.array([np.maximum(columns - 37, -1), np.where(columns < T - 50, columns, -1)])


def plain(q, k, v, positions, window, scale, cap):
    return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)


def results(attention, q, k, v, weights, positions):
    """Outputs, zero at padding, and the gradients that they send back."""

    def run(q, k, v):
        out = attention(q, k, v, positions)
        assert out.shape == q.shape and out.dtype == q.dtype
        return jnp.sum(out * weights * (positions >= 0)[:, :, None, None]), out

    gradients, out = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    assert all(np.all(np.isfinite(x)) for x in (out, *gradients))
    return out * (positions >= 0)[:, :, None, None], *gradients


PARTS = ("output", "dq", "dk", "dv")


def check(name: str, got, expected, tolerance: float = TOLERANCE) -> None:
    for part, x, true in zip(PARTS, got, expected, strict=True):
        x, true = (np.asarray(a, np.float64) for a in (x, true))
        difference = np.abs(x - true).max() / np.abs(true).max()
        measured.record(f"{name}: {part}", difference, tolerance)
        assert difference <= tolerance, f"{part}: {difference:.1e}"


# ----- blockwise


@pytest.mark.exhaustive
@pytest.mark.parametrize("T, window", [(128, 100), (129, None), (520, 300), (1100, 100)])
def test_blockwise_prompts(T: int, window: int | None):
    *inputs, positions = *arrays(T, 16), padded(T)
    got, true = (
        results(lambda *x, f=f: f(*x, window=window, **HOW), *inputs, positions)
        for f in (blockwise.attend_prompt, plain)
    )
    check("blockwise prompts", got, true)


def test_blockwise_prompts_without_cap():
    *inputs, positions = *arrays(300, 16), padded(300)
    how = {"window": None, "scale": 0.3, "cap": None}
    got, true = (
        results(lambda *x, f=f: f(*x, **how), *inputs, positions)
        for f in (blockwise.attend_prompt, plain)
    )
    check("blockwise prompts", got, true)


@pytest.mark.slow
@pytest.mark.parametrize("P", [128, 300])
def test_blockwise_crops(P: int):
    q, k, v, weights = arrays(P, 24)
    k, v = (jnp.concatenate([x, -x], axis=1) for x in (k, v))
    got, true = (
        results(lambda q, k, v, _, f=f: f(q, k, v), q, k, v, weights, jnp.zeros((B, P), int))
        for f in (
            lambda *x: blockwise.attend_crops(*x, scale=0.3),
            lambda *x: attend(*x, None, scale=0.3),
        )
    )
    check("blockwise crops", got, true)


def test_blockwise_under_vmap():
    q, k, v, _ = arrays(300, 16)
    inputs, positions = [jnp.stack([x, 2 * x]) for x in (q, k, v)], padded(300)

    def run(q, k, v):
        return blockwise.attend_prompt(q, k, v, positions, window=100, **HOW)

    got = jax.jit(jax.vmap(run))(*inputs)
    for x, one in zip(got, ([x[i] for x in inputs] for i in range(2)), strict=True):
        np.testing.assert_allclose(x, jax.jit(run)(*one), atol=TOLERANCE)


def shapes(compiled) -> set[tuple[int, ...]]:
    """Every float32 shape of a compiled program."""
    found = re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())
    return {tuple(map(int, dims.split(","))) for dims in found}


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_blockwise_holds_no_scores_of_a_whole_prompt(gradient: bool):
    """Nothing that is compiled has a score of every query and key; plain attention has."""
    T, held = 2048, {}
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays(T, 16)[:3], padded(T))]
    for name, attention in {"plain": plain, "blockwise": blockwise.attend_prompt}.items():

        def run(q, k, v, positions, attention=attention):
            return jnp.sum(attention(q, k, v, positions, window=None, **HOW) ** 2)

        function = jax.grad(run, (0, 1, 2)) if gradient else run
        compiled = jax.jit(function).lower(*like).compile()
        scores = max(np.prod(s) for s in shapes(compiled))
        held[name] = scores, compiled.memory_analysis().temp_size_in_bytes
    whole = B * N * T * T
    assert held["plain"][0] >= whole and held["plain"][1] >= 4 * whole
    assert held["blockwise"][0] <= whole / 8
    assert held["blockwise"][1] <= 4 * whole / 3


# ----- splash, interpreted; tokamax, whose plain form stands in for its kernels for GPUs


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", [splash, tokamax], ids=["splash", "tokamax"])
@pytest.mark.parametrize(
    "window, cap, mesh", [(100, 5.0, None), (None, None, "in scope"), (100, 5.0, "of the queries")]
)
def test_prompts_by_kernel(kernel, window: int | None, cap: float | None, mesh: str | None):
    """On one device, and with rows and heads over a mesh."""
    *inputs, positions = *arrays(250, 128), padded(250)
    how = {"window": window, "scale": 0.1, "cap": cap}
    true = results(lambda *x: plain(*x, **how), *inputs, positions)
    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    if mesh == "of the queries":
        inputs[0] = jax.device_put(inputs[0], NamedSharding(devices, PartitionSpec()))
    with jax.set_mesh(devices) if mesh == "in scope" else nullcontext():
        got = results(lambda *x: kernel.attend_prompt(*x, **how), *inputs, positions)
    if mesh:
        assert got[0].sharding.spec == PartitionSpec("data", None, "model")
    check(f"{kernel.__name__.rpartition('.')[2]} prompts", got, true)


@pytest.mark.slow
@pytest.mark.parametrize("how", [jax.checkpoint, jax.vmap])
def test_tokamax_gradient_of_rematerialised_blocks_and_under_vmap(how):
    """Its backward pass is of our own making: nothing of the forward's trace may be left in it."""
    q, k, v, weights = arrays(200, 32)
    options = {"window": 100, **HOW}

    def gradients(attention):
        def run(q, k, v, positions, weights):
            arrays = (x[None] if how is jax.vmap else x for x in (q, k, v, positions + 0))
            out = attention(*arrays, **options)
            return jnp.sum(out * weights)

        def summed(q, k, v):
            return jnp.sum(how(run)(q, k, v, padded(200), weights))

        return jax.jit(jax.grad(summed, (0, 1, 2)))(q, k, v)

    weights *= (padded(200) >= 0)[:, :, None, None]
    got, true = gradients(tokamax.attend_prompt), gradients(plain)
    for x, y in zip(got, true, strict=True):
        assert np.abs(x - y).max() <= TOLERANCE * np.abs(y).max()


@pytest.mark.exhaustive
def test_splash_crops_of_heads_of_72():
    q, k, v, weights = arrays(150, 72)
    k, v = (jnp.concatenate([x, -x], axis=1) for x in (k, v))
    got, true = (
        results(lambda q, k, v, _, f=f: f(q, k, v), q, k, v, weights, jnp.zeros((B, 150), int))
        for f in (
            lambda *x: splash.attend_crops(*x, scale=0.3),
            lambda *x: attend(*x, None, scale=0.3),
        )
    )
    check("splash crops", got, true)


def kernel_in(function, *inputs) -> str:
    """The kernel that a function calls, from its traced program."""
    program = str(jax.make_jaxpr(function)(*inputs))
    if "splash_mha_fwd" in program:
        return "splash"
    if "custom_vjp" in program:
        return "tokamax"
    return "blockwise" if "scan" in program else "plain"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kernel, platform", [("auto", "cpu"), ("auto", "gpu"), ("auto", "tpu"), ("plain", None)]
)
def test_the_chosen_kernel_runs(kernel, platform, dtype):
    q, k, v, _ = arrays(250, 128, dtype)
    options = {"scale": 0.1, "setting": KernelSetting(kernel, platform)}

    def prompt(*arrays):
        return attention_kernels.prompt_attention(*arrays, window=None, cap=None, **options)

    def crops(q, k, v):
        return attention_kernels.crop_attention(q, k, v, **options)

    crop_keys = jnp.concatenate([k, k], axis=1)
    for call, found in {
        "prefill": kernel_in(prompt, q, k, v, padded(250)),
        "vision": kernel_in(crops, q, crop_keys, crop_keys),
    }.items():
        assert found == choose_kernel(kernel, call, 250, dtype=dtype, platform=platform)


# ----- the choice of a kernel


@pytest.mark.parametrize(
    "kernel, platform, call, num_queries, expected",
    [
        ("auto", "cpu", "prefill", 128, "plain"),
        ("auto", "cpu", "prefill", 129, "blockwise"),
        ("auto", "cpu", "vision", 36, "plain"),
        ("auto", "cpu", "vision", 729, "blockwise"),
        ("auto", "cpu", "decode", 1, "plain"),
        ("auto", "gpu", "prefill", 128, "plain"),
        ("auto", "gpu", "prefill", 2048, "tokamax"),
        ("auto", "gpu", "vision", 729, "plain"),
        ("auto", "gpu", "decode", 1, "plain"),
        ("auto", "tpu", "prefill", 128, "plain"),
        ("auto", "tpu", "prefill", 2048, "splash"),
        ("auto", "tpu", "vision", 729, "splash"),
        ("auto", "tpu", "decode", 1, "plain"),
        ("tokamax", "gpu", "prefill", 300, "tokamax"),
        ("tokamax", "gpu", "vision", 729, "plain"),
        ("splash", "tpu", "prefill", 300, "splash"),
        ("splash", "tpu", "decode", 1, "plain"),
        ("plain", "cpu", "prefill", 2048, "plain"),
        ("plain", "cpu", "vision", 729, "plain"),
        ("blockwise", "gpu", "vision", 729, "blockwise"),
        ("blockwise", "cpu", "decode", 1, "plain"),
    ],
)
def test_choice(kernel, platform, call, num_queries, expected):
    assert choose_kernel(kernel, call, num_queries, platform=platform) == expected


def test_platform_of_jax_without_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    assert choose_kernel("auto", "prefill", 2048) == "plain"


class Gpu:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize(
    "case, reason",
    [
        ({"dtype": "float32"}, "does not support float32"),
        ({"installed": False}, "is not installed: .*cuda12"),
        ({"gpu": Gpu("7.5")}, "needs an NVIDIA GPU of compute capability 8.0 or higher"),
        ({"gpu": Gpu("gfx942")}, "needs an NVIDIA GPU of compute capability 8.0 or higher"),
    ],
)
def test_gpus_without_tokamax(monkeypatch, case, reason):
    """The report shows another kernel for prompts; forcing tokamax is an error with the reason."""
    if "gpu" in case:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [case["gpu"]])
    if "installed" in case:
        monkeypatch.setattr(attention_kernels, "find_spec", lambda name: None)
    options = {"dtype": case.get("dtype", "bfloat16"), "platform": "gpu"}
    report = attention_report(presets.ovis1_6_gemma2_9b(), 2048, **options)
    assert [line.kernel for line in report] == ["plain", "blockwise", "plain"]
    with pytest.raises(RequestError, match=f"'tokamax' {reason}.*; use plain or blockwise"):
        choose_kernel("tokamax", "prefill", 300, **options)
    if "gpu" in case:
        case["gpu"].compute_capability = "8.0"
        assert choose_kernel("tokamax", "prefill", 300, **options) == "tokamax"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_forcing_a_kernel_of_another_platform(platform):
    message = f"'splash' cannot run on {platform}: .*; use plain or blockwise"
    with pytest.raises(RequestError, match=message):
        choose_kernel("splash", "prefill", 300, platform=platform)


def test_unknown_names(monkeypatch):
    # The checks of the tests would reject the names first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = Ovis(presets.tiny())
    with pytest.raises(RequestError, match="kernel is 'flash', expected one of auto, plain, "):
        replace(model, attention_kernel="flash")  # pyright: ignore
    with pytest.raises(RequestError, match="platform is 'cuda', expected one of None, cpu, gpu"):
        replace(model, platform="cuda")  # pyright: ignore
    with pytest.raises(RequestError, match="kv_cache_dtype 'fp8': expected auto or int8"):
        replace(model, kv_cache_dtype="fp8")  # pyright: ignore
    with pytest.raises(RequestError, match="kernel is 'flash', expected one of auto, plain, "):
        choose_kernel("flash", "prefill", 300)  # pyright: ignore
    with pytest.raises(RequestError, match="platform is 'cuda', expected one of None, cpu, gpu"):
        choose_kernel("auto", "prefill", 300, platform="cuda")  # pyright: ignore


def test_report_of_the_9b():
    assert attention_report(presets.ovis1_6_gemma2_9b(), 2048, platform="cpu") == [
        ("vision", 729, 16, 72, "blockwise"),
        ("prefill", 2048, 16, 256, "blockwise"),
        ("decode", 1, 16, 256, "plain"),
    ]


@pytest.mark.exhaustive
def test_the_model_passes_its_kernel_on(monkeypatch):
    """Every kernel returns the same logits, and each kernel runs."""
    config = shallow_config()
    visual_tokenizer = replace(  # 144 patches, more than a block
        config.visual_tokenizer, vision=replace(config.vision, image_size=168)
    )
    config = replace(config, visual_tokenizer=visual_tokenizer)
    params = jax.jit(Ovis(config).init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(108, 600, (2, 140))
    tokens[0, 1:37] = -300
    positions = np.tile(np.arange(140), (2, 1))
    positions[1, 100:] = -1
    pixels = np.random.default_rng(1).normal(size=(1, 168, 168, 3)).astype(np.float32)
    inputs = Inputs(tokens.astype(np.int32), positions.astype(np.int32), pixels)

    calls = []
    for name in ("attend_prompt", "attend_crops"):
        function = getattr(blockwise, name)
        monkeypatch.setattr(
            blockwise, name, lambda *x, n=name, f=function, **y: calls.append(n) or f(*x, **y)
        )
    logits = {}
    for kernel in ("plain", "auto", "blockwise"):
        model = Ovis(config, attention_kernel=kernel)
        last, cache = jax.jit(model.prefill, static_argnums=2)(params, inputs, 150)
        following, _ = jax.jit(model.decode)(params, jnp.argmax(last, -1), cache)
        every = jax.jit(model.forward)(params, inputs)[0]
        assert set(calls) == (set() if kernel == "plain" else {"attend_prompt", "attend_crops"})
        logits[kernel] = last, following, every[positions >= 0]
        calls.clear()
    for kernel in ("auto", "blockwise"):
        for found, expected in zip(logits[kernel], logits["plain"], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    model = Ovis(config, platform="tpu")
    assert "splash_mha_fwd" in str(jax.make_jaxpr(model.encode_vision)(params, pixels))
