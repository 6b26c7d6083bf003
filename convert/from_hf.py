"""Hub layout -> this library: `python -m convert.from_hf SRC DST`.

A conversion renames tensors and never reshapes them, so it is a stream: no tensor is ever whole in
memory. It is made in DST.partial and can be stopped at any moment: the same command goes on with
it. Exit codes: 0 done, 1 the checkpoint is wrong, 2 usage, 3 input or output, 4 interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from convert.exits import exits
from convert.report import print_plan, progress_bar
from convert.transfer import (
    Dtype,
    OnProgress,
    check_unchanged,
    copy_small_files,
    counted,
    pieces,
    result_facts,
)
from ovis_jax.checkpoint.checksums import check, published
from ovis_jax.checkpoint.journal import left_behind, unfinished
from ovis_jax.checkpoint.keymap import Plan
from ovis_jax.checkpoint.params import is_converted, plan_parameters
from ovis_jax.checkpoint.source import Source, find_source, small_files
from ovis_jax.checkpoint.writer import (
    CONVERSION_FILE,
    MAX_SHARD_BYTES,
    Tensors,
    check_destination,
    check_space,
    conversion_record,
    plan_shards,
    tensor_bytes,
    write_json,
    write_tensors,
)
from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError


@dataclass(frozen=True)
class Conversion:
    """All that a conversion will do, known from headers and configs alone."""

    source: Source
    plan: Plan
    tensors: Tensors
    dtype: str
    recast: bool
    files: dict[str, Path]


def prepare(
    src: str | Path, *, revision: str | None = None, dtype: str | None = None
) -> Conversion:
    """Read the configs and headers of a source and match every tensor; nothing is written.

    Raises:
      ConfigError: a config or tokenizer file is missing or not supported.
      CheckpointError: the tensors are not those of the config; with a row for every fault.
      OvisError: `src` is neither a folder nor a repo id, or `dtype` is not one of the three.
      OSError: a file cannot be read or fetched.
    """
    source = find_source(src, revision)
    config = OvisConfig.from_folder(source.folder)
    files = small_files(source.folder)
    if is_converted(source.folder):
        raise OvisError(f"{source.folder} is already converted; give the checkpoint it was made of")
    plan, target = plan_parameters(source.folder, config, dtype)
    tensors = {path: (target, entry.shape) for path, entry in plan.sources.items()}
    return Conversion(source, plan, tensors, target, dtype is not None, files)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    progress: OnProgress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    checksums: bool = True,
    verify: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint; `dst` appears when it is complete. Returns what conversion.json says.

    `src` is a folder in the Hub's layout or a repo id, `revision` a branch, tag or commit of that
    repo; `dtype` ("float32", "bfloat16", "float16") casts every tensor, otherwise none is changed.
    What an interrupted conversion has left in `dst`.partial is hashed again and kept. Without
    `checksums` conversion.json has none. With `verify` the source is first held to what the Hub
    publishes of it, and what was written is read again and held to conversion.json.

    Raises:
      OvisError: as in `prepare`, and when `dst` exists and is not an empty folder, another process
        is writing it, or `dst`.partial was begun with other arguments or another source.
      CheckpointError: a file of the source changed while it was read, or a checksum is not right.
      OSError: a file cannot be read or written, or the disk is too small.
    """
    dst = Path(dst)
    check_destination(dst)
    conversion = prepare(src, revision=revision, dtype=dtype)
    if verify and not checksums:
        raise OvisError("--verify needs checksums; leave out --no-checksums")
    if verify:
        check(conversion.source.folder, published(conversion.source))
    total = sum(tensor_bytes(*tensor) for tensor in conversion.tensors.values())
    entries = conversion.plan.sources
    facts = result_facts(entries, conversion.tensors, max_shard_bytes, checksums)

    def chunks(path: str) -> Iterator[memoryview]:
        return pieces(entries[path], conversion.dtype)

    check_space(dst, total - left_behind(dst))
    with unfinished(dst, facts, checksums=checksums) as (partial, journal):
        stream = counted(chunks, total, progress, journal)
        digests = write_tensors(
            partial, conversion.tensors, stream, max_shard_bytes, journal=journal
        )
        recast = conversion.dtype if conversion.recast else None
        copy_small_files(conversion.source.folder, partial, conversion.files, recast)
        provenance = _provenance(conversion)
        record = conversion_record(conversion.tensors, digests if checksums else {}, **provenance)
        write_json(partial / CONVERSION_FILE, record)
        check_unchanged(facts["sources"])
        if verify:
            check(partial, digests)
    return record


def _provenance(conversion: Conversion) -> dict[str, Any]:
    plan, source = conversion.plan, conversion.source
    return {
        "source": {"name": source.name, "revision": source.revision},
        "source_keys": len(plan.sources) + len(plan.unused),
        "not_used": {entry.key: why for entry, why in plan.unused},
        "not_used_and_absent": list(plan.absent),
    }


def command(
    src: Annotated[str, typer.Argument(help="A folder in the Hub's layout, or a repo id.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it must not hold anything.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repo id.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast every tensor.")] = None,
    checksums: Annotated[
        bool, typer.Option(help="Keep the sha256 of every shard in conversion.json.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash the source and the result, as published and written."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
) -> None:
    """Convert an Ovis1.6-Gemma2 checkpoint from the Hub's layout."""
    with exits(dst) as errors:
        if dry_run:
            check_destination(dst)
            conversion = prepare(src, revision=revision, dtype=dtype)
            shards = plan_shards(conversion.tensors)
            print_plan(Console(), conversion.plan, conversion.tensors, shards)
            return
        with progress_bar(errors, "converting") as show:
            settings = {"dtype": dtype, "checksums": checksums, "verify": verify}
            record = convert(src, dst, revision=revision, progress=show, **settings)
        Console().print(
            f"{dst}: {record['source_keys']} source keys, {record['parameters']:,} parameters"
            f" as {record['dtype']} in {len(list(dst.glob('*.safetensors')))} shard(s)",
            soft_wrap=True,
        )


def main() -> None:
    """Run the command line."""
    typer.run(command)


if __name__ == "__main__":
    main()
