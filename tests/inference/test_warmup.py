"""After `warmup`, batches of the given shapes compile nothing."""

import jax
import jaxtyping
import numpy as np
import pytest
from compilations import compilations
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import generate, stream
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inference.warmup import warmup
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.sharding import TENSOR


def batch(bucket: Bucket, seed: int) -> Inputs:
    """Prompts of a bucket's shape: visual slots, text, and a shorter last row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(108, 600, (bucket.rows, bucket.length)).astype(np.int32)
    tokens[0, : 9 * bucket.crops] = -300
    positions = np.tile(np.arange(bucket.length, dtype=np.int32), (bucket.rows, 1))
    positions[-1, -3:] = -1
    pixels = rng.normal(size=(bucket.crops, 70, 70, 3)).astype(np.float32)
    return Inputs(tokens, positions, pixels)


@pytest.mark.exhaustive
def test_compiled_buckets_compile_nothing(shallow):
    model, params = shallow
    buckets = [Bucket(1, 30, 1), Bucket(2, 24, 0)]
    limits = dict(max_new_tokens=7, eos_ids=())
    with compilations() as found:
        compiled = warmup(model, params, buckets, chunk_size=3, **limits)
    assert [x.bucket for x in compiled] == buckets and all(x.seconds > 0 for x in compiled)
    assert len(found) >= 6  # for each bucket: generate, the first chunk, later chunks
    with compilations() as found:
        for bucket in buckets:
            inputs = batch(bucket, 1)
            full = np.asarray(generate(model, params, inputs, **limits).tokens)
            chunks = [
                np.asarray(p.tokens) for p in stream(model, params, inputs, chunk_size=3, **limits)
            ]
            assert np.concatenate(chunks, axis=1)[:, :7].tolist() == full.tolist()
        assert found == []
        generate(model, params, batch(Bucket(1, 31, 1), 1), **limits)
        assert len(found) > 0


@pytest.mark.slow
def test_sampling_values_compile_nothing(shallow, monkeypatch):
    # Lowering puts abstract arrays into a Sampling, which the type checks of the tests reject.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, params = shallow
    shape = Bucket(1, 20, 0)
    limits = dict(max_new_tokens=4, eos_ids=[1, 107])
    compiled_for = Sampling(1.0, top_k=1, repetition_penalty=1.0)
    warmup(model, params, [shape], jax.random.key(0), sampling=compiled_for, **limits)
    key, sampling = jax.random.key(3), Sampling(0.5, top_k=9, repetition_penalty=1.3)
    with compilations() as found:
        limits["eos_ids"] = [5, 6]
        generate(model, params, batch(shape, 2), key, sampling=sampling, **limits)
    assert found == []


@pytest.mark.slow
def test_on_a_mesh(shallow, lay):
    """Parameters sharded over two devices, inputs replicated."""
    model, params = shallow
    placed, mesh = lay(params, model.config, (1, 2), TENSOR)
    sharding = NamedSharding(mesh, PartitionSpec())
    shape, limits = Bucket(1, 20, 1), dict(max_new_tokens=5, eos_ids=())
    warmup(model, placed, [shape], chunk_size=1, sharding=sharding, **limits)
    inputs = jax.device_put(batch(shape, 3), sharding)
    with compilations() as found:
        out = generate(model, placed, inputs, **limits)
        chunks = list(stream(model, placed, inputs, **limits))
    assert found == []
    assert [int(p.tokens[0, 0]) for p in chunks] == out.tokens[0].tolist()


@pytest.mark.slow
def test_rows_that_are_only_padding_are_done_from_the_start(shallow):
    model, params = shallow
    inputs = batch(Bucket(2, 24, 0), 4)
    inputs.positions[1] = -1
    out = generate(model, params, inputs, max_new_tokens=7, eos_ids=())
    assert out.lengths.tolist() == [7, 0]
    assert out.tokens[1].tolist() == [0] * 7 and not out.log_probs[1].any()


@pytest.mark.parametrize(
    "buckets, more, message",
    [
        ([], {}, "there is no bucket"),
        ([Bucket(1, 64), (1, 9000)], {}, "at most 8192 positions"),
        ([Bucket(1, 64, 50)], {}, "hold 0 to 7 crops"),
        ([(64,)], {}, r"buckets\[0\] is \(64,\), expected a Bucket"),
        ([Bucket(1, 64)], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([Bucket(1, 64)], dict(chunk_size=0), "chunk_size is 0"),
        ([Bucket(1, 64)], dict(sampling=Sampling(1.0)), "needs a key"),
    ],
)
def test_invalid_requests(shallow, buckets, more, message):
    with pytest.raises(RequestError, match=message):
        warmup(*shallow, buckets, **dict(max_new_tokens=4) | more)
