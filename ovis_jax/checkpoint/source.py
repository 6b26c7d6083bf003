"""Where a checkpoint comes from: a folder, or a repo id that is fetched from the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ovis_jax.checkpoint.folder import INDEX_FILE, SINGLE_FILE, locate
from ovis_jax.errors import ConfigError, OvisError

CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


BUILT_IN = {"ovis-tiny": Path(__file__).parents[1] / "assets" / "ovis-tiny"}
"""Checkpoints that come with the library, in the Hub's layout, by name."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine; `name` is a repo id with its commit, or a folder's own name."""

    folder: Path
    name: str
    revision: str | None


def find_source(source: str | Path, revision: str | None = None) -> Source:
    """Take an existing folder, a checkpoint that is built in, or fetch what is needed of a repo id.

    Raises:
      OvisError: it is none of them, or a revision is asked of a folder.
      OSError: the Hub cannot be reached.
    """
    folder = Path(source)
    if not folder.exists() and str(source) in BUILT_IN:
        folder = BUILT_IN[str(source)]
    if folder.is_dir():
        if revision is not None:
            raise OvisError(f"{source} is a folder, which has no revision; leave out --revision")
        return Source(folder, folder.resolve().name, None)
    repo = str(source)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise OvisError(
            f"{source} is neither a folder nor a repo id of the form name/name, nor"
            f" {', '.join(BUILT_IN)}; give one of these"
        )
    tried = f"{repo}: there is no such folder, and as a repo id of the Hub"
    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, SINGLE_FILE, INDEX_FILE, "model-*.safetensors"]
    try:
        fetched = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise OvisError(f"{tried} it was not found: {_first_line(error)}") from error
    # The client lets through the errors of whichever HTTP library its version is built on.
    except Exception as error:
        raise OSError(f"{tried} it could not be fetched: {_first_line(error)}") from error
    return Source(fetched, repo, fetched.name)


def small_files(folder: Path) -> dict[str, Path]:
    """The preprocessor's and tokenizer's files of a folder, by name.

    Raises:
      ConfigError: those that are needed are missing, or are links that lead out of the folder.
    """
    names = ["preprocessor_config.json", *TOKENIZER_FILES]
    found = {name: folder / name for name in names if (folder / name).is_file()}
    advice = "copy it from the repo that the checkpoint is of"
    if "preprocessor_config.json" not in found:
        raise ConfigError(f"{folder}: preprocessor_config.json is missing; {advice}")
    if "tokenizer.json" not in found and not {"tokenizer.model", "tokenizer_config.json"} <= set(
        found
    ):
        raise ConfigError(
            f"{folder}: neither tokenizer.model with tokenizer_config.json nor tokenizer.json is"
            f" there; {advice}"
        )
    for name in found:
        if locate(folder, name) is None:
            raise ConfigError(f"{folder}: {name} is a link that leads out of the folder; {advice}")
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
