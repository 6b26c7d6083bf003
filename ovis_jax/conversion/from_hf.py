"""Converting a checkpoint from the Hub's layout: `ovis-jax convert SRC DST`.

A conversion renames tensors and never reshapes them, so it is a stream that never holds a whole
tensor in memory. It writes to DST.partial. If it is interrupted, the same command keeps the
finished shards and converts the others again.

From a repo id, the configs and the headers of all shards are read first. The index file has only
keys; the headers also have shapes and dtypes, so that all faults are known before anything is
written. Each shard is then downloaded while the one before it is converted. A file of the result
has tensors from one file of the source, so that a source shard can be deleted
(`--delete-source-shards`) as soon as the next one is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ovis_jax.checkpoint.checksums import get_published_sha256, verify_sha256
from ovis_jax.checkpoint.conversion_record import (
    CONVERSION_FILE,
    is_converted,
    make_conversion_record,
)
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.key_map import MatchedTensors
from ovis_jax.checkpoint.output_dirs import check_disk_space, require_empty, resumable_dir
from ovis_jax.checkpoint.params import match_checkpoint
from ovis_jax.checkpoint.resolve import (
    BUNDLED,
    ResolvedCheckpoint,
    find_processor_files,
    resolve_checkpoint,
)
from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    TensorSpecs,
    plan_shards,
    select_unfinished,
    total_bytes,
    write_shards,
)
from ovis_jax.checkpoint.tensor_index import read_local_header
from ovis_jax.config import OvisConfig
from ovis_jax.console import Dtype
from ovis_jax.conversion.exit_codes import exit_on_error
from ovis_jax.conversion.input_fingerprint import check_unchanged, copy_small_files, describe_inputs
from ovis_jax.conversion.progress import (
    ProgressCallback,
    print_conversion_plan,
    progress_bar,
    report_progress,
)
from ovis_jax.conversion.tensor_chunks import read_cast_chunks
from ovis_jax.errors import OvisError


@dataclass(frozen=True)
class ConversionPlan:
    """The complete plan of a conversion, computed from headers and configs alone.

    Attributes:
      checkpoint: the source.
      headers: headers of the source's files, by path.
      matched: the parameter of every source tensor.
      tensors: dtypes and shapes of the result, in the order of the source's files.
      source_files: source file by parameter path.
      dtype: dtype of the result: "F32", "F16" or "BF16".
      is_cast: whether the user gave a dtype to cast to.
      processor_files: names of the files to copy.
    """

    checkpoint: ResolvedCheckpoint
    headers: Mapping[Path, SafetensorsHeader]
    matched: MatchedTensors
    tensors: TensorSpecs
    source_files: Mapping[str, Path]
    dtype: str
    is_cast: bool
    processor_files: tuple[str, ...]

    def plan_shards(self, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
        """Return the parameter paths of each file of the result."""
        return plan_shards(self.tensors, max_shard_bytes, self.source_files)


def plan_conversion(
    src: str | Path, *, revision: str | None = None, dtype: str | None = None
) -> ConversionPlan:
    """Read the configs and headers of a source and match every tensor; nothing is written.

    From a repo id, only these are downloaded.

    Args:
      src: a folder in the Hub's layout, the name of a bundled checkpoint, or a repo id.
      revision: branch, tag or commit of a repo id.
      dtype: "float32", "bfloat16" or "float16" to cast to.

    Raises:
      ConfigError: a config or tokenizer file is missing or not supported.
      CheckpointError: the tensors are not those of the config; all faults are reported.
      OvisError: there is no such source, it is already converted, or `dtype` is another one.
      OSError: a file cannot be read or downloaded.
    """
    checkpoint = resolve_checkpoint(src, revision, weights=False)
    folder = checkpoint.folder
    config = OvisConfig.from_folder(folder)
    processor_files = find_processor_files(folder)
    if is_converted(folder):
        hidden = f"; it hides the bundled checkpoint {src}" if str(src) in BUNDLED else ""
        raise OvisError(
            f"the folder {folder} is already converted; give the checkpoint that it was made"
            f" from{hidden}"
        )
    headers: dict[Path, SafetensorsHeader] = {}

    def read_header(path: Path) -> SafetensorsHeader | None:
        if checkpoint.revision is None:
            header = read_local_header(path)
        else:
            from ovis_jax.checkpoint.hub import read_remote_header

            header = read_remote_header(checkpoint.name, checkpoint.revision, folder, path)
        if header is not None:
            headers[path] = header
        return header

    matched, target = match_checkpoint(folder, config, dtype, read_header)
    sources = matched.sources
    ordered = sorted(sources, key=lambda path: sources[path].path)
    return ConversionPlan(
        checkpoint,
        headers,
        matched,
        tensors={path: (target, sources[path].shape) for path in ordered},
        source_files={path: sources[path].path for path in ordered},
        dtype=target,
        is_cast=dtype is not None,
        processor_files=tuple(processor_files),
    )


def convert_from_hf(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    progress: ProgressCallback | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    checksums: bool = True,
    verify: bool = False,
    delete_source_shards: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint from the Hub's layout; `dst` appears when it is complete.

    Args:
      src: a folder in the Hub's layout, the name of a bundled checkpoint, or a repo id.
      dst: folder to create; it must not exist or be empty. `dst`.partial is resumed.
      revision: branch, tag or commit of a repo id.
      dtype: "float32", "bfloat16" or "float16" to cast every tensor to; None for no change.
      progress: called for every chunk.
      max_shard_bytes: limit for the tensors of a file.
      checksums: whether to record the SHA-256 of every shard in conversion.json.
      verify: whether to compare the source with the SHA-256 that the Hub publishes, and the result
        with conversion.json.
      delete_source_shards: whether to delete each shard of a repo id from the Hub's cache once the
        result has its tensors. At most two shards are then on the disk.

    Returns:
      The content of conversion.json.

    Raises:
      OvisError: as in `plan_conversion`; also if `dst` is not empty, another process is writing it,
        or `dst`.partial was started with different inputs.
      CheckpointError: a source file has changed while it was read, or a checksum is wrong.
      DownloadValidationError: the same for a downloaded shard; `dst`.partial is kept.
      OSError: a file cannot be read or written, or a disk has too little space.
    """
    dst = Path(dst)
    require_empty(dst)
    if verify and not checksums:
        raise OvisError("--verify needs checksums; leave out --no-checksums")
    if delete_source_shards and _is_local(src):
        kind = "a folder of yours" if Path(src).exists() else "the bundled checkpoint"
        raise OvisError(
            f"--delete-source-shards is for a repo id: {src} is {kind}, from which nothing is"
            " deleted; leave it out"
        )
    plan = plan_conversion(src, revision=revision, dtype=dtype)
    checkpoint, sources = plan.checkpoint, plan.matched.sources
    published = get_published_sha256(checkpoint) if verify else None
    if published is not None and checkpoint.revision is None:
        verify_sha256(checkpoint.folder, published)
    inputs = describe_inputs(
        sources, plan.tensors, max_shard_bytes, checksums, origin=_describe_origin(plan, verify)
    )
    shards = plan.plan_shards(max_shard_bytes)
    with resumable_dir(dst, inputs) as output:
        unfinished = select_unfinished(plan.tensors, shards, output.finished)
        with _provide_shards(
            plan, dst, unfinished, published, delete_used=delete_source_shards
        ) as wait_for_shard:

            def read_tensor(path: str) -> Iterator[memoryview]:
                wait_for_shard(sources[path].path)
                return read_cast_chunks(sources[path], plan.dtype)

            total = total_bytes(plan.tensors)
            sha256 = write_shards(
                output.path,
                plan.tensors,
                report_progress(read_tensor, progress, total - total_bytes(unfinished), total),
                shards,
                checksums=checksums,
                resumable=output,
            )
            dtype_change = plan.dtype if plan.is_cast else None
            copy_small_files(checkpoint.folder, output.path, plan.processor_files, dtype_change)
            record = make_conversion_record(plan.tensors, sha256, **_describe_source(plan))
            write_json(output.path / CONVERSION_FILE, record)
            check_unchanged(inputs.get("sources", {}))
            if verify:
                verify_sha256(output.path, sha256)
    return record


