"""The commands `ovis-jax inspect` and `ovis-jax verify`."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ovis_jax.checkpoint.checksums import read_recorded_sha256, verify_sha256
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE
from ovis_jax.checkpoint.params import match_checkpoint, read_stored_quantization
from ovis_jax.checkpoint.resolve import find_folder_or_bundled_checkpoint
from ovis_jax.checkpoint.safetensors_reader import DTYPES, TensorInfo
from ovis_jax.config import OvisConfig
from ovis_jax.console import QuantizationOption, TensorParallelOption, print_unwrapped
from ovis_jax.errors import count_noun
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.quantization import quantized_matrices
from ovis_jax.sharding import param_shapes
from ovis_jax.training.trainable import PART_BY_PREFIX
from ovis_jax.verify_goldens import GoldenFile, compare_with_golden

FolderArgument = Annotated[
    str, typer.Argument(help="Converted folder, folder in the Hub's layout, or ovis-tiny.")
]


def inspect_command(
    folder: FolderArgument,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also compare the weights with the recorded checksums; exit code 1 on a mismatch.",
        ),
    ] = False,
) -> None:
    """Show a checkpoint's config, and the size and formats of each part; no weights are read."""
    advice = (
        "give a converted folder, a folder in the Hub's layout, or ovis-tiny; a repo id must be"
        " converted first, with: ovis-jax convert REPO_ID DIR"
    )
    checkpoint = find_folder_or_bundled_checkpoint(folder, advice)
    config = OvisConfig.from_folder(checkpoint.folder)
    sha256 = read_recorded_sha256(checkpoint) if check else {}
    parts = _measure_parts(checkpoint.folder, config)
    numbers = _number_columns("tensors", "parameters", "bytes", "bits")
    table = Table("part", *numbers, "formats", "trainable as")

    def add_row(name: str, size: _PartSize) -> None:
        bits = f"{8 * size.bytes / size.parameters:.1f}"
        counts = (f"{value:,}" for value in (size.tensors, size.parameters, size.bytes))
        table.add_row(name, *counts, bits, ", ".join(size.formats), PART_BY_PREFIX.get(name, ""))

    total = _PartSize()
    for name, size in parts.items():
        add_row(name, size)
        total.add(size)
    table.add_section()
    add_row("all", total)
    console = Console(highlight=False)
    console.print_json(data=asdict(config))
    print_unwrapped(console, table)
    if check:
        verify_sha256(checkpoint.folder, sha256)
        files = count_noun(len(sha256), "file")
        console.print(f"{files} checked: equal to the checksums in {CONVERSION_FILE}")


@dataclass
class _PartSize:
    """The size of a model part, and the formats of its parameters in order of appearance."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    formats: dict[str, None] = field(default_factory=dict)

    def add(self, other: "_PartSize") -> None:
        self.tensors += other.tensors
        self.parameters += other.parameters
        self.bytes += other.bytes
        self.formats |= other.formats


def _measure_parts(folder: Path, config: OvisConfig) -> dict[str, _PartSize]:
    """Return the size of each part of a checkpoint by name, from the headers."""
    matched, _ = match_checkpoint(folder, config)
    quantization = read_stored_quantization(folder)
    matrices = quantized_matrices(config, quantization)
    shapes, parts = param_shapes(config), defaultdict[str, _PartSize](_PartSize)

    def add(part: str, info: TensorInfo, parameters: int, formats: dict[str, None]) -> None:
        parts[part].add(_PartSize(1, parameters, info.stop - info.start, formats))

    for path, info in matched.sources.items():
        formats = {}
        if quantization is not None and path in matrices:
            formats = {"int8" if quantization.group_of(path) is None else "int4": None}
        elif path in shapes:
            formats = {DTYPES[info.dtype].name: None}
        add(path.partition("/")[0], info, math.prod(shapes.get(path, (0,))), formats)
    for info, _ in matched.unused_found:
        name = DTYPES[info.dtype].name if info.dtype in DTYPES else info.dtype
        add("(not used)", info, math.prod(info.shape), {name: None})
    return parts


def verify_command(
    folder: FolderArgument,
    golden: Annotated[
        list[Path], typer.Argument(help="Golden files (.npz) with results of the original code.")
    ],
    quantization: QuantizationOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Compare a checkpoint with results from the original code, stage by stage.

    If the checkpoint is quantized, the comparison has two values: the mean KL divergence of the
    next token's distribution, in nats, and the share of greedy tokens that differ.
    """
    mesh = tensor_parallel_mesh(tensor_parallel)
    loaded: dict[str, LoadedOvis] = {}
    columns = _number_columns("difference", "tolerance")
    table = Table("case", "stage", *columns, "result")
    all_passed = True
    for path in golden:
        results = GoldenFile(path)
        if results.dtype not in loaded:
            loaded[results.dtype] = load(
                folder, dtype=results.dtype, quantization=quantization, mesh=mesh
            )
        stages = compare_with_golden(loaded[results.dtype], results)
        for n, stage in enumerate(stages):
            all_passed &= stage.passed
            result = "[green]pass[/]" if stage.passed else "[bold red]FAIL[/]"
            numbers = f"{stage.difference:.2g}", f"{stage.tolerance:g}"
            table.add_row("" if n else path.stem, stage.name, *numbers, result)
        table.add_section()
    Console().print(table)
    if not all_passed:
        raise typer.Exit(1)


def _number_columns(*names: str) -> list[Column]:
    return [Column(name, justify="right", no_wrap=True) for name in names]
