"""Where a checkpoint comes from: a folder, or a repo id that is fetched from the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

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


def find_source(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Source:
    """Take an existing folder, a checkpoint that is built in, or fetch what is needed of a repo id.

    Without `weights` all of a repo is fetched but the tensors.

    Raises:
      OvisError: it is none of them, a revision is asked of a folder, or the repo may not be read.
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
    # The Hub's client is slow to import, and most checkpoints are folders.
    from ovis_jax.checkpoint.hub import fetch_files

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE]
    if weights:
        patterns += [SINGLE_FILE, "model-*.safetensors"]
    fetched = fetch_files(repo, revision, patterns)
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
