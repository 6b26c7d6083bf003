"""Downloads from the Hugging Face Hub with huggingface_hub, its cache and its tokens.

`download_files` resolves a revision to a commit once. All later requests are for that commit, so
files from two checkpoints are never mixed, even if the branch moves in the meantime.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader, parse_header, read_header
from ovis_jax.errors import OvisError

_HEADER_BLOCK_BYTES = 1 << 17  # one request; most headers of published shards are shorter
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that can read it"


def download_files(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files of a repository whose names match patterns.

    Args:
      repo_id: Repo id, such as "AIDC-AI/Ovis1.6-Gemma2-9B".
      revision: Branch, tag or commit; None for the default branch.
      patterns: File name patterns, such as "*.json".

    Returns:
      The folder with the files in the Hub's cache. The name of the folder is the commit.

    Raises:
      OvisError: The repository or revision does not exist, or the token cannot read it.
      OSError: The Hub cannot be reached.
    """
    with hub_errors(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))


def download_file(repo_id: str, commit: str, file_name: str, tqdm_class: type[tqdm] = tqdm) -> None:
    """Download a file to its commit's folder in the Hub's cache, unless the file already exists.

    Raises:
      OvisError, OSError: The request fails, as in `download_files`.
    """
    with hub_errors(repo_id):
        hf_hub_download(repo_id, file_name, revision=commit, tqdm_class=tqdm_class)


def read_remote_header(
    repo_id: str, commit: str, folder: Path, path: Path
) -> SafetensorsHeader | None:
    """Read the header of a safetensors file, with an HTTP range request if the file is not local.

    Args:
      repo_id: The repository.
      commit: The commit of the repository.
      folder: The commit's folder in the Hub's cache.
      path: Path that the file has in `folder` after it is downloaded.

    Returns:
      The header, or None if the repository has no such file.

    Raises:
      OvisError, OSError: The request fails, as in `download_files`.
    """
    if path.is_file():
        return read_header(path)
    url = f"{repo_id}@{commit}/{path.relative_to(folder).as_posix()}"
    with hub_errors(repo_id):
        try:
            with HfFileSystem().open(url, "rb", block_size=_HEADER_BLOCK_BYTES) as file:
                return parse_header(path, cast(BinaryIO, file))
        except FileNotFoundError:
            return None


def fetch_shard_sha256(repo_id: str, commit: str) -> Mapping[str, str]:
    """Fetch the SHA-256 of every safetensors file in a repository, by file name.

    Raises:
      OvisError, OSError: The request fails, as in `download_files`.
    """
    with hub_errors(repo_id):
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True)
        files = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
        return {name: found for name, found in files.items() if name.endswith(".safetensors")}


def delete_from_cache(path: Path) -> None:
    """Delete a file from the Hub's cache, in all revisions of its repository.

    Content that several repositories share remains as long as one of them links to it. A path
    outside the cache is not deleted.

    Raises:
      OSError: The file cannot be deleted.
    """
    snapshots = path.parents[1]
    if snapshots.name != "snapshots" or not path.exists():
        return
    content = path.resolve()
    blob = path.parent / path.readlink() if path.is_symlink() else path
    for link in snapshots.glob(f"*/{path.name}"):
        if link.resolve() == content:
            link.unlink()
    blob.unlink(missing_ok=True)
    elsewhere = snapshots.parents[1].glob("*/blobs/*")
    if not any(link.is_symlink() and link.resolve() == content for link in elsewhere):
        content.unlink(missing_ok=True)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Convert huggingface_hub's errors to one-line errors that say what to do and omit the token.

    Raises:
      OvisError: The repository or revision does not exist, or the token cannot read it.
      OSError: Any other error occurred.
    """
    subject = f"{repo_id}: there is no such folder, and as a repo id of the Hub it"
    try:
        yield
    # huggingface_hub does not catch the errors of its HTTP library, which depends on its version.
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        responses = [cause for cause in causes if getattr(cause, "response", None) is not None]
        status = getattr(responses[0], "response").status_code if responses else None  # noqa: B009
        if _any(causes, GatedRepoError):
            message = f"is gated: request access on its page of the Hub, then {_LOGIN}"
        elif _any(causes, RevisionNotFoundError):
            message = "has no such revision; give a branch, tag or commit that it has"
        elif _any(causes, RepositoryNotFoundError, HFValidationError):
            message = f"was not found; check its name, and if it is private {_LOGIN}"
        elif status in (401, 403):
            message = f"cannot be read, according to the Hub ({status}); {_LOGIN}"
        else:
            reason = _first_line(responses[0] if responses else causes[-1])
            retry = "check that the Hub can be reached; the same command resumes the download"
            raise OSError(f"{subject} could not be downloaded: {reason}; {retry}") from error
        raise OvisError(f"{subject} {message}") from error


def _any(errors: Sequence[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in errors)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
