"""Adapters are trained on a quantized model, whose matrices stay as they are (QLoRA)."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import read_tensors

from ovis_jax.errors import RequestError
from ovis_jax.loading import load
from ovis_jax.model.linear import LowRank, Quantized
from ovis_jax.training.trainable import cast_params, split_params

LORA = ("lora.rank=2", "quantization=int8", "training.max_steps=1", "data.micro_batch_size=8")


@pytest.mark.exhaustive
def test_adapters_on_an_int8_base(train, write_config, tmp_path, shallow_checkpoint):
    """One step on one device and on eight; `lora_b` is zero before."""
    path = write_config(trainable=False)
    assert train(path, *LORA, f"output_dir={tmp_path / 'one'}")
    mesh = ("mesh.data=8", "mesh.rules=fsdp")
    assert train(path, *LORA, *mesh, f"output_dir={tmp_path / 'eight'}")
    one, eight = (read_tensors(tmp_path / name / "adapters") for name in ("one", "eight"))
    assert one.keys() == eight.keys() and len(one) == 2 * 4 * 2
    for key in one:
        np.testing.assert_allclose(eight[key], one[key], atol=1e-4)
        assert one[key].any()
    ovis = load(shallow_checkpoint, quantization="int8", adapters=tmp_path / "one/adapters")
    adapted = flatten_dict(ovis.params, sep="/")["decoder/block_1/attn/q"]
    assert isinstance(adapted, LowRank) and isinstance(adapted.w, Quantized)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_matrices_are_not_trained(name, shallow_checkpoint):
    params = load(shallow_checkpoint, quantization=name).params
    message = r"part llm: decoder/block_0/attn/k is quantized, so its numbers cannot be trained; tr"
    with pytest.raises(RequestError, match=message.replace("block_0/attn/k", r"\S+")):
        split_params(params, ["llm"])
    cast = cast_params(flatten_dict(params, sep="/"), "bfloat16")
    assert cast["decoder/final_norm"].dtype == "bfloat16"
    assert cast["decoder/embed"] is params["decoder"]["embed"]
