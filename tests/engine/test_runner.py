"""The shapes of a runner's arrays."""

import jaxtyping
import numpy as np
import pytest


def test_shapes_and_dtypes_are_checked_in_tests(runner):
    for pixels in (np.zeros((84, 84), np.float32), np.zeros((84, 84, 3), np.float64)):
        with pytest.raises(jaxtyping.TypeCheckError, match="pixels"):
            runner.run_encoder(runner.init_prefill_state(), pixels, 0, 0)
    with pytest.raises(jaxtyping.TypeCheckError, match="tokens"):
        runner.run_prefill(runner.init_prefill_state(), np.zeros((1, 3), np.int32), 0)
