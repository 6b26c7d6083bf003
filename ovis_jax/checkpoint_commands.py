"""The commands `ovis-jax inspect` and `ovis-jax verify`."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ovis_jax.checkpoint.checksums import read_recorded_sha256, verify_sha256
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE
from ovis_jax.checkpoint.params import match_checkpoint
from ovis_jax.checkpoint.resolve import find_folder_or_bundled_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.console import TensorParallelOption
from ovis_jax.errors import count_noun
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.mesh import tensor_parallel_mesh
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
    """Show a checkpoint's config and the size of each model part, without reading the weights."""
    advice = (
        "give a converted folder, a folder in the Hub's layout, or ovis-tiny; a repo id must be"
        " converted first, with: ovis-jax convert REPO_ID DIR"
    )
    checkpoint = find_folder_or_bundled_checkpoint(folder, advice)
    config = OvisConfig.from_folder(checkpoint.folder)
    sha256 = read_recorded_sha256(checkpoint) if check else {}
    matched, dtype = match_checkpoint(checkpoint.folder, config)
    used = [(path.partition("/")[0], info) for path, info in matched.sources.items()]
    unused = [("(not used)", info) for info, _ in matched.unused_found]
    totals: dict[str, list[int]] = {}
    for part, info in [*used, *unused]:
        row = totals.setdefault(part, [0, 0, 0])
        sizes = 1, math.prod(info.shape), info.stop - info.start
        totals[part] = [total + size for total, size in zip(row, sizes, strict=True)]
    numbers = _number_columns("tensors", "parameters", f"bytes ({dtype})")
    table = Table("part", *numbers, "trainable as")
    for part, row in totals.items():
        table.add_row(part, *(f"{value:,}" for value in row), PART_BY_PREFIX.get(part, ""))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*totals.values(), strict=True)))
    console = Console(highlight=False)
    console.print_json(data=asdict(config))
    console.print(table)
    if check:
        verify_sha256(checkpoint.folder, sha256)
        files = count_noun(len(sha256), "file")
        console.print(f"{files} checked: equal to the checksums in {CONVERSION_FILE}")


def verify_command(
    folder: FolderArgument,
    golden: Annotated[
        list[Path], typer.Argument(help="Golden files (.npz) with results of the original code.")
    ],
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Compare a checkpoint with results from the original code, stage by stage."""
    mesh = tensor_parallel_mesh(tensor_parallel)
    loaded: dict[str, LoadedOvis] = {}
    columns = _number_columns("largest difference", "tolerance")
    table = Table("case", "stage", *columns, "result")
    all_passed = True
    for path in golden:
        results = GoldenFile(path)
        if results.dtype not in loaded:
            loaded[results.dtype] = load(folder, dtype=results.dtype, mesh=mesh)
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
    return [Column(name, justify="right") for name in names]
