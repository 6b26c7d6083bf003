"""Two thousand tokens, far across the window: flat memory, and what the model says uncached."""

import jax
import numpy as np

from ovis_jax import Inputs, forward, stream

TOKENS, CHUNK = 2000, 100
MARGIN = 1e-2
"""Of the two likeliest tokens; nearer ones may change places by rounding."""


def test_two_thousand_tokens(load_golden):
    ovis = load_golden("tiny-f32", None)
    assert ovis.config.decoder.sliding_window == 16
    inputs = ovis.processor(["Tell me everything."])
    end = int(inputs.positions.max()) + 1
    pieces, held = [], []
    for piece in stream(
        ovis.model, ovis.params, inputs, max_new_tokens=TOKENS, eos_ids=(), chunk=CHUNK
    ):
        pieces.append(np.array(piece.tokens))  # a view would keep the piece
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    answer = np.concatenate(pieces, axis=1)
    assert answer.shape == (1, TOKENS)
    assert len(set(held[2:-2])) == 1

    prompt = np.asarray(inputs.tokens)[np.asarray(inputs.positions) >= 0]
    whole = np.concatenate([prompt[None], answer], axis=1)[:, :-1]
    positions = np.arange(whole.shape[1], dtype=np.int32)[None]
    logits = forward(ovis.model, ovis.params, Inputs(whole, positions, inputs.pixels[:0]))
    logits = np.asarray(logits)[0, end - 1 :]
    second, best = np.sort(logits, axis=1)[:, -2:].T
    clear = best - second > MARGIN
    assert np.mean(clear) > 0.9
    np.testing.assert_array_equal(answer[0, clear], logits.argmax(1)[clear])
