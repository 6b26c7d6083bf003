"""What a page gives to those who forge its requests: no file but the uploads and the examples."""

import asyncio
import gc
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio")

from gradio.utils import get_upload_folder  # noqa: E402

from ovis_jax import answering  # noqa: E402
from ovis_jax.errors import RequestError  # noqa: E402
from ovis_jax.serving import page as pages  # noqa: E402
from ovis_jax.serving import visits  # noqa: E402

ROOT = Path(__file__).parents[2]
# Gradio's own: what it does with pandas behind every event, and event loops it leaves behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
META = {"_type": "gradio.FileData"}
API = "gradio_api"


class Visitor:
    """Speaks with a page as its scripts do, and keeps all that it was told."""

    def __init__(self, address: str):
        self.client = httpx.Client(base_url=address, timeout=120)
        config = self.client.get("/config").json()
        self.events: list[dict[str, Any]] = config["dependencies"]
        self.kinds = {part["id"]: part["type"] for part in config["components"]}
        self.values = {part["id"]: part["props"].get("value") for part in config["components"]}

    def inputs(self, event: dict[str, Any]) -> list[Any]:
        """What an ordinary visit may send for an event."""
        return [
            {"text": "Who?", "files": []}
            if self.kinds[part] == "multimodaltextbox"
            else self.values[part]
            for part in event["inputs"]
        ]

    def send(self, event: dict[str, Any], data: list[Any], event_data: Any = None) -> list[Any]:
        """Send an event to the queue, and read what comes to its end."""
        session = uuid.uuid4().hex
        body = {
            "data": data,
            "event_data": event_data,
            "fn_index": event["id"],
            "session_hash": session,
            "trigger_id": event["targets"][0][0],
        }
        joined = self.client.post(f"{API}/queue/join", json=body)
        if joined.status_code != 200:
            return [joined.json()]
        stream = self.client.get(f"{API}/queue/data", params={"session_hash": session})
        lines = stream.text.splitlines()
        return [json.loads(line[len("data:") :]) for line in lines if line.startswith("data:")]

    def send_directly(self, event: dict[str, Any], data: list[Any], event_data: Any) -> list[Any]:
        """Send an event past the queue."""
        body = {"data": data, "event_data": event_data, "fn_index": event["id"]}
        body["session_hash"] = uuid.uuid4().hex
        return [self.client.post(f"{API}/run/predict", json=body).json()]

    def get(self, path: str | Path) -> httpx.Response:
        return self.client.get(f"{API}/file={quote(str(path))}")

    def example(self) -> dict[str, Any]:
        (event,) = (e for e in self.events if e["targets"][0][1] == "example_select")
        return event


@pytest.fixture(scope="module")
def served():
    """Serve pages, and close them all behind the tests."""
    opened = []

    def serve(ovis) -> Visitor:
        opened.append(pages.build(ovis, "ovis-tiny"))
        return Visitor(pages.launch(opened[-1]))

    yield serve
    for blocks in opened:
        blocks.close(verbose=False)
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.fixture(scope="module")
def visitor(served, ovis):
    return served(ovis)


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    def stream(*_, **__):
        raise RequestError("enough")

    monkeypatch.setattr(answering, "stream", stream)


@pytest.fixture(scope="module")
def secrets():
    """Files that are none of a visitor's business, where Gradio takes files from."""
    with tempfile.TemporaryDirectory(prefix="another-program-") as folder:
        text, picture = Path(folder, "secret.txt"), Path(folder, "secret.png")
        text.write_text(f"the secret {uuid.uuid4()}")
        Image.effect_noise((90, 60), 80).save(picture)
        yield [Path("pyproject.toml").resolve(), text, picture]


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    """Let the working folder be one with files of the user's."""
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def forged_files(secret: Path, link: Path) -> Iterator[dict[str, Any]]:
    """A file that a browser claims to have uploaded, in all spellings."""
    cache = get_upload_folder()
    up = "../" * 30
    for path in (
        secret,
        link,
        os.path.relpath(secret),
        f"{cache}/{up}{secret}",
        f"file://{secret}",
        f"/{API}/file={secret}",
        quote(str(secret), safe=""),
    ):
        yield {"path": str(path), "meta": META}
    yield {"path": str(secret)}
    yield {"path": str(secret), "meta": META, "is_stream": True}
    yield {"path": str(secret), "meta": META, "url": f"/{API}/file={secret}"}
    yield {"path": f"http://localhost/{up}{secret}", "meta": META, "is_stream": True}
    yield {"path": f"http://localhost:1{secret}", "meta": META}
    yield {"path": [str(secret)], "meta": META}


