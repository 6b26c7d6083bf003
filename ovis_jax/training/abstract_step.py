"""A training step as shapes: its arrays without their values, and its compilation."""

import re
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath

from ovis_jax.errors import TrainingError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import Ovis
from ovis_jax.plan.abstract_arrays import abstract_params_by_rules
from ovis_jax.plan.aot_compile import compile_only_mesh, lowering_for, measure_compilation
from ovis_jax.sharding import adapter_shapes, adapter_shardings, supports_adapter
from ovis_jax.training.losses import PreferenceBatch, TrainBatch
from ovis_jax.training.train_step import (
    TrainState,
    accumulate_gradients,
    init_gradient_sums,
    init_train_state,
    train_step,
)
from ovis_jax.training.trainable import FrozenParams, split_params
from ovis_jax.training.training_workload import TrainingWorkload


class AbstractStep(NamedTuple):
    """The arrays of a training step, as shapes with shardings.

    Attributes:
      state: The trainable parameters and the optimizer's state.
      frozen: The frozen parameters, by path.
      reference: The parameters of the reference model that are not frozen parameters, by path.
        They are in memory during a step, but the step does not read them.
      batch: A micro-batch.
    """

    state: TrainState
    frozen: FrozenParams
    reference: FrozenParams
    batch: TrainBatch | PreferenceBatch


def abstract_step(workload: TrainingWorkload, mesh: Mesh | AbstractMesh) -> AbstractStep:
    """Describe the arrays of a recipe's training step.

    Raises:
      OvisError: The mesh cannot shard a parameter.
      RequestError: A trainable part is quantized.
      TrainingError: No matrix matches `lora.target_modules`.
    """
    config, recipe = workload.config, workload.recipe
    dtype = recipe.training.compute_dtype
    params = abstract_params_by_rules(config, mesh, workload.rules, dtype, recipe.quantization)
    if recipe.lora is None:
        split = partial(split_params, parts=recipe.trainable)
        trainable, rest = jax.eval_shape(split, unflatten_dict(params, sep="/"))
        frozen = {path: params[path] for path in rest}
        shardings = {path: params[path].sharding for path in trainable}
    else:
        trainable = _abstract_adapters(workload, mesh)
        frozen, shardings = params, adapter_shardings(config, mesh, workload.rules)
    has_reference = workload.is_preference and recipe.lora is None
    state = jax.eval_shape(partial(init_train_state, recipe.training), trainable)

    def shard_like_parameter(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = str(path[-1].key) if isinstance(path[-1], DictKey) else ""
        return _abstract_array(mesh, x.shape, x.dtype, shardings.get(name))

    return AbstractStep(
        jax.tree_util.tree_map_with_path(shard_like_parameter, state),
        frozen,
        {path: params[path] for path in trainable} if has_reference else {},
        _abstract_batch(workload, mesh),
    )


def _abstract_adapters(workload: TrainingWorkload, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    lora, config = workload.recipe.lora, workload.config
    assert lora is not None
    adapters: dict[str, Any] = {}
    for path, shape in adapter_shapes(config, lora.rank, mesh, workload.rules).items():
        matrix = path.rpartition("/")[0]
        if re.fullmatch(lora.target_modules, matrix) and supports_adapter(matrix):
            adapters[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if not adapters:
        raise TrainingError(
            f"lora.target_modules is {lora.target_modules!r}, which matches no matrix; ovis-jax"
            " inspect lists the paths"
        )
    return adapters


def _abstract_batch(
    workload: TrainingWorkload, mesh: Mesh | AbstractMesh
) -> TrainBatch | PreferenceBatch:
    """Return a micro-batch as shapes whose rows and crops are sharded over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows, vision = workload.recipe.data.micro_batch_size, workload.config.vision
    side = vision.image_size
    crop_shape = (1, rows * workload.crops_per_row, side, side, vision.num_channels)
    tokens = _abstract_array(mesh, (1, rows, workload.length), jnp.int32, sharding)
    pixels = _abstract_array(mesh, crop_shape, jnp.float32, sharding)
    batch = TrainBatch(Inputs(cast(Any, tokens), cast(Any, tokens), cast(Any, pixels)), tokens)
    if not workload.is_preference:
        return batch
    log_probs = _abstract_array(mesh, (1, rows), jnp.float32, sharding)
    return PreferenceBatch(batch, batch, log_probs, log_probs)


def _abstract_array(
    mesh: Mesh | AbstractMesh, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None
) -> Any:
    """Return a shape with a sharding; None replicates the array over the mesh."""
    sharding = sharding or NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def analyze_train_step(workload: TrainingWorkload) -> dict[str, Any]:
    """Compile the program that computes the gradients of a recipe's micro-batch.

    Without gradient accumulation, the program also updates the parameters.

    Returns:
      The dict of `measure_compilation`.
    """
    mesh = compile_only_mesh(workload.topology, workload.mesh_sizes)
    return measure_compilation(lambda: lower_train_step(workload, mesh).compile())[0]


def lower_train_step(workload: TrainingWorkload, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the program of `analyze_train_step` for the devices of a mesh."""
    recipe = workload.recipe
    platform: Any = mesh.devices.flat[0].platform
    model = Ovis(workload.config, remat=recipe.run.remat, platform=platform)
    state, frozen, _, batch = abstract_step(workload, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    run = recipe.lora_scale, key
    with lowering_for(mesh):
        if not workload.accumulates:
            return train_step.lower(model, recipe.training, state, frozen, batch, *run)
        sums = jax.eval_shape(init_gradient_sums, state)
        gradients = jax.tree.map(
            lambda x, y: _abstract_array(mesh, x.shape, x.dtype, y.sharding),
            sums.gradients,
            state.trainable,
        )
        scalar = _abstract_array(mesh, (), jnp.float32, None)
        sums = sums._replace(gradients=gradients, loss=scalar, count=scalar)
        return accumulate_gradients.lower(
            model, recipe.training, state.trainable, frozen, sums, batch, *run, state.step
        )
