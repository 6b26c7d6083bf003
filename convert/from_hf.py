"""Hub layout -> this library: `python -m convert.from_hf SRC DST`.

A conversion renames tensors and never reshapes them, so it is a stream: no tensor is ever whole in
memory. It is made in DST.partial and can be stopped at any moment: the same command goes on with
it. Exit codes: 0 done, 1 the checkpoint is wrong, 2 usage, 3 input or output, 4 interrupted.

Of a repo id the configs come first and then the headers of all shards, a few kB each by a range of
bytes: the index names keys alone, and only headers have the shapes and dtypes that make it known
that nothing is wrong before anything is written. Then each shard is fetched while the one before it
is converted. A file of the result holds tensors of one file of the source, so that a shard is done
with, and may be removed (`--delete-source-shards`), when the next one is begun.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from convert.download import Shards, check_room, fetched_ahead
from convert.exits import exits
from convert.report import print_plan, progress_bar
from convert.transfer import (
    OnProgress,
    check_unchanged,
    copy_small_files,
    counted,
    pieces,
    result_facts,
)
from ovis_jax.checkpoint.checksums import check, published
from ovis_jax.checkpoint.folder import header_there
from ovis_jax.checkpoint.hub import header_on_hub
from ovis_jax.checkpoint.journal import left_behind, unfinished
from ovis_jax.checkpoint.keymap import Plan
from ovis_jax.checkpoint.params import is_converted, plan_parameters
from ovis_jax.checkpoint.safetensors_files import Header
from ovis_jax.checkpoint.source import BUILT_IN, Source, find_source, small_files
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
from ovis_jax.console import Dtype
from ovis_jax.errors import OvisError


@dataclass(frozen=True)
class Conversion:
    """All that a conversion will do, known from headers and configs alone.

    `tensors` are in the order of the source's files, `headers` by file, `origins` the file of each.
    """

    source: Source
    headers: Mapping[Path, Header]
    plan: Plan
    tensors: Tensors
    origins: Mapping[str, Path]
    dtype: str
    recast: bool
    files: dict[str, Path]


def prepare(
    src: str | Path, *, revision: str | None = None, dtype: str | None = None
) -> Conversion:
    """Read the configs and headers of a source and match every tensor; nothing is written.

    Of a repo they are fetched, and no tensor is.

    Raises:
      ConfigError: a config or tokenizer file is missing or not supported.
      CheckpointError: the tensors are not those of the config; with a row for every fault.
      OvisError: `src` is neither a folder nor a repo id that may be read, or `dtype` is not one of
        the three.
      OSError: a file cannot be read or fetched.
    """
    source = find_source(src, revision, weights=False)
    config = OvisConfig.from_folder(source.folder)
    files = small_files(source.folder)
    if is_converted(source.folder):
        raise OvisError(f"{source.folder} is already converted; give the checkpoint it was made of")
    headers: dict[Path, Header] = {}

    def read(path: Path) -> Header | None:
        if source.revision is None:
            header = header_there(path)
        else:
            header = header_on_hub(source.name, source.revision, source.folder, path)
        if header is not None:
            headers[path] = header
        return header

    plan, target = plan_parameters(source.folder, config, dtype, read)
    ordered = sorted(plan.sources, key=lambda path: plan.sources[path].path)
    tensors = {path: (target, plan.sources[path].shape) for path in ordered}
    origins = {path: plan.sources[path].path for path in ordered}
    return Conversion(source, headers, plan, tensors, origins, target, dtype is not None, files)


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
    delete_source_shards: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint; `dst` appears when it is complete. Returns what conversion.json says.

    `src` is a folder in the Hub's layout or a repo id, `revision` a branch, tag or commit of that
    repo; `dtype` ("float32", "bfloat16", "float16") casts every tensor, otherwise none is changed.
    With `delete_source_shards` each shard of a repo id is removed from the Hub's cache when the
    result has its tensors, so that never more than two of them are on the disk.
    What an interrupted conversion has left in `dst`.partial is hashed again and kept. Without
    `checksums` conversion.json has none. With `verify` the source is first held to what the Hub
    publishes of it (each shard of a repo id as it comes), and what was written is read again and
    held to conversion.json.

    Raises:
      OvisError: as in `prepare`, and when `dst` exists and is not an empty folder, another process
        is writing it, or `dst`.partial was begun with other arguments or another source.
      CheckpointError: a file of the source changed while it was read, or a checksum is not right.
      ShardProblems: the same of a shard that was fetched; DST.partial is kept.
      OSError: a file cannot be read or written, or the disk is too small.
    """
    dst = Path(dst)
    check_destination(dst)
    if verify and not checksums:
        raise OvisError("--verify needs checksums; leave out --no-checksums")
    if delete_source_shards and _is_here(src):
        raise OvisError(
            f"--delete-source-shards is for a repo id: {src} is a folder of your own, of which"
            " nothing is deleted; leave it out"
        )
    conversion = prepare(src, revision=revision, dtype=dtype)
    source = conversion.source
    expected = published(source) if verify else None
    total = sum(tensor_bytes(*tensor) for tensor in conversion.tensors.values())
    if source.revision is None:
        shards = None
        check_space(dst, total - left_behind(dst))
        if expected is not None:
            check(source.folder, expected)
    else:
        order, headers = list(dict.fromkeys(conversion.origins.values())), conversion.headers
        check_room(dst, total, source, order, headers, delete_source_shards)
        shards = Shards(source, order, headers, expected=expected, delete=delete_source_shards)
    entries = conversion.plan.sources
    origin = None
    if source.revision is not None:
        # A shard that is not needed again is not held to anything any more.
        asked = "given" if verify else "left out"
        origin = {"repo": source.name, "revision": source.revision, "--verify": asked}
    settings = (max_shard_bytes, checksums)
    facts = result_facts(entries, conversion.tensors, *settings, origin=origin)

    with (
        unfinished(dst, facts, checksums=checksums) as (partial, journal),
        fetched_ahead(shards) as need,
    ):

        def chunks(path: str) -> Iterator[memoryview]:
            need(entries[path].path)
            return pieces(entries[path], conversion.dtype)

        stream = counted(chunks, total, progress, journal)
        digests = write_tensors(
            partial,
            conversion.tensors,
            stream,
            max_shard_bytes,
            journal=journal,
            origins=conversion.origins,
        )
        recast = conversion.dtype if conversion.recast else None
        copy_small_files(source.folder, partial, conversion.files, recast)
        provenance = _provenance(conversion)
        record = conversion_record(conversion.tensors, digests if checksums else {}, **provenance)
        write_json(partial / CONVERSION_FILE, record)
        check_unchanged(facts.get("sources", {}))
        if verify:
            check(partial, digests)
    return record


def _is_here(src: str | Path) -> bool:
    """Whether nothing is fetched."""
    return Path(src).exists() or str(src) in BUILT_IN


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
    delete_source_shards: Annotated[
        bool,
        typer.Option(
            "--delete-source-shards",
            help="Of a repo id: remove each shard from the Hub's cache once it is converted.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
) -> None:
    """Convert an Ovis1.6-Gemma2 checkpoint from the Hub's layout."""
    with exits(dst) as errors:
        if dry_run:
            check_destination(dst)
            conversion = prepare(src, revision=revision, dtype=dtype)
            shards = plan_shards(conversion.tensors, origins=conversion.origins)
            print_plan(Console(), conversion.plan, conversion.tensors, shards)
            return
        # Of a repo id the client shows bars of its own, which take longer.
        with progress_bar(errors, "converting", shown=_is_here(src)) as show:
            settings = {"dtype": dtype, "checksums": checksums, "verify": verify}
            settings["delete_source_shards"] = delete_source_shards
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
