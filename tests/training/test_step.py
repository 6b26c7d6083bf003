"""The train step: what learns, how it is accumulated, and that it learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.image import open_image
from ovis_jax.loading import load
from ovis_jax.model.layers import LowRank
from ovis_jax.model.ovis import forward
from ovis_jax.training.losses import Batch, Pairs, answer_log_probs
from ovis_jax.training.parts import PARTS, add_adapters, join, merge_adapters, split
from ovis_jax.training.step import Recipe, stack, start, step

RECIPE = Recipe(learning_rate=3e-3, clip_norm=1.0, weight_decay=0.01)


@pytest.fixture(scope="module")
def ovis(shallow_checkpoint):
    return load(shallow_checkpoint)


def text_batch(*rows: list[int], answer: int) -> Batch:
    """Rows of one length, of which the last `answer` tokens are learned."""
    tokens = np.array(rows, np.int32)
    labels = tokens.copy()
    labels[:, :-answer] = -100
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(rows), 1))
    return Batch(Inputs(tokens, positions, np.zeros((0, 70, 70, 3), np.float32)), labels)


def random_rows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(108, 600, (count, length)).tolist()


@pytest.fixture(scope="module")
def image_batch(ovis, golden) -> Batch:
    """One conversation about an image."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A red dot."}]
    example = ovis.processor.training_example(turns, [open_image(golden / "images/square.png")])
    positions = np.arange(len(example.tokens), dtype=np.int32)[None]
    return Batch(Inputs(example.tokens[None], positions, example.pixels), example.labels[None])


def test_parts_are_the_whole_model(ovis):
    flat = flatten_dict(ovis.params, sep="/")
    pieces = [split(ovis.params, [part])[0].keys() for part in PARTS]
    assert sum(map(len, pieces)) == len(flat)
    assert set().union(*pieces) == flat.keys()
    learned, frozen = split(ovis.params, ["visual_embedding"])
    assert learned.keys() == {"visual_embedding"} and len(frozen) == len(flat) - 1
    rejoined = flatten_dict(join(learned, frozen), sep="/")
    assert all(rejoined[path] is flat[path] for path in flat)
    for parts in ([], ["decoder"]):
        with pytest.raises(RequestError, match="expected some of visual_tokenizer"):
            split(ovis.params, parts)


@pytest.mark.parametrize("part", PARTS)
def test_only_what_is_named_learns(ovis, image_batch, part):
    learned, frozen = split(ovis.params, [part])
    before = {path: np.asarray(x) for path, x in learned.items()}
    kept = {path: np.asarray(x) for path, x in frozen.items()}
    state, metrics = step(ovis.model, RECIPE, start(RECIPE, learned), frozen, stack([image_batch]))
    assert np.isfinite(metrics.loss) and metrics.gradient_norm > 0 and state.step == 1
    unchanged = {path for path, x in before.items() if np.array_equal(x, state.learned[path])}
    # Keys' biases do not change attention; unseen rows of a table only decay.
    assert unchanged <= {path for path in before if path.endswith("attn/k_bias")}
    assert all(np.array_equal(kept[path], frozen[path]) for path in kept)


def test_it_learns_an_answer(ovis, image_batch):
    recipe = replace(RECIPE, learning_rate=1e-2, warmup_steps=3)
    learned, frozen = split(ovis.params, ["llm"])
    state, losses = start(recipe, learned), []
    for _ in range(30):
        state, metrics = step(ovis.model, recipe, state, frozen, stack([image_batch]))
        losses.append(float(metrics.loss))
    assert losses[0] > 1.0 > 0.1 > losses[-1]
    params = join(state.learned, frozen)
    answer = [int(i) for i in image_batch.labels[0] if i != -100]
    end = int(np.argmax(image_batch.labels[0] != -100))
    asked = Inputs(*(a[:, :end] for a in image_batch.inputs[:2]), image_batch.inputs.pixels)
    out = generate(ovis.model, params, asked, max_new_tokens=len(answer))
    assert out.tokens[0].tolist() == answer


