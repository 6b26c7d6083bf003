"""The sizes of a runner, and the shapes of its arrays."""

import jaxtyping
import numpy as np
import pytest

from ovis_jax.engine.runner import ModelRunner
from ovis_jax.errors import RequestError


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "chunk_size"])
def test_sizes_are_checked(ovis, name):
    sizes = {"max_num_seqs": 1, "max_model_len": 9, "chunk_size": 9} | {name: 0}
    with pytest.raises(RequestError, match=f"{name} is 0, expected at least 1"):
        ModelRunner(ovis.model, ovis.params, **sizes)


def test_shapes_and_dtypes_are_checked_in_tests(runner):
    for pixels in (np.zeros((84, 84), np.float32), np.zeros((84, 84, 3), np.float64)):
        with pytest.raises(jaxtyping.TypeCheckError, match="pixels"):
            runner.run_encoder(runner.init_prefill_state(), pixels, 0, 0)
    with pytest.raises(jaxtyping.TypeCheckError, match="tokens"):
        runner.run_prefill(runner.init_prefill_state(), np.zeros((1, 3), np.int32), 0)
