"""Converting a checkpoint from the Hub's layout: `ovis-jax convert SRC DST`.

A conversion renames tensors and never reshapes them, so it can process them as a stream, without
holding a whole tensor in memory. With `--quantization`, it reads each matrix twice, block by block:
once for the scales and once for the numbers. GPTQ's int4 matrices are an exception: they are
transposed, one at a time. The result is written to DST.partial. If the conversion is interrupted,
running the same command again keeps the finished shards and converts the others.

If SRC is a repo id, the configs and the headers of all shards are read first. The headers contain
shapes and dtypes, which the index file lacks, so all faults are known before anything is written.
Each shard is downloaded while the previous one is converted. Each output file contains tensors from
a single source file, so a source shard can be deleted (`--delete-source-shards`) as soon as the
next one is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from ovis_jax.checkpoint.checksums import get_published_sha256, verify_sha256
from ovis_jax.checkpoint.conversion_record import (
    CONVERSION_FILE,
    is_converted,
    make_conversion_record,
    read_quantization,
)
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.gptq import CONSTANT_REASON
from ovis_jax.checkpoint.key_map import MatchedTensors
from ovis_jax.checkpoint.output_dirs import check_disk_space, require_empty, resumable_dir
from ovis_jax.checkpoint.params import (
    check_values,
    files_with_checked_values,
    match_checkpoint,
    resolve_quantization,
)
from ovis_jax.checkpoint.resolve import (
    BUNDLED,
    ResolvedCheckpoint,
    find_processor_files,
    resolve_checkpoint,
)
from ovis_jax.checkpoint.safetensors_reader import DTYPES, SafetensorsHeader, TensorInfo
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    TensorSpecs,
    plan_shards,
    select_unfinished,
    total_bytes,
    write_shards,
)
from ovis_jax.checkpoint.tensor_index import read_header_if_present
from ovis_jax.config import OvisConfig
from ovis_jax.console import Dtype, QuantizationOption, print_table
from ovis_jax.conversion.input_fingerprint import check_unchanged, copy_small_files, describe_inputs
from ovis_jax.conversion.progress import (
    ProgressCallback,
    exit_on_interrupt,
    progress_bar,
    report_progress,
)
from ovis_jax.conversion.tensor_chunks import (
    read_cast_chunks,
    read_quantized_chunks,
    read_repacked_chunks,
    read_scale_chunks,
)
from ovis_jax.errors import OvisError, count_noun
from ovis_jax.quantization import (
    Quantization,
    describe_formats,
    scale_path,
    stored_specs,
    stored_tensors,
)
from ovis_jax.sharding import param_shapes


@dataclass(frozen=True)
class ConversionPlan:
    """The complete plan for a conversion, computed from the headers and configs alone.

    Attributes:
      checkpoint: The source checkpoint.
      config: Config of the model.
      headers: Headers of the source files, by path.
      matched: The source tensors, each matched with a parameter.
      source_names: Names of the source tensors in `matched`, by name in the result, in file order.
        The numbers and the scales of a quantized matrix have the same source.
      dtype: Dtype of the tensors in the result that are not quantized: "F32", "F16" or "BF16".
      stored: The quantization of a source that GPTQ quantized; None for any other source.
      quantization: The quantization of the result; None if the result is not quantized.
      processor_files: Names of the files to copy.
    """

    checkpoint: ResolvedCheckpoint
    config: OvisConfig
    headers: Mapping[Path, SafetensorsHeader]
    matched: MatchedTensors
    source_names: Mapping[str, str]
    dtype: str
    stored: Quantization | None
    quantization: Quantization | None
    processor_files: tuple[str, ...]

    @cached_property
    def tensors(self) -> TensorSpecs:
        """Dtypes and shapes of the tensors in the result, in the order of the source files."""
        specs = stored_specs(self.config, self.quantization, self.dtype)
        return {name: specs[name] for name in self.source_names}

    @property
    def unused(self) -> list[tuple[TensorInfo, str]]:
        """The source tensors that are not part of the result, each with the reason."""
        used = {*self.source_names.values()}
        constants = [info for name, info in self.matched.sources.items() if name not in used]
        return [*((info, CONSTANT_REASON) for info in constants), *self.matched.unused_found]

    def source_of(self, name: str) -> TensorInfo:
        """Return the source of a tensor in the result."""
        return self.matched.sources[self.source_names[name]]

    def read_tensor(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in the result, in chunks."""
        info, path, (dtype, _) = self.source_of(name), self.source_names[name], self.tensors[name]
        if dtype in DTYPES and path == name:
            return read_cast_chunks(info, dtype)
        if self.stored is not None:
            return read_repacked_chunks(info)
        read = read_quantized_chunks if path == name else read_scale_chunks
        return read(info, cast(Quantization, self.quantization).group_of(path))

    def plan_shards(self, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
        """Return the names of the tensors in each output file."""
        source_files = {name: self.source_of(name).path for name in self.source_names}
        return plan_shards(self.tensors, max_shard_bytes, source_files)


def plan_conversion(
    src: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> ConversionPlan:
    """Read the configs and headers of a source and match all tensors; nothing is written.

    If the source is a repo id, only the configs and headers are downloaded.

    Args:
      src: A folder in the Hub's layout, the name of a bundled checkpoint, or a repo id.
      revision: Branch, tag or commit of a repo id.
      dtype: Dtype to cast to: "float32", "bfloat16" or "float16"; None for no cast.
      quantization: "int8" or "int4" to quantize the matrices; None to keep them as they are stored.

    Raises:
      ConfigError: A config or tokenizer file is missing or not supported.
      CheckpointError: The tensors do not match the config; the error lists all faults.
      OvisError: The source does not exist, it is already converted or quantized, or `dtype` or
        `quantization` is not supported.
      OSError: A file cannot be read or downloaded.
    """
    checkpoint = resolve_checkpoint(src, revision, weights=False)
    folder = checkpoint.folder
    config = OvisConfig.from_folder(folder)
    processor_files = find_processor_files(folder)
    if is_converted(folder):
        found = read_quantization(folder)
        quantized = "" if found is None else f" and quantized to {found}"
        hidden = f"; it hides the bundled checkpoint {src}" if str(src) in BUNDLED else ""
        raise OvisError(
            f"the folder {folder} is already converted{quantized}; give the checkpoint that it was"
            f" made from{hidden}"
        )
    stored, wanted = resolve_quantization(folder, config, quantization)
    headers: dict[Path, SafetensorsHeader] = {}

    def read_header(path: Path) -> SafetensorsHeader | None:
        if checkpoint.revision is None:
            header = read_header_if_present(path)
        else:
            from ovis_jax.checkpoint.hub import read_remote_header

            header = read_remote_header(checkpoint.name, checkpoint.revision, folder, path)
        if header is not None:
            headers[path] = header
        return header

    matched, target = match_checkpoint(folder, config, dtype, read_header)
    sources = {scale_path(path): path for path in matched.sources}
    sources |= {path: path for path in matched.sources}
    names = {name: sources[name] for name in stored_tensors(config, wanted)}
    ordered = dict(sorted(names.items(), key=lambda item: matched.sources[item[1]].path))
    return ConversionPlan(
        checkpoint,
        config,
        headers,
        matched,
        ordered,
        target,
        stored,
        wanted,
        tuple(processor_files),
    )


def convert_from_hf(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    progress: ProgressCallback | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    checksums: bool = True,
    verify: bool = False,
    delete_source_shards: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint from the Hub's layout; `dst` appears only when it is complete.

    Args:
      src: A folder in the Hub's layout, the name of a bundled checkpoint, or a repo id.
      dst: Folder to create; it must either not exist or be empty. An interrupted conversion in
        `dst`.partial is resumed.
      revision: Branch, tag or commit of a repo id.
      dtype: Dtype to cast every tensor to: "float32", "bfloat16" or "float16"; None for no cast.
        Matrices are quantized from their stored numbers.
      quantization: "int8" or "int4" to quantize the matrices; None to keep them as they are stored.
      progress: Called after every chunk with the progress.
      max_shard_bytes: Maximum size of the tensors in one file, in bytes.
      checksums: Whether to record the SHA-256 of every shard in conversion.json.
      verify: Whether to check the source against the SHA-256 checksums on the Hub, and the result
        against those in conversion.json.
      delete_source_shards: Whether to delete each downloaded shard from the Hub's cache once its
        tensors are converted. At most two source shards are then on the disk at a time.

    Returns:
      The content of conversion.json.

    Raises:
      OvisError: The arguments are invalid, as in `plan_conversion`, `dst` is not empty, another
        process is writing it, or `dst`.partial was started with different inputs.
      CheckpointError: A source file changed while it was read, or a checksum does not match.
      DownloadValidationError: A downloaded shard has faults or the wrong checksum; `dst`.partial is
        kept.
      OSError: A file cannot be read or written, or a disk has too little space.
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
    plan = plan_conversion(src, revision=revision, dtype=dtype, quantization=quantization)
    checkpoint, sources = plan.checkpoint, plan.matched.sources
    if checkpoint.revision is not None:
        _download_and_check_values(checkpoint, plan.matched)
    published = get_published_sha256(checkpoint) if verify else None
    if published is not None and checkpoint.revision is None:
        verify_sha256(checkpoint.folder, published)
    origin = None
    if checkpoint.revision is not None:
        # Finished shards are not checked again, so --verify must not be added when resuming.
        given = "given" if verify else "left out"
        origin = {"repo": checkpoint.name, "revision": checkpoint.revision, "--verify": given}
    options = max_shard_bytes, checksums, plan.quantization and asdict(plan.quantization)
    inputs = describe_inputs(sources, plan.tensors, *options, origin=origin)
    shards = plan.plan_shards(max_shard_bytes)
    with resumable_dir(dst, inputs) as output:
        unfinished = select_unfinished(plan.tensors, shards, output.finished)
        with _provide_shards(
            plan, dst, unfinished, published, delete_used=delete_source_shards
        ) as wait_for_shard:

            def read_tensor(name: str) -> Iterator[memoryview]:
                wait_for_shard(plan.source_of(name).path)
                return plan.read_tensor(name)

            total = total_bytes(plan.tensors)
            sha256 = write_shards(
                output.path,
                plan.tensors,
                report_progress(read_tensor, progress, total - total_bytes(unfinished), total),
                shards,
                checksums=checksums,
                resumable=output,
            )
            dtype_change = None if dtype is None and plan.stored is None else plan.dtype
            copy_small_files(checkpoint.folder, output.path, plan.processor_files, dtype_change)
            record = make_conversion_record(
                plan.config,
                plan.tensors,
                sha256,
                plan.dtype,
                plan.quantization,
                source={"name": checkpoint.name, "revision": checkpoint.revision},
                source_keys=len(sources) + len(plan.matched.unused_found),
                not_used={info.key: reason for info, reason in plan.unused},
                not_used_and_absent=list(plan.matched.unused_missing),
            )
            write_json(output.path / CONVERSION_FILE, record)
            check_unchanged(inputs.get("sources", {}))
            if verify:
                verify_sha256(output.path, sha256)
    return record


def _download_and_check_values(checkpoint: ResolvedCheckpoint, matched: MatchedTensors) -> None:
    """Download the shards of a repo id that contain known numbers, and check these numbers.

    Raises:
      CheckpointError, OvisError, OSError: As in `check_values` and `download_file`.
    """
    from ovis_jax.checkpoint.hub import download_file

    for path in files_with_checked_values(matched):
        name = path.relative_to(checkpoint.folder).as_posix()
        download_file(checkpoint.name, str(checkpoint.revision), name)
    check_values(matched)


def _is_local(src: str | Path) -> bool:
    """Return whether the source is local, so that nothing is downloaded."""
    return Path(src).exists() or str(src) in BUNDLED


def _provide_shards(
    plan: ConversionPlan,
    dst: Path,
    unfinished: TensorSpecs,
    published: Mapping[str, str] | None,
    *,
    delete_used: bool,
) -> AbstractContextManager[Callable[[Path], None]]:
    """Check the disk space, and return a context manager that downloads the source shards.

    The context manager yields a function that waits for a shard. For a local source, this function
    returns immediately.
    """
    if plan.checkpoint.revision is None:
        check_disk_space(dst, total_bytes(unfinished))
        return nullcontext(lambda path: None)
    # Imported here because huggingface_hub is slow to import.
    from ovis_jax.checkpoint.hub import delete_from_cache
    from ovis_jax.conversion.shard_downloads import ShardDownloader, check_download_space

    needed = list(dict.fromkeys(plan.source_of(name).path for name in unfinished))
    if delete_used:
        for path in plan.headers.keys() - {*needed}:
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


def print_conversion_plan(console: Console, plan: ConversionPlan) -> None:
    """Print each source tensor with its parameter or the reason why it is unused, then totals."""
    tensors, unused = plan.tensors, plan.unused
    used = {path: plan.matched.sources[path] for path in plan.source_names.values()}
    quantized = {"I8": " as int8", "U8": " as int4"}
    rows = [(info, path + quantized.get(tensors[path][0], "")) for path, info in used.items()]
    rows += [(info, f"not used: {reason}") for info, reason in unused]
    table = [(info.key, str(list(info.shape)), info.dtype, target) for info, target in rows]
    absent = [
        (key, "", "", "not used, and not in the files") for key in plan.matched.unused_missing
    ]
    print_table(console, ["source key", "shape", "dtype", "parameter"], table + absent)
    formats = describe_formats(plan.quantization, DTYPES[plan.dtype].name)
    console.print(
        f"{count_noun(len(rows), 'source key')}, {len(unused)} of them not used;"
        f" {count_noun(len(param_shapes(plan.config)), 'parameter')},"
        f" {total_bytes(tensors):,} bytes as {formats} in"
        f" {count_noun(len(plan.plan_shards()), 'shard')}; dry run: nothing was written",
        soft_wrap=True,
    )


def convert(
    src: Annotated[
        str, typer.Argument(help="Folder in the Hub's layout, a repo id, or ovis-tiny.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to create; if it exists, it must be empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to cast every tensor to.")] = None,
    quantization: QuantizationOption = None,
    checksums: Annotated[
        bool, typer.Option(help="Record the SHA-256 of every shard in conversion.json.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check the source against the published SHA-256, and check the written result.",
        ),
    ] = False,
    delete_source_shards: Annotated[
        bool,
        typer.Option(
            "--delete-source-shards",
            help="Delete each downloaded shard from the Hub's cache once it is converted.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
) -> None:
    """Convert an Ovis1.6 checkpoint from the Hub's layout to that of ovis_jax."""
    if dry_run:
        require_empty(dst)
        plan = plan_conversion(src, revision=revision, dtype=dtype, quantization=quantization)
        print_conversion_plan(Console(), plan)
        return
    # For a repo id, huggingface_hub shows progress bars for the downloads, which take longer.
    with exit_on_interrupt(dst), progress_bar("converting", visible=_is_local(src)) as progress:
        record = convert_from_hf(
            src,
            dst,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            progress=progress,
            checksums=checksums,
            verify=verify,
            delete_source_shards=delete_source_shards,
        )
    shards = count_noun(len(list(dst.glob("*.safetensors"))), "shard")
    formats = describe_formats(read_quantization(dst), record["dtype"])
    Console().print(
        f"{dst}: {count_noun(record['source_keys'], 'source key')}, {record['parameters']:,}"
        f" parameters as {formats} in {shards}",
        soft_wrap=True,
    )
