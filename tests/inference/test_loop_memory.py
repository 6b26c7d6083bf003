"""The compiled loop over tokens copies neither the cache nor a weight, inside or before it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ovis_jax import Inputs, Ovis, presets
from ovis_jax.inference.generate import decode_more, make_options, prefill_and_decode
from ovis_jax.inference.sampling import Sampling

pytestmark = pytest.mark.optimized

# A cache of 512 KiB per block and row in float32, and an embedding of 512 KiB in bfloat16.
TINY = presets.tiny()
CONFIG = replace(
    TINY,
    decoder=replace(TINY.decoder, vocab_size=2048, width=128, depth=2, head_dim=32, mlp_width=512),
)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_a_step_needs_little_memory(dtype, rows):
    model, new_tokens = Ovis(CONFIG), 1024
    params = jax.eval_shape(lambda key: model.init(key, jnp.dtype(dtype)), jax.random.key(0))
    ids = jnp.ones((rows, 4), jnp.int32)
    inputs = Inputs(ids, ids, jnp.zeros((0, 70, 70, 3)))
    options = make_options("generate", model, params, inputs, None, new_tokens, Sampling(), ())
    state, _ = jax.eval_shape(
        lambda params, options: prefill_and_decode(model, params, inputs, options, new_tokens, 8),
        params,
        options,
    )
    loop = decode_more.lower(model, params, state, options, jnp.int32(8), 8).compile()
    memory = loop.memory_analysis()
    assert memory is not None
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 2**17
