"""Forged requests to the page: no file is served but the uploads and the examples."""

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

from ovis_jax.errors import RequestError
from ovis_jax.ui.events import EMPTY_BOX, PageEvents
from ovis_jax.ui.gradio_isolation import PRIVATE_DIR, SERVED_DIR, use_empty_working_dir
from ovis_jax.ui.page import ASSETS, EXAMPLES, create_page, launch_page_in_thread

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    # Gradio uses deprecated options of pandas in every event, and does not close its event loops.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
META = {"_type": "gradio.FileData"}
API = "gradio_api"


class Visitor:
    """Sends requests to a page as its scripts do, or forged ones."""

    def __init__(self, url: str, needs_login: bool = False):
        self.client = httpx.Client(base_url=url, timeout=120)
        if needs_login:
            return
        config = self.client.get("/config").json()
        self.events: list[dict[str, Any]] = [
            event for event in config["dependencies"] if event["backend_fn"]
        ]
        self.kinds = {part["id"]: part["type"] for part in config["components"]}
        self.values = {part["id"]: part["props"].get("value") for part in config["components"]}

    def inputs(self, event: dict[str, Any]) -> list[Any]:
        """Return ordinary inputs of an event."""
        return [
            {"text": "Who?", "files": []}
            if self.kinds[part] == "multimodaltextbox"
            else self.values[part]
            for part in event["inputs"]
        ]

    def event(self, name: str) -> dict[str, Any]:
        """Return the event with this name."""
        (event,) = (event for event in self.events if event["targets"][0][1] == name)
        return event

    def send(
        self,
        event: dict[str, Any],
        data: list[Any],
        event_data: Any = None,
        session: str | None = None,
    ) -> list[Any]:
        """Send an event to the queue, and return all messages until it is completed."""
        session = session or uuid.uuid4().hex
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
        """Send an event without the queue."""
        body = {"data": data, "event_data": event_data, "fn_index": event["id"]}
        body["session_hash"] = uuid.uuid4().hex
        return [self.client.post(f"{API}/run/predict", json=body).json()]

    def select_example(self, index: Any, value: Any = None) -> tuple[dict[str, Any], list[Any]]:
        """Click an example; return the last message and all messages."""
        event = self.event("example_select")
        messages = self.send(event, self.inputs(event), {"index": index, "value": value})
        (completed,) = (x for x in messages if x["msg"] == "process_completed")
        return completed, messages

    def get(self, path: str | Path) -> httpx.Response:
        return self.client.get(f"{API}/file={quote(str(path))}")


@pytest.fixture(scope="module")
def open_page(scheduler):
    """Serve pages until the end of the module."""
    pages = []

    def open_page(auth: tuple[str, str] | None = None) -> Visitor:
        pages.append(create_page(scheduler, "ovis-tiny"))
        return Visitor(launch_page_in_thread(pages[-1], auth=auth), bool(auth))

    yield open_page
    for page in pages:
        page.close(verbose=False)
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.fixture(scope="module")
def visitor(open_page):
    return open_page()


@pytest.fixture(autouse=True)
def no_answers(scheduler, monkeypatch):
    def submit(request):
        raise RequestError("enough")

    monkeypatch.setattr(scheduler, "submit", submit)


@pytest.fixture(scope="module")
def secrets():
    """Files of others in the folders that Gradio trusts: the working and the temporary folder."""
    with tempfile.TemporaryDirectory(prefix="another-program-") as folder:
        text, picture = Path(folder, "secret.txt"), Path(folder, "secret.png")
        text.write_text(f"the secret {uuid.uuid4()}")
        Image.effect_noise((90, 60), 80).save(picture)
        yield [ROOT / "pyproject.toml", text, picture]


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    """Make the repository the working folder, where the user's files are."""
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def forged_files(secret: Path, link: Path) -> Iterator[dict[str, Any]]:
    """Claim in many ways that a browser uploaded a file."""
    cache = SERVED_DIR
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
    """Put a file into every place of an input that can hold one."""
    yield file
    yield [file]
    if kind == "multimodaltextbox":
        yield {"text": "Who?", "files": [file]}
        # Gradio does not look into an object that has a path.
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


def find_strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            yield from find_strings(item)


