"""A folder of safetensors files: which tensors it holds, where, and what is wrong with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ovis_jax.checkpoint.problems import CheckpointProblems, Problem
from ovis_jax.checkpoint.safetensors_files import Header, TensorEntry, read_header
from ovis_jax.errors import CheckpointError, ConfigError
from ovis_jax.fields import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADVICE = "fetch or write the checkpoint again"


@dataclass(frozen=True)
class CheckpointFolder:
    """The tensors of a folder; `account` tells whether they are those of a model.

    `index` is the index file's key -> file name (empty for a single file); `unusable` are the keys
    whose place in a file is known to be broken; `problems` are the rows about files and headers.
    """

    folder: Path
    tensors: tuple[TensorEntry, ...]
    index: Mapping[str, str]
    unusable: frozenset[str]
    problems: tuple[Problem, ...]


ReadHeader = Callable[[Path], Header | None]
"""The header of a file, or None where there is no such file."""


def header_there(path: Path) -> Header | None:
    """The header of a file on this machine.

    Raises:
      OSError: the file cannot be opened or read.
    """
    return read_header(path) if path.is_file() else None


def open_checkpoint(folder: Path, read: ReadHeader = header_there) -> CheckpointFolder:
    """Read the index and every header of a folder; no tensor is read.

    `read` gives the headers: those of files that are not there yet may come from elsewhere.

    Raises:
      CheckpointError: no weights in the folder, an index that cannot be read, or a single file
        whose header cannot. All other faults become rows of `problems`.
      OSError: a file cannot be opened or read.
    """
    single, index_path = folder / SINGLE_FILE, folder / INDEX_FILE
    index = _read_index(index_path) if index_path.exists() else {}
    names = sorted(set(index.values())) or [SINGLE_FILE]
    tensors: list[TensorEntry] = []
    problems: list[Problem] = []
    unusable: set[str] = set()
    if index and SINGLE_FILE not in names and single.exists():
        found = f"{INDEX_FILE} of other files beside it"
        problems.append(Problem(SINGLE_FILE, "", "two checkpoints", "one of the two", found))
    for name in names:
        indexed = {key for key, file in index.items() if file == name}
        path = locate(folder, name)
        if path is None:
            found = "a path that leaves it"
            problems.append(Problem(name, "", "refused file", "a file inside the folder", found))
        elif (header := read(path)) is None:
            if not index:
                raise CheckpointError(
                    f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a folder that"
                    " holds the weights"
                )
            problems.append(Problem(name, "", "missing file", "a file", "none of that name"))
        else:
            tensors += header.tensors
            problems += header.problems
            unusable |= header.unusable
            if header.readable:
                continue
            if not index:
                raise CheckpointProblems(str(folder), problems, ADVICE)
        unusable |= indexed
    return CheckpointFolder(folder, tuple(tensors), index, frozenset(unusable), tuple(problems))


def locate(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, or None where the name or a link leads out of it.

    The cache of the Hub is a folder of links into its own `blobs`, which is let through, and these
    may be links into the `blobs` that its repos share.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        repo = root.parent.parent
        allowed += [repo / "blobs", repo.parent / "blobs"]
    try:
        # Of the name alone first: "../here/x" may not leave the folder and come back.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        target = (root / name).resolve()
    except (ValueError, OSError):
        return None
    return folder / name if any(target.is_relative_to(place) for place in allowed) else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map is {weight_map!r}, expected an object of key -> file name"
        )
    for key, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: weight_map[{key!r}] is {file!r}, expected a file name")
    return weight_map
