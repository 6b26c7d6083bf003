"""One of two processes with four CPU devices each; test_distributed.py starts them."""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (  # the last value of a flag counts
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ovis_jax
from ovis_jax.sharding import param_shapes


def inputs() -> ovis_jax.Inputs:
    """Eight rows with one crop each; one row is shorter."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    positions[2, 20:] = -1
    return ovis_jax.Inputs(tokens, positions, rng.normal(size=(8, 70, 70, 3)).astype(np.float32))


def load_and_count(
    checkpoint: str, mesh: Mesh, rules: dict[str, str]
) -> tuple[ovis_jax.LoadedOvis, int]:
    """Load onto a mesh; also returns the number of bytes that this process read."""
    sizes: list[int] = []
    ovis = ovis_jax.load(
        checkpoint, mesh=mesh, rules=rules, on_read=lambda key, size: sizes.append(size)
    )
    return ovis, sum(sizes)


def bytes_held(ovis: ovis_jax.LoadedOvis) -> tuple[int, int]:
    """Bytes of the checkpoint that this process holds, without copies, and bytes of all of it."""
    held = whole = 0
    shapes = param_shapes(ovis.config)
    for path, array in flatten_dict(ovis.params, sep="/").items():
        stored = np.broadcast_to(np.float32(0), shapes[path])
        whole += stored.nbytes
        held += sum(
            stored[i].nbytes
            for i in {str(s.index): s.index for s in array.addressable_shards}.values()
        )
    return held, whole


def place(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
    """Shard an array that every process has over the devices of all processes."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def main() -> None:
    """Load onto a mesh of both processes and answer; process 0 writes the results."""
    address, index, checkpoint, folder = sys.argv[1:]
    ovis_jax.initialize_distributed(address, 2, int(index), timeout=120)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    whole = inputs()
    found = dict(whole._asdict())
    for name, shape, rules in (
        ("tensor", (4, 2), ovis_jax.TENSOR),
        ("tensor_fsdp", (4, 2), ovis_jax.TENSOR_FSDP),
    ):
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
        ovis, size = load_and_count(checkpoint, mesh, rules)
        held, all_bytes = bytes_held(ovis)
        read = {"read": size, "held": held, "whole": all_bytes}
        rows = NamedSharding(mesh, PartitionSpec("data"))
        placed = jax.tree.map(partial(place, rows), whole)
        logits = ovis_jax.forward(ovis.model, ovis.params, placed)
        out = ovis_jax.generate(ovis.model, ovis.params, placed, max_new_tokens=8, eos_ids=())
        found[f"{name} logits"] = process_allgather(logits, tiled=True)
        found[f"{name} answer"] = process_allgather(out.tokens, tiled=True)
    Path(folder, f"read {index}.json").write_text(json.dumps(read))  # of the last mesh
    if index == "0":
        np.savez(Path(folder, "found.npz"), **found)


if __name__ == "__main__":
    main()
