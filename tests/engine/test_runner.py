"""What a runner accepts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from serving_setup import MAX_MODEL_LEN

from ovis_jax.engine.runner import ModelRunner, cache_lengths
from ovis_jax.errors import OvisError


def test_shapes_and_dtypes_are_checked_in_tests(runner):
    state = runner.init_decode_state(runner.cache_lengths[0])
    visual = runner.init_visual()
    with pytest.raises(jaxtyping.TypeCheckError, match="visual"):
        runner.run_encoder(visual[0], [])
    with pytest.raises(jaxtyping.TypeCheckError, match="logits"):
        runner.run_start(state, np.zeros((1, 3), np.float64), [])


def test_the_cache_is_resized(runner):
    """Up and down, also by several lengths at once; no row is longer than the cache."""

    def check(state, length):
        expected = jax.eval_shape(lambda: runner.init_decode_state(length))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)

    shortest, *_, longest = runner.cache_lengths
    state, length = runner.init_decode_state(shortest), shortest
    for next_length in (longest, shortest, *runner.cache_lengths[1:], shortest):
        state = runner.resize_cache(state, length, next_length)
        length = next_length
        check(state, length)
    lengths = jnp.array([shortest + 7, shortest - 1, 3, 0], jnp.int32)
    state = runner.resize_cache(state, shortest, longest)
    state = state._replace(cache=state.cache._replace(lengths=lengths))
    state = runner.resize_cache(state, longest, shortest)
    assert state.cache.lengths.tolist() == [shortest - 1, shortest - 1, 3, 0]


def test_too_many_stop_ids(ovis):
    model = replace(ovis.model, config=replace(ovis.config, eos_ids=tuple(range(17))))
    with pytest.raises(OvisError, match="eos_token_id: 17 ids, but the engine supports at most 16"):
        ModelRunner(model, ovis.params, max_num_seqs=1, max_model_len=MAX_MODEL_LEN, chunk_size=8)


@pytest.mark.slow
def test_programs_with_masks_are_compiled_only_for_constraints(ovis, monkeypatch):
    masked, run_decode = [], ModelRunner.run_decode

    def record(runner, state, active, mode, masks=None):
        masked.append(masks is not None)
        return run_decode(runner, state, active, mode, masks)

    monkeypatch.setattr(ModelRunner, "run_decode", record)
    sizes = {"max_num_seqs": 1, "max_model_len": MAX_MODEL_LEN, "chunk_size": 8}
    ModelRunner(ovis.model, ovis.params, **sizes, supports_constraints=False)
    assert len(masked) > 3 and not any(masked)


@pytest.mark.parametrize(
    "max_model_len, lengths",
    [(8192, (1024, 2048, 4096, 8192)), (320, (128, 256, 320)), (130, (128, 130)), (64, (64,))],
)
def test_lengths_of_the_cache(max_model_len, lengths):
    assert cache_lengths(max_model_len) == lengths
