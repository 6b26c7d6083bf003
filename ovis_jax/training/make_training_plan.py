"""The plan for a training recipe: the memory of a step, and whether it fits."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ovis_jax.plan.make_plan import Method, compile_programs
from ovis_jax.plan.memory_estimate import usable_bytes
from ovis_jax.training.abstract_step import analyze_train_step
from ovis_jax.training.fitting_recipes import find_fitting_changes
from ovis_jax.training.memory_estimate import TrainingMemory, estimate_training_memory
from ovis_jax.training.training_workload import TrainingWorkload


def make_training_plan(
    workload: TrainingWorkload,
    method: Method = "auto",
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compute the memory of a training step on one device, and whether it fits.

    Args:
      workload: The workload.
      method: The source of the figures.
      notify: Called with a message before the compilation.

    Returns:
      A JSON-serializable dictionary; sizes are bytes on one device.

    Raises:
      OvisError: The workload is invalid (see `TrainingWorkload.validate`), a trainable part is
        quantized, or `method` is "compiler" but the compiler is not installed or cannot compile for
        the workload.
    """
    workload.validate()
    recipe, topology = workload.recipe, workload.topology
    memory = estimate_training_memory(workload)
    usable = usable_bytes(topology)
    source, compiled = compile_programs(
        topology,
        {"step": partial(analyze_train_step, workload)},
        memory.kept > usable,
        method,
        notify,
    )
    peak = memory.peak
    if compiled and compiled["step"]["peak"] is not None:
        peak = compiled["step"]["peak"] + _unread_bytes(workload, memory)
    over_by = max(peak - usable, 0)
    compiler_errors = [program["error"] for program in compiled.values() if "error" in program]
    fits = not over_by and not compiler_errors
    changes = [] if fits else find_fitting_changes(workload, max(peak - memory.peak, 0))
    return {
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": workload.mesh_sizes._asdict(),
        "rules": recipe.mesh.rules if recipe.mesh else None,
        "training": workload.training_method,
        "objective": recipe.training.objective,
        "rows": recipe.data.micro_batch_size,
        "micro_batches": recipe.data.gradient_accumulation_steps,
        "length": workload.length,
        "crops_per_row": workload.crops_per_row,
        "dtype": recipe.training.compute_dtype,
        "remat": recipe.run.remat,
        "source": source,
        "bytes": {
            "trainable parameters": memory.trainable,
            "optimizer state": memory.optimizer,
            "frozen parameters": memory.frozen,
            "reference model": memory.reference,
            "gradients and activations": peak - memory.kept,
            "peak": peak,
            "usable": usable,
            "memory": topology.device.memory_bytes,
        },
        "arithmetic": {
            "gradients": memory.gradients,
            "activations": memory.activations,
            "peak": memory.peak,
        },
        "programs": compiled,
        "fits": fits,
        "over_by": over_by,
        "compiler_errors": compiler_errors,
        "changes": [
            {"options": options, "peak": estimate_training_memory(changed).peak}
            for options, changed in changes
        ],
    }


def _unread_bytes(workload: TrainingWorkload, memory: TrainingMemory) -> int:
    """Return the bytes that are in memory during the compiled program, which does not read them."""
    return memory.reference + (memory.optimizer if workload.accumulates else 0)