def forged_inputs(kind: str, file: dict[str, Any]) -> Iterator[Any]:
    """All places of an input where a file can stand."""
    yield file
    yield [file]
    if kind == "multimodaltextbox":
        yield {"text": "Who?", "files": [file]}
        # Gradio looks no further where it finds a path.
        yield {"text": "Who?", "files": [file], "path": "", "meta": META}
    elif kind == "chatbot":
        component = {"component": "image", "value": file, "constructor_args": {}, "props": {}}
        for content in (
            {"type": "file", "file": file},
            {"type": "component", **component},
            {"type": "component", **component, "component": "file", "value": [file]},
        ):
            message = {"role": "user", "content": [content], "metadata": None, "options": None}
            yield [message, message]


def strings(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for item in found.values() if isinstance(found, dict) else found:
            yield from strings(item)


def assert_nothing_leaked(visitor: Visitor, told: list[Any], secrets: list[Path]) -> None:
    """Nothing told leads to a secret, and no copy of one lies where files are served from."""
    contents = [secret.read_bytes() for secret in secrets]
    told_strings = set(strings(told))
    assert not any(
        content.decode("latin-1") in text for text in told_strings for content in contents
    )
    for text in told_strings:
        # A picture that was opened is shown within the page itself.
        assert "data:image/" not in text
        name = text.split("file=", 1)[-1]
        if name.startswith("/"):
            assert visitor.get(name).content not in contents, text
    for path in Path(get_upload_folder()).rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.read_bytes() not in contents, path


@pytest.fixture
def link(secrets):
    """A link to a secret, in the folder of the uploads."""
    path = Path(get_upload_folder(), "link.png")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(secrets[-1])
    yield path
    path.unlink()


def spellings(secrets: list[Path], link: Path) -> list[dict[str, Any]]:
    """Every secret, and one of them in all spellings."""
    plain = [{"path": str(secret), "meta": META} for secret in secrets[:-1]]
    return plain + list(forged_files(secrets[-1], link))


def test_no_input_of_any_event_leads_to_a_file(visitor, secrets, link):
    """Each input of each event holds a file; one that is meant for files, each spelling of it."""
    sent, looked_at = [], 0
    for event in visitor.events:
        ordinary = visitor.inputs(event)
        for position, part in enumerate(event["inputs"]):
            kind = visitor.kinds[part]
            for_files = kind in ("multimodaltextbox", "chatbot")
            for file in spellings(secrets, link)[: None if for_files else len(secrets)]:
                for forged in forged_inputs(kind, file):
                    data = [*ordinary[:position], forged, *ordinary[position + 1 :]]
                    sent.append((event, data))
            looked_at += for_files
    assert looked_at >= 3
    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda one: visitor.send(*one), sent))
    assert_nothing_leaked(visitor, told, secrets)
    for (event, data), answers in zip(sent, told, strict=True):
        shown = [
            value
            for part, value in zip(event["inputs"], data, strict=True)
            if visitor.kinds[part] != "state"  # the server has its own, and does not look
        ]
        if "path" in json.dumps(shown):
            assert not any(answer.get("success") for answer in answers), data


def test_no_event_data_leads_to_a_file(visitor, secrets, link):
    sent = []
    for event in visitor.events:
        for index in (0, -1, "0", str(secrets[-1]), {"path": str(secrets[-1])}):
            for file in spellings(secrets, link)[: None if index == 0 else 1]:
                # Gradio looks no further where it finds a path.
                value = {"path": "", "text": "x", "files": [file], "icon": file}
                sent.append((event, visitor.inputs(event), {"index": index, "value": value}))
    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda one: visitor.send(*one), sent))
        told += pool.map(lambda one: visitor.send_directly(*one), sent)
    assert_nothing_leaked(visitor, told, secrets)