def test_micro_batches_are_one_batch(ovis):
    """Even when they hold different numbers of answer tokens."""
    rows = random_rows(4, 24)
    short, long = text_batch(*rows[:2], answer=3), text_batch(*rows[2:], answer=11)
    inputs = jax.tree.map(lambda *x: np.concatenate(x), short.inputs, long.inputs)
    whole = Batch(inputs, np.concatenate([short.labels, long.labels]))
    learned, frozen = split(ovis.params, ["llm", "visual_embedding"])

    def run(*batches: Batch):
        return step(ovis.model, RECIPE, start(RECIPE, learned), frozen, stack(batches))

    one, one_metrics = run(whole)
    two, two_metrics = run(short, long)
    assert one_metrics.count == two_metrics.count == 2 * 3 + 2 * 11
    np.testing.assert_allclose(one_metrics.loss, two_metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(one_metrics.gradient_norm, two_metrics.gradient_norm, rtol=1e-4)
    for path in one.learned:
        # Adam's first step is the gradient's sign: compare where that is not a matter of rounding.
        different = np.abs(one.learned[path] - two.learned[path]) > 1e-4
        assert different.mean() < 2e-3, path
    with pytest.raises(RequestError, match="2 shapes"):
        stack([short, whole])


def test_remat_changes_nothing(ovis, image_batch):
    learned, frozen = split(ovis.params, list(PARTS))
    norms = [
        step(model, RECIPE, start(RECIPE, learned), frozen, stack([image_batch]))[1].gradient_norm
        for model in (ovis.model, replace(ovis.model, remat=True))
    ]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_master_weights_are_float32_over_bfloat16(ovis, image_batch):
    """Updates smaller than bfloat16's last bit add up."""
    recipe = replace(RECIPE, learning_rate=1e-6, weight_decay=0.0, compute_dtype=jnp.bfloat16)
    learned, frozen = split(ovis.params, ["llm"])
    state = start(recipe, learned)
    for _ in range(3):
        state, metrics = step(ovis.model, recipe, state, frozen, stack([image_batch]))
    path = "decoder/block_0/mlp/up"
    moved = np.abs(np.asarray(state.learned[path]) - np.asarray(learned[path]))
    assert state.learned[path].dtype == jnp.float32 and metrics.loss.dtype == jnp.float32
    assert 1e-6 < moved.max() < 4e-6


def test_rates():
    recipe = Recipe(learning_rate=2.0, total_steps=10, warmup_steps=4, decay_steps=5)
    rates = [float(recipe.rate(i)) for i in range(11)]
    np.testing.assert_allclose(rates, [0.5, 1, 1.5, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0], atol=1e-6)


def test_adapters_start_as_nothing_learn_and_merge(ovis, image_batch):
    adapters = add_adapters(ovis.params, jax.random.key(0), rank=4)
    assert len(adapters) == 2 * 4 * 2
    frozen = flatten_dict(ovis.params, sep="/")
    inputs = image_batch.inputs
    plain = forward(ovis.model, ovis.params, inputs)
    params = join(adapters, frozen, 2.0)
    assert isinstance(params["decoder"]["block_0"]["attn"]["q"], LowRank)
    np.testing.assert_allclose(forward(ovis.model, params, inputs), plain, atol=1e-3)
    recipe = replace(RECIPE, learning_rate=1e-2, adapter_scale=2.0)
    state, losses = start(recipe, adapters), []
    for _ in range(20):
        state, metrics = step(ovis.model, recipe, state, frozen, stack([image_batch]))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    params = join(state.learned, frozen, 2.0)
    merged = merge_adapters(params)
    assert jax.tree.structure(merged) == jax.tree.structure(ovis.params)
    with_adapters, without = (forward(ovis.model, p, inputs) for p in (params, merged))
    np.testing.assert_allclose(with_adapters, without, atol=1e-2)
    assert np.abs(without - plain).max() > 0.1
    with pytest.raises(RequestError, match="0 matrices match"):
        add_adapters(ovis.params, jax.random.key(0), rank=4, targets="nothing")


def test_dpo_prefers_the_chosen(ovis):
    rows = random_rows(2, 20, seed=4)
    chosen, rejected = (text_batch(row, answer=6) for row in rows)
    learned, frozen = split(ovis.params, ["llm"])

    def answers(params, batch):
        return answer_log_probs(forward(ovis.model, params, batch.inputs), jnp.array(batch.labels))

    reference = answers(ovis.params, chosen), answers(ovis.params, rejected)
    pairs = Pairs(chosen, rejected, *reference)
    recipe = replace(RECIPE, learning_rate=1e-3, beta=0.5, chosen_weight=0.1)
    state, losses = start(recipe, learned), []
    for _ in range(8):
        state, metrics = step(ovis.model, recipe, state, frozen, stack([pairs]))
        losses.append(float(metrics.loss))
    unlikely = -float(reference[0].mean()) / 6  # a token of the chosen answer
    np.testing.assert_allclose(losses[0], np.log(2.0) + 0.1 * unlikely, rtol=1e-3)
    assert losses[-1] < 0.1 * losses[0]
    params = join(state.learned, frozen)
    margins = [answers(params, b) - r for b, r in zip((chosen, rejected), reference, strict=True)]
    assert margins[0] > margins[1]


def test_the_state_is_given_away(ovis, image_batch):
    learned, frozen = split(ovis.params, ["llm"])
    state = start(RECIPE, learned)
    held = state.learned["decoder/embed"]
    step(ovis.model, RECIPE, state, frozen, stack([image_batch]))
    assert held.is_deleted() and not ovis.params["decoder"]["embed"].is_deleted()
