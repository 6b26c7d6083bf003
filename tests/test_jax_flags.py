"""Every entry point under each of JAX's global settings that research programs switch on."""

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shallow import shallow_config

from ovis_jax import Ovis, Sampling, generate, score, stream, visual_words
from ovis_jax.engine.runner import Chunk, Crop, ModelRunner, Start
from ovis_jax.engine.state import make_sampling_params
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import forward
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import TrainBatch
from ovis_jax.training.train_step import init_train_state, stack_micro_batches, train_step
from ovis_jax.training.trainable import split_params

pytestmark = pytest.mark.slow

CHECKS = (
    partial(jax.numpy_dtype_promotion, "strict"),
    partial(jax.numpy_rank_promotion, "raise"),
    partial(jax.transfer_guard, "disallow"),
    partial(jax.debug_nans, True),
    partial(jax.debug_infs, True),
    partial(jax.debug_key_reuse, True),
    jax.checking_leaks,
)
"""Settings that change no result and raise errors. They need not be tested one by one."""


@contextmanager
def all_checks():
    """Switch on all checks."""
    with ExitStack() as stack:
        for check in CHECKS:
            stack.enter_context(check())
        yield


SETTINGS = {
    "default": nullcontext,
    "checks": all_checks,
    "jax_enable_x64": partial(jax.enable_x64, True),
    "jax_default_matmul_precision": partial(jax.default_matmul_precision, "bfloat16"),
    "jax_disable_jit": jax.disable_jit,
}
"""Settings -> a context in which they are switched on."""

NEW_TOKENS = 3


def inputs(rows: int = 2) -> Inputs:
    """Prompts of 14 and 13 positions, each with one crop."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (rows, 14)).astype(np.int32)
    tokens[:, 2:11] = -300
    columns = np.arange(14, dtype=np.int32)
    positions = np.stack([np.where(columns >= row, columns - row, -1) for row in range(rows)])
    pixels = rng.normal(size=(rows, 70, 70, 3)).astype(np.float32)
    return jax.device_put(Inputs(tokens, positions, pixels))


def sampling_numbers() -> Sampling:
    """A value for every sampling parameter."""
    filters = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1}
    return Sampling(temperature=0.8, **filters, **penalties)


def sampling() -> Sampling:
    """The same on the device."""
    return jax.tree.map(lambda x: jax.device_put(np.float32(x)), sampling_numbers())


def run_forward(model, params, inputs, key, sampling):
    return forward(model, params, inputs)


def run_generate(model, params, inputs, key, sampling):
    return generate(model, params, inputs, key, max_new_tokens=NEW_TOKENS, sampling=sampling)


def run_greedy(model, params, inputs, key, sampling):
    return generate(model, params, inputs, max_new_tokens=NEW_TOKENS, eos_ids=[7])


def run_int8_cache(model, params, inputs, key, sampling):
    int8_model = replace(model, kv_cache_dtype="int8")
    return run_greedy(int8_model, params, inputs, key, sampling)


def run_stream(model, params, inputs, key, sampling):
    options = {"max_new_tokens": NEW_TOKENS, "sampling": sampling, "chunk_size": 2}
    return list(stream(model, params, inputs, key, **options))


def run_score(model, params, inputs, key, sampling):
    return score(model, params, inputs, jax.device_put(np.full((2, 1, 3), 150, np.int32)))


def run_visual_words(model, params, inputs, key, sampling):
    return visual_words(model, params, inputs, k=3)


def run_train_step(model, params, inputs, key, sampling):
    config = StepConfig(max_steps=10, learning_rate=1e-3, max_grad_norm=1.0)
    trainable, frozen = split_params(params, ["visual_tokenizer", "llm"])
    tokens = np.asarray(inputs.tokens)
    batch = TrainBatch(inputs, jax.device_put(np.where(tokens > 300, tokens, -100)))
    with jax.transfer_guard("allow"):  # once at the start of a run
        state = init_train_state(config, trainable)
    batches = stack_micro_batches([batch])
    state, metrics = train_step(model, config, state, frozen, batches, key=key)
    return state.trainable, metrics


def run_engine_programs(model, params, inputs, key, sampling):
    runner = ModelRunner(model, params, max_num_seqs=2, max_model_len=24, chunk_size=8)
    tokens, pixels = np.asarray(inputs.tokens)[0], np.asarray(inputs.pixels)
    visual, embeddings = runner.run_encoder(runner.init_visual(), [Crop(pixels[0], 0, 0, 5)])
    visual = runner.run_add_visual(visual, embeddings[0], 0, 0)
    state = runner.init_decode_state(24)
    for start in range(0, len(tokens), runner.chunk_size):
        state, logits = runner.run_prefill(state, visual, [Chunk(tokens, start, 1, 0)])
    options = make_sampling_params(sampling_numbers(), 5, 0)
    state, first = runner.run_start(state, logits, [Start(1, 0, options, None)])
    found = [first]
    for mode in ("greedy", "temperature", "full"):
        state, sampled = runner.run_decode(state, np.array([False, True]), mode)
        found.append(sampled)
    runner.run_copy(state, 1, 0)
    return logits, [(x.tokens[-1], x.logprobs[-1]) for x in jax.device_get(found)]


ENTRY_POINTS = {
    function.__name__.removeprefix("run_"): function
    for function in (
        run_forward,
        run_generate,
        run_greedy,
        run_int8_cache,
        run_stream,
        run_score,
        run_visual_words,
        run_train_step,
        run_engine_programs,
    )
}


@pytest.fixture(scope="module")
def results():
    """Setting, entry point -> results, of a model with a single block on each side."""
    config = shallow_config()
    model = Ovis(replace(config, decoder=replace(config.decoder, depth=1)))
    params = jax.jit(model.init)(jax.random.key(0))
    found = {}

    def run(setting: str, name: str):
        if (setting, name) not in found:
            arguments = inputs(), jax.random.key(3), sampling()
            with SETTINGS[setting]():
                found[setting, name] = ENTRY_POINTS[name](model, params, *arguments)
        return found[setting, name]

    return run


CASES = [(s, n) for n in ENTRY_POINTS for s in list(SETTINGS)[1:] if n != "int8_cache"] + [
    ("jax_enable_x64", "int8_cache"),
    ("checks", "int8_cache"),
]


@pytest.mark.parametrize(("setting", "name"), CASES)
def test_results_are_the_same_under_every_setting(results, setting, name):
    expected, structure = jax.tree.flatten(results("default", name))
    found, found_structure = jax.tree.flatten(results(setting, name))
    assert found_structure == structure
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(y.dtype, jnp.integer):
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, atol=1e-4)