def assert_nothing_leaked(visitor: Visitor, messages: list[Any], secrets: list[Path]) -> None:
    """Check that no message leads to a secret, and that no copy of a secret is served."""
    contents = [secret.read_bytes() for secret in secrets]
    found = set(find_strings(messages))
    assert not any(content.decode("latin-1") in text for text in found for content in contents)
    for text in found:
        assert "data:image/" not in text  # a preview of an image that was opened
        name = text.split("file=", 1)[-1]
        if name.startswith("/"):
            assert visitor.get(name).content not in contents, text
    for path in SERVED_DIR.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.read_bytes() not in contents, path


@pytest.fixture
def link(secrets):
    """A link to a secret in the folder of the uploads."""
    path = SERVED_DIR / "link.png"
    path.symlink_to(secrets[-1])
    yield path
    path.unlink()


def forgeries(secrets: list[Path], link: Path) -> list[dict[str, Any]]:
    """Every secret as an upload, and one of them in all forged forms."""
    plain = [{"path": str(secret), "meta": META} for secret in secrets[:-1]]
    return plain + list(forged_files(secrets[-1], link))


def test_no_input_of_any_event_reveals_a_file(visitor, secrets, link):
    """Put files into each input of each event, and all forged forms into inputs for files."""
    sent, num_for_files = [], 0
    for event in visitor.events:
        ordinary = visitor.inputs(event)
        for position, part in enumerate(event["inputs"]):
            kind = visitor.kinds[part]
            for_files = kind in ("multimodaltextbox", "chatbot")
            for file in forgeries(secrets, link)[: None if for_files else len(secrets)]:
                for forged in forged_inputs(kind, file):
                    data = [*ordinary[:position], forged, *ordinary[position + 1 :]]
                    sent.append((event, data))
            num_for_files += for_files
    assert num_for_files >= 3
    with ThreadPoolExecutor(16) as pool:
        received = list(pool.map(lambda arguments: visitor.send(*arguments), sent))
    assert_nothing_leaked(visitor, received, secrets)
    for (event, data), messages in zip(sent, received, strict=True):
        used = [
            value
            for part, value in zip(event["inputs"], data, strict=True)
            if visitor.kinds[part] != "state"  # the server keeps the state itself
        ]
        if "path" in json.dumps(used):
            assert not any(message.get("success") for message in messages), data


def test_no_event_data_reveals_a_file(visitor, secrets, link):
    sent = []
    for event in visitor.events:
        for index in (0, -1, "0", str(secrets[-1]), {"path": str(secrets[-1])}):
            for file in forgeries(secrets, link)[: None if index == 0 else 1]:
                # Gradio does not look into an object that has a path.
                value = {"path": "", "text": "x", "files": [file], "icon": file}
                sent.append((event, visitor.inputs(event), {"index": index, "value": value}))
    with ThreadPoolExecutor(16) as pool:
        received = list(pool.map(lambda arguments: visitor.send(*arguments), sent))
        received += pool.map(lambda arguments: visitor.send_directly(*arguments), sent)
    assert_nothing_leaked(visitor, received, secrets)


@pytest.mark.parametrize("index", [-1, 4, 10**30, "0", True, None, 1.0, [0], {"0": 0}])
def test_invalid_example_index_is_rejected(visitor, index):
    completed, _ = visitor.select_example(index)
    assert not completed["success"]
    assert completed["output"]["error"] == "There is no such example."


def test_only_the_index_of_an_example_is_used(visitor, secrets):
    forged = {"path": "", "text": "x", "files": [{"path": str(secrets[-1]), "meta": META}]}
    for index, (name, text) in enumerate(EXAMPLES.items()):
        completed, _ = visitor.select_example(index, forged)
        question, answer = completed["output"]["data"][0]
        picture, shown = question["content"]
        assert shown["text"] == text and "enough" in answer["content"][0]["text"]
        assert visitor.get(picture["file"]["path"]).content == (ASSETS / name).read_bytes()


def test_no_event_of_a_conversation_reveals_a_file(visitor, secrets, link):
    """Forge the data of each event after a question, then take back and export what it has done."""

    def use(forged: Any, name: str) -> list[Any]:
        session = uuid.uuid4().hex
        data = {"index": 0, "value": forged, "previous_value": forged, "files": [forged]}
        messages = []
        for event, event_data in (
            ("submit", None),
            (name, data),
            ("retry", None),
            ("undo", None),
            ("click", None),
        ):
            for found in visitor.events:
                if found["targets"][0][1] == event:
                    inputs = visitor.inputs(found)
                    messages.append(visitor.send(found, inputs, event_data, session))
        return messages

    text = f"{secrets[-1]}"
    forms = [text, *forgeries(secrets, link)]
    used = [(form, name) for form in forms for name in ("edit", "retry", "undo", "click")]
    with ThreadPoolExecutor(16) as pool:
        received = list(pool.map(lambda arguments: use(*arguments), used))
    assert_nothing_leaked(visitor, received, secrets)
    for messages in received[0][:4]:  # with a text, the events do what they should
        assert any(message.get("success") for message in messages)
    assert text in "".join(find_strings(received[0][3]))  # it is in the text box again


