"""Output folders that are complete or absent, and resumed after an interruption."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_copies import read_files

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, DownloadValidationError
from ovis_jax.checkpoint.output_dirs import RESUME_FILE, atomic_dir, resumable_dir
from ovis_jax.errors import CheckpointError, OvisError

INPUTS = {"revision": "abc", "tensors": [1, 2]}


def write(output, name: str, content: bytes = b"content") -> None:
    (output.path / name).write_bytes(content)
    output.record_finished(name, f"sha256 of {name}")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A destination whose first attempt finished one file and was interrupted in another."""
    with pytest.raises(KeyboardInterrupt), resumable_dir(tmp_path / "out", INPUTS) as output:
        write(output, "a")
        (output.path / "b").write_bytes(b"not recorded")
        (output.path / "c.tmp").write_bytes(b"incomplete")
        raise KeyboardInterrupt
    return tmp_path / "out"


def test_atomic_dir(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_dir(tmp_path / "empty") as partial:
        (partial / "file").touch()
        assert not names_in(tmp_path / "empty")
    assert names_in(tmp_path / "empty") == {"file"}
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "a" / "b") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert not names_in(tmp_path / "a")


def test_finished_files_are_kept_and_others_removed(interrupted):
    assert not interrupted.exists()
    with resumable_dir(interrupted, INPUTS) as output:
        assert output.finished == {"a": "sha256 of a"}
        assert names_in(output.path) == {"a"}
        write(output, "b")
    assert read_files(interrupted) == {"a": b"content", "b": b"content"}
    assert names_in(interrupted.parent) == {"out"}


def test_file_of_another_size_is_not_kept(interrupted):
    os.truncate(interrupted.with_name("out.partial") / "files/a", 3)
    with resumable_dir(interrupted, INPUTS) as output:
        assert not output.finished and not names_in(output.path)
        write(output, "a")


@pytest.mark.parametrize("record", [b"", b"{", b"{}"])
def test_unreadable_record_starts_over(interrupted, record):
    (interrupted.with_name("out.partial") / RESUME_FILE).write_bytes(record)
    with resumable_dir(interrupted, INPUTS) as output:
        assert not output.finished and not names_in(output.path)
        write(output, "a")


def test_different_inputs_are_rejected(interrupted):
    partial = interrupted.with_name("out.partial")
    before = read_files(partial / "files")
    message = r"out\.partial was started with different inputs: revision \(was abc\), tensors; use"
    with pytest.raises(OvisError, match=message):
        with resumable_dir(interrupted, {"revision": "def", "tensors": []}):
            pass
    assert read_files(partial / "files") == before


def test_folder_with_other_files_is_left_alone(tmp_path):
    mine = tmp_path / "out.partial/thesis.tex"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(OvisError, match=r"out\.partial contains other files and no resume\.json"):
        with resumable_dir(tmp_path / "out", INPUTS):
            pass
    assert mine.read_text() == "years of work"


def fork(work: Callable[[], None]) -> int:
    """Start a process that does the work, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns about forks; nothing here computes
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def test_second_process_is_rejected(tmp_path):
    read_end, write_end = os.pipe()

    def hold_the_lock() -> None:
        with resumable_dir(tmp_path / "out", INPUTS) as output:
            write(output, "a")
            os.write(write_end, b"locked")
            signal.pause()

    child = fork(hold_the_lock)
    assert os.read(read_end, 6) == b"locked"
    with pytest.raises(OvisError, match=r"another process is writing .*out\.partial; wait for it"):
        with resumable_dir(tmp_path / "out", INPUTS):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # The lock of a killed process is gone, and its file is not in the result.
    with resumable_dir(tmp_path / "out", INPUTS) as output:
        assert output.finished
    assert names_in(tmp_path) == {"out"} and names_in(tmp_path / "out") == {"a"}


@pytest.mark.parametrize("moved", [False, True], ids=["before the move", "after the move"])
def test_killed_at_the_end(tmp_path, moved):
    def kill(path: Path, target: Path) -> None:
        if moved:
            os.rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        Path.rename = kill  # in the fork
        with resumable_dir(tmp_path / "out", INPUTS) as output:
            write(output, "a")

    _, status = os.waitpid(fork(work), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert (tmp_path / "out").exists() == moved
    inputs = INPUTS
    if moved:
        shutil.rmtree(tmp_path / "out")
        inputs = {"other": "inputs"}  # nothing is left to resume
    with resumable_dir(tmp_path / "out", inputs) as output:
        assert bool(output.finished) != moved
        write(output, "a")
    assert names_in(tmp_path) == {"out"} and names_in(tmp_path / "out") == {"a"}


@pytest.mark.parametrize("error", ["checkpoint", "download", "input or output"])
def test_only_an_invalid_source_discards_the_finished_files(tmp_path, error):
    problem = CheckpointProblem("a", "", "wrong sha256", "x", "y")
    raised = {
        "checkpoint": CheckpointError("changed"),
        "download": DownloadValidationError("repo", [problem], "download it again"),
        "input or output": OSError("disk"),
    }[error]
    with pytest.raises(type(raised)), resumable_dir(tmp_path / "out", INPUTS) as output:
        write(output, "a")
        raise raised
    assert names_in(tmp_path) == (set() if error == "checkpoint" else {"out.partial"})


def test_failure_before_the_first_file_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="no space"), resumable_dir(tmp_path / "out", INPUTS):
        raise OSError("no space")
    assert not names_in(tmp_path)


def test_record_is_json(interrupted):
    record = json.loads((interrupted.with_name("out.partial") / RESUME_FILE).read_text())
    assert record == {
        "inputs": INPUTS,
        "finished": {"a": {"bytes": 7, "sha256": "sha256 of a"}},
    }