def _is_local(src: str | Path) -> bool:
    """Whether nothing is downloaded."""
    return Path(src).exists() or str(src) in BUNDLED


def _describe_origin(plan: ConversionPlan, verify: bool) -> dict[str, Any] | None:
    """Return what identifies the files of a repo id, which need not be local when resuming."""
    if plan.checkpoint.revision is None:
        return None
    # The shards of a finished part are not checked again, so --verify must not be added later.
    given = "given" if verify else "left out"
    return {"repo": plan.checkpoint.name, "revision": plan.checkpoint.revision, "--verify": given}


def _provide_shards(
    plan: ConversionPlan,
    dst: Path,
    unfinished: TensorSpecs,
    published: Mapping[str, str] | None,
    *,
    delete_used: bool,
) -> AbstractContextManager[Callable[[Path], None]]:
    """Check the disk space, and return the context in which source shards are downloaded.

    The context yields a function that waits for a shard; local files are always there.
    """
    if plan.checkpoint.revision is None:
        check_disk_space(dst, total_bytes(unfinished))
        return nullcontext(lambda path: None)
    # Imported here because huggingface_hub is slow to import.
    from ovis_jax.checkpoint.hub import delete_from_cache
    from ovis_jax.conversion.shard_downloads import ShardDownloader, check_download_space

    needed = list(dict.fromkeys(plan.source_files[path] for path in unfinished))
    if delete_used:
        for path in set(plan.source_files.values()) - {*needed}:
            delete_from_cache(path)
    result_bytes, cache = total_bytes(unfinished), plan.checkpoint.folder
    check_download_space(dst, result_bytes, cache, needed, plan.headers, delete_used=delete_used)
    return ShardDownloader(
        plan.checkpoint,
        needed,
        plan.headers,
        expected_sha256=published,
        delete_used=delete_used,
    )


