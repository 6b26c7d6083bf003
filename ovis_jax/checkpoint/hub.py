"""What is asked of the Hub, all of it through huggingface_hub, its cache and its tokens.

A revision is turned into a commit once, by `fetch_files`; all else is asked of that commit, so that
a branch that moves meanwhile cannot mix two checkpoints.
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

from ovis_jax.checkpoint.safetensors_files import Header, parse_header, read_header
from ovis_jax.errors import OvisError

_HEADER_BYTES = 1 << 17  # fetched at once: nearly all headers of published shards are shorter
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


def fetch_files(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch the files of a repo whose names fit; gives their folder, named by the commit.

    Raises:
      OvisError: there is no such repo or revision, or it may not be read with this token.
      OSError: the Hub cannot be reached.
    """
    with told_in_one_line(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def fetch_file(repo: str, commit: str, name: str, bar: type[tqdm] = tqdm) -> None:
    """Fetch one file into the folder of its commit, where it is not there yet.

    Raises:
      OvisError, OSError: as `fetch_files`.
    """
    with told_in_one_line(repo):
        hf_hub_download(repo, name, revision=commit, tqdm_class=bar)


def header_on_hub(repo: str, commit: str, folder: Path, path: Path) -> Header | None:
    """The header of a file that will stand at `path`, or None where the repo has no such file.

    It is read over the network, a range of bytes, unless the file is in `folder` already. So all
    keys, shapes and dtypes are known before the first tensor is fetched.

    Raises:
      OvisError, OSError: as `fetch_files`.
    """
    if path.is_file():
        return read_header(path)
    where = f"{repo}@{commit}/{path.relative_to(folder).as_posix()}"
    with told_in_one_line(repo):
        try:
            with HfFileSystem().open(where, "rb", block_size=_HEADER_BYTES) as file:
                return parse_header(path, cast(BinaryIO, file))
        except FileNotFoundError:
            return None


def digests(repo: str, commit: str) -> Mapping[str, str]:
    """The sha256 of every shard of a repo, as the Hub states them.

    Raises:
      OvisError, OSError: as `fetch_files`.
    """
    with told_in_one_line(repo):
        files = HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or ()
        stated = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
        return {name: found for name, found in stated.items() if name.endswith(".safetensors")}


def remove_from_cache(path: Path) -> None:
    """Remove a file of the cache and its content, which other revisions of its repo lose with it.

    Content that the cache shares with other repos stays as long as one of these has it.

    Raises:
      OSError: it cannot be removed.
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
def told_in_one_line(repo: str) -> Iterator[None]:
    """Say what the client raises in one line that says what to do; no token is ever part of it.

    Raises:
      OvisError: there is no such repo or revision, or it may not be read with this token.
      OSError: all else.
    """
    tried = f"{repo}: there is no such folder, and as a repo id of the Hub it"
    try:
        yield
    # The client lets through the errors of whichever HTTP library its version is built on.
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        answered = [cause for cause in causes if getattr(cause, "response", None) is not None]
        status = getattr(answered[0], "response").status_code if answered else None  # noqa: B009
        if _any(causes, GatedRepoError):
            message = f"is gated: ask for access on its page of the Hub, then {_LOGIN}"
        elif _any(causes, RevisionNotFoundError):
            message = "has no such revision; give a branch, tag or commit that it has"
        elif _any(causes, RepositoryNotFoundError, HFValidationError):
            message = f"was not found; check its name, and if it is private {_LOGIN}"
        elif status in (401, 403):
            message = f"may not be read, says the Hub ({status}); {_LOGIN}"
        else:
            said = _first_line(answered[0] if answered else causes[-1])
            again = "see that the Hub can be reached; the same command goes on with what is there"
            raise OSError(f"{tried} could not be fetched: {said}; {again}") from error
        raise OvisError(f"{tried} {message}") from error


def _any(errors: Sequence[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(error, kinds) for error in errors)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
