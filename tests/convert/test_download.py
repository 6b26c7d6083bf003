"""Conversions of a repo id, fetched from a server on loopback that has what can go wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_copies import GOLDEN, copy_golden, flip_last_bit, read_files
from hub_server import Fault, Hub, Repo, hub_server

from convert.from_hf import convert

ROOT = Path(__file__).parents[2]
SOURCE = GOLDEN / "tiny-bf16-sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
TOKEN = "hf_" + "secret" * 5


@dataclass
class Ended:
    """How a command ended, and what it printed."""

    code: int
    said: str


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where huggingface_hub has its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def forks(hub, home):
    """Processes that run convert.from_hf against the server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home)}
    environment["SSL_CERT_DIR"] = str(home)  # reading the certificates of all would take a while
    with subprocess.Popen(
        [sys.executable, "-m", "tests.convert.forked"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def repo(hub, tmp_path) -> str:
    """The id of a repo of the sharded checkpoint, new for each test; the server has no faults."""
    name = f"test/{tmp_path.name}"
    hub.repos[name] = Repo.of(SOURCE)
    hub.asked.clear()
    hub.faults.clear()
    hub.after = lambda method, path: None
    return name


@pytest.fixture
def run(forks, tmp_path):
    """Run the command with arguments; `environment` is added to it."""

    def run(*arguments: object, **environment: str) -> Ended:
        output = tmp_path / "printed"
        output.unlink(missing_ok=True)
        what = {"arguments": [*map(str, arguments)], "environment": environment}
        forks.stdin.write(json.dumps(what | {"output": str(output)}) + "\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        said = output.read_text()
        assert "Traceback" not in said and TOKEN not in said and "secret" not in said
        return Ended(code, said)

    return run


def cached(home: Path, repo: str) -> list[str]:
    """The shards of a repo that the cache holds; each link must lead to its content."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    links = [path for path in folder.glob("snapshots/*/*") if path.suffix == ".safetensors"]
    assert all(path.exists() for path in links)
    large = [path for path in (folder / "blobs").iterdir() if path.stat().st_size > 50_000]
    names = sorted(path.name for path in links)
    assert len([path for path in large if path.resolve() in {x.resolve() for x in links}]) == len(
        set(names)
    )
    return names


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The files of a conversion of the same checkpoint from a folder."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    convert(SOURCE, folder)
    return read_files(folder)


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


def test_shards_that_are_removed_are_not_needed_again(run, hub, home, repo, tmp_path, alone):
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
    assert run(repo, tmp_path / "out", "--delete-source-shards").code == 0
    assert hub.fetched(".safetensors") == SHARDS[2:]
    assert_same(tmp_path / "out", alone, repo)
    assert cached(home, repo) == []


def test_a_folder_of_your_own_is_not_deleted(run, tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "mine")
    ended = run(folder, tmp_path / "out", "--delete-source-shards")
    assert ended.code == 2 and len(ended.said.splitlines()) == 1
    assert "is a folder of your own, of which nothing is deleted; leave it out" in ended.said
    assert read_files(folder) == read_files(SOURCE) and not (tmp_path / "out").exists()


def test_a_connection_that_is_dropped(run, hub, repo, tmp_path, alone):
    hub.faults.append(Fault("GET", rf"{SHARDS[0]}$", 0.5, times=2))
    assert run(repo, tmp_path / "out").code == 0
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


def test_a_repo_that_does_not_exist(run, hub, repo, tmp_path):
    ended = run("test/nowhere", tmp_path / "out", HF_TOKEN=TOKEN)
    assert ended.code == 2 and len(ended.said.splitlines()) == 1
    assert "was not found; check its name, and if it is private log in with" in ended.said
    ended = run(repo, tmp_path / "out", "--revision", "v9")
    assert ended.code == 2 and "has no such revision; give a branch, tag or commit" in ended.said


@pytest.mark.parametrize(
    ("private", "token", "message"),
    [
        (False, "", "is gated: ask for access on its page of the Hub, then log in with"),
        (False, "hf_other", "is gated: ask for access on its page of the Hub, then log in with"),
        (True, "", "was not found; check its name, and if it is private log in with"),
    ],
)
def test_a_gated_repo(run, hub, repo, tmp_path, alone, private, token, message):
    hub.repos[repo].token, hub.repos[repo].private = TOKEN, private
    ended = run(repo, tmp_path / "out", HF_TOKEN=token)
    assert ended.code == 2 and message in ended.said and "hf auth login" in ended.said
    assert ended.said.count("error:") == 1 and "hf_other" not in ended.said
    assert run(repo, tmp_path / "out", HF_TOKEN=TOKEN, HF_DEBUG="").code == 0
    assert_same(tmp_path / "out", alone, repo)


def test_a_token_that_is_refused(run, hub, repo, tmp_path):
    hub.faults.append(Fault("GET", "/api/models/", 401))
    ended = run(repo, tmp_path / "out", HF_TOKEN=TOKEN)
    assert ended.code == 2 and "may not be read, says the Hub (401); log in with" in ended.said


def test_checksums_of_a_repo_that_states_none(run, hub, repo, tmp_path):
    hub.repos[repo].lfs = False
    ended = run(repo, tmp_path / "out", "--verify")
    assert ended.code == 2 and "no published checksums are known" in ended.said
    assert not (tmp_path / "out").exists()


def test_faults_of_a_header_are_told_before_anything_is_fetched(run, hub, repo, tmp_path):
    shard = bytearray(hub.repos[repo].commits["a" * 40][SHARDS[2]])
    shard[:8] = (1 << 60).to_bytes(8, "little")
    hub.repos[repo].commits["a" * 40][SHARDS[2]] = bytes(shard)
    ended = run(repo, tmp_path / "out")
    assert ended.code == 1 and "header length" in ended.said and SHARDS[2] in ended.said
    assert not hub.fetched(".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed"]


def test_a_cache_is_enough_without_a_network(run, hub, repo, tmp_path, alone):
    assert run(repo, tmp_path / "first").code == 0
    hub.faults += [Fault(method, "", 503) for method in ("GET", "HEAD")]
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", alone, repo)
