"""The shards of a repo while it is converted: each is fetched while the one before it is read."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from convert.transfer import check_unchanged, file_facts
from ovis_jax.checkpoint.checksums import sha256
from ovis_jax.checkpoint.hub import fetch_file, remove_from_cache
from ovis_jax.checkpoint.journal import left_behind
from ovis_jax.checkpoint.problems import Problem, ShardProblems
from ovis_jax.checkpoint.safetensors_files import Header, read_header
from ovis_jax.checkpoint.source import Source
from ovis_jax.checkpoint.writer import check_space, nearest_existing
from ovis_jax.errors import OvisError

Headers = Mapping[Path, Header]

_STOP_SECONDS = 10  # a client that is slow to stop does not keep a user waiting for longer


class _Task(threading.Thread):
    """Work in the background, whose error is raised where its end is waited for."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self._work = work
        self._error: BaseException | None = None
        # Waited for instead of `join`, which an interruption can make believe that it has ended.
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        self.ended.set()

    def wait(self) -> None:
        self.ended.wait()
        if self._error is not None:
            raise self._error


class Shards:
    """Fetches shards one ahead and, where asked to, removes them behind; see `fetched_ahead`.

    Args:
      source: the repo at a commit.
      order: the shards in the order of their use. When one is asked for, all that comes from those
        before it must stand in the result.
      headers: what was read of each before it was fetched.
      expected: sha256 by name, where they are to be held to it.
      delete: remove each when the next one is asked for. Never more than two are then there.
    """

    def __init__(
        self,
        source: Source,
        order: Sequence[Path],
        headers: Headers,
        *,
        expected: Mapping[str, str] | None = None,
        delete: bool = False,
    ):
        self._source, self._order, self._headers = source, list(order), headers
        self._expected, self._delete = expected, delete
        self._tasks: dict[Path, _Task] = {}
        self._facts: dict[Path, dict[str, Any]] = {}
        self._stopped = threading.Event()
        self._current: Path | None = None
        names = {self._name(path) for path in order}
        if expected is not None and (unknown := sorted(names - expected.keys())):
            raise OvisError(
                f"{source.name}: the Hub states no sha256 of {', '.join(unknown)}; leave out"
                " --verify"
            )

    def need(self, path: Path) -> None:
        """Wait until a shard is there, and begin to fetch the one after it.

        Raises:
          CheckpointError: it is not what its header or its checksum said, or the one before it has
            changed while it was read.
          OvisError: the repo may not be read any more.
          OSError: it cannot be fetched, read or removed.
        """
        if path == self._current:
            return
        number = self._order.index(path)
        self._finish(self._order[:number])
        self._fetch(path).wait()
        self._current = path
        for ahead in self._order[number + 1 : number + 2]:
            self._fetch(ahead)

    def finish(self) -> None:
        """Hold the last shard to what it was; the result has all.

        Raises:
          CheckpointError: it has changed while it was read.
          OSError: it cannot be read or removed.
        """
        self._finish(self._order)

    def stop(self) -> None:
        """Give up what is being fetched."""
        self._stopped.set()
        for task in self._tasks.values():
            task.ended.wait(_STOP_SECONDS)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._source.folder).as_posix()

    def _fetch(self, path: Path) -> _Task:
        if path not in self._tasks:
            self._tasks[path] = _Task(lambda: self._bring(path))
        return self._tasks[path]

    def _bring(self, path: Path) -> None:
        """Fetch a shard and hold it to what is known of it; a wrong one is not kept."""
        stopped = self._stopped

        class Bar(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise OSError("stopped")
                return super().update(n)

        name = self._name(path)
        fetch_file(self._source.name, str(self._source.revision), name, Bar)
        facts = file_facts([path])
        problems = []
        if read_header(path) != self._headers[path]:
            what = "what the Hub said of it"
            problems.append(Problem(name, "", "another header", what, "other tensors"))
        elif self._expected is not None and (found := sha256(path)) != self._expected[name]:
            problems.append(Problem(name, "", "wrong sha256", self._expected[name], found))
        if problems:
            remove_from_cache(path)
            advice = "it was removed from the cache: the same command fetches it again"
            raise ShardProblems(self._source.name, problems, advice)
        self._facts[path] = facts

    def _finish(self, paths: Sequence[Path]) -> None:
        for path in paths:
            # One that was fetched ahead and then not needed, as the result has it, may still come.
            if path in self._tasks:
                self._tasks[path].ended.wait()
            if (facts := self._facts.pop(path, None)) is not None:
                check_unchanged(facts)
            if self._delete:
                remove_from_cache(path)


def check_room(
    dst: Path, total: int, source: Source, order: Iterable[Path], headers: Headers, delete: bool
) -> None:
    """Refuse to begin what the disks cannot hold: a result of `total` bytes, and what is fetched.

    Of shards that are removed behind never more than two are there. What an earlier attempt has
    left of the result need not be written again, nor fetched.

    Raises:
      OSError: a disk has less free.
    """
    need = max(0, total - left_behind(dst))
    sizes = {path: max(entry.stop for entry in headers[path].tensors) for path in order}
    missing = sorted(size for path, size in sizes.items() if not path.exists())
    fetched = min(sum(missing[-2:] if delete else missing), sum(sizes.values()) * need // total)
    if nearest_existing(dst).stat().st_dev == source.folder.stat().st_dev:
        check_space(dst, need + fetched)
    else:
        check_space(dst, need)
        check_space(source.folder, fetched)


@contextmanager
def fetched_ahead(shards: Shards | None) -> Iterator[Callable[[Path], None]]:
    """Gives what waits for a shard to be there; nothing is fetched any more when the block ends."""
    if shards is None:
        yield lambda path: None
        return
    try:
        yield shards.need
    finally:
        shards.stop()
    shards.finish()
