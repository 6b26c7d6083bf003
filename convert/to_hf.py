"""This library -> Hub layout: `python -m convert.to_hf SRC DST`.

The inverse of `convert.from_hf`: tensors get their names of the Hub back and are never reshaped, so
that this is a stream too. With `--lora ADAPTERS` it writes a PEFT adapter instead, and with
`--merge` the checkpoint with the adapters added into their matrices. Exit codes: 0 done, 1 the
checkpoint is wrong, 2 usage, 3 input or output, 4 interrupted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from convert.exits import exits
from convert.peft import export_adapters
from convert.report import progress_bar
from convert.transfer import (
    OnProgress,
    check_unchanged,
    copy_small_files,
    counted,
    file_facts,
    merged_pieces,
    pieces,
    result_facts,
)
from ovis_jax.checkpoint.adapters import Adapters, load_adapters
from ovis_jax.checkpoint.folder import ADVICE, locate, open_checkpoint
from ovis_jax.checkpoint.journal import left_behind, unfinished
from ovis_jax.checkpoint.keymap import UNUSED, hub_keys, unused_shapes
from ovis_jax.checkpoint.params import is_converted, plan_parameters
from ovis_jax.checkpoint.problems import CheckpointProblems, Problem
from ovis_jax.checkpoint.safetensors_files import CHUNK, DTYPES, TensorEntry
from ovis_jax.checkpoint.source import TOKENIZER_FILES
from ovis_jax.checkpoint.writer import (
    CONVERSION_FILE,
    MAX_SHARD_BYTES,
    Tensors,
    check_destination,
    check_space,
    tensor_bytes,
    write_tensors,
)
from ovis_jax.config import OvisConfig
from ovis_jax.console import Dtype
from ovis_jax.errors import ConfigError, OvisError

_METADATA = {"format": "pt"}  # transformers takes no file whose header does not say so


@dataclass(frozen=True)
class _Export:
    """All that will be written, known from headers and configs alone, by the Hub's keys.

    A tensor that is not in `entries` is written as zeros. `paths` are our names of the parameters,
    and `adapters` are to be added into theirs.
    """

    entries: dict[str, TensorEntry]
    paths: Mapping[str, str]
    adapters: Adapters | None
    tensors: Tensors
    dtype: str
    files: tuple[str, ...]


def export(
    src: str | Path,
    dst: str | Path,
    *,
    source: str | Path | None = None,
    merge: str | Path | None = None,
    dtype: str | None = None,
    progress: OnProgress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a converted folder in the Hub's layout; `dst` appears when it is complete.

    The tensors that the model never uses are not in a converted folder: they come from `source`, a
    folder in the Hub's layout, or are zeros. `dtype` ("float32", "bfloat16", "float16") casts every
    tensor; otherwise the parameters stay as they are and only those of `source` are cast to match.
    The low-rank adapters of the folder `merge` are added into their matrices in float32, one whole
    matrix at a time in memory; `src` may then be in the Hub's layout, and without a `source` those
    never used that it has are kept.
    What an interrupted export has left in `dst`.partial is kept as far as it is sound. Returns how
    many tensors were written.

    Raises:
      ConfigError: a config is missing or not supported.
      CheckpointError: the tensors of `src` are not those of its config, or those never used are
        not in `source` as they should be, or `merge` belongs to another config; with a row for
        every fault.
      OvisError: `src` is not a converted folder, `merge` holds no adapters, `source` is not in the
        Hub's layout, `dtype` is not one of the three, `dst` exists and is not an empty folder,
        another process is writing it, or `dst`.partial was begun with something else.
      OSError: a file cannot be read or written, or the disk is too small.
    """
    src, dst = Path(src), Path(dst)
    check_destination(dst)
    plan = _prepare(src, None if source is None else Path(source), merge, dtype)
    total = sum(tensor_bytes(*tensor) for tensor in plan.tensors.values())
    merged = None if merge is None else file_facts(Path(merge).iterdir())
    facts = result_facts(plan.entries, plan.tensors, max_shard_bytes, merged)

    def chunks(key: str) -> Iterator[memoryview]:
        if key not in plan.entries:
            return _zeros(tensor_bytes(*plan.tensors[key]))
        entry, added, path = plan.entries[key], plan.adapters, plan.paths.get(key)
        if added is not None and f"{path}/a" in added.halves:
            a, b = added.halves[f"{path}/a"], added.halves[f"{path}/b"]
            return merged_pieces(entry, a, b, added.scale, plan.dtype)
        return pieces(entry, plan.dtype)

    check_space(dst, total - left_behind(dst))
    with unfinished(dst, facts, checksums=False) as (partial, journal):
        stream = counted(chunks, total, progress, journal)
        write_tensors(partial, plan.tensors, stream, max_shard_bytes, _METADATA, journal)
        copy_small_files(src, partial, plan.files, None if dtype is None else plan.dtype)
        check_unchanged(facts["sources"])
    return len(plan.tensors)


