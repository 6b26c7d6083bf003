"""Finding changes of a recipe that make it fit, without compilation."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ovis_jax.errors import OvisError
from ovis_jax.plan.memory_estimate import usable_bytes
from ovis_jax.quantization import QuantizationFormat
from ovis_jax.training.config import LoraConfig, MeshConfig
from ovis_jax.training.memory_estimate import estimate_training_memory
from ovis_jax.training.training_workload import TrainingWorkload

LORA_RANK = 16
"""Rank of the adapters that replace full fine-tuning in a suggestion."""

_Change = tuple[str, TrainingWorkload]
"""The arguments of a change, such as "run.remat=true", and the changed workload."""


def find_fitting_changes(
    workload: TrainingWorkload, bytes_above_estimate: int = 0
) -> list[tuple[str, TrainingWorkload]]:
    """Find changes that make a recipe fit.

    The result has at most one change of each of these kinds, without those that do not fit: only
    run.remat, smaller micro-batches with the same number of rows per step, or another mesh of the
    same devices; LoRA instead of full fine-tuning; LoRA on an int8 or int4 model; and a larger
    topology of the same kind. The last three include changes of the first kind where needed.

    Args:
      workload: A workload that does not fit.
      bytes_above_estimate: Bytes per device by which the compiler's peak exceeds the estimate. The
        difference is assumed to be the same after a change.

    Returns:
      The arguments of each change, such as "run.remat=true", and the changed workload.
    """
    found: list[_Change] = []
    for options, changed in [("", workload), *_cheaper_methods(workload)]:
        found += _first_that_fits(options, changed, bytes_above_estimate)
    for topology in workload.topology.larger():
        larger = replace(workload, topology=topology)
        options = f"--topology {topology.name}"
        if change := _first_that_fits(options, larger, bytes_above_estimate):
            return found + change
    return found


def _first_that_fits(
    options: str, workload: TrainingWorkload, bytes_above_estimate: int
) -> list[_Change]:
    """Return the smallest change with the same results that fits, as a list of at most one."""
    for more, changed in _same_results(workload):
        try:
            changed.validate()
            peak = estimate_training_memory(changed).peak
        except OvisError:
            continue
        if peak + bytes_above_estimate <= usable_bytes(changed.topology):
            return [(f"{options} {more}".strip(), changed)]
    return []


def _cheaper_methods(workload: TrainingWorkload) -> list[_Change]:
    """Return the workload with LoRA and with QLoRA, unless it has them already."""
    recipe, found = workload.recipe, []
    options: list[str] = []
    if recipe.lora is None:
        options = ["'trainable=[]'", f"lora.rank={LORA_RANK}"]
        lora = {"trainable": (), "lora": LoraConfig(rank=LORA_RANK)}
        recipe = recipe.model_copy(update=lora)
        found.append((" ".join(options), replace(workload, recipe=recipe)))
    stronger: dict[str | None, tuple[QuantizationFormat, ...]] = {
        None: ("int8", "int4"),
        "int8": ("int4",),
    }
    for quantization in stronger.get(recipe.quantization, ()):
        changed = recipe.model_copy(update={"quantization": quantization})
        texts = [*options, f"quantization={quantization}"]
        found.append((" ".join(texts), replace(workload, recipe=changed)))
    return found


def _same_results(workload: TrainingWorkload) -> list[_Change]:
    """Return the workload with changes that only affect memory and speed, smallest first."""
    recipe = workload.recipe
    remats = [("", recipe.run)]
    if not recipe.run.remat:
        remats.append(("run.remat=true", recipe.run.model_copy(update={"remat": True})))
    batches, rows = [("", recipe.data)], recipe.data.micro_batch_size
    while rows % 2 == 0:
        rows //= 2
        steps = recipe.data.micro_batch_size * recipe.data.gradient_accumulation_steps // rows
        fields = {"micro_batch_size": rows, "gradient_accumulation_steps": steps}
        text = " ".join(f"data.{name}={value}" for name, value in fields.items())
        batches.append((text, recipe.data.model_copy(update=fields)))
    meshes = [("", recipe.mesh), *_other_meshes(workload)]
    changes = []
    for mesh, batch, remat in product(meshes, batches, remats):
        texts = [text for text, _ in (remat, batch, mesh) if text]
        tables = {"run": remat[1], "data": batch[1], "mesh": mesh[1]}
        changed = replace(workload, recipe=recipe.model_copy(update=tables))
        changes.append((len(texts), " ".join(texts), changed))
    changes.sort(key=lambda change: change[0])  # stable
    return [(text, changed) for _, text, changed in changes]


def _other_meshes(workload: TrainingWorkload) -> Iterator[tuple[str, MeshConfig]]:
    """Yield meshes of all devices of the topology, those with the largest "data" axis first."""
    num_devices = workload.topology.num_devices
    for model in (n for n in range(1, num_devices + 1) if num_devices % n == 0):
        rules = "fsdp" if model == 1 else "tensor_fsdp"
        mesh = MeshConfig(data=num_devices // model, model=model, rules=rules)
        if num_devices > 1 and mesh != workload.recipe.mesh:
            yield f"mesh.data={mesh.data} mesh.model={model} mesh.rules={rules}", mesh
