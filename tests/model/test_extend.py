"""A prompt read in pieces against a prompt read at once."""

import jax
import jax.numpy as jnp
import measured
import numpy as np
from shallow import shallow_config

from ovis_jax import Ovis
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import kv_cache

LENGTHS = (41, 38)
"""Positions of two rows: longer than the window of 16, and not divided by any piece."""
SLOT = -300


def rows(seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(108, 600, (2, max(LENGTHS))).astype(np.int32)
    tokens[0, 9:18] = tokens[1, 3:12] = SLOT  # cut by a piece of 12
    columns = np.arange(max(LENGTHS), dtype=np.int32)
    positions = np.stack([np.where(columns < n, columns, -1) for n in LENGTHS])
    return Inputs(tokens, positions, rng.normal(size=(2, 70, 70, 3)).astype(np.float32))


def near(name: str, got, expected, tolerance: float = 1e-4) -> None:
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(expected)).max()
    measured.record(name, difference, tolerance)
    assert difference <= tolerance


def test_pieces_equal_one_prefill(shallow):
    (model, params), piece = shallow, 12
    inputs = rows(piece)
    logits, whole = jax.jit(model.prefill, static_argnums=2)(params, inputs, 48)
    visual = jax.jit(model.embed_crops)(params, inputs.pixels)  # [2, 9, D]
    D = visual.shape[-1]
    extend, decode = jax.jit(model.extend), jax.jit(model.decode)
    cache = kv_cache.empty(model.config.decoder, 2, 48, jnp.float32)
    last = None
    for start in range(0, max(LENGTHS), piece):
        part = slice(start, start + piece)
        tokens, positions = (
            np.pad(x[:, part], ((0, 0), (0, piece - x[:, part].shape[1])), constant_values=fill)
            for x, fill in ((inputs.tokens, 0), (inputs.positions, -1))
        )
        # The slots of this piece alone, over the batch in order: what each row has left of its own.
        left = [
            visual[b, int(np.sum(inputs.tokens[b, :start] == SLOT)) :][: np.sum(t == SLOT)]
            for b, t in enumerate(tokens)
        ]
        taken = jnp.concatenate([*left, jnp.zeros((18, D))])[None, :18]
        last, cache = extend(params, tokens, positions, taken, cache)
    near("logits of pieces", last, logits)
    assert cache.lengths.tolist() == whole.lengths.tolist() == list(LENGTHS)
    for block, (mine, theirs) in enumerate(zip(cache.blocks, whole.blocks, strict=True)):
        held = kv_cache.slot_positions(cache.lengths, mine[0].shape[2]) >= 0
        assert held.sum() == (2 * 16, sum(LENGTHS))[block]
        for x, true in zip(mine, theirs, strict=True):
            near(
                f"cache of block {block}",
                *(jnp.where(held[:, None, :, None], a, 0) for a in (x, true)),
                1e-5,
            )
    for token in ([200, 300], [400, 500]):
        tokens = jnp.array(token)
        last, cache = decode(params, tokens, cache)
        logits, whole = decode(params, tokens, whole)
        near("decode after pieces", last, logits)


def test_a_stale_cache_does_no_harm():
    """A slot that held another prompt begins anew: positions alone say what is there."""
    model = Ovis(shallow_config())
    params = jax.jit(model.init)(jax.random.key(1))
    inputs = rows(0)
    tokens, positions = inputs.tokens[:, 18:38], inputs.positions[:, :20]
    c = model.config.decoder
    clean = kv_cache.empty(c, 2, 48, jnp.float32)
    stale = clean._replace(blocks=jax.tree.map(lambda x: x + 7.0, clean.blocks))
    extend = jax.jit(model.extend)
    fresh, old = (extend(params, tokens, positions, None, cache)[0] for cache in (clean, stale))
    near("logits over a stale cache", old, fresh, 1e-5)
