"""2000 tokens, far beyond the window: constant memory, and the tokens of an uncached forward."""

import jax
import numpy as np
import pytest

from ovis_jax import Inputs, forward, stream

NUM_TOKENS, CHUNK_SIZE = 2000, 100
MARGIN = 1e-2
"""Margin between the two best tokens below which rounding may swap them."""


@pytest.mark.exhaustive
def test_two_thousand_tokens(load_golden):
    ovis = load_golden("tiny-f32", None)
    assert ovis.config.decoder.sliding_window == 16
    inputs = ovis.processor(["Tell me everything."])
    end = int(inputs.positions.max()) + 1
    chunks, live_bytes = [], []
    for chunk in stream(
        ovis.model,
        ovis.params,
        inputs,
        max_new_tokens=NUM_TOKENS,
        eos_ids=(),
        chunk_size=CHUNK_SIZE,
    ):
        chunks.append(np.array(chunk.tokens))  # a view would keep the chunk alive
        live_bytes.append(sum(x.nbytes for x in jax.live_arrays()))
    answer = np.concatenate(chunks, axis=1)
    assert answer.shape == (1, NUM_TOKENS)
    assert len(set(live_bytes[2:-2])) == 1

    prompt = np.asarray(inputs.tokens)[np.asarray(inputs.positions) >= 0]
    tokens = np.concatenate([prompt[None], answer], axis=1)[:, :-1]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = forward(ovis.model, ovis.params, Inputs(tokens, positions, inputs.pixels[:0]))
    logits = np.asarray(logits)[0, end - 1 :]
    second, best = np.sort(logits, axis=1)[:, -2:].T
    clear = best - second > MARGIN
    assert np.mean(clear) > 0.9
    np.testing.assert_array_equal(answer[0, clear], logits.argmax(1)[clear])
