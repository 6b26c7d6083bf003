"""`ask`, `ask_stream` and `repr` of a loaded model."""

import base64
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_copies import GOLDEN
from jax.sharding import Mesh, PartitionSpec
from PIL import Image

import ovis_jax
from ovis_jax import Sampling
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.errors import ImageError, OvisError, PromptError, RequestError

WIDE = GOLDEN / "images" / "wide.png"


@pytest.fixture(scope="module")
def ovis(shallow_checkpoint):
    return ovis_jax.load(shallow_checkpoint)


def ask(ovis, *arguments, **options):
    return ovis.ask(*arguments, max_new_tokens=8, **options)


@pytest.mark.slow
def test_ask_equals_generate(ovis):
    inputs = ovis.processor(["Who?"], [[Image.open(WIDE)]], assistant_prefix="It", max_partition=4)
    out = ovis_jax.generate(ovis.model, ovis.params, inputs, max_new_tokens=8)
    text = ovis.processor.decode(out.tokens)[0]
    options = dict(assistant_prefix="It", max_partition=4)
    assert ask(ovis, "Who?", str(WIDE), **options) == text != ""
    assert "".join(ovis.ask_stream("Who?", WIDE, max_new_tokens=8, **options)) == text
    *_, last = ovis.stream_answer("Who?", WIDE, max_new_tokens=8, **options)
    assert last.text == text
    assert list(last.tokens) == out.tokens[0, : int(out.lengths[0])].tolist()
    assert last.prompt_positions == np.count_nonzero(inputs.positions >= 0)


@pytest.mark.slow
def test_every_form_of_an_image_and_a_prompt(ovis):
    image = Image.open(WIDE)
    text = ask(ovis, "Who?", WIDE)
    array = np.asarray(image.convert("RGB"))
    for source in (str(WIDE), WIDE.read_bytes(), image, array, jnp.asarray(array)):
        assert ask(ovis, "Who?", source) == ask(ovis, "Who?", [source]) == text
    url = f"data:image/png;base64,{base64.b64encode(WIDE.read_bytes()).decode()}"
    for part in (
        {"type": "image", "image": WIDE},
        {"type": "image_url", "image_url": {"url": url}},
    ):
        content = [part, {"type": "text", "text": "Who?"}]
        assert ask(ovis, [{"role": "user", "content": content}]) == text
    turns = [
        {"role": "user", "content": "<image>\nWho?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "<image>\nAnd there?"},
    ]
    assert ask(ovis, turns, [WIDE, WIDE]) != text


@pytest.mark.slow
def test_sampling_options(ovis):
    texts = {ask(ovis, "Who?", temperature=2.0, seed=seed) for seed in range(4)}
    assert len(texts) > 1
    assert ask(ovis, "Who?", sampling=Sampling(2.0), seed=3) in texts
    assert ask(ovis, "Who?", temperature=0.0) == ask(ovis, "Who?")


def test_invalid_arguments(ovis):
    """They raise at the call, before the first token is requested."""
    with pytest.raises(ImageError, match="none.png cannot be read"):
        ovis.ask_stream("Who?", "none.png")
    with pytest.raises(PromptError, match="the prompt is empty"):
        ovis.ask_stream(" ")
    with pytest.raises(RequestError, match="temperature and sampling are both given"):
        ovis.ask_stream("Who?", temperature=1.0, sampling=Sampling(2.0))
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        ovis.ask_stream("Who?", max_new_tokens=0)
    with pytest.raises(TypeError, match="max_tokens"):
        ovis.ask_stream("Who?", max_tokens=3)


@pytest.mark.parametrize(
    "image", [WIDE, WIDE.read_bytes(), Image.open(WIDE), np.zeros((2, 3), np.uint8), jnp.zeros(2)]
)
def test_a_swapped_prompt_and_image(ovis, image):
    found = rf"has type {type(image).__name__}, an image type; the order is ask\(prompt, images\)"
    with pytest.raises(PromptError, match=f"the prompt {found}"):
        ovis.ask(image, "Who?")
    with pytest.raises(PromptError, match=f"turn 1 of the prompt {found}"):
        ovis.ask([image], "Who?")
    with pytest.raises(PromptError, match=f"the prompt {found}"):
        ovis.processor(image, "Who?")


def test_rules_by_name():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    ovis = ovis_jax.load("ovis-tiny", mesh=mesh, rules="tensor")
    assert ovis.params["visual_embedding"].sharding.spec == PartitionSpec("model", None)


@pytest.mark.parametrize(
    "rules, message",
    [
        ("tensr", "rules are 'tensr', expected one of tensor, fsdp, tensor_fsdp, or a dict from "),
        ({"heads": "model"}, "rules are {'heads': 'model'}, expected .* letters .A B C D E F H K "),
        ({"N": ("data", "model")}, r"rules are {'N': \('data', 'model'\)}, expected"),
        ("fsdp", "load: rules are given without a mesh"),
    ],
)
def test_invalid_rules(rules, message):
    with pytest.raises(OvisError, match=message):
        ovis_jax.load("ovis-tiny", rules=rules)


def test_gemma2_does_not_compute_in_float16(tmp_path):
    """A float16 file can be read; its parameters become bfloat16 unless another dtype is given."""
    message = "dtype float16: the activations of Gemma2 .* use bfloat16 or float32"
    for dtype in ("float16", np.float16):
        with pytest.raises(OvisError, match=message):
            ovis_jax.load(GOLDEN / "tiny-f32", dtype=dtype)
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "f16", dtype="float16")
    for dtype, expected in ((None, "bfloat16"), ("float32", "float32")):
        params = ovis_jax.load(tmp_path / "f16", dtype=dtype).params
        assert {str(x.dtype) for x in jax.tree.leaves(params)} == {expected}


def test_repr_is_one_short_paragraph():
    text = repr(ovis_jax.load(GOLDEN / "tiny-bf16-sharded"))
    assert len(text) < 300 and "\n" not in text
    assert text.startswith("LoadedOvis(tiny-bf16-sharded: Ovis1.6-Gemma2 with ")
    assert "parameters in bfloat16 on 1 x cpu" in text


def test_version():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{ovis_jax.__version__}"' in project
