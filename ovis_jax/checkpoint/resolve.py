"""Resolving a folder name, the name of a bundled checkpoint or a repo id to a local folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from ovis_jax.checkpoint.tensor_index import INDEX_FILE, SINGLE_FILE, path_inside_folder
from ovis_jax.errors import ConfigError, OvisError

CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

BUNDLED = {"ovis-tiny": Path(__file__).parents[1] / "assets" / "ovis-tiny"}
"""Folders of the checkpoints in this package, by name; all are in the Hub's layout."""


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint on this machine.

    Attributes:
      folder: The local folder of the checkpoint; for a repo id, a commit's folder in the Hub's
        cache.
      name: The repo id, the bundled name, or the last part of the folder's path.
      revision: The commit for a repo id; None for other checkpoints.
      label: Name of the checkpoint in messages.
    """

    folder: Path
    name: str
    revision: str | None
    label: str

    @property
    def bundled(self) -> bool:
        """Whether the checkpoint is part of this package."""
        return self.folder in BUNDLED.values()


def resolve_checkpoint(
    checkpoint: str | Path, revision: str | None = None, *, weights: bool = True
) -> ResolvedCheckpoint:
    """Find a checkpoint, and download it if a repo id is given.

    A folder takes precedence over a bundled checkpoint with the same name.

    Args:
      checkpoint: A folder, the name of a bundled checkpoint, or a repo id of the Hub.
      revision: Branch, tag or commit, for a repo id only.
      weights: Whether to download the weights too, or only all other files.

    Raises:
      OvisError: There is no such checkpoint, `revision` is given without a repo id, or the
        repository cannot be read.
      OSError: The Hub cannot be reached.
    """
    folder, name = Path(checkpoint), str(checkpoint)
    if folder.is_dir():
        if name in BUNDLED and not (folder / "config.json").exists():
            raise OvisError(
                f"{name} is a folder here, without config.json, which hides the bundled checkpoint"
                f" {name}; run the command from another folder, or give the path of a checkpoint"
            )
        found = ResolvedCheckpoint(folder, folder.resolve().name, None, name)
        kind = "a folder"
    elif folder.exists():
        raise OvisError(f"{name} is a file, expected a folder, a repo id or {', '.join(BUNDLED)}")
    elif name in BUNDLED:
        found = ResolvedCheckpoint(BUNDLED[name], name, None, f"the bundled checkpoint {name}")
        kind = "a bundled checkpoint"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _download_checkpoint(name, revision, weights=weights)
    else:
        raise OvisError(
            f"{name} is neither a folder nor a repo id of the form name/name, nor"
            f" {', '.join(BUNDLED)}; give one of these"
        )
    if revision is not None:
        raise OvisError(f"{name} is {kind}, which has no revision; leave out --revision")
    return found


def find_folder_or_bundled_checkpoint(checkpoint: str | Path, advice: str) -> ResolvedCheckpoint:
    """Find a folder or a bundled checkpoint; nothing is downloaded.

    Args:
      checkpoint: A folder, or the name of a bundled checkpoint.
      advice: Advice for the error message if there is no such folder.

    Raises:
      OvisError: `checkpoint` is neither a folder nor a bundled checkpoint.
    """
    if not Path(checkpoint).is_dir() and str(checkpoint) not in BUNDLED:
        raise OvisError(f"{checkpoint} is not a folder; {advice}")
    return resolve_checkpoint(checkpoint)


def _download_checkpoint(
    repo_id: str, revision: str | None, *, weights: bool
) -> ResolvedCheckpoint:
    # Imported here because it is slow to import and most checkpoints are folders.
    from ovis_jax.checkpoint.hub import download_files

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE]
    if weights:
        patterns += [SINGLE_FILE, "model-*.safetensors"]
    folder = download_files(repo_id, revision, patterns)
    return ResolvedCheckpoint(folder, repo_id, folder.name, repo_id)


def find_processor_files(folder: Path) -> dict[str, Path]:
    """Return the paths of a folder's image processor and tokenizer files, by file name.

    Raises:
      ConfigError: A required file is missing, or a file is a symbolic link to a target outside the
        folder.
    """
    names = ["preprocessor_config.json", *TOKENIZER_FILES]
    found = {name: folder / name for name in names if (folder / name).is_file()}
    advice = "copy it from the repository of the checkpoint"
    if "preprocessor_config.json" not in found:
        raise ConfigError(f"{folder}: preprocessor_config.json is missing; {advice}")
    sentencepiece = {"tokenizer.model", "tokenizer_config.json"} <= found.keys()
    if "tokenizer.json" not in found and not sentencepiece:
        raise ConfigError(
            f"{folder}: neither tokenizer.model with tokenizer_config.json nor tokenizer.json"
            f" exists; {advice}"
        )
    for name in found:
        if path_inside_folder(folder, name) is None:
            raise ConfigError(f"{folder}: {name} is a link that leads out of the folder; {advice}")
    return found
