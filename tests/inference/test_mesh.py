"""The model on meshes of 8 CPU devices, placed by the one table of axes, is that of one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import GOLDEN, read_tensors, same_bits
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ovis_jax import forward, load, visual_words
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.inference.generate import generate, stream
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import apply
from ovis_jax.model.visual_tokenizer import VisualTokenizer
from ovis_jax.sharding import FSDP, TENSOR, TENSOR_FSDP

VISUAL = {
    "visual_embedding": "vte.weight",
    "visual_tokenizer/head": "visual_tokenizer.head.0.weight",
    "visual_tokenizer/norm/scale": "visual_tokenizer.head.1.weight",
    "visual_tokenizer/norm/bias": "visual_tokenizer.head.1.bias",
}
"""What has rows for U or W: our path -> the key of the Hub."""
MESHES = [
    ((1, 2), TENSOR),
    ((4, 2), TENSOR),
    ((2, 2), TENSOR_FSDP),
    ((8, 1), FSDP),
]


def answer(model, params, inputs):
    """Greedy tokens, and the logits and states of the prompts."""
    out = generate(model, params, inputs, max_new_tokens=12, eos_ids=())
    return out, *forward(model, params, inputs, return_states=True)


@pytest.fixture(scope="module")
def inputs():
    """Eight rows of one crop each; one of them is shorter, and two have the image's indicators."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 40)).astype(np.int32)
    tokens[:, 1:10] = -300
    tokens[:2, 0], tokens[:2, 10] = -301, -305
    positions = np.tile(np.arange(40, dtype=np.int32), (8, 1))
    positions[2, 30:] = -1
    return Inputs(tokens, positions, rng.normal(size=(8, 70, 70, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def expected(shallow, inputs):
    return answer(*shallow, inputs)


@pytest.mark.parametrize("shape, rules", MESHES)
def test_a_mesh_changes_nothing(shallow, inputs, expected, lay, shape, rules):
    model, params = shallow
    placed, mesh = lay(params, model.config, shape, rules)
    rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    same(answer(model, placed, rows), expected)


def same(found, expected):
    (out, logits, states), (right, right_logits, right_states) = found, expected
    assert out.tokens.tolist() == right.tokens.tolist()
    np.testing.assert_allclose(out.log_probs, right.log_probs, atol=1e-4)
    np.testing.assert_allclose(logits, right_logits, atol=1e-4)
    for name in ("logits", "probabilities"):
        x, true = (getattr(s.images.tokens, name) for s in (states, right_states))
        assert x.shape == true.shape and x.shape[-1] == 64
        np.testing.assert_allclose(x, true, atol=1e-4)


@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_padding_is_never_the_likeliest_word(shallow, lay, function):
    """Not even where every true word is less likely than the padding's logit, which is 0."""
    model, params = shallow
    low = params["visual_tokenizer"]["norm"] | {"bias": jnp.full(64, -100.0)}
    params = params | {"visual_tokenizer": params["visual_tokenizer"] | {"norm": low}}
    config = replace(model.config.visual_tokenizer, tokenize_function=function)
    merged = jax.random.normal(jax.random.key(1), (3, 9, 192))
    placed, _ = lay(params, model.config, (1, 2), TENSOR)
    whole, padded = (
        apply(VisualTokenizer(config), x["visual_tokenizer"], merged, jax.random.key(2))
        for x in (params, placed)
    )
    assert padded.probabilities.shape == (3, 9, 70)
    np.testing.assert_array_equal(padded.probabilities[..., :64], whole.probabilities)
    assert not np.any(padded.probabilities[..., 64:])


def test_a_checkpoint_is_padded_as_it_is_read(inputs, load_golden, tmp_path):
    """Each device gets the bytes of its rows, zeros behind the last; saving cuts them off again."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    ovis = load(GOLDEN / "tiny-f32", mesh=mesh)
    source, flat = read_tensors(GOLDEN / "tiny-f32"), flatten_dict(ovis.params, sep="/")
    for path, key in VISUAL.items():
        true, array = source[key], flat[path]
        whole = np.concatenate([true, np.zeros((70 - len(true), *true.shape[1:]), true.dtype)])
        assert array.shape == whole.shape and len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape[0] == 35
            assert same_bits(np.asarray(shard.data), whole[shard.index])
    rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    single = load_golden("tiny-f32", None)
    # No further than the embeddings: this decoder makes 1e-3 of what 1e-6 is in its input.
    found, true = (
        forward(ovis.model, params, x, return_states=True)[1].inputs_embeds
        for params, x in ((ovis.params, rows), (single.params, inputs))
    )
    np.testing.assert_allclose(found, true, atol=1e-5)

    save_params(tmp_path / "saved", ovis.params, ovis.config)
    again = flatten_dict(load_params(tmp_path / "saved", ovis.config), sep="/")
    for path, x in flatten_dict(single.params, sep="/").items():
        assert same_bits(np.asarray(again[path]), np.asarray(x))


def test_explicit_axes_are_taken_as_automatic_ones(shallow_checkpoint, inputs):
    """What `jax.make_mesh` gives, in scope or not, around a program of the caller's own."""
    single = load(shallow_checkpoint)
    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices()[:8])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    ovis = load(shallow_checkpoint, mesh=mesh)

    def last(params, inputs):
        out = generate(ovis.model, params, inputs, max_new_tokens=3, eos_ids=())
        return out.tokens + 0, forward(ovis.model, params, inputs)[:, -1] + 0.0

    true = last(single.params, inputs)
    seen = visual_words(single.model, single.params, inputs).entropy
    with jax.set_mesh(mesh):
        spread = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
        within = jax.jit(last)(ovis.params, spread)
        pieces = [
            np.asarray(piece.tokens)
            for piece in stream(ovis.model, ovis.params, inputs, max_new_tokens=3, eos_ids=())
        ]
        entropy = visual_words(ovis.model, ovis.params, spread).entropy
        named = forward(model=ovis.model, params=ovis.params, inputs=spread)[:, -1]
    np.testing.assert_allclose(named, true[1], atol=1e-4)
    np.testing.assert_allclose(entropy, seen, atol=1e-4)
    for found in (last(ovis.params, inputs), within):
        np.testing.assert_array_equal(found[0], true[0])
        np.testing.assert_allclose(found[1], true[1], atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), true[0])
