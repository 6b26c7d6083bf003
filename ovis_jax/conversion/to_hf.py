"""Exporting a converted checkpoint to the Hub's layout: `ovis-jax export SRC DST`.

An export is the inverse of `convert`: it renames tensors back to their keys on the Hub. Tensors are
never reshaped, so they are also processed as a stream. With `--adapters DIR`, the export writes a
PEFT adapter instead. With `--merge` in addition, it writes the checkpoint with the adapters merged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.checkpoint.adapters import LoraAdapters, load_adapters
from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE, is_converted
from ovis_jax.checkpoint.key_map import (
    UNUSED_HUB_KEYS,
    find_tensor_problems,
    make_hub_key_map,
    unused_tensor_shapes,
)
from ovis_jax.checkpoint.output_dirs import check_disk_space, require_empty, resumable_dir
from ovis_jax.checkpoint.params import match_checkpoint, read_stored_quantization
from ovis_jax.checkpoint.resolve import (
    TOKENIZER_FILES,
    ResolvedCheckpoint,
    find_folder_or_bundled_checkpoint,
)
from ovis_jax.checkpoint.safetensors_reader import TensorInfo
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    TensorSpecs,
    count_bytes,
    plan_shards,
    select_unfinished,
    total_bytes,
    write_shards,
)
from ovis_jax.checkpoint.tensor_index import DOWNLOAD_ADVICE, read_tensor_index
from ovis_jax.config import OvisConfig
from ovis_jax.console import Dtype
from ovis_jax.conversion.input_fingerprint import (
    check_unchanged,
    copy_small_files,
    describe_inputs,
    read_file_stats,
)
from ovis_jax.conversion.peft_export import export_peft_adapter
from ovis_jax.conversion.progress import (
    ProgressCallback,
    exit_on_interrupt,
    progress_bar,
    report_progress,
)
from ovis_jax.conversion.tensor_chunks import read_cast_chunks, read_merged_chunks, zero_chunks
from ovis_jax.errors import OvisError, count_noun
from ovis_jax.sharding import axis_letter_sizes

_METADATA = {"format": "pt"}  # transformers rejects files without it


@dataclass(frozen=True)
class _ExportPlan:
    """The tensors that an export writes, by key on the Hub; computed from headers and configs.

    A tensor that is not in `sources` is written as zeros. `paths` maps keys to parameter paths.
    """

    sources: dict[str, TensorInfo]
    paths: Mapping[str, str]
    adapters: LoraAdapters | None
    tensors: TensorSpecs
    dtype: str
    files: tuple[str, ...]

    def read_tensor(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of an output tensor in chunks."""
        if key not in self.sources:
            return zero_chunks(count_bytes(*self.tensors[key]))
        info, adapters, path = self.sources[key], self.adapters, self.paths.get(key)
        if adapters is None or f"{path}/lora_a" not in adapters.weights:
            return read_cast_chunks(info, self.dtype)
        a, b = adapters.weights[f"{path}/lora_a"], adapters.weights[f"{path}/lora_b"]
        return read_merged_chunks(info, a, b, adapters.scale, self.dtype)


