"""Conversions of a repo id, fetched from a server on loopback that has what can go wrong."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_copies import GOLDEN, copy_golden, flip_last_bit, read_files
from hub_server import Fault, Repo

from convert.download import check_room
from convert.from_hf import convert
from ovis_jax.checkpoint import writer
from ovis_jax.checkpoint.safetensors_files import Header, TensorEntry
from ovis_jax.checkpoint.source import Source

SOURCE = GOLDEN / "tiny-bf16-sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def repo(hub, tmp_path) -> str:
    """The id of a repo of the sharded checkpoint, new for each test; the server has no faults."""
    name = f"test/{tmp_path.name}"
    hub.repos[name] = Repo.of(SOURCE)
    hub.asked.clear()
    hub.faults.clear()
    hub.after = lambda method, path: None
    return name


def cached(home: Path, repo: str) -> list[str]:
    """The shards of a repo that the cache links to; each link must lead to its content."""
    links = sorted(folder_of(home, repo).glob("snapshots/*/*.safetensors"))
    assert all(path.exists() for path in links)
    return [path.name for path in links]


def folder_of(home: Path, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}"


def content_of(home: Path, repo: str) -> int:
    """The bytes that a repo takes in the cache."""
    return sum(path.stat().st_size for path in (folder_of(home, repo) / "blobs").iterdir())


def assert_same(folder: Path, alone: dict[str, bytes], repo: str, commit: str = "a" * 40) -> None:
    found = read_files(folder)
    records = [json.loads(files["conversion.json"]) for files in (found, alone)]
    source = {"name": repo, "revision": commit}
    assert records[0] == records[1] | {"source": source}
    assert found == alone | {"conversion.json": found["conversion.json"]}


def test_a_repo_becomes_what_its_folder_becomes(run, hub, home, repo, tmp_path, alone):
    ended = run(repo, tmp_path / "out")
    assert ended.code == 0 and "98 source keys" in ended.said
    assert_same(tmp_path / "out", alone, repo)
    assert hub.fetched(".safetensors") == SHARDS == cached(home, repo)
    assert "pytorch_model.bin" not in hub.fetched()
    # All headers were asked for before the first tensor, by ranges of bytes.
    assert [path.rpartition("/")[2] for _, path, part in hub.asked if part] == SHARDS
    first = hub.asked.index(("GET", f"/{repo}/resolve/{'a' * 40}/{SHARDS[0]}", ""))
    assert all(not part for *_, part in hub.asked[first:])


def test_a_single_file(run, hub, repo, tmp_path):
    hub.repos[repo] = Repo.of(GOLDEN / "tiny-f32")
    assert run(repo, tmp_path / "out", "--dtype", "bfloat16").code == 0
    convert(GOLDEN / "tiny-f32", tmp_path / "alone", dtype="bfloat16")
    assert_same(tmp_path / "out", read_files(tmp_path / "alone"), repo)


def test_a_dry_run_fetches_no_shard(run, hub, repo, tmp_path):
    ended = run(repo, tmp_path / "out", "--dry-run")
    assert ended.code == 0 and "85 parameters" in ended.said and not hub.fetched(".safetensors")


def test_shards_are_removed_behind(run, hub, home, repo, tmp_path, alone):
    there = []

    def look(method: str, path: str) -> None:
        if SHARDS[0] in hub.fetched():
            there.append(cached(home, repo))

    hub.after = look
    assert run(repo, tmp_path / "out", "--delete-source-shards").code == 0
    assert_same(tmp_path / "out", alone, repo)
    assert cached(home, repo) == []
    # When the third is asked for the first is gone.
    assert SHARDS[0] not in there[-1] and max(map(len, there)) <= 2
    assert hub.fetched(".safetensors") == SHARDS
    small = [path for path in SOURCE.iterdir() if path.suffix != ".safetensors"]
    assert content_of(home, repo) == sum(path.stat().st_size for path in small)


@pytest.mark.parametrize("damaged", [False, True])
def test_shards_that_are_removed_are_not_needed_again(
    run, hub, home, repo, tmp_path, alone, damaged
):
    def fail(method: str, path: str) -> None:
        # Its header is read before the first shard is fetched.
        if SHARDS[0] in hub.fetched() and not hub.faults:
            hub.faults.append(Fault("GET", SHARDS[2], 503))

    hub.after = fail
    ended = run(repo, tmp_path / "out", "--delete-source-shards")
    assert ended.code == 3 and "could not be fetched" in ended.said and "503" in ended.said
    assert ended.said.count("error:") == 1 and not (tmp_path / "out").exists()
    assert cached(home, repo) == []
    hub.after = lambda method, path: None
    hub.faults.clear()
    hub.asked.clear()
    if damaged:
        flip_last_bit(tmp_path / "out.partial" / SHARDS[0])
    assert run(repo, tmp_path / "out", "--delete-source-shards").code == 0
    fetched = hub.fetched(".safetensors")
    assert SHARDS[2] in fetched and (SHARDS[0] in fetched) == damaged
    assert fetched == SHARDS[2:] or damaged
    assert_same(tmp_path / "out", alone, repo)
    assert cached(home, repo) == []


def test_a_folder_of_your_own_is_not_deleted(run, tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "mine")
    ended = run(folder, tmp_path / "out", "--delete-source-shards")
    assert ended.code == 2 and len(ended.said.splitlines()) == 1
    assert "is a folder of your own, of which nothing is deleted; leave it out" in ended.said
    assert read_files(folder) == read_files(SOURCE) and not (tmp_path / "out").exists()


def test_a_connection_that_is_dropped(run, hub, repo, tmp_path, alone):
    hub.faults += [Fault("GET", SHARDS[1], 0.5, times=1)]  # its header

    def fail(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[2]) and len(hub.faults) == 1:
            hub.faults.append(Fault("GET", SHARDS[0], 0.5, times=2))

    hub.after = fail
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)
    # What had come was not fetched again.
    parts = [part for _, path, part in hub.asked if path.endswith(SHARDS[0])]
    starts = [int(part[6:-1]) for part in parts if part.endswith("-")]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_an_interruption_while_a_shard_is_fetched(run, hub, home, repo, tmp_path, alone):
    def interrupt() -> None:
        os.kill(run.child, signal.SIGINT)
        time.sleep(0.5)  # until it is noticed; else the shard would be there before

    def fail(method: str, path: str) -> None:
        # Its header is read before the first shard is fetched.
        if SHARDS[0] in hub.fetched() and not hub.faults:
            hub.faults.append(Fault("GET", SHARDS[1], interrupt, times=1))

    hub.after = fail
    ended = run(repo, tmp_path / "out")
    assert ended.code == 4 and "the same command goes on with it" in ended.said
    assert not (tmp_path / "out").exists() and SHARDS[0] in cached(home, repo)
    assert not list(folder_of(home, repo).glob("blobs/*.incomplete"))
    hub.asked.clear()
    assert run(repo, tmp_path / "out").code == 0
    assert SHARDS[0] not in hub.fetched() and SHARDS[1] in hub.fetched()
    assert_same(tmp_path / "out", alone, repo)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_for_a_moment(run, hub, repo, tmp_path, alone, status):
    hub.faults.append(Fault("HEAD", rf"{SHARDS[1]}$", status, times=1))
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy(run, hub, repo, tmp_path, alone, status):
    hub.faults.append(Fault("GET", "/api/models/", status))
    ended = run(repo, tmp_path / "out")
    assert ended.code == 3 and ended.said.count("error:") == 1 and str(status) in ended.said
    assert "see that the Hub can be reached; the same command goes on" in ended.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed"]
    hub.faults.clear()
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)


def wrong(folder: Path, name: str) -> bytes:
    """A shard of the right size whose last bit is another."""
    flip_last_bit(copy_golden("tiny-bf16-sharded", folder) / name)
    return (folder / name).read_bytes()


def test_a_shard_with_another_checksum(run, hub, home, repo, tmp_path, alone):
    commit, right = "a" * 40, hub.repos[repo].commits["a" * 40][SHARDS[1]]
    stated = hub.repos[repo].sha256(commit, SHARDS[1])
    hub.repos[repo].stated[SHARDS[1]] = stated
    hub.repos[repo].commits[commit][SHARDS[1]] = wrong(tmp_path / "wrong", SHARDS[1])
    ended = run(repo, tmp_path / "out", "--verify")
    assert ended.code == 1 and "wrong sha256" in ended.said
    assert SHARDS[1] in ended.said and stated in ended.said
    assert "removed from the cache: the same command fetches it again" in ended.said
    assert not (tmp_path / "out").exists() and SHARDS[1] not in cached(home, repo)
    # Of the wrong shard's tensors nothing was written, and what the one before it gave is kept.
    kept = read_files(tmp_path / "out.partial")
    assert kept[SHARDS[0]] == alone[SHARDS[0]] and kept.keys() <= {*SHARDS[:2], "journal.jsonl"}
    begun = kept.get(SHARDS[1], b"\0" * 8)
    assert len(begun) <= 8 + int.from_bytes(begun[:8], "little")
    hub.repos[repo].commits[commit][SHARDS[1]] = right
    hub.asked.clear()
    assert run(repo, tmp_path / "out", "--verify").code == 0
    assert SHARDS[0] not in hub.fetched() and SHARDS[1] in hub.fetched()
    assert_same(tmp_path / "out", alone, repo)


def test_what_was_begun_without_verify_is_not_taken_for_verified(run, hub, repo, tmp_path, alone):
    hub.faults.append(Fault("HEAD", f"{SHARDS[1]}$", 403))
    assert run(repo, tmp_path / "out").code == 2
    hub.faults.clear()
    ended = run(repo, tmp_path / "out", "--verify")
    assert ended.code == 2 and "not the same are --verify (it was left out); give" in ended.said
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)


def test_a_shard_that_is_not_what_its_header_was(run, hub, home, repo, tmp_path):
    files = hub.repos[repo].commits["a" * 40]
    changed = bytearray(files[SHARDS[0]])
    changed[8 + changed[8:].index(b"[")] = ord(" ")

    def change(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[2]):  # the last header
            files[SHARDS[0]] = bytes(changed)

    hub.after = change
    ended = run(repo, tmp_path / "out")
    assert ended.code == 1 and "another header" in ended.said and SHARDS[0] in ended.said
    assert SHARDS[0] not in cached(home, repo) and not (tmp_path / "out").exists()


def test_a_revision_that_moves_between_two_files(run, hub, repo, tmp_path, alone):
    moved = {**hub.repos[repo].commits["a" * 40], SHARDS[1]: wrong(tmp_path / "new", SHARDS[1])}
    hub.repos[repo].commits["b" * 40] = moved

    def move(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[0]):
            hub.repos[repo].refs["main"] = "b" * 40

    hub.after = move
    assert run(repo, tmp_path / "out", "--verify").code == 0
    assert_same(tmp_path / "out", alone, repo)
    assert run(repo, tmp_path / "later").code == 0
    record = json.loads((tmp_path / "later/conversion.json").read_text())
    assert record["source"]["revision"] == "b" * 40


def test_a_revision_that_moved_since_it_was_begun(run, hub, repo, tmp_path, alone):
    hub.faults.append(Fault("HEAD", f"{SHARDS[1]}$", 403))
    assert run(repo, tmp_path / "out").code == 2
    hub.faults.clear()
    hub.repos[repo].commits["b" * 40] = dict(hub.repos[repo].commits["a" * 40])
    hub.repos[repo].refs["main"] = "b" * 40
    ended = run(repo, tmp_path / "out")
    assert ended.code == 2 and f"not the same are revision (it was {'a' * 40})" in ended.said
    assert run(repo, tmp_path / "out", "--revision", "a" * 40).code == 0
    assert_same(tmp_path / "out", alone, repo)


def test_a_repo_that_does_not_exist(run, hub, repo, tmp_path, token):
    ended = run("test/nowhere", tmp_path / "out", HF_TOKEN=token)
    assert ended.code == 2 and len(ended.said.splitlines()) == 1
    assert "was not found; check its name, and if it is private log in with" in ended.said
    ended = run(repo, tmp_path / "out", "--revision", "v9")
    assert ended.code == 2 and "has no such revision; give a branch, tag or commit" in ended.said


@pytest.mark.parametrize(
    ("private", "wrong_token", "message"),
    [
        (False, "", "is gated: ask for access on its page of the Hub, then log in with"),
        (False, "hf_other", "is gated: ask for access on its page of the Hub, then log in with"),
        (True, "", "was not found; check its name, and if it is private log in with"),
    ],
)
def test_a_gated_repo(run, hub, repo, tmp_path, alone, token, private, wrong_token, message):
    hub.repos[repo].token, hub.repos[repo].private = token, private
    ended = run(repo, tmp_path / "out", HF_TOKEN=wrong_token)
    assert ended.code == 2 and message in ended.said and "hf auth login" in ended.said
    assert ended.said.count("error:") == 1 and "hf_other" not in ended.said
    assert run(repo, tmp_path / "out", HF_TOKEN=token).code == 0
    assert_same(tmp_path / "out", alone, repo)


def test_a_token_that_is_refused(run, hub, repo, tmp_path, token):
    hub.faults.append(Fault("GET", "/api/models/", 401))
    ended = run(repo, tmp_path / "out", HF_TOKEN=token)
    assert ended.code == 2 and "may not be read, says the Hub (401); log in with" in ended.said


def test_checksums_of_a_repo_that_states_none(run, hub, repo, tmp_path):
    hub.repos[repo].lfs = False
    ended = run(repo, tmp_path / "out", "--verify")
    assert ended.code == 2 and "no published checksums are known" in ended.said
    assert not (tmp_path / "out").exists()


def test_checksums_that_cannot_be_fetched(run, hub, repo, tmp_path):
    def fail(method: str, path: str) -> None:
        if path.endswith(SHARDS[2]) and not hub.faults:  # the last header
            hub.faults.append(Fault("GET", "/api/models/", 429))

    hub.after = fail
    ended = run(repo, tmp_path / "out", "--verify")
    assert ended.code == 3 and "could not be fetched: 429" in ended.said
    assert not hub.fetched(".safetensors") and not list(tmp_path.glob("out*"))


def test_faults_of_a_header_are_told_before_anything_is_fetched(run, hub, repo, tmp_path):
    shard = bytearray(hub.repos[repo].commits["a" * 40][SHARDS[2]])
    shard[:8] = (1 << 60).to_bytes(8, "little")
    hub.repos[repo].commits["a" * 40][SHARDS[2]] = bytes(shard)
    ended = run(repo, tmp_path / "out")
    assert ended.code == 1 and "header length" in ended.said and SHARDS[2] in ended.said
    assert not hub.fetched(".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed"]


@pytest.mark.parametrize(("delete", "there", "need"), [(False, 0, 7), (True, 0, 6), (False, 2, 5)])
def test_a_disk_that_is_too_small(tmp_path, monkeypatch, delete, there, need):
    """A result of 1 GB of three shards of 1, 2 and 3 GB."""
    source = Source(tmp_path / "hub/models--a--b/snapshots/c", "a/b", "c")
    source.folder.mkdir(parents=True)
    order = [source.folder / name for name in ("x", "y", "z")]
    headers = {
        path: Header((TensorEntry(path, "key", "U8", (), 8, number * 10**9),))
        for number, path in enumerate(order, start=1)
    }
    if there:
        order[there - 1].touch()
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match=f"{need}.00 GB are needed and 1.00 GB are free"):
        check_room(tmp_path / "out", 10**9, source, order, headers, delete)


def test_a_cache_is_enough_without_a_network(run, hub, repo, tmp_path, alone):
    assert run(repo, tmp_path / "first").code == 0
    hub.faults += [Fault(method, "", 503) for method in ("GET", "HEAD")]
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)
