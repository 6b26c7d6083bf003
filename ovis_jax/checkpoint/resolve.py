"""Resolving a folder name, the name of a bundled checkpoint or a repo id to a local folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from ovis_jax.checkpoint.tensor_index import INDEX_FILE, SINGLE_FILE
from ovis_jax.errors import ConfigError, OvisError
from ovis_jax.json_fields import read_json

CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
GPTQ_CONFIG_FILE = "quantize_config.json"
ADAPTER_CONFIG_FILE = "adapters.json"
PEFT_CONFIG_FILE = "adapter_config.json"

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
      weights: Whether to download the weights; all other files are always downloaded.

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
        _reject_adapters(folder, name, model_files=(SINGLE_FILE, INDEX_FILE))
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

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE, GPTQ_CONFIG_FILE, PEFT_CONFIG_FILE]
    if weights:
        patterns += [SINGLE_FILE, "model-*.safetensors", "gptq_model-*.safetensors"]
    folder = download_files(repo_id, revision, patterns)
    _reject_adapters(folder, repo_id, model_files=("config.json",))
    return ResolvedCheckpoint(folder, repo_id, folder.name, repo_id)


def _reject_adapters(folder: Path, label: str, model_files: tuple[str, ...]) -> None:
    """Reject a folder that contains adapters but none of a model's files.

    Raises:
      OvisError: `folder` contains adapters and no model.
      ConfigError: The config of the adapters cannot be read.
    """
    if any((folder / name).exists() for name in model_files):
        return
    for name, kind in ((ADAPTER_CONFIG_FILE, "LoRA"), (PEFT_CONFIG_FILE, "PEFT")):
        if (folder / name).exists():
            base = read_json(folder / name).get("base_model_name_or_path")
            raise OvisError(
                f"{label} contains {kind} adapters ({name}) and no model; give the model that they"
                f" were trained with{f' ({base})' if base else ''}, and the folder of the adapters"
                " as --adapters or load(..., adapters=FOLDER)"
            )


def find_processor_files(folder: Path) -> dict[str, Path]:
    """Return the paths of a folder's image processor and tokenizer files, by file name.

    Raises:
      ConfigError: A required file is missing.
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
    return found
