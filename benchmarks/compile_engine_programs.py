"""Are the programs of the engine, and those with adapters, efficient on accelerators?

`python -m benchmarks.compile_engine_programs` compiles them for TPUs and GPUs and checks their
memory, copies and collectives, as `benchmarks.compile_for_accelerators` does for the programs of
`generate`. No program is executed, and no accelerator is needed. All sizes are those of the model,
except for the number of blocks, which is reduced to save time. Sizes are per device.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks.support.engine_programs import (
    NUM_PARTIAL_PREFILLS,
    analyze_engine_programs,
)
from benchmarks.support.reduced_depth import with_depth
from benchmarks.support.results import JsonOption, print_results, write_results
from ovis_jax.errors import install_command
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.aot_compile import COMPILER_EXTRAS, installed_compiler
from ovis_jax.plan.topologies import parse_topology
from ovis_jax.plan.workload_from_names import load_config, make_workload
from ovis_jax.quantization import QuantizationFormat

TOPOLOGIES = ("v5e:2x4", "v6e:1x1", "v5p:2x2x1", "h100:1", "a100:1")

NUM_SEQS, MAX_MODEL_LEN = 8, 4096
"""Slots of the engine, and positions per slot."""

PROMPT_LENGTH = 2048
"""Length of the prompt that the program "prefill" reads at once, in positions."""


class Format(NamedTuple):
    """The formats of weights, cache and adapters, and the programs that depend on them."""

    programs: tuple[str, ...]
    quantization: QuantizationFormat | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    rank: int | None = None
    """Rank of the adapters; None for no adapters."""

    def label(self) -> str:
        """Return the formats in words."""
        names = [self.quantization or "bfloat16"]
        names += ["int8 cache"] if self.kv_cache_dtype == "int8" else []
        names += [f"LoRA {self.rank}"] if self.rank else []
        return ", ".join(names)


_EVERY = ("decode full, masks", "prefill_chunks x1")

FORMATS = (
    Format(
        (
            "decode greedy",
            "decode temperature",
            "decode full",
            "decode temperature, masks",
            *_EVERY,
            f"prefill_chunks x{NUM_PARTIAL_PREFILLS}",
            "encode_crops x1",
            f"encode_crops x{NUM_PARTIAL_PREFILLS}",
            "start_sequences",
            "copy_cache",
            "resize_rows, longer",
            "resize_rows, shorter",
        )
    ),
    Format(_EVERY, rank=16),
    Format((*_EVERY, "encode_crops x1"), "int8"),
    Format((*_EVERY, "prefill"), "int8", rank=16),
    Format((*_EVERY, "encode_crops x1"), "int4"),
    Format(
        (*_EVERY, "copy_cache", "resize_rows, longer", "resize_rows, shorter"),
        "int8",
        kv_cache_dtype="int8",
    ),
)

MAX_TEMP_MIB = {
    "decode": 64,
    "prefill_chunks": 192,
    "prefill": 768,
    "encode_crops": 320,
    "start_sequences": 64,
    "copy_cache": 64,
    "resize_rows": 16,
}
"""Maximum temporary arrays of each kind of program, in MiB."""


def max_temp_mib(name: str) -> int:
    """Return the maximum temporary arrays of a program, in MiB; several prompts may take more."""
    kind, several = re.split("[ ,]", name)[0], re.search(r"prefill_chunks x(\d+)", name)
    return MAX_TEMP_MIB[kind] * (int(several[1]) if several else 1)


def passed_checks(name: str, program: dict[str, Any]) -> dict[str, bool]:
    """Check a compiled program.

    Args:
      name: Name of the program.
      program: The result of `analyze_engine_programs`.

    Returns:
      For each check, whether it passed.
    """
    if "error" in program:
        return {"compiles": False}
    bound = max_temp_mib(name)
    return {
        "updates in place": program["aliased"] >= program["updated"],
        f"temp under {bound} MiB": program["temp"] < bound * 2**20,
        "at most 2 all-reduces per block": program["all_reduces_per_block"] <= 2,
        **{f"no weight-sized {x}": not n for x, n in program["weight_sized"].items()},
    }


def compile_format(
    config: str, topology: str, one: Format, depth: int, programs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Compile and check programs for a topology; yield the result of each."""
    workload = make_workload(
        with_depth(load_config(config), depth),
        topology,
        NUM_SEQS,
        MAX_MODEL_LEN,
        quantization=one.quantization,
        kv_cache_dtype=one.kv_cache_dtype,
    )
    workload = replace(workload, prompt_length=PROMPT_LENGTH)
    for name, program in analyze_engine_programs(workload, one.rank, programs):
        facts = {"topology": topology, "format": one.label(), "program": name}
        yield {**facts, **program, "checks": passed_checks(name, program)}


def program_table(
    results: Sequence[Mapping[str, Any]], topologies: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: a program per row, and its temporary MiB on each topology.

    The number in parentheses is that of all-reduces per block.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for x in results:
        cell = "too large"
        if "error" not in x:
            cell = f"{x['temp'] / 2**20:.0f}"
            cell += f" ({x['all_reduces_per_block']})" if x["all_reduces_per_block"] else ""
        failed = not all(x["checks"].values())
        row = cells.setdefault((x["format"], x["program"]), {})
        row[x["topology"]] = f"{cell} FAILED" if failed else cell
    rows = [[*key, *(row.get(x, "") for x in topologies)] for key, row in cells.items()]
    return ["format", "program", *topologies], rows


def main(
    topology: Annotated[
        list[str] | None, typer.Option(help="Topology to compile for; may be repeated.")
    ] = None,
    config: Annotated[
        str, typer.Option(help="Model: 9b, 27b, 3b, or a folder with config.json.")
    ] = "9b",
    depth: Annotated[
        int, typer.Option(min=2, help="Maximum number of blocks of each transformer.")
    ] = 2,
    program: Annotated[
        list[str] | None, typer.Option(help="Compile only programs that start with this.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Compile the programs for each topology; exit with code 1 if a check fails.

    A topology whose compiler is not installed is left out and named after the table.
    """
    notes = Console(stderr=True, highlight=False)
    console = Console(highlight=False, markup=False)
    topologies, results, missing = topology or TOPOLOGIES, [], []
    for name in topologies:
        platform = parse_topology(name).device.platform
        compiler = installed_compiler(platform)
        if compiler is None:
            install = install_command(*COMPILER_EXTRAS[platform])
            missing.append(
                f"{name}: not compiled, because no compiler for {platform} is installed;"
                f" install one: {install}"
            )
            continue
        for one in FORMATS:
            selected = [x for x in one.programs if x.startswith(tuple(program or [""]))]
            for result in compile_format(config, name, one, depth, selected):
                results.append(result)
                seconds = result.get("compile_seconds", 0)
                what = f"{name}, {one.label()}, {result['program']}"
                notes.print(f"compiled for {what} with {compiler}: {seconds:.0f} s")
    title = f"{config}, {depth} blocks per transformer: temporary MiB (all-reduces per block)"
    print_results(title, *program_table(results, topologies))
    failed = [
        f"{x['topology']}, {x['format']}, {x['program']}: FAILED {check}"
        for x in results
        for check, passed in x["checks"].items()
        if not passed
    ]
    num_checks = sum(len(x["checks"]) for x in results)
    for line in (*missing, *failed, f"{num_checks} checks, {len(failed)} failed"):
        console.print(line, soft_wrap=True)
    write_results(json_path, config=config, depth=depth, programs=results, missing=missing)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