def export_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    source: str | Path | None = None,
    merge: str | Path | None = None,
    dtype: str | None = None,
    progress: ProgressCallback | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[int, int]:
    """Write a converted checkpoint in the Hub's layout; `dst` appears only when it is complete.

    A converted folder lacks the tensors that the model never uses. The export copies them from
    `source` or, without `source`, writes zeros. If `src` is in the Hub's layout, as is possible
    with `merge`, and there is no `source`, the never-used tensors of `src` are kept.

    Args:
      src: A converted folder; with `merge` also a folder in the Hub's layout or the name of a
        bundled checkpoint.
      dst: Folder to create; it must either not exist or be empty. An interrupted export in
        `dst`.partial is resumed.
      source: Folder in the Hub's layout, or name of a bundled checkpoint, from which the never-used
        tensors are copied. They are cast to the dtype of the result.
      merge: Folder of LoRA adapters to merge. They are merged in float32, one matrix at a time.
      dtype: Dtype to cast every tensor to: "float32", "bfloat16" or "float16"; None for no cast.
      progress: Called after every chunk with the progress.
      max_shard_bytes: Maximum size of the tensors in one file, in bytes.

    Returns:
      The number of tensors, and the number of never-used tensors that were copied instead of
      written as zeros.

    Raises:
      ConfigError: A config is missing or not supported.
      CheckpointError: The tensors in `src` do not match its config, a never-used tensor is missing
        from `source`, or the adapters belong to a model with a different config. The error lists
        all faults.
      OvisError: `src` is not a converted folder or is quantized, `merge` contains no adapters,
        `source` is not in the Hub's layout, `dtype` is not supported, `dst` is not empty, another
        process is writing it, or `dst`.partial was started with different inputs.
      OSError: A file cannot be read or written, or the disk has too little space.
    """
    dst = Path(dst)
    require_empty(dst)
    checkpoint = find_folder_or_bundled_checkpoint(
        src, "give one that ovis-jax convert has written"
    )
    plan = _plan_export(checkpoint, source, merge, dtype)
    adapter_stats = None if merge is None else read_file_stats(Path(merge).iterdir())
    inputs = describe_inputs(plan.sources, plan.tensors, max_shard_bytes, adapter_stats)
    shards = plan_shards(plan.tensors, max_shard_bytes)
    with resumable_dir(dst, inputs) as output:
        unfinished = total_bytes(select_unfinished(plan.tensors, shards, output.finished))
        check_disk_space(dst, unfinished)
        total = total_bytes(plan.tensors)
        write_shards(
            output.path,
            plan.tensors,
            report_progress(plan.read_tensor, progress, total - unfinished, total),
            shards,
            metadata=_METADATA,
            checksums=False,
            resumable=output,
        )
        dtype_change = None if dtype is None else plan.dtype
        copy_small_files(checkpoint.folder, output.path, plan.files, dtype_change)
        check_unchanged(inputs["sources"])
    return len(plan.tensors), len(UNUSED_HUB_KEYS.keys() & plan.sources.keys())


def _plan_export(
    checkpoint: ResolvedCheckpoint,
    source: str | Path | None,
    merge: str | Path | None,
    dtype: str | None,
) -> _ExportPlan:
    src = checkpoint.folder
    in_hub_layout = not is_converted(src)
    if in_hub_layout and merge is None:
        raise OvisError(
            f"{checkpoint.label} has no {CONVERSION_FILE}, so it is not a converted folder: one in"
            " the Hub's layout needs no export; give a folder that ovis-jax convert or save_params"
            " has written"
        )
    if (quantization := read_stored_quantization(src)) is not None:
        merging = ", or keep the adapters separate" if merge is not None else ""
        raise OvisError(
            f"{checkpoint.label} is quantized to {quantization}: the numbers from before the"
            " rounding cannot be restored; give the checkpoint that it was made from, or one that"
            f" was converted without --quantization{merging}"
        )
    config = OvisConfig.from_folder(src)
    files = _find_small_files(src)
    matched, target = match_checkpoint(src, config, dtype)
    adapters = None if merge is None else load_adapters(merge, config)
    paths = make_hub_key_map(config).parameters
    keys = {path: key for key, path in paths.items()}
    sources = {keys[path]: info for path, info in matched.sources.items()}
    tensors = {key: (target, info.shape) for key, info in sources.items()}
    tensors |= {key: (target, shape) for key, shape in unused_tensor_shapes(config).items()}
    if source is not None:
        folder = _find_source_folder(source)
        sources |= _find_unused_tensors(folder, config, f"--source {source}")
    elif in_hub_layout:
        sources |= _find_unused_tensors(src, config)
    return _ExportPlan(sources, paths, adapters, tensors, target, files)