def _describe_source(plan: ConversionPlan) -> dict[str, Any]:
    matched, checkpoint = plan.matched, plan.checkpoint
    return {
        "source": {"name": checkpoint.name, "revision": checkpoint.revision},
        "source_keys": len(matched.sources) + len(matched.unused),
        "not_used": {info.key: reason for info, reason in matched.unused},
        "not_used_and_absent": list(matched.absent),
    }


def convert(
    src: Annotated[
        str, typer.Argument(help="Folder in the Hub's layout, a repo id, or ovis-tiny.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to create; if it exists, it must be empty.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the repo id.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to cast every tensor to.")] = None,
    checksums: Annotated[
        bool, typer.Option(help="Record the SHA-256 of every shard in conversion.json.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the SHA-256 of the source with the published one, and reread the result.",
        ),
    ] = False,
    delete_source_shards: Annotated[
        bool,
        typer.Option(
            "--delete-source-shards",
            help="Delete each shard of a repo id from the Hub's cache once it is converted.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
) -> None:
    """Convert an Ovis1.6-Gemma2 checkpoint from the Hub's layout."""
    with exit_on_error(dst) as errors:
        if dry_run:
            require_empty(dst)
            plan = plan_conversion(src, revision=revision, dtype=dtype)
            print_conversion_plan(Console(), plan.matched, plan.tensors, plan.plan_shards())
            return
        # For a repo id, huggingface_hub shows bars of the downloads, which take longer.
        with progress_bar(errors, "converting", visible=_is_local(src)) as progress:
            record = convert_from_hf(
                src,
                dst,
                revision=revision,
                dtype=dtype,
                progress=progress,
                checksums=checksums,
                verify=verify,
                delete_source_shards=delete_source_shards,
            )
        Console().print(
            f"{dst}: {record['source_keys']} source keys, {record['parameters']:,} parameters"
            f" as {record['dtype']} in {len(list(dst.glob('*.safetensors')))} shard(s)",
            soft_wrap=True,
        )
