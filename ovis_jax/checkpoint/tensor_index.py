"""The tensors in a checkpoint folder: their names, their files and their faults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader, TensorInfo, read_header
from ovis_jax.errors import CheckpointError, ConfigError
from ovis_jax.json_fields import read_json
from ovis_jax.user_files import describe_missing_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOAD_ADVICE = "download or write the checkpoint again"


@dataclass(frozen=True)
class TensorIndex:
    """The tensors in a folder, or arrays in memory; `match_tensors` compares them with a model.

    Attributes:
      folder: The folder, or a name for arrays in memory.
      tensors: The tensors in all files.
      weight_map: File name by key, from the index file; empty if there is a single weight file.
      unusable_keys: Keys whose data is known to be invalid.
      problems: Faults in the files and headers.
    """

    folder: Path
    tensors: tuple[TensorInfo, ...]
    weight_map: Mapping[str, str]
    unusable_keys: frozenset[str]
    problems: tuple[CheckpointProblem, ...]


HeaderReader = Callable[[Path], SafetensorsHeader | None]
"""A function that takes a path and returns the file's header, or None if there is no such file."""


def read_header_if_present(path: Path) -> SafetensorsHeader | None:
    """Read the header of a local file, or return None if there is no such file.

    Raises:
      OSError: The file cannot be opened or read.
    """
    return read_header(path) if path.is_file() else None


def read_tensor_index(
    folder: Path,
    read_header: HeaderReader = read_header_if_present,
    single_file: str = SINGLE_FILE,
) -> TensorIndex:
    """Read the index file and all headers in a folder, but no tensors.

    Args:
      folder: A folder with a single file of weights, or with model.safetensors.index.json and
        shards.
      read_header: Function that reads a header. It may fetch the headers of remote files from the
        Hub.
      single_file: Name of the single file.

    Raises:
      CheckpointError: The folder has no weights, the index file is invalid, or the header of a
        single file cannot be parsed. All other faults are listed in `problems`.
      OSError: A file cannot be opened or read.
    """
    single, index_path = folder / single_file, folder / INDEX_FILE
    weight_map = _read_weight_map(index_path) if index_path.exists() else {}
    names = sorted(set(weight_map.values())) or [single_file]
    tensors: list[TensorInfo] = []
    problems: list[CheckpointProblem] = []
    unusable: set[str] = set()

    def report(file: str, problem: str, expected: str, found: str) -> None:
        problems.append(CheckpointProblem(file, "", problem, expected, found))

    if weight_map and single_file not in names and single.exists():
        found = f"also {INDEX_FILE}, which names other files"
        report(single_file, "two checkpoints", "one of the two", found)
    for name in names:
        path = path_inside_folder(folder, name)
        if path is None:
            report(name, "rejected file", "a file inside the folder", "a name that leaves it")
        elif (header := read_header(path)) is None:
            if not weight_map:
                raise CheckpointError(
                    f"{folder}: neither {single_file} nor {INDEX_FILE} exists;"
                    f" {_explain_missing_weights(folder)}"
                )
            report(name, "missing file", "a file", describe_missing_file(path))
        else:
            tensors += header.tensors
            problems += header.problems
            unusable |= header.unusable_keys
            if header.readable:
                continue
            if not weight_map:
                raise CheckpointValidationError(str(folder), problems, DOWNLOAD_ADVICE)
        unusable |= {key for key, file in weight_map.items() if file == name}
    return TensorIndex(folder, tuple(tensors), weight_map, frozenset(unusable), tuple(problems))


def path_inside_folder(folder: Path, name: str) -> Path | None:
    """Join a folder and a file name stated in one of its files; None if the name leads outside.

    Symbolic links in the folder may lead anywhere, because only its owner can create them. For
    example, huggingface_hub creates links in its cache.
    """
    # A name such as "../here/x" must not leave the folder and come back.
    outside = Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name
    return None if outside else folder / name


def _explain_missing_weights(folder: Path) -> str:
    """Return what a folder without an index contains instead, and advice."""
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        if shards[0].startswith("gptq_model-"):
            return (
                f"it contains {shards[0]}; copy quantize_config.json of the same checkpoint, which"
                " states the group_size in that name"
            )
        return f"it contains {shards[0]}; copy {INDEX_FILE}, which names the shards"
    for pattern in ("pytorch_model*.bin", "model*.bin", "consolidated*.pth"):
        for path in sorted(folder.glob(pattern)):
            return (
                f"{path.name} is a pickle file of PyTorch, which is not read; load the model in"
                " PyTorch and save it with save_pretrained, which writes safetensors"
            )
    return "give a folder with weights"


def _read_weight_map(path: Path) -> dict[str, str]:
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
