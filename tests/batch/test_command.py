"""`ovis-jax batch`: both formats and a folder, rows with errors, and interrupted runs."""

import shutil

import pytest
from fastapi.testclient import TestClient
from serving_setup import FIELDS, image_part, make_image, user_message

from ovis_jax.batch import command
from ovis_jax.engine.scheduler import Scheduler

PROMPT = "What is this?"


@pytest.fixture
def answer_of(scheduler, submit):
    """Answer a question with the engine alone."""
    return lambda *question: submit(scheduler, *question, max_new_tokens=24).text()


def test_plain_rows(run_batch, read_lines, answer_of, tmp_path):
    """The results are in the order of the rows, and errors do not end the run."""
    image = make_image(0)
    image.save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "prompt": "Who?", "id": "\u2028ä"},
        {"images": ["a.png", {"path": "a.png"}]},
        b" ",
        {"prompt": "Tell me.", "\ud800": None},
        b"{",
        {"image": "none.png"},
        b"\xff",
        [1],
        {"prompt": "Who?", "answer": "I."},
        {"prompt": "so " * 400, "image": None},
        {"image": "https://a/b.png"},
        {"prompt": "Who? " * 3},
    ]
    result, path = run_batch(rows, "--prompt", PROMPT)
    assert result.exit_code == 1 and "11 rows answered in" in result.stderr
    assert "7 with errors" in result.stderr
    *answered, last = (
        {**row, "answer": answer_of(*question)}
        for row, *question in (
            (rows[0], "Who?", [image]),
            (rows[1], PROMPT, [image, image]),
            ({"prompt": "Tell me.", "?": None}, "Tell me."),
            (rows[11], "Who? " * 3),
        )
    )
    *found, found_last = read_lines(path)
    assert all(row.pop("finish_reason") in ("stop", "length") for row in [*found[:3], found_last])
    assert [*found[:3], found_last] == [*answered, last]
    errors = [row.pop("error") for row in found[3:]]
    assert found[3:] == [{}, rows[5], {}, {}, *rows[8:11]]
    expected = [
        "line 5: not JSON: Expecting property name",
        f"line 6: {tmp_path / 'none.png'} cannot be read: No such file",
        "line 7: not JSON: 'utf-8' codec can't decode",
        "line 8: the row has type list, expected an object",
        "line 9: the row already has the field 'answer'; rename it",
        "line 10: the prompt is ",
        "line 11: image is 'https://a/b.png'; images are not downloaded here",
    ]
    assert [error[: len(start)] for error, start in zip(errors, expected, strict=True)] == expected


@pytest.mark.parametrize("number, processes", [(7, 3), (2, 3)])
def test_processes_share_the_rows(run_batch, read_lines, number, processes, tmp_path):
    rows = [{"prompt": "Who?", "number": n} for n in range(number)]
    shared = []
    for process in range(processes):
        options = "--num-processes", processes, "--process-id", process, "--prompt", PROMPT
        result, path = run_batch(rows, *map(str, options))
        assert result.exit_code == 0
        shared.append([row["number"] for row in read_lines(path)])
        path.unlink()
        path.with_name(f"{path.name}.run.json").unlink()
    assert sum(shared, []) == list(range(number))
    assert max(map(len, shared)) - min(map(len, shared)) <= 1
    result, path = run_batch(rows, "--num-processes", "3", "--process-id", "3")
    message = "--process-id is 3, expected 0 to 2 for --num-processes 3"
    assert message in str(result.exception) and not path.exists()


def test_processes_share_a_folder(run_batch, read_lines, tmp_path):
    for name in "abc":
        make_image(0).save(tmp_path / f"{name}.png")
    options = "--prompt", PROMPT, "--num-processes", "2", "--process-id", "1"
    _, path = run_batch(tmp_path, *options)
    assert [row["image"] for row in read_lines(path)] == ["b.png", "c.png"]


