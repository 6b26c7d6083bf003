"""The training step: what it updates, gradient accumulation, precision, LoRA and DPO."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.linear import LowRank
from ovis_jax.model.lora import attach_adapters, init_adapters, merge_adapters
from ovis_jax.model.ovis import forward
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import PreferenceBatch, TrainBatch, answer_log_probs
from ovis_jax.training.train_step import (
    accumulate_gradients,
    apply_gradients,
    init_gradient_sums,
    init_train_state,
    learning_rate_at,
    stack_micro_batches,
    train_step,
)
from ovis_jax.training.trainable import TRAINABLE_PARTS, join_params, split_params


def step_config(**options) -> StepConfig:
    defaults = {"max_steps": 1000, "learning_rate": 3e-3, "weight_decay": 0.01}
    return StepConfig(**{**defaults, **options})


@pytest.fixture(scope="module")
def ovis(shallow_checkpoint):
    return load(shallow_checkpoint)


def text_batch(*rows: list[int], answer: int) -> TrainBatch:
    """Rows of one length, with labels on the last `answer` tokens."""
    tokens = np.array(rows, np.int32)
    labels = tokens.copy()
    labels[:, :-answer] = -100
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(rows), 1))
    return TrainBatch(Inputs(tokens, positions, np.zeros((0, 70, 70, 3), np.float32)), labels)


def pad_batch(batch: TrainBatch, rows: int, length: int) -> TrainBatch:
    """Add padding at the end of a batch's rows, and padding rows."""
    old_rows, old_length = batch.labels.shape
    shape = ((0, rows - old_rows), (0, length - old_length))
    tokens, positions, labels = (
        np.pad(x, shape, constant_values=value)
        for x, value in zip((*batch.inputs[:2], batch.labels), (0, -1, -100), strict=True)
    )
    return TrainBatch(Inputs(tokens, positions, batch.inputs.pixels), labels)


def random_rows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(108, 600, (count, length)).tolist()