def _prepare(
    src: Path, source: Path | None, merge: str | Path | None, dtype: str | None
) -> _Export:
    if not src.is_dir():
        raise OvisError(f"{src} is not a folder; give one that convert.from_hf has made")
    in_hub_layout = not is_converted(src)
    if in_hub_layout and merge is None:
        raise OvisError(
            f"{src} holds no {CONVERSION_FILE}, so it is not a converted folder: one in the Hub's"
            " layout needs no export; give a folder that convert.from_hf or save_params has made"
        )
    config = OvisConfig.from_folder(src)
    files = _files_there(src)
    plan, target = plan_parameters(src, config, dtype)
    adapters = None if merge is None else load_adapters(merge, config)
    paths = hub_keys(config).parameters
    keys = {path: key for key, path in paths.items()}
    entries = {keys[path]: entry for path, entry in plan.sources.items()}
    tensors = {key: (target, entry.shape) for key, entry in entries.items()}
    tensors |= {key: (target, shape) for key, shape in unused_shapes(config).items()}
    if source is not None:
        entries |= _unused_tensors(source, config)
    elif in_hub_layout:
        entries |= _unused_tensors(src, config, own=True)
    return _Export(entries, paths, adapters, tensors, target, files)


def _files_there(folder: Path) -> tuple[str, ...]:
    """Those of the preprocessor's and tokenizer's files that there are; save_params needs none."""
    names = ("preprocessor_config.json", *TOKENIZER_FILES)
    found = tuple(name for name in names if (folder / name).is_file())
    for name in found:
        if locate(folder, name) is None:
            raise ConfigError(
                f"{folder}: {name} is a link that leads out of the folder; put the file there"
            )
    return found


def _unused_tensors(
    folder: Path, config: OvisConfig, *, own: bool = False
) -> dict[str, TensorEntry]:
    """The never-used tensors of a folder in the Hub's layout, held to the shapes of a config.

    All of `--source`; or of `src`, its `own`, those that there are.
    """
    if not folder.is_dir() or is_converted(folder):
        what = "a converted folder, which lacks them" if folder.is_dir() else "not a folder"
        raise OvisError(
            f"--source {folder} is {what}; give the folder in the Hub's layout that holds the"
            " tensors that the model never uses, or leave it out to have zeros written"
        )
    listing = open_checkpoint(folder)
    problems = list(listing.problems)
    found: dict[str, TensorEntry] = {}
    for entry in listing.tensors:
        if entry.key in UNUSED and entry.key in found:
            names = f"{found[entry.key].path.name}, {entry.path.name}"
            problems.append(Problem(names, entry.key, "in two files", "one tensor", "2"))
        found[entry.key] = entry
    for key, shape in unused_shapes(config).items():
        entry = found.get(key)
        if entry is None:
            if not own and key not in listing.unusable:
                file, expected = listing.index.get(key, "-"), str(list(shape))
                problems.append(Problem(file, key, "missing key", expected, "no such tensor"))
            continue
        name = entry.path.name
        if entry.shape != shape:
            expected, wrong = str(list(shape)), str(list(entry.shape))
            problems.append(Problem(name, key, "wrong shape", expected, wrong))
        if entry.dtype not in DTYPES:
            expected = "one of " + ", ".join(DTYPES)
            problems.append(Problem(name, key, "wrong dtype", expected, entry.dtype))
    if problems:
        if own:
            raise CheckpointProblems(str(folder), problems, ADVICE)
        advice = f"{ADVICE}, or leave out --source to have zeros written"
        raise CheckpointProblems(f"--source {folder}", problems, advice)
    return {key: found[key] for key in UNUSED if key in found}


def _zeros(size: int) -> Iterator[memoryview]:
    return (memoryview(bytes(min(CHUNK, size - start))) for start in range(0, size, CHUNK))


def command(
    src: Annotated[Path, typer.Argument(help="A folder made by convert.from_hf or save_params.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it must not hold anything.")],
    source: Annotated[
        Path | None,
        typer.Option(help="A folder in the Hub's layout to copy the never-used tensors from."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast every tensor.")] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="A folder of low-rank adapters of SRC, to write as a PEFT adapter."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the checkpoint with the adapters added in.")
    ] = False,
) -> None:
    """Write a converted Ovis1.6-Gemma2 checkpoint in the Hub's layout, or its adapters for PEFT."""
    with exits(dst) as errors:
        if merge and lora is None:
            raise OvisError("--merge needs --lora ADAPTERS, the folder to merge")
        if lora is not None and not merge:
            if source is not None:
                raise OvisError("--source is for a whole checkpoint: leave it out, or add --merge")
            record = export_adapters(src, dst, lora, dtype=dtype or "float32")
            matrices, base = len(record["target_modules"]), record["base_model_name_or_path"]
            what = f"a PEFT adapter of rank {record['r']} on {matrices} matrices of {base}"
            Console().print(f"{dst}: {what}", soft_wrap=True)
            return
        with progress_bar(errors, "exporting") as show:
            count = export(src, dst, source=source, merge=lora, dtype=dtype, progress=show)
        told = f"{dst}: {count} tensors; {_origin(src, source)}"
        if lora is not None:
            told += f"; the adapters of {lora} were merged"
        Console().print(told, soft_wrap=True)


def _origin(src: Path, source: Path | None) -> str:
    """Where the tensors that the model never uses came from, in words."""
    total, folder = len(UNUSED), source if source or is_converted(src) else src
    there = set() if folder is None else {entry.key for entry in open_checkpoint(folder).tensors}
    copied = len(UNUSED.keys() & there)
    if not copied:
        return f"the {total} that the model never uses are zeros"
    if copied == total:
        return f"the {total} that the model never uses were copied from {folder}"
    return (
        f"of the {total} that the model never uses {copied} were copied from {folder}, and"
        f" {total - copied} that it lacks are zeros"
    )


def main() -> None:
    """Run the command line."""
    typer.run(command)


if __name__ == "__main__":
    main()