@pytest.mark.parametrize("index", [-1, 2, 10**30, "0", True, None, 1.0, [0]])
def test_invalid_index_of_a_question_is_rejected(visitor, index):
    session, ask, edit = uuid.uuid4().hex, visitor.event("submit"), visitor.event("edit")
    visitor.send(ask, visitor.inputs(ask), None, session)
    data = {"index": index, "value": "Why?", "previous_value": "Who?"}
    *_, completed = (
        message
        for message in visitor.send(edit, visitor.inputs(edit), data, session)
        if message["msg"] == "process_completed"
    )
    assert not completed["success"]
    assert completed["output"]["error"] == "There is no such question."


def test_password(open_page, caplog, capfd):
    visitor = open_page(("ann", "s3cret:word"))
    (example, *_) = (SERVED_DIR / "examples").glob("*.png")
    requests = [
        ("GET", "/config", {}),
        ("GET", f"{API}/info", {}),
        ("GET", f"{API}/file={example}", {}),
        ("POST", f"{API}/upload", {"files": {"files": ("a.png", b"a")}}),
        ("POST", f"{API}/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "a"}}),
        ("GET", f"{API}/queue/data?session_hash=a", {}),
        ("POST", f"{API}/run/predict", {"json": {"data": [], "fn_index": 0}}),
    ]
    for method, path, content in requests:
        assert visitor.client.request(method, path, **content).status_code == 401, path
    assert example.name not in visitor.client.get("/").text

    def log_in(password: str) -> int:
        form = {"username": "ann", "password": password}
        return visitor.client.post("/login", data=form).status_code

    for password in ("", "s3cret", "S3cret:word", "s3cret:word "):
        assert log_in(password) in (400, 422)
        assert visitor.client.get("/config").status_code == 401
    assert log_in("s3cret:word") == 200
    assert "s3cret" not in visitor.client.get("/").text + visitor.client.get("/config").text
    assert visitor.client.get(f"{API}/file={example}").content == example.read_bytes()
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


def test_uploads_are_served_and_accepted(visitor):
    picture = (ROOT / "examples/shapes.png").read_bytes()
    (path,) = visitor.client.post(f"{API}/upload", files={"files": ("a b.png", picture)}).json()
    assert visitor.get(path).content == picture
    for event in visitor.events:
        data = visitor.inputs(event)
        if visitor.kinds.get((event["inputs"] or [None])[0]) == "multimodaltextbox":
            data[0]["files"] = [{"path": path, "meta": META}]
            assert any(message.get("success") for message in visitor.send(event, data))


def test_files_of_the_machine_are_not_served(visitor, secrets, link):
    cache = SERVED_DIR
    asset = ASSETS / "page.css"
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
    [
        "file=http://example.com/",
        "file=https://example.com/",
        "proxy=https://a.hf.space/",
        "runs",
        "vibe-edit",
    ],
)
def test_unused_routes_do_not_exist(visitor, path):
    assert visitor.client.get(f"{API}/{path}").status_code == 404


def test_uploads_are_private_to_this_user(visitor):
    picture = (ROOT / "examples/shapes.png").read_bytes()
    (path,) = visitor.client.post(f"{API}/upload", files={"files": ("a.png", picture)}).json()
    assert PRIVATE_DIR in Path(path).parents
    assert PRIVATE_DIR.stat().st_mode & 0o077 == 0


@pytest.mark.exhaustive
def test_empty_working_dir_protects_even_from_a_handler_that_returns_a_path(
    open_page, secrets, monkeypatch
):
    returned = []

    async def undo(self, *_):
        return {self._components.box: {"text": "", "files": [str(returned[-1])]}}

    monkeypatch.setattr(PageEvents, "undo", undo)
    before = os.getcwd(), tempfile.gettempdir()
    with use_empty_working_dir():
        visitor = open_page()
        for secret in secrets:
            returned.append(secret)
            messages = visitor.send(visitor.event("undo"), [EMPTY_BOX, None])
            assert not any(message.get("success") for message in messages)
            assert_nothing_leaked(visitor, messages, secrets)
    assert before == (os.getcwd(), tempfile.gettempdir())