@pytest.fixture(scope="module")
def image_batch(ovis, golden) -> TrainBatch:
    """One conversation about an image."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A red dot."}]
    image = open_image(golden / "images/square.png")
    example = ovis.processor.encode_training_example(turns, [image])
    positions = np.arange(len(example.tokens), dtype=np.int32)[None]
    return TrainBatch(Inputs(example.tokens[None], positions, example.pixels), example.labels[None])


def test_parts_cover_the_model(ovis):
    flat = flatten_dict(ovis.params, sep="/")
    pieces = [split_params(ovis.params, [part])[0].keys() for part in TRAINABLE_PARTS]
    assert sum(map(len, pieces)) == len(flat)
    assert set().union(*pieces) == flat.keys()
    trainable, frozen = split_params(ovis.params, ["visual_embedding"])
    assert trainable.keys() == {"visual_embedding"} and len(frozen) == len(flat) - 1
    rejoined = flatten_dict(join_params(trainable, frozen), sep="/")
    assert all(rejoined[path] is flat[path] for path in flat)
    for parts in ([], ["decoder"]):
        with pytest.raises(RequestError, match="expected some of visual_tokenizer"):
            split_params(ovis.params, parts)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", TRAINABLE_PARTS)
def test_only_trainable_parts_change(ovis, image_batch, part):
    trainable, frozen = split_params(ovis.params, [part])
    before = {path: np.asarray(x) for path, x in trainable.items()}
    frozen_before = {path: np.asarray(x) for path, x in frozen.items()}
    config = step_config()
    state = init_train_state(config, trainable)
    batches = stack_micro_batches([image_batch])
    state, metrics = train_step(ovis.model, config, state, frozen, batches)
    assert np.isfinite(metrics.loss) and metrics.grad_norm > 0 and state.step == 1
    unchanged = {path for path, x in before.items() if np.array_equal(x, state.trainable[path])}
    # Biases of keys do not affect attention. Unused rows of a table still decay.
    assert unchanged <= {path for path in before if path.endswith("attn/k_bias")}
    assert all(np.array_equal(frozen_before[path], frozen[path]) for path in frozen)


@pytest.mark.slow
def test_training_on_an_answer_makes_it_the_greedy_one(ovis, image_batch):
    config = step_config(learning_rate=1e-2, warmup_steps=3)
    trainable, frozen = split_params(ovis.params, ["llm"])
    state, losses = init_train_state(config, trainable), []
    batches = stack_micro_batches([image_batch])
    for _ in range(30):
        state, metrics = train_step(ovis.model, config, state, frozen, batches)
        losses.append(float(metrics.loss))
    assert losses[0] > 1.0 > 0.1 > losses[-1]
    params = join_params(state.trainable, frozen)
    answer = [int(i) for i in image_batch.labels[0] if i != -100]
    end = int(np.argmax(image_batch.labels[0] != -100))
    prompt = Inputs(*(a[:, :end] for a in image_batch.inputs[:2]), image_batch.inputs.pixels)
    out = generate(ovis.model, params, prompt, max_new_tokens=len(answer))
    assert out.tokens[0].tolist() == answer


@pytest.mark.slow
def test_gradient_accumulation_equals_one_batch(ovis):
    """The micro-batches have different numbers of answer tokens."""
    rows = random_rows(4, 24)
    short, long = text_batch(*rows[:2], answer=3), text_batch(*rows[2:], answer=11)
    inputs = jax.tree.map(lambda *x: np.concatenate(x), short.inputs, long.inputs)
    whole = TrainBatch(inputs, np.concatenate([short.labels, long.labels]))
    trainable, frozen = split_params(ovis.params, ["llm", "visual_embedding"])
    config = step_config()

    def run(*batches: TrainBatch):
        state = init_train_state(config, trainable)
        return train_step(ovis.model, config, state, frozen, stack_micro_batches(batches))

    one, one_metrics = run(whole)
    two, two_metrics = run(short, long)
    assert one_metrics.num_targets == two_metrics.num_targets == 2 * 3 + 2 * 11
    np.testing.assert_allclose(one_metrics.loss, two_metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(one_metrics.grad_norm, two_metrics.grad_norm, rtol=1e-4)
    for path in one.trainable:
        # Adam's first update is the gradient's sign, which rounding can flip near zero.
        different = np.abs(one.trainable[path] - two.trainable[path]) > 1e-4
        assert different.mean() < 2e-3, path
    with pytest.raises(RequestError, match="2 shapes"):
        stack_micro_batches([short, whole])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_micro_batches_of_different_shapes_equal_one_batch(ovis, objective):
    """The second micro-batch is longer, and each has a padding row."""
    rows, long_rows = random_rows(4, 16), random_rows(4, 24, seed=1)
    config = step_config(objective=objective, rpo_alpha=0.5)
    trainable, frozen = split_params(ovis.params, ["llm"])

    def batch(first: int, count: int, num_rows: int, length: int):
        chosen = [text_batch(*rows[first : first + count], answer=3 + first)]
        chosen += [text_batch(*long_rows[first : first + count], answer=7)] * (objective == "dpo")
        padded = [pad_batch(each, num_rows, length) for each in chosen]
        if objective == "sft":
            return padded[0]
        reference = np.arange(first, first + num_rows, dtype=np.float32)
        return PreferenceBatch(*padded, reference - 40.0, reference - 50.0)

    expected, expected_metrics = train_step(
        ovis.model,
        config,
        init_train_state(config, trainable),
        frozen,
        stack_micro_batches([batch(0, 2, 2, 24), batch(2, 2, 2, 24)]),
    )
    state = init_train_state(config, trainable)
    sums = init_gradient_sums(state)
    for part in (batch(0, 2, 3, 24), batch(2, 2, 3, 32)):
        stacked = stack_micro_batches([part])
        sums = accumulate_gradients(
            ovis.model, config, state.trainable, frozen, sums, stacked, step=state.step
        )
    state, metrics = apply_gradients(config, state, sums)
    assert metrics.num_targets == (2 * 3 + 2 * 5 if objective == "sft" else 4)
    assert state.step == expected.step == 1
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    for path in expected.trainable:
        different = np.abs(state.trainable[path] - expected.trainable[path]) > 1e-4
        assert different.mean() < 2e-3, path  # see above


@pytest.mark.exhaustive
def test_remat_gives_the_same_gradient(ovis, image_batch):
    trainable, frozen = split_params(ovis.params, list(TRAINABLE_PARTS))
    config, batches = step_config(), stack_micro_batches([image_batch])
    norms = [
        train_step(model, config, init_train_state(config, trainable), frozen, batches)[1].grad_norm
        for model in (ovis.model, replace(ovis.model, remat=True))
    ]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.slow
def test_float32_weights_accumulate_updates_below_bfloat16_precision(ovis, image_batch):
    config = step_config(learning_rate=1e-6, weight_decay=0.0, compute_dtype="bfloat16")
    trainable, frozen = split_params(ovis.params, ["llm"])
    state, batches = init_train_state(config, trainable), stack_micro_batches([image_batch])
    for _ in range(3):
        state, metrics = train_step(ovis.model, config, state, frozen, batches)
    path = "decoder/block_0/mlp/up"
    moved = np.abs(np.asarray(state.trainable[path]) - np.asarray(trainable[path]))
    assert state.trainable[path].dtype == jnp.float32 and metrics.loss.dtype == jnp.float32
    assert 1e-6 < moved.max() < 4e-6


def test_learning_rate_schedule():
    config = StepConfig(learning_rate=2.0, max_steps=10, warmup_steps=4, decay_steps=5)
    rates = [float(learning_rate_at(config, i)) for i in range(11)]
    np.testing.assert_allclose(rates, [0.5, 1, 1.5, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0], atol=1e-6)


@pytest.mark.slow
def test_adapters_start_at_zero_learn_and_merge(ovis, image_batch):
    adapters = init_adapters(ovis.params, jax.random.key(0), rank=4)
    assert len(adapters) == 2 * 4 * 2
    inputs = image_batch.inputs
    base_logits = forward(ovis.model, ovis.params, inputs)
    params = attach_adapters(ovis.params, adapters, 2.0)
    assert isinstance(params["decoder"]["block_0"]["attn"]["q"], LowRank)
    np.testing.assert_allclose(forward(ovis.model, params, inputs), base_logits, atol=1e-3)
    config = step_config(learning_rate=1e-2)
    frozen = flatten_dict(ovis.params, sep="/")
    state, losses = init_train_state(config, adapters), []
    batches = stack_micro_batches([image_batch])
    for _ in range(20):
        state, metrics = train_step(ovis.model, config, state, frozen, batches, lora_scale=2.0)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    params = join_params(state.trainable, frozen, 2.0)
    merged = merge_adapters(params)
    assert jax.tree.structure(merged) == jax.tree.structure(ovis.params)
    attached_logits, merged_logits = (forward(ovis.model, p, inputs) for p in (params, merged))
    np.testing.assert_allclose(attached_logits, merged_logits, atol=1e-2)
    assert np.abs(merged_logits - base_logits).max() > 0.1
    with pytest.raises(RequestError, match="0 matrices match"):
        init_adapters(ovis.params, jax.random.key(0), rank=4, target_modules="nothing")


@pytest.mark.slow
def test_dpo_prefers_the_chosen_answer(ovis):
    rows = random_rows(2, 20, seed=4)
    chosen, rejected = (text_batch(row, answer=6) for row in rows)
    trainable, frozen = split_params(ovis.params, ["llm"])

    def log_probs(params, batch):
        hidden = ovis.model.last_hidden_states(params, batch.inputs)
        return answer_log_probs(ovis.model, params, hidden, jnp.array(batch.labels))

    reference = log_probs(ovis.params, chosen), log_probs(ovis.params, rejected)
    batches = stack_micro_batches([PreferenceBatch(chosen, rejected, *reference)])
    config = step_config(learning_rate=1e-3, beta=0.5, rpo_alpha=0.1)
    state, losses = init_train_state(config, trainable), []
    for _ in range(8):
        state, metrics = train_step(ovis.model, config, state, frozen, batches)
        losses.append(float(metrics.loss))
    loss_per_token = -float(reference[0].mean()) / 6
    np.testing.assert_allclose(losses[0], np.log(2.0) + 0.1 * loss_per_token, rtol=1e-3)
    assert losses[-1] < 0.1 * losses[0]
    params = join_params(state.trainable, frozen)
    gains = [
        log_probs(params, batch) - before
        for batch, before in zip((chosen, rejected), reference, strict=True)
    ]
    assert gains[0] > gains[1]


@pytest.mark.slow
def test_the_state_is_donated(ovis, image_batch):
    trainable, frozen = split_params(ovis.params, ["llm"])
    config = step_config()
    state = init_train_state(config, trainable)
    old = state.trainable["decoder/embed"]
    train_step(ovis.model, config, state, frozen, stack_micro_batches([image_batch]))
    assert old.is_deleted() and not ovis.params["decoder"]["embed"].is_deleted()


def hard_model(ovis, function):
    tokenizer = replace(ovis.model.config.visual_tokenizer, tokenize_function=function)
    return replace(ovis.model, config=replace(ovis.model.config, visual_tokenizer=tokenizer))


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_hard_visual_tokens_train_the_visual_tokenizer(ovis, image_batch, function):
    """Each step and each micro-batch samples its own visual words from one key."""
    model, config = hard_model(ovis, function), step_config()
    trainable, frozen = split_params(ovis.params, ["visual_tokenizer"])

    def loss_and_norm(seed: int, step: int, *batches: TrainBatch) -> tuple[float, float]:
        state = init_train_state(config, trainable)._replace(step=jnp.int32(step))
        batches, key = stack_micro_batches(batches), jax.random.key(seed)
        metrics = train_step(model, config, state, frozen, batches, 1.0, key)[1]
        return float(metrics.loss), float(metrics.grad_norm)

    first, again, other_step, other_seed = (
        loss_and_norm(seed, step, image_batch) for seed, step in [(0, 0), (0, 0), (0, 1), (1, 0)]
    )
    assert first[1] > 0 and first == again
    assert len({first[0], other_step[0], other_seed[0]}) == (3 if function[0] == "g" else 1)
    both = loss_and_norm(0, 0, image_batch, image_batch)
    assert (both[0] == pytest.approx(first[0], rel=1e-6)) == (function == "st_argmax")


def test_sampled_visual_words_need_a_key(ovis, image_batch):
    trainable, frozen = split_params(ovis.params, ["visual_tokenizer"])
    config, batches = step_config(), stack_micro_batches([image_batch])
    state = init_train_state(config, trainable)
    with pytest.raises(RequestError, match="is gumbel_argmax needs a key .* pass key="):
        train_step(hard_model(ovis, "gumbel_argmax"), config, state, frozen, batches)