def test_a_row_needs_a_prompt(run_batch, read_lines):
    _, path = run_batch([b'\xef\xbb\xbf{"image": "a.png"}'])  # with a byte order mark
    (row,) = read_lines(path)
    assert row["image"] == "a.png"
    assert row["error"] == "line 1: prompt is missing; add it to the row, or give --prompt"


def test_openai_rows(run_batch, read_lines, app):
    """The responses are those of the server."""
    question = FIELDS | {"max_tokens": 9, "messages": user_message(PROMPT)}
    image = image_part(make_image(0))
    bodies = [
        question | {"messages": user_message(PROMPT, image), "n": 2, "logprobs": True},
        question | {"temperature": 1.5, "seed": 3},
        question | {"messages": [{"role": "user", "content": 3}]},
        question | {"tools": [1]},
    ]
    others = [
        question | {"temperature": 1.5},
        question | {"max_tokens": 25},
        question | {"model": "other"},
        question | {"stream": True},
    ]
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    rows = [{**row, "custom_id": str(n), "body": x} for n, x in enumerate([*bodies, *others])]
    invalid = [{**row, "custom_id": 1}, {**row, "url": "/v1/embeddings"}, row, b"{"]
    result, path = run_batch([*rows, *invalid], "--seed", 3)
    assert result.exit_code == 1 and "9 with errors" in result.stderr
    found = read_lines(path)
    assert [line["custom_id"] for line in found] == [*"01234567", 1, "a", "a", None]
    assert len({line["id"] for line in found}) == len(found)
    responses = [line["response"] for line in found[:8]]
    assert all(line["error"] is None for line in found[:8])

    def without_ids(response):
        return {key: x for key, x in response.items() if key not in ("id", "created", "usage")}

    server = TestClient(app)
    for body, response in zip(bodies, responses, strict=False):
        expected = server.post("/v1/chat/completions", json=body)
        assert response["status_code"] == expected.status_code
        assert without_ids(response["body"]) == without_ids(expected.json())
    unseeded, *rejected = responses[4:]
    assert unseeded["body"]["choices"] == responses[1]["body"]["choices"]
    assert [(x["status_code"], x["body"]["error"]["message"]) for x in rejected] == [
        (400, "max_tokens: 25, but the maximum is 24"),
        (
            404,
            "model: 'other' is not the model of this run, 'ovis-tiny'; --served-model-name gives it"
            " another name",
        ),
        (400, "stream: expected false or null in a file of requests"),
    ]
    errors = [line["error"]["message"].partition(" enclosed")[0] for line in found[8:]]
    assert errors == [
        "line 9: custom_id is 1, expected a string",
        "line 10: url is '/v1/embeddings', expected '/v1/chat/completions'",
        "line 11: body is None, expected an object",
        "line 12: not JSON: Expecting property name",
    ]
    assert all(line["response"] is None for line in found[8:])


def test_a_folder_of_pictures(run_batch, read_lines, answer_of, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b/1.png", "a.JPG", ".hidden/2.png"):
        make_image(len(name)).save(folder / name)
    (folder / "c.webp").write_bytes(b"")
    (folder / "a.txt").write_text("a caption")
    result, path = run_batch(folder, "--prompt", PROMPT)
    assert result.exit_code == 1, result.output
    first, second, third = read_lines(path)
    assert (first["image"], second["image"], third["image"]) == ("a.JPG", "b/1.png", "c.webp")
    assert second["answer"] == answer_of(PROMPT, [make_image(7)])
    assert "answer" in first and "is an empty file" in third["error"]


@pytest.mark.slow
def test_an_interrupted_run_resumes(run_batch, tmp_path, monkeypatch):
    """Wherever the results file ends, the resumed run answers only the other rows."""
    make_image(0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "prompt": PROMPT}, {}, *({"prompt": f"{n}?"} for n in "1234")]
    result, path = run_batch(rows)
    assert result.exit_code == 1 and "1 with errors" in result.stderr
    complete = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(complete) if byte == ord("\n")]
    submitted, submit = [], Scheduler.submit
    monkeypatch.setattr(Scheduler, "submit", lambda *a: (submitted.append(a), submit(*a)))
    for end in (0, 1, ends[0], ends[0] + 9, ends[1], ends[3] - 1, ends[4], len(complete)):
        path.write_bytes(complete[:end])
        submitted.clear()
        result, _ = run_batch(rows)
        assert path.read_bytes() == complete and result.exit_code == 1
        assert "6 rows answered in" in result.stderr and "1 with errors" in result.stderr
        num_done = sum(n <= end for n in ends)
        assert len(submitted) == 6 - num_done - (num_done < 2)
        assert (f"{num_done} of 6 rows already answered" in result.stderr) == bool(num_done)


