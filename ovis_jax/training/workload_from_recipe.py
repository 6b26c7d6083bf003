"""The workload of a training plan from a recipe and the name of a topology."""

from collections.abc import Sequence
from pathlib import Path

from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.plan.topologies import parse_topology
from ovis_jax.plan.workload_from_names import PUBLISHED_CONFIGS
from ovis_jax.training.config import read_train_config
from ovis_jax.training.training_workload import TrainingWorkload


def read_training_workload(
    path: Path, overrides: Sequence[str], topology: str, images_per_row: int | None = None
) -> TrainingWorkload:
    """Read a recipe and the config of its model.

    Args:
      path: Path of the recipe.
      overrides: Overrides of its fields, as in `read_train_config`. The model may also be a name
        in `PUBLISHED_CONFIGS`.
      topology: Name of the topology.
      images_per_row: Maximum number of images in a row; None for 1.

    Raises:
      TrainingError: The recipe is invalid.
      OvisError: The topology is unknown, or the config of the model cannot be read.
    """
    recipe, devices = read_train_config(path, overrides), parse_topology(topology)
    if recipe.model in PUBLISHED_CONFIGS:
        config = PUBLISHED_CONFIGS[recipe.model]()
    else:
        config = OvisConfig.from_folder(resolve_checkpoint(recipe.model, weights=False).folder)
    images = 1 if images_per_row is None else images_per_row
    return TrainingWorkload(config, recipe, devices, images)