def _find_small_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the processor files in a folder; `save_params` may have written none."""
    names = ("preprocessor_config.json", *TOKENIZER_FILES)
    return tuple(name for name in names if (folder / name).is_file())


def _find_source_folder(source: str | Path) -> Path:
    """Return the folder that `--source` names, after checking that it is in the Hub's layout."""
    advice = (
        "--source is a folder in the Hub's layout with the tensors that the model never uses; leave"
        " it out to write zeros"
    )
    folder = find_folder_or_bundled_checkpoint(source, advice).folder
    if is_converted(folder):
        raise OvisError(f"{source} is a converted folder, which lacks them; {advice}")
    return folder


def _find_unused_tensors(
    folder: Path, config: OvisConfig, required_by: str | None = None
) -> dict[str, TensorInfo]:
    """Find the never-used tensors in a folder in the Hub's layout, and check their shapes.

    If `required_by`, the option that names the folder, is given, all of these tensors must exist.
    """
    index = read_tensor_index(folder)
    problems = list(index.problems)
    found: dict[str, TensorInfo] = {}

    def report(file: str, key: str, problem: str, expected: str, wrong: str) -> None:
        problems.append(CheckpointProblem(file, key, problem, expected, wrong))

    for info in index.tensors:
        if info.key in UNUSED_HUB_KEYS and info.key in found:
            names = f"{found[info.key].path.name}, {info.path.name}"
            report(names, info.key, "in two files", "one tensor", "2")
        found[info.key] = info
    sizes = axis_letter_sizes(config, "vision/")
    for key, (axes, _) in UNUSED_HUB_KEYS.items():
        if key in found:
            problems += find_tensor_problems(found[key], axes, sizes, None)
        elif required_by is not None and key not in index.unusable_keys:
            expected = str(list(unused_tensor_shapes(config)[key]))
            report(index.weight_map.get(key, "-"), key, "missing key", expected, "no such tensor")
    if problems:
        advice = f"{DOWNLOAD_ADVICE}, or leave out --source to write zeros"
        if required_by is None:
            advice = DOWNLOAD_ADVICE
        raise CheckpointValidationError(required_by or str(folder), problems, advice)
    return {key: found[key] for key in UNUSED_HUB_KEYS if key in found}


def export(
    src: Annotated[str, typer.Argument(help="Folder written by ovis-jax convert or save_params.")],
    dst: Annotated[Path, typer.Argument(help="Folder to create; if it exists, it must be empty.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="Folder in the Hub's layout from which to copy tensors that the model never uses."
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to cast every tensor to.")] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of LoRA adapters for SRC; they are written as a PEFT adapter."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapters, and write the full checkpoint.")
    ] = False,
) -> None:
    """Export a converted checkpoint to the Hub's layout, or its adapters to PEFT."""
    if merge and adapters is None:
        raise OvisError("--merge needs --adapters DIR, the adapters to merge")
    if adapters is not None and not merge:
        if source is not None:
            raise OvisError("--source is for a whole checkpoint: leave it out, or add --merge")
        record = export_peft_adapter(src, dst, adapters, dtype=dtype or "float32")
        count, base = len(record["target_modules"]), record["base_model_name_or_path"]
        matrices = "1 matrix" if count == 1 else f"{count} matrices"
        summary = f"PEFT adapter of rank {record['r']} for {matrices} of {base}"
    else:
        with exit_on_interrupt(dst), progress_bar("exporting") as progress:
            count, copied = export_to_hf(
                src, dst, source=source, merge=adapters, dtype=dtype, progress=progress
            )
        origins = [f"{copied} copied from {source or src}"] if copied else []
        if zeros := len(UNUSED_HUB_KEYS) - copied:
            origins.append(f"{zeros} written as zeros")
        unused = f"tensors that the model never uses: {', '.join(origins)}"
        summary = f"{count_noun(count, 'tensor')}; {unused}"
        if adapters is not None:
            summary += f"; the adapters of {adapters} were merged"
    Console().print(f"{dst}: {summary}", soft_wrap=True)
