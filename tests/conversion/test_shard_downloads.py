"""Conversions of a repo id, downloaded from a local server with faults."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_copies import (
    GOLDEN,
    copy_golden,
    flip_last_bit,
    read_files,
    read_tensors,
    rewrite_shard,
)
from hub_server import Fault, Repo

from ovis_jax.checkpoint import output_dirs
from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader, TensorInfo
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.conversion.shard_downloads import check_download_space

SOURCE = GOLDEN / "tiny-bf16-sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def repo(hub, tmp_path) -> str:
    """The id of a new repository with the sharded checkpoint; the server has no faults."""
    name = f"test/{tmp_path.name}"
    hub.repos[name] = Repo.from_folder(SOURCE)
    hub.requests.clear()
    hub.faults.clear()
    hub.after_request = lambda method, path: None
    return name


def cached(hf_home: Path, repo: str) -> list[str]:
    """The shards of a repository in the cache; each link must lead to its content."""
    links = sorted(cache_folder(hf_home, repo).glob("snapshots/*/*.safetensors"))
    assert all(path.exists() for path in links)
    return [path.name for path in links]


def cache_folder(hf_home: Path, repo: str) -> Path:
    return hf_home / "hub" / f"models--{repo.replace('/', '--')}"


def cached_bytes(hf_home: Path, repo: str) -> int:
    """The size of a repository in the cache."""
    return sum(path.stat().st_size for path in (cache_folder(hf_home, repo) / "blobs").iterdir())


def assert_same(
    folder: Path, expected_files: dict[str, bytes], repo: str, commit: str = "a" * 40
) -> None:
    found = read_files(folder)
    records = [json.loads(files["conversion.json"]) for files in (found, expected_files)]
    source = {"name": repo, "revision": commit}
    assert records[0] == records[1] | {"source": source}
    assert found == expected_files | {"conversion.json": found["conversion.json"]}


@pytest.mark.slow
def test_repo_gives_the_same_result_as_a_folder(run, hub, hf_home, repo, tmp_path, expected_files):
    result = run(repo, tmp_path / "out")
    assert result.code == 0 and "98 source keys" in result.output
    assert_same(tmp_path / "out", expected_files, repo)
    assert hub.downloads(".safetensors") == SHARDS == cached(hf_home, repo)
    assert "pytorch_model.bin" not in hub.downloads()
    # All headers were requested before the first tensor, by range requests.
    assert [path.rpartition("/")[2] for _, path, part in hub.requests if part] == SHARDS
    first = hub.requests.index(("GET", f"/{repo}/resolve/{'a' * 40}/{SHARDS[0]}", ""))
    assert all(not part for *_, part in hub.requests[first:])


@pytest.mark.slow
def test_single_file(run, hub, repo, tmp_path):
    hub.repos[repo] = Repo.from_folder(GOLDEN / "tiny-f32")
    assert run(repo, tmp_path / "out", "--dtype", "bfloat16").code == 0
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "alone", dtype="bfloat16")
    assert_same(tmp_path / "out", read_files(tmp_path / "alone"), repo)


@pytest.mark.parametrize("equal", [True, False])
def test_output_matrix_of_a_tied_checkpoint(run, hub, repo, tmp_path, expected_files, equal):
    folder = copy_golden(SOURCE.name, tmp_path / "in")
    output = read_tensors(folder)["llm.model.embed_tokens.weight"].copy()
    output[5] += 0 if equal else 1
    rewrite_shard(folder / SHARDS[2], {"llm.lm_head.weight": output})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["llm.lm_head.weight"] = SHARDS[2]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repos[repo] = Repo.from_folder(folder)
    result = run(repo, tmp_path / "out")
    if equal:
        assert (result.code, "99 source keys" in result.output) == (0, True)
        found = read_files(tmp_path / "out")
        for name in SHARDS:
            assert found[name] == expected_files[name]
    else:
        assert result.code == 1
        for part in ("llm.lm_head.weight", "differs from the tied embedding", "in row 5"):
            assert part in result.output
        assert not list(tmp_path.glob("out*"))


def test_repo_of_adapters(run, hub, repo, tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    (tmp_path / "peft/adapter_model.safetensors").touch()
    hub.repos[repo] = Repo.from_folder(tmp_path / "peft")
    result = run(repo, tmp_path / "out")
    message = result.output.splitlines()[-1]  # after the progress of the download
    assert result.code == 2
    assert message.startswith(f"error: {repo} contains PEFT adapters (adapter_config.json)")
    assert "give the model that they were trained with (a/base)" in message
    assert hub.downloads(".safetensors") == []


def test_dry_run_downloads_no_shard(run, hub, repo, tmp_path):
    result = run(repo, tmp_path / "out", "--dry-run")
    assert (
        result.code == 0 and "85 parameters" in result.output and not hub.downloads(".safetensors")
    )


def test_source_shards_are_deleted_after_use(run, hub, hf_home, repo, tmp_path, expected_files):
    seen = []

    def look(method: str, path: str) -> None:
        if SHARDS[0] in hub.downloads():
            seen.append(cached(hf_home, repo))

    hub.after_request = look
    assert run(repo, tmp_path / "out", "--delete-source-shards").code == 0
    assert_same(tmp_path / "out", expected_files, repo)
    assert cached(hf_home, repo) == []
    # The first is deleted before the third is requested.
    assert SHARDS[0] not in seen[-1] and max(map(len, seen)) <= 2
    assert hub.downloads(".safetensors") == SHARDS
    small = [path for path in SOURCE.iterdir() if path.suffix != ".safetensors"]
    assert cached_bytes(hf_home, repo) == sum(path.stat().st_size for path in small)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_deleted_shards_are_not_downloaded_again(
    run, hub, hf_home, repo, tmp_path, expected_files, damaged
):
    def fail(method: str, path: str) -> None:
        # Its header is read before the first shard is downloaded.
        if SHARDS[0] in hub.downloads() and not hub.faults:
            hub.faults.append(Fault("GET", SHARDS[2], 503))

    hub.after_request = fail
    result = run(repo, tmp_path / "out", "--delete-source-shards")
    assert (
        result.code == 3 and "could not be downloaded" in result.output and "503" in result.output
    )
    assert result.output.count("error:") == 1 and not (tmp_path / "out").exists()
    assert cached(hf_home, repo) == []
    hub.after_request = lambda method, path: None
    hub.faults.clear()
    hub.requests.clear()
    if damaged:
        os.truncate(tmp_path / "out.partial/files" / SHARDS[0], 1000)
    assert run(repo, tmp_path / "out", "--delete-source-shards").code == 0
    needed = [SHARDS[0], SHARDS[2]] if damaged else [SHARDS[2]]
    assert hub.downloads(".safetensors") == needed
    assert_same(tmp_path / "out", expected_files, repo)
    assert cached(hf_home, repo) == []


def test_local_folder_is_not_deleted(run, tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "mine")
    result = run(folder, tmp_path / "out", "--delete-source-shards")
    assert result.code == 2 and len(result.output.splitlines()) == 1
    assert "is a folder of yours, from which nothing is deleted; leave it out" in result.output
    assert read_files(folder) == read_files(SOURCE) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dropped_connection(run, hub, repo, tmp_path, expected_files):
    hub.faults += [Fault("GET", SHARDS[1], 0.5, times=1)]  # its header

    def fail(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[2]) and len(hub.faults) == 1:
            hub.faults.append(Fault("GET", SHARDS[0], 0.5, times=2))

    hub.after_request = fail
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", expected_files, repo)
    # The bytes received before were not requested again.
    parts = [part for _, path, part in hub.requests if path.endswith(SHARDS[0])]
    starts = [int(part[6:-1]) for part in parts if part.endswith("-")]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_interrupted_download(run, hub, hf_home, repo, tmp_path, expected_files):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def interrupt() -> None:
        os.kill(run.child, signal.SIGINT)
        assert fifo.read_text() == "stopping"  # only then is the rest of the shard sent

    def fail(method: str, path: str) -> None:
        # Its header is read before the first shard is downloaded.
        if SHARDS[0] in hub.downloads() and not hub.faults:
            hub.faults.append(Fault("GET", SHARDS[1], interrupt, times=1))

    hub.after_request = fail
    result = run(repo, tmp_path / "out", fault=("announce stop", str(fifo)))
    assert result.code == 4 and "the same command resumes" in result.output
    assert not (tmp_path / "out").exists() and SHARDS[0] in cached(hf_home, repo)
    assert not list(cache_folder(hf_home, repo).glob("blobs/*.incomplete"))
    hub.requests.clear()
    assert run(repo, tmp_path / "out").code == 0
    assert SHARDS[0] not in hub.downloads() and SHARDS[1] in hub.downloads()
    assert_same(tmp_path / "out", expected_files, repo)


@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub_is_retried(run, hub, repo, tmp_path, expected_files, status):
    hub.faults.append(Fault("HEAD", rf"{SHARDS[1]}$", status, times=1))
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", expected_files, repo)


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub(run, hub, repo, tmp_path, expected_files, status):
    hub.faults.append(Fault("GET", "/api/models/", status))
    result = run(repo, tmp_path / "out")
    assert result.code == 3 and result.output.count("error:") == 1 and str(status) in result.output
    assert "check that the Hub can be reached; the same command resumes" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed"]
    hub.faults.clear()
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", expected_files, repo)


def corrupted(folder: Path, name: str) -> bytes:
    """A shard whose last bit differs."""
    flip_last_bit(copy_golden("tiny-bf16-sharded", folder) / name)
    return (folder / name).read_bytes()


def test_shard_with_a_wrong_checksum(run, hub, hf_home, repo, tmp_path, expected_files):
    commit, valid = "a" * 40, hub.repos[repo].commits["a" * 40][SHARDS[1]]
    stated = hub.repos[repo].sha256(commit, SHARDS[1])
    hub.repos[repo].stated_sha256[SHARDS[1]] = stated
    hub.repos[repo].commits[commit][SHARDS[1]] = corrupted(tmp_path / "wrong", SHARDS[1])
    result = run(repo, tmp_path / "out", "--verify")
    assert result.code == 1 and "wrong sha256" in result.output
    assert SHARDS[1] in result.output and stated in result.output
    assert "removed from the cache: the same command downloads it again" in result.output
    assert not (tmp_path / "out").exists() and SHARDS[1] not in cached(hf_home, repo)
    # The shard before it is kept.
    kept = read_files(tmp_path / "out.partial/files")
    assert kept[SHARDS[0]] == expected_files[SHARDS[0]] and SHARDS[1] not in kept
    hub.repos[repo].commits[commit][SHARDS[1]] = valid
    hub.requests.clear()
    assert run(repo, tmp_path / "out", "--verify").code == 0
    assert SHARDS[0] not in hub.downloads() and SHARDS[1] in hub.downloads()
    assert_same(tmp_path / "out", expected_files, repo)


@pytest.mark.slow
def test_verify_cannot_be_added_when_resuming(run, hub, repo, tmp_path, expected_files):
    hub.faults.append(Fault("HEAD", f"{SHARDS[1]}$", 403))
    assert run(repo, tmp_path / "out").code == 2
    hub.faults.clear()
    result = run(repo, tmp_path / "out", "--verify")
    assert result.code == 2 and "different inputs: --verify (was left out); use" in result.output
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", expected_files, repo)


def test_shard_that_differs_from_its_remote_header(run, hub, hf_home, repo, tmp_path):
    files = hub.repos[repo].commits["a" * 40]
    changed = files[SHARDS[0]].replace(b'"llm.', b'"LLM.', 1)

    def change(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[2]):  # the last header
            files[SHARDS[0]] = changed

    hub.after_request = change
    result = run(repo, tmp_path / "out")
    assert result.code == 1 and "another header" in result.output and SHARDS[0] in result.output
    assert SHARDS[0] not in cached(hf_home, repo) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_branch_that_moves_between_two_files(run, hub, repo, tmp_path, expected_files):
    moved = {**hub.repos[repo].commits["a" * 40], SHARDS[1]: corrupted(tmp_path / "new", SHARDS[1])}
    hub.repos[repo].commits["b" * 40] = moved

    def move(method: str, path: str) -> None:
        if method == "GET" and path.endswith(SHARDS[0]):
            hub.repos[repo].refs["main"] = "b" * 40

    hub.after_request = move
    assert run(repo, tmp_path / "out", "--verify").code == 0
    assert_same(tmp_path / "out", expected_files, repo)
    assert run(repo, tmp_path / "later").code == 0
    record = json.loads((tmp_path / "later/conversion.json").read_text())
    assert record["source"]["revision"] == "b" * 40


@pytest.mark.slow
def test_branch_that_moves_before_resuming(run, hub, repo, tmp_path, expected_files):
    hub.faults.append(Fault("HEAD", f"{SHARDS[1]}$", 403))
    assert run(repo, tmp_path / "out").code == 2
    hub.faults.clear()
    hub.repos[repo].commits["b" * 40] = dict(hub.repos[repo].commits["a" * 40])
    hub.repos[repo].refs["main"] = "b" * 40
    result = run(repo, tmp_path / "out")
    assert result.code == 2 and f"different inputs: revision (was {'a' * 40})" in result.output
    assert run(repo, tmp_path / "out", "--revision", "a" * 40).code == 0
    assert_same(tmp_path / "out", expected_files, repo)


def test_missing_repo_and_revision(run, hub, repo, tmp_path, token):
    result = run("test/nowhere", tmp_path / "out", HF_TOKEN=token)
    assert result.code == 2 and len(result.output.splitlines()) == 1
    assert "was not found; check its name, and if it is private log in with" in result.output
    result = run(repo, tmp_path / "out", "--revision", "v9")
    assert (
        result.code == 2 and "has no such revision; give a branch, tag or commit" in result.output
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("private", "wrong_token", "message"),
    [
        (False, "", "is gated: request access on its page of the Hub, then log in with"),
        (False, "hf_other", "is gated: request access on its page of the Hub, then log in with"),
        (True, "", "was not found; check its name, and if it is private log in with"),
    ],
    ids=["gated", "wrong token", "private"],
)
def test_repo_that_needs_a_token(
    run, hub, repo, tmp_path, expected_files, token, private, wrong_token, message
):
    hub.repos[repo].token, hub.repos[repo].private = token, private
    result = run(repo, tmp_path / "out", HF_TOKEN=wrong_token)
    assert result.code == 2 and message in result.output and "hf auth login" in result.output
    assert result.output.count("error:") == 1 and "hf_other" not in result.output
    assert run(repo, tmp_path / "out", HF_TOKEN=token).code == 0
    assert_same(tmp_path / "out", expected_files, repo)


def test_rejected_token(run, hub, repo, tmp_path, token):
    hub.faults.append(Fault("GET", "/api/models/", 401))
    result = run(repo, tmp_path / "out", HF_TOKEN=token)
    assert (
        result.code == 2
        and "cannot be read, according to the Hub (401); log in with" in result.output
    )


def test_repo_without_published_checksums(run, hub, repo, tmp_path):
    hub.repos[repo].lfs = False
    result = run(repo, tmp_path / "out", "--verify")
    assert result.code == 2 and f"no published checksums of {repo} are known" in result.output
    assert not (tmp_path / "out").exists()


def test_checksums_that_cannot_be_downloaded(run, hub, repo, tmp_path):
    def fail(method: str, path: str) -> None:
        if path.endswith(SHARDS[2]) and not hub.faults:  # the last header
            hub.faults.append(Fault("GET", "/api/models/", 429))

    hub.after_request = fail
    result = run(repo, tmp_path / "out", "--verify")
    assert result.code == 3 and "could not be downloaded: 429" in result.output
    assert not hub.downloads(".safetensors") and not list(tmp_path.glob("out*"))


def test_invalid_remote_header_is_reported_before_downloads(run, hub, repo, tmp_path):
    shard = bytearray(hub.repos[repo].commits["a" * 40][SHARDS[2]])
    shard[:8] = (1 << 60).to_bytes(8, "little")
    hub.repos[repo].commits["a" * 40][SHARDS[2]] = bytes(shard)
    result = run(repo, tmp_path / "out")
    assert result.code == 1 and "header length" in result.output and SHARDS[2] in result.output
    assert not hub.downloads(".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed"]


@pytest.mark.parametrize(
    ("delete", "existing", "need"), [(False, 0, 7), (True, 0, 6), (False, 2, 5)]
)
def test_disk_that_is_too_small(tmp_path, monkeypatch, delete, existing, need):
    """A result of 1 GB from three shards of 1, 2 and 3 GB."""
    shards = [tmp_path / name for name in ("x", "y", "z")]
    headers = {
        path: SafetensorsHeader((TensorInfo(path, "key", "U8", (), 8, number * 10**9),))
        for number, path in enumerate(shards, start=1)
    }
    if existing:
        shards[existing - 1].touch()
    monkeypatch.setattr(output_dirs.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(OSError, match=f"{need}.00 GB are needed and 1.00 GB are free"):
        check_download_space(tmp_path / "out", 10**9, tmp_path, shards, headers, delete_used=delete)


def test_cached_repo_needs_no_network(run, hub, repo, tmp_path, expected_files):
    assert run(repo, tmp_path / "first").code == 0
    hub.faults += [Fault(method, "", 503) for method in ("GET", "HEAD")]
    assert run(repo, tmp_path / "out").code == 0
    assert_same(tmp_path / "out", expected_files, repo)
