"""Top-p against the class that the original code uses."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tied_logits import tied_logits
from transformers import TopPLogitsWarper

from ovis_jax.inference.sampling import top_k_top_p

pytestmark = [pytest.mark.torch, pytest.mark.optimized]


def test_top_p_keeps_as_many_tokens_as_transformers():
    logits, top_p = tied_logits()
    found = np.isfinite(top_k_top_p(jnp.array(logits), p=top_p))
    for row, (x, p) in enumerate(zip(logits, top_p.tolist(), strict=True)):
        expected = torch.isfinite(TopPLogitsWarper(p)(torch.zeros(1, 0), torch.tensor(x[None])))
        assert np.sum(found[row]) == int(expected.sum()), (row, p)
        # The kept logits are equal, too. PyTorch does not define which of the ties it keeps.
        np.testing.assert_array_equal(np.sort(x[found[row]]), np.sort(x[expected[0].numpy()]))