def test_results_of_another_run_are_rejected(run_batch, golden, tmp_path):
    rows = [{"prompt": "Who?"}, {"prompt": "Why?"}]
    _, path = run_batch(rows)
    complete = path.read_bytes()

    def error_of(*arguments):
        result, _ = run_batch(*arguments)
        return str(result.exception)

    assert f"{path} has the results of a different run (model is " in error_of(
        rows, "--model", golden / "tiny-f32"
    )
    assert "(requests is " in error_of(rows[:1])
    assert "(seed is 0 there and 1 here); give the results another name" in error_of(
        rows, "--seed", 1
    )
    assert "(temperature is None there and 0.5 here)" in error_of(rows, "--temperature", 0.5)
    assert path.read_bytes() == complete
    for text in (complete + complete, complete + b"[]\n", b"other\n"):
        path.write_bytes(text)
        assert "; remove the file to start over" in error_of(rows)
        assert path.read_bytes() == text
    path.with_name("results.jsonl.run.json").unlink()
    assert f"{path} is not a results file of format 'ovis-jax batch 1'" in error_of(rows)
    assert path.read_bytes() == b"other\n"
    requests = tmp_path / "requests.jsonl"
    shutil.copy(requests, path)  # the two arguments are swapped or the same
    assert "is not a results file" in error_of(rows) and path.read_bytes() == requests.read_bytes()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"custom_id": "a"}], ["--prompt", "Who?"], "--prompt is 'Who.', but .* OpenAI's batch"),
        ([{"custom_id": "a"}], ["--temperature", 1], "--temperature is 1.0, but"),
        ([{"prompt": "a"}], ["--top-p", 0.5], "need a temperature"),
        ([b"", b" "], [], "requests.jsonl: no rows"),
        (["a".encode("utf-16")], [], "is UTF-16, expected UTF-8"),
        ([b"version https://git-lfs.github.com/spec/v1"], [], "is a Git LFS pointer"),
        ("none.jsonl", [], "cannot be read: .*No such file"),
        ("empty", ["--prompt", "Who?"], "the folder has no picture, which is a file whose name"),
        ("pictures", [], "is a folder of pictures; give a question as --prompt"),
    ],
)
def test_invalid_arguments(run_batch, tmp_path, rows, options, message):
    for name in ("empty", "pictures"):
        (tmp_path / name).mkdir()
    make_image(0).save(tmp_path / "pictures/a.png")
    result, path = run_batch(tmp_path / rows if isinstance(rows, str) else rows, *options)
    with pytest.raises(Exception, match=message):
        raise result.exception
    assert not path.exists()


def test_a_run_that_cannot_continue(run_batch, monkeypatch):
    """The command ends with what to do, and writes no errors for rows that were not the cause."""
    monkeypatch.setattr(
        Scheduler, "submit", lambda self, _: self.close(0.0) or self.check_accepting()
    )
    result, path = run_batch([{"prompt": "Who?"}] * 9)
    assert f"shutting down); the same command resumes {path}" in str(result.exception)
    assert path.read_bytes() == b""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "answer_in_order", interrupt)
    result, path = run_batch([{"prompt": "Who?"}] * 9)
    assert result.exit_code == 4
    assert f"interrupted; the same command resumes {path}" in result.stderr.replace("\n", "")