@pytest.mark.parametrize("index", [-1, 4, 10**30, "0", True, None, 1.0, [0], {"0": 0}])
def test_what_is_no_example_is_refused(visitor, index):
    told = visitor.send(visitor.example(), [], {"index": index, "value": None})
    (end,) = (message for message in told if message["msg"] == "process_completed")
    assert not end["success"] and end["output"]["error"] == "There is no such example."


def test_an_example_is_one_of_the_pages_own_whatever_else_is_said(visitor, secrets):
    forged = {"path": "", "text": "x", "files": [{"path": str(secrets[-1]), "meta": META}]}
    for index, (name, text) in enumerate(pages.EXAMPLES.items()):
        told = visitor.send(visitor.example(), [], {"index": index, "value": forged})
        (end,) = (message for message in told if message["msg"] == "process_completed")
        (box,) = end["output"]["data"]
        (file,) = box["files"]
        assert box["text"] == text
        assert visitor.get(file["path"]).content == (pages.ASSETS / name).read_bytes()


def test_what_was_uploaded_is_served_and_asked_about(visitor):
    picture = (ROOT / "examples/shapes.png").read_bytes()
    (path,) = visitor.client.post(f"{API}/upload", files={"files": ("a b.png", picture)}).json()
    assert visitor.get(path).content == picture
    for event in visitor.events:
        data = visitor.inputs(event)
        if visitor.kinds.get((event["inputs"] or [None])[0]) == "multimodaltextbox":
            data[0]["files"] = [{"path": path, "meta": META}]
            told = visitor.send(event, data)
            assert any(message.get("success") for message in told)


def test_files_of_the_host_are_not_served(visitor, secrets, link):
    cache = get_upload_folder()
    asset = pages.ASSETS / "page.css"
    for secret in [*secrets, ROOT / ".git/config", ROOT / ".git", asset, Path("/etc/passwd")]:
        for path in (
            secret,
            os.path.relpath(secret),
            f"/{secret}",
            f"{cache}/..{secret}",
            f"{cache}/{'../' * 30}{secret}",
            f"file://{secret}",
            f"{secret}\0.png",
            quote(str(secret), safe=""),
        ):
            for method in ("GET", "HEAD"):
                url = f"{API}/file={quote(str(path), safe='')}"
                assert visitor.client.request(method, url).status_code in (403, 404), path
                url = f"{API}/file={path}".replace("\0", "%00")
                assert visitor.client.request(method, url).status_code in (403, 404), path
        assert visitor.client.get(f"{API}/file/{secret}").status_code in (403, 404)
    assert visitor.get(link).status_code == 403


@pytest.mark.parametrize(
    "path",
    ["file=http://example.com/", "file=https://example.com/", "proxy=https://a.hf.space/", "runs"],
)
def test_routes_that_the_page_does_not_need(visitor, path):
    assert visitor.client.get(f"{API}/{path}").status_code == 404


def test_uploads_lie_where_no_other_user_reads(visitor):
    assert pages.PRIVATE in Path(get_upload_folder()).parents
    assert pages.PRIVATE.stat().st_mode & 0o077 == 0


def test_apart_even_a_handler_that_names_a_file_gives_none(served, ovis, secrets, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        visits.Visits, "take_example", lambda *_: {"text": "", "files": [str(chosen[-1])]}
    )
    before = os.getcwd(), tempfile.gettempdir()
    with pages.apart():
        visitor = served(ovis)
        for secret in secrets:
            chosen.append(secret)
            told = visitor.send(visitor.example(), [], {"index": 0, "value": None})
            (end,) = (message for message in told if message["msg"] == "process_completed")
            assert not end["success"]
            assert_nothing_leaked(visitor, told, secrets)
    assert before == (os.getcwd(), tempfile.gettempdir())
