"""The model on meshes of CPU devices gives the results of a single device."""

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
"""Parameters with rows for U or W: our path -> the Hub's key."""
MESHES = [
    ((1, 2), TENSOR),
    ((4, 2), TENSOR),
    ((2, 2), TENSOR_FSDP),
    ((8, 1), FSDP),
]


def answer(model, params, inputs):
    """Greedy tokens, logits and states of the prompts."""
    out = generate(model, params, inputs, max_new_tokens=12, eos_ids=())
    return out, *forward(model, params, inputs, return_states=True)


@pytest.fixture(scope="module")
def inputs():
    """Eight rows with one crop each; one row is shorter, and two have image indicators."""
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


@pytest.mark.slow
@pytest.mark.parametrize("shape, rules", MESHES)
def test_results_on_a_mesh(shallow, inputs, expected, lay, shape, rules):
    model, params = shallow
    placed, mesh = lay(params, model.config, shape, rules)
    rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    check(answer(model, placed, rows), expected)


def check(found, expected):
    (out, logits, states), (right, right_logits, right_states) = found, expected
    assert out.tokens.tolist() == right.tokens.tolist()
    np.testing.assert_allclose(out.log_probs, right.log_probs, atol=1e-4)
    np.testing.assert_allclose(logits, right_logits, atol=1e-4)
    for name in ("logits", "probabilities"):
        x, true = (getattr(s.images.tokens, name) for s in (states, right_states))
        assert x.shape == true.shape and x.shape[-1] == 64
        np.testing.assert_allclose(x, true, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_padding_is_never_the_most_likely_word(shallow, lay, function):
    """All real logits are below the logit of padding, which is 0."""
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


@pytest.mark.slow
def test_loading_pads_a_checkpoint(inputs, load_golden, tmp_path):
    """Each device gets its rows, with zeros after the last one; saving removes the zeros."""
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
    # Only the embeddings are compared, as this decoder amplifies a difference of 1e-6 to 1e-3.
    found, true = (
        forward(ovis.model, params, x, return_states=True)[1].inputs_embeds
        for params, x in ((ovis.params, rows), (single.params, inputs))
    )
    np.testing.assert_allclose(found, true, atol=1e-5)

    save_params(tmp_path / "saved", ovis.params, ovis.config)
    again = flatten_dict(load_params(tmp_path / "saved", ovis.config), sep="/")
    for path, x in flatten_dict(single.params, sep="/").items():
        assert same_bits(np.asarray(again[path]), np.asarray(x))


@pytest.mark.exhaustive
def test_explicit_axes(shallow_checkpoint, inputs):
    """A mesh from `jax.make_mesh`, in scope or not, around a jitted function of the caller."""
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
