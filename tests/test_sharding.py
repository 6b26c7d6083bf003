"""Axes, shapes and shardings of the parameters."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ovis_jax import presets
from ovis_jax.errors import OvisError
from ovis_jax.sharding import (
    FSDP,
    PARAM_AXES,
    TENSOR,
    TENSOR_FSDP,
    adapter_shapes,
    adapter_shardings,
    axes_of_param,
    axis_letter_sizes,
    pad_params,
    param_shapes,
    param_shardings,
    split_axis_letters,
)


def mesh(data: int, model: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@pytest.mark.slow
def test_parameters_of_the_published_models():
    shapes = param_shapes(presets.ovis1_6_gemma2_9b())
    assert len(shapes) == 916 - 13
    assert shapes["vision/patch"] == (1152, 3, 14, 14)
    assert shapes["vision/position"] == (729, 1152)
    assert shapes["vision/block_26/mlp/up_bias"] == (4304,)
    assert shapes["visual_tokenizer/head"] == (65531, 4608)
    assert shapes["visual_embedding"] == (65536, 3584)
    assert shapes["decoder/embed"] == (256000, 3584)
    assert shapes["decoder/block_41/attn/q"] == (4096, 3584)
    assert shapes["decoder/block_41/attn/k"] == (2048, 3584)
    assert shapes["decoder/block_41/mlp/down"] == (3584, 14336)
    assert "decoder/block_42/attn/q" not in shapes
    large = param_shapes(presets.ovis1_6_gemma2_27b())
    assert large["decoder/block_45/attn/o"] == (4608, 4096)


def test_parameters_are_ordered_block_by_block():
    paths = list(param_shapes(presets.tiny()))
    assert paths[0] == "vision/patch"
    assert paths[-1] == "decoder/final_norm"
    first, second = (
        paths.index("vision/block_0/mlp/down_bias"),
        paths.index("vision/block_1/attn_norm/scale"),
    )
    assert second == first + 1


def test_unembed_only_when_untied():
    tiny = presets.tiny()
    assert "decoder/unembed" not in param_shapes(tiny)
    untied = dataclasses.replace(
        tiny, decoder=dataclasses.replace(tiny.decoder, tie_embeddings=False)
    )
    assert param_shapes(untied)["decoder/unembed"] == (600, 64)


def test_axes_of_a_parameter():
    assert axes_of_param("decoder/block_11/attn/q") == "(N H) D"
    assert axes_of_param("vision/block_0/attn/q_bias") == "(A H)"
    assert split_axis_letters("W (m m E)") == [["W"], ["m", "m", "E"]]
    assert axis_letter_sizes(presets.tiny(), "vision/patch")["F"] == 64
    assert axis_letter_sizes(presets.tiny(), "decoder/embed")["F"] == 128


def test_every_letter_of_the_table_has_a_size():
    sizes = axis_letter_sizes(presets.tiny(), "decoder/")
    used = {
        letter for axes in PARAM_AXES.values() for dim in split_axis_letters(axes) for letter in dim
    }
    assert used <= sizes.keys()


def test_specs_by_rules():
    config, grid = presets.tiny(), mesh(4, 2)
    tensor = param_shardings(config, grid, TENSOR)
    assert tensor.keys() == param_shapes(config).keys()
    assert tensor["decoder/block_0/attn/q"].spec == PartitionSpec("model", None)
    assert tensor["decoder/block_0/attn/o"].spec == PartitionSpec(None, "model")
    assert tensor["vision/block_0/attn/q_bias"].spec == PartitionSpec("model")
    assert tensor["visual_embedding"].spec == PartitionSpec("model", None)
    assert tensor["visual_tokenizer/head"].spec == PartitionSpec("model", None)
    assert tensor["visual_tokenizer/norm/scale"].spec == PartitionSpec("model")
    fsdp = param_shardings(config, grid, FSDP)
    assert fsdp["decoder/block_0/attn/q"].spec == PartitionSpec(None, "data")
    assert fsdp["decoder/final_norm"].spec == PartitionSpec("data")
    both = param_shardings(config, grid, TENSOR_FSDP)
    assert both["decoder/block_3/mlp/down"].spec == PartitionSpec("data", "model")
    # Of the letters of its columns (m m E), only E has a rule.
    assert both["visual_tokenizer/head"].spec == PartitionSpec("model", "data")
    assert both["vision/patch"].spec == PartitionSpec("data", None, None, None)


def test_axes_that_the_mesh_lacks_are_ignored():
    line = Mesh(np.array(jax.devices()[:4]), ("data",))
    specs = param_shardings(presets.tiny(), line, TENSOR_FSDP)
    assert specs["decoder/embed"].spec == PartitionSpec(None, "data")


def test_a_mesh_without_any_axis_of_the_rules():
    other = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    message = r"mesh has the axes \['x', 'y'\], but the rules shard over \['data', 'model'\],"
    for shardings in (param_shardings, adapter_shardings):
        with pytest.raises(OvisError, match=message):
            shardings(presets.tiny(), other, TENSOR)
    replicated = param_shardings(presets.tiny(), other, {})
    assert all(sharding.is_fully_replicated for sharding in replicated.values())


def test_the_9b_shards_over_eight_devices():
    shardings = param_shardings(presets.ovis1_6_gemma2_9b(), mesh(1, 8), TENSOR)
    shapes = param_shapes(presets.ovis1_6_gemma2_9b(), mesh(1, 8), TENSOR)
    assert shapes["visual_tokenizer/head"] == (65536, 4608)
    local = sum(math.prod(s.shard_shape(shapes[path])) for path, s in shardings.items())
    assert local < sum(map(math.prod, shapes.values())) / 8 * 1.01


def test_only_a_sharded_visual_vocabulary_is_padded():
    config = presets.tiny()
    plain, rows = param_shapes(config), {"U": 70, "W": 70}
    for path, shape in param_shapes(config, mesh(4, 2), TENSOR_FSDP).items():
        first = split_axis_letters(axes_of_param(path))[0][0]
        assert shape == (rows.get(first, plain[path][0]), *plain[path][1:]), path
    assert param_shapes(config, mesh(8, 1), TENSOR_FSDP) == plain
    assert param_shapes(config, mesh(4, 2), FSDP) == plain
    line = Mesh(np.array(jax.devices()), ("data",))
    assert param_shapes(config, line, {"U": "data"})["visual_embedding"] == (72, 64)
    assert param_shapes(config, line, {"U": "data"})["visual_tokenizer/head"] == (64, 192)
    adapters = adapter_shapes(config, 4, mesh(4, 2), TENSOR)
    assert adapters["visual_tokenizer/head/lora_b"] == (70, 4)
    assert adapters["visual_tokenizer/head/lora_a"] == (4, 192)


def test_pad_params_pads_with_zeros():
    config = presets.tiny()
    params = {"visual_embedding": np.ones((69, 64), np.float16)}
    table = pad_params(params, config, mesh(4, 2))["visual_embedding"]
    assert table.dtype == np.float16
    np.testing.assert_array_equal(table, np.repeat([[1.0], [0.0]], [69, 1], axis=0) * np.ones(64))


def test_a_letter_that_the_mesh_axis_does_not_divide():
    # 4 divides the 32 rows of 2 heads of 16, but it must divide the number of heads.
    with pytest.raises(OvisError) as error:
        param_shardings(presets.tiny(), mesh(2, 4), TENSOR)
    message = str(error.value)
    assert "decoder/block_0/attn/k" in message
    assert "letter K has size 2" in message
    assert "'model' of size 4" in message
    assert "rules without K" in message


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(OvisError, match="two dimensions on mesh axis 'model'"):
        param_shardings(presets.tiny(), mesh(2, 2), {"N": "model", "D": "model"})
