"""Low-rank adapters in a folder of their own, beside the config of the model they belong to."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ovis_jax.checkpoint.keymap import tensor_problems
from ovis_jax.checkpoint.params import cut_padding, list_arrays, place
from ovis_jax.checkpoint.problems import CheckpointProblems, Problem
from ovis_jax.checkpoint.safetensors_files import (
    Header,
    TensorEntry,
    map_file,
    read_header,
    view_tensor,
)
from ovis_jax.checkpoint.safetensors_stream import write_file
from ovis_jax.checkpoint.writer import array_pieces, check_space, whole_or_absent, write_json
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.fields import Fields, read_json
from ovis_jax.sharding import (
    TENSOR,
    Rules,
    adapter_axes,
    adapter_shapes,
    adapter_shardings,
    letter_sizes,
    shape_of,
)

TENSORS_FILE = "adapters.safetensors"
RECORD_FILE = "adapters.json"
FORMAT = 1


@dataclass(frozen=True)
class Adapters:
    """Adapters of one rank, each of which stands for scale * b a beside its matrix.

    `halves` holds `path/a` [rank, in] and `path/b` [out, rank] for the path of every matrix.
    """

    halves: dict[str, jax.Array]
    rank: int
    scale: float

    @property
    def matrices(self) -> list[str]:
        """The paths of the matrices that have an adapter."""
        return [path.removesuffix("/a") for path in self.halves if path.endswith("/a")]


def save_adapters(
    folder: str | Path, adapters: Mapping[str, Any], config: OvisConfig, *, scale: float
) -> None:
    """Write adapters as a folder, which appears only when it is complete.

    Args:
      folder: it must not hold anything.
      adapters: float32, `path/a` [rank, in] and `path/b` [out, rank], as `training.parts` has them.
      config: of the model that they were trained beside.
      scale: what multiplies their products.

    Raises:
      CheckpointError: the adapters are not halves of matrices of `config`, all of one rank.
      OvisError: the folder exists and is not empty, the scale is not above 0, or an array is not
        all on this host's devices.
      OSError: too little space, or a file cannot be written.
    """
    folder = Path(folder)
    if not (math.isfinite(scale) and scale > 0):
        raise OvisError(f"adapters: scale is {scale!r}, expected a number above 0")
    adapters = cut_padding(adapters, adapter_axes(config), config)
    listing = list_arrays("adapters", adapters)
    shapes = {entry.key: entry.shape for entry in listing.tensors}
    ranks = [shape[0] for key, shape in shapes.items() if key.endswith("/a") and shape]
    rank = max(ranks, key=ranks.count, default=0)  # of most: those of another are the fault
    header = Header(listing.tensors, listing.unusable, listing.problems)
    _account("adapters", "adapters", header, config, rank)
    config_json, _ = config.to_hf()
    record = {"format": FORMAT, "rank": rank, "scale": float(scale), "config": config_json}
    check_space(folder, sum(x.nbytes for x in adapters.values()))
    with whole_or_absent(folder) as partial:
        write_file(
            partial / TENSORS_FILE,
            {path: ("F32", shapes[path]) for path in sorted(shapes)},
            lambda path: array_pieces(np.asarray(adapters[path])),
        )
        write_json(partial / RECORD_FILE, record)


def load_adapters(
    folder: str | Path,
    config: OvisConfig,
    *,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR,
) -> Adapters:
    """Read a folder that `save_adapters` made, for a model of `config`.

    The halves are float32. On a mesh they lie as their matrices do; without one they are on the
    default device, where a CPU device uses the mapped file (as in `load_params`).

    Raises:
      CheckpointError: the adapters belong to a model of another config, or the tensors are not
        whole adapters of its matrices and of the stated rank; names every fault.
      ConfigError: adapters.json cannot be read, or lacks a field.
      OvisError: `folder` does not hold adapters, or they cannot be laid on the mesh by the rules.
      OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        what = f"holds no {RECORD_FILE}" if folder.is_dir() else "is not a folder"
        raise OvisError(f"adapters {folder}: it {what}; give a folder that save_adapters has made")
    rank, scale = _read_record(folder, config)
    path = folder / TENSORS_FILE
    if not path.is_file():
        missing = Problem(TENSORS_FILE, "", "missing file", "a file", "none of that name")
        header = Header(problems=(missing,), readable=False)
    else:
        header = read_header(path)
    _account(f"adapters {folder}", TENSORS_FILE, header, config, rank)
    shardings = {} if mesh is None else adapter_shardings(config, mesh, rules)
    shapes = adapter_shapes(config, rank, mesh, rules)
    mapped = map_file(path)

    def load(key: str, entry: TensorEntry) -> jax.Array:
        return place(key, view_tensor(mapped, entry), "F32", shardings.get(key), shapes[key])

    entries = {entry.key: entry for entry in header.tensors}
    return Adapters({key: load(key, entries[key]) for key in sorted(entries)}, rank, scale)


def _read_record(folder: Path, config: OvisConfig) -> tuple[int, float]:
    """Rank and scale, when the record is of a model of this config."""
    path = folder / RECORD_FILE
    record = Fields(read_json(path), str(path))
    if (found := record.get("format")) != FORMAT:
        raise CheckpointError(
            f"{path}: format is {found!r}, expected {FORMAT}; save the adapters again with this"
            " version of ovis_jax"
        )
    rank, scale = record.size("rank"), record.positive("scale")
    expected = _deciding(config.to_hf()[0])
    stated = _deciding(dict(record.section("config").values))
    problems = [
        Problem(RECORD_FILE, f"config: {key}", "another config", repr(value), repr(stated.get(key)))
        for key, value in expected.items()
        if stated.get(key) != value
    ]
    if problems:
        advice = "give the checkpoint that they were trained beside, or adapters of this one"
        raise CheckpointProblems(f"adapters {folder}", problems, advice)
    return rank, scale


def _deciding(config_json: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that decide what a matrix means; not its ids and lengths."""
    flat: dict[str, Any] = flatten_dict(config_json, sep=".")
    return {
        key: value
        for key, value in flat.items()
        if key.startswith(("llm_config.", "visual_tokenizer_config."))
        and not key.endswith("_token_id")
    }


def _account(subject: str, file: str, header: Header, config: OvisConfig, rank: int) -> None:
    """Hold tensors to the adapters that a model may have.

    Raises:
      CheckpointProblems: with all rows.
    """
    problems = list(header.problems)
    axes = adapter_axes(config)
    known = {entry.key for entry in header.tensors} | header.unusable
    for entry in header.tensors:
        if entry.key not in axes:
            expected = "path/a or path/b of a matrix that products are made with"
            found = f"{entry.dtype} {list(entry.shape)}"
            problems.append(Problem(file, entry.key, "unknown key", expected, found))
            continue
        sizes = letter_sizes(config, entry.key) | {"R": rank}
        problems += tensor_problems(entry, axes[entry.key], sizes, "F32")
        for other in _other_half(entry.key, known):
            shape = list(shape_of(axes[other], sizes))
            expected = f"{shape} {axes[other]!r} beside {entry.key}"
            problems.append(Problem(file, other, "missing key", expected, "no such tensor"))
    if not known and not problems:
        problems.append(Problem(file, "", "no adapters", "two tensors for each matrix", "none"))
    if problems:
        raise CheckpointProblems(subject, problems, "save the adapters again, whole")


def _other_half(key: str, known: Iterable[str]) -> list[str]:
    """The key of the other half of an adapter, if it is missing."""
    matrix, _, half = key.rpartition("/")
    other = f"{matrix}/{'b' if half == 'a' else 'a'}"
    return [] if other in known else [other]
