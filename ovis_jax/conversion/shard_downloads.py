"""Downloading the shards of a repository during conversion, always one shard ahead."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from huggingface_hub.utils import tqdm

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, DownloadValidationError
from ovis_jax.checkpoint.checksums import compute_sha256
from ovis_jax.checkpoint.hub import delete_from_cache, download_file
from ovis_jax.checkpoint.output_dirs import check_disk_space, existing_ancestor
from ovis_jax.checkpoint.resolve import ResolvedCheckpoint
from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader, read_header
from ovis_jax.conversion.input_fingerprint import check_unchanged, read_file_stats
from ovis_jax.errors import OvisError

_STOP_SECONDS = 10  # maximum time to wait for a download to stop


class ShardDownloader:
    """Context manager that downloads each shard while the previous one is used.

    Args:
      checkpoint: The repository at a commit.
      shards: Paths of the shards in the Hub's cache, in the order in which they are used.
      headers: Header of each shard, read before the download.
      expected_sha256: Expected SHA-256 of each shard, by file name; None for no check.
      delete_used: Whether to delete a shard when the next one is requested. At most two shards are
        then on the disk at a time.

    Raises:
      OvisError: A shard is missing from `expected_sha256`.
    """

    def __init__(
        self,
        checkpoint: ResolvedCheckpoint,
        shards: Sequence[Path],
        headers: Mapping[Path, SafetensorsHeader],
        *,
        expected_sha256: Mapping[str, str] | None = None,
        delete_used: bool = False,
    ):
        self._checkpoint, self._shards, self._headers = checkpoint, list(shards), headers
        self._expected_sha256, self._delete_used = expected_sha256, delete_used
        self._downloads: dict[Path, Future[dict[str, list[int]]]] = {}
        self._stopped = threading.Event()
        self._next = 0
        if expected_sha256 is not None:
            names = {self._file_name(path) for path in shards}
            if unknown := sorted(names - expected_sha256.keys()):
                raise OvisError(
                    f"{checkpoint.name}: the Hub states no sha256 of {', '.join(unknown)}; leave"
                    " out --verify"
                )

    def __enter__(self) -> Callable[[Path], None]:
        """Return a function that waits for a shard."""
        return self.wait_for

    def __exit__(self, error_type: object, *_: object) -> None:
        """Stop all downloads; if there was no error, also check and release the last shard."""
        self.stop()
        if error_type is None:
            self._release(self._shards[self._next - 1 : self._next])

    def wait_for(self, path: Path) -> None:
        """Wait until a shard is downloaded, and start downloading the next one.

        All tensors from the previous shards must already be in the result.

        Raises:
          CheckpointError: The shard does not match its header or checksum, or the previous shard
            changed while it was read.
          OvisError: The repository can no longer be read.
          OSError: A shard cannot be downloaded, read or deleted.
        """
        position = self._shards.index(path)
        if position < self._next:
            return
        self._release(self._shards[max(position - 1, 0) : position])
        self._start_download(path).result()
        self._next = position + 1
        for following in self._shards[self._next : self._next + 1]:
            self._start_download(following)

    def stop(self) -> None:
        """Stop all downloads."""
        self._stopped.set()
        wait(self._downloads.values(), _STOP_SECONDS)

    def _file_name(self, path: Path) -> str:
        return path.relative_to(self._checkpoint.folder).as_posix()

    def _start_download(self, path: Path) -> Future[dict[str, list[int]]]:
        """Start to download a shard in a daemon thread; an executor's threads are not daemons."""
        if path not in self._downloads:
            future = self._downloads[path] = Future()

            def run() -> None:
                try:
                    future.set_result(self._download(path))
                except BaseException as error:
                    future.set_exception(error)

            threading.Thread(target=run, daemon=True).start()
        return self._downloads[path]

    def _download(self, path: Path) -> dict[str, list[int]]:
        """Download and check a shard, and return its file stats. An invalid shard is deleted."""
        stopped = self._stopped

        class StoppableBar(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise OSError("stopped")
                return super().update(n)

        name = self._file_name(path)
        download_file(self._checkpoint.name, str(self._checkpoint.revision), name, StoppableBar)
        file_stats, header = read_file_stats([path]), read_header(path)
        problems = list(header.problems)
        expected = (self._expected_sha256 or {}).get(name)
        if not problems and header != self._headers[path]:
            fault = "another header", "the header that the Hub sent before", "other tensors"
            problems.append(CheckpointProblem(name, "", *fault))
        elif expected is not None and (found := compute_sha256(path)) != expected:
            problems.append(CheckpointProblem(name, "", "wrong sha256", expected, found))
        if problems:
            delete_from_cache(path)
            advice = "removed from the cache: the same command downloads it again"
            raise DownloadValidationError(self._checkpoint.name, problems, advice)
        return file_stats

    def _release(self, paths: Sequence[Path]) -> None:
        """Check that shards have not changed since their download, and delete them if requested."""
        for path in paths:
            check_unchanged(self._downloads[path].result())
            if self._delete_used:
                delete_from_cache(path)


def check_download_space(
    destination: Path,
    result_bytes: int,
    cache: Path,
    shards: Sequence[Path],
    headers: Mapping[Path, SafetensorsHeader],
    *,
    delete_used: bool,
) -> None:
    """Check that the disks have enough free space for the result and the shards to download.

    Args:
      destination: Folder of the result.
      result_bytes: Number of bytes to write to `destination`.
      cache: Folder of the shards in the Hub's cache.
      shards: Paths of the required shards; shards that already exist need no free space.
      headers: Header of each shard.
      delete_used: Whether shards are deleted after use, so that at most two exist at a time.

    Raises:
      OSError: A disk has too little free space.
    """
    sizes = [max(info.stop for info in headers[x].tensors) for x in shards if not x.exists()]
    download_bytes = sum(sorted(sizes)[-2:] if delete_used else sizes)
    if existing_ancestor(destination).stat().st_dev == cache.stat().st_dev:
        check_disk_space(destination, result_bytes + download_bytes)
    else:
        check_disk_space(destination, result_bytes)
        check_disk_space(cache, download_bytes)
