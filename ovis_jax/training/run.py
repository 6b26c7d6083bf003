"""What a run of training consists of, made from its config: model, what learns, rows, devices."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax.checkpoint.params import load_params
from ovis_jax.checkpoint.source import find_source
from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError, DataError
from ovis_jax.inputs.processor import Processor
from ovis_jax.mesh_axes import first_devices
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.sharding import RULES, TENSOR, adapter_shapes, adapter_shardings, param_shapes
from ovis_jax.training.config import MeshSection, TrainConfig
from ovis_jax.training.data import BatchShape, ExampleMaker
from ovis_jax.training.evaluation import check_answer
from ovis_jax.training.parts import Flat, add_adapters, join, split
from ovis_jax.training.rows import Row, Rows, read_rows
from ovis_jax.training.step import Recipe


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Attributes:
      config: as given.
      recipe: the step's settings.
      source: the folder of the model that the run begins from.
      model: its mathematics.
      processor: its processor.
      frozen: what does not learn, by path, in the dtype of computation.
      reference: the model as it was, in the dtype of computation; for DPO alone.
      train: the rows to learn from.
      validation: the rows to score answers on.
      faults: a message for each row that was left out.
      mesh: where all of it lies; None for the default device.
    """

    config: TrainConfig
    recipe: Recipe
    source: Path
    model: Ovis
    processor: Processor
    frozen: Flat
    reference: Params | None
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    faults: tuple[str, ...]
    mesh: Mesh | None

    def params(self, learned: Flat) -> Params:
        """The whole model in the dtype of computation; matrices with an adapter are `LowRank`."""
        return join(_rounded(learned, self.recipe), self.frozen, self.recipe.adapter_scale)

    def place(self, arrays: Any, *axes: str | None) -> Any:
        """Lay arrays on the mesh along these of its axes; without a mesh they stay as they are."""
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def padded(self, learned: Flat) -> dict[str, list[int]]:
        """The shapes of what learns, by path, where the mesh asks for more rows than there are."""
        lora = self.config.learn.lora
        true = param_shapes(self.model.config)
        if lora is not None:
            true = adapter_shapes(self.model.config, lora.rank)
        return {path: list(x.shape) for path, x in learned.items() if x.shape != true[path]}

    def example_maker(self) -> ExampleMaker:
        """How a row becomes an example."""
        data = self.config.data
        skip = data.unreadable == "skip"
        return ExampleMaker(
            self.processor, data.max_partition, data.max_length, data.truncate, skip
        )

    def batch_shape(self) -> BatchShape:
        """The rows of a step."""
        data = self.config.data
        return BatchShape(data.rows, data.accumulate, data.length_unit)


def prepare(config: TrainConfig) -> tuple[Run, Flat]:
    """Read all that a run needs but images; gives the run, and what learns, by path.

    Raises:
      ConfigError: the config asks for what the model does not have.
      DataError: a dataset file cannot be used, or a row when unreadable rows are errors.
      CheckpointError: the model's files do not hold its parameters.
      OvisError: the mesh is of more devices than there are.
    """
    mesh = None if config.mesh is None else _mesh(config.mesh, config.data.rows)
    train, faults = _rows(config, config.data.train)
    validation, more = _rows(config, config.data.validation, scored=True)
    source = find_source(config.model).folder
    ovis = OvisConfig.from_folder(source)
    processor = Processor.from_folder(source, ovis)
    rules = RULES[config.mesh.rules] if config.mesh else TENSOR
    params = load_params(source, ovis, mesh=mesh, rules=rules)
    recipe = config.recipe()
    lora = config.learn.lora
    if lora is None:
        learned, frozen = split(params, config.learn.parts)
    else:
        key = jax.random.key(config.run.seed)
        learned = add_adapters(params, key, rank=lora.rank, targets=lora.targets)
        frozen = cast(Flat, flatten_dict(params, sep="/"))
        if mesh is not None:
            shardings = adapter_shardings(ovis, mesh, rules)
            learned = {path: jax.device_put(x, shardings[path]) for path, x in learned.items()}
    frozen = _rounded(frozen, recipe)
    # Adapters begin as nothing, so without them the model is what it was.
    before = {} if lora else _rounded(learned, recipe)
    run = Run(
        config=config,
        recipe=recipe,
        source=source,
        model=Ovis(ovis, remat=config.run.remat),
        processor=processor,
        frozen=frozen,
        reference=join(before, frozen) if config.learn.objective == "dpo" else None,
        train=train,
        validation=validation,
        faults=(*faults, *more),
        mesh=mesh,
    )
    return run, learned


def _rounded(flat: Flat, recipe: Recipe) -> Flat:
    return {path: x.astype(recipe.compute_dtype) for path, x in flat.items()}


def _rows(
    config: TrainConfig, paths: tuple[Path, ...], scored: bool = False
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """The good rows of dataset files, and a message for each other one, if those may be skipped."""
    if not paths:
        return (), ()
    found = read_rows(paths)
    if scored:
        found = _scorable(found)
    if found.faults and config.data.unreadable == "error":
        more = len(found.faults) - 1
        raise DataError(
            f"{found.faults[0]}{f' (and {more} more such rows)' if more else ''}; mend it, or have"
            ' such rows left out with data.unreadable = "skip"'
        )
    if not found.rows:
        raise DataError(f"{', '.join(map(str, paths))}: no row is usable; {found.faults[0]}")
    expected = config.learn.objective == "dpo"
    for row in found.rows:
        if (row.answers is not None) != expected and not scored:
            form = "prompt, chosen and rejected" if expected else "conversations"
            raise DataError(f"{row.name}: learn.objective {config.learn.objective} needs {form}")
    return found.rows, found.faults


def _scorable(found: Rows) -> Rows:
    """The rows that answers can be scored on, as far as it is known before images are read."""
    rows, faults = [], list(found.faults)
    for row in found.rows:
        missing = [path for path in row.images if not os.path.isfile(path)]
        try:
            check_answer(row)
            if missing:
                raise DataError(f"{row.name}: there is no file {missing[0]}")
            rows.append(row)
        except DataError as error:
            faults.append(str(error))
    return Rows(tuple(rows), tuple(faults))


def _mesh(section: MeshSection, rows: int) -> Mesh:
    mesh = first_devices(section.data, section.model)
    if rows % section.data:
        raise ConfigError(
            f"data.rows is {rows}, which mesh axis data of size {section.data} does not divide;"
            " use a multiple of it"
        )
    return mesh
