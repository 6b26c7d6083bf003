"""A page and a server on loopback answer no request that names another host."""

import asyncio
import gc
import json
import socket
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from served import LIMITS, SLOTS

from ovis_jax.serving.app import make_app
from ovis_jax.serving.command import serve
from ovis_jax.serving.gate import KnownHosts
from ovis_jax.serving.listening import DrainingServer

OWN = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "127.8.8.8:1", "[::1]:7860"]
FOREIGN = [
    "evil.example",
    "evil.example:7860",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example@127.0.0.1",
    "localhost,evil.example",
    "192.168.0.1",
    "0.0.0.0:7860",
    "[::2]",
    "[::1",
    "::1",
    "2130706433",
    "",
]


def assert_refused(answer: Any, host: str) -> None:
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error["code"] == "foreign_host" and repr(host) in error["message"]
    assert "--host" in error["message"]


def test_the_server(engine, ovis):
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS, host="127.0.0.1")
    client = TestClient(app)
    for host in OWN:
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in FOREIGN:
        for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
            assert_refused(client.get(path, headers={"host": host}), host)
        assert_refused(client.post("/v1/chat/completions", headers={"host": host}), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", None])
def test_a_server_that_others_reach_has_names_of_its_own(engine, ovis, host):
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS, host=host)
    assert TestClient(app).get("/health", headers={"host": "gpu.example"}).status_code == 200


def test_the_command_says_where_it_listens(steps, monkeypatch):
    apps = []
    monkeypatch.setattr("ovis_jax.serving.steps.Steps", lambda *_, **__: steps)
    monkeypatch.setattr(DrainingServer, "run", lambda self, sockets: apps.append(self.config.app))
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
    serve(port=0, slots=SLOTS, drain=1.0)
    with TestClient(apps[0], base_url="http://localhost") as client:  # and closes its engine
        assert client.get("/health").status_code == 200
        assert_refused(client.get("/health", headers={"host": "evil.example"}), "evil.example")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_page(ovis):
    pages = pytest.importorskip("ovis_jax.serving.page")
    blocks = pages.build(ovis, "ovis-tiny")
    try:
        with httpx.Client(base_url=pages.launch(blocks)) as client:
            for host in OWN:
                assert client.get("/config", headers={"host": host}).status_code == 200
            for host in FOREIGN:
                headers = {"host": host}
                for path in ("/", "/config", "/gradio_api/queue/data?session_hash=1", "/theme.css"):
                    assert_refused(client.get(path, headers=headers), host)
                for path in ("queue/join", "upload", "run/predict"):
                    assert_refused(client.post(f"/gradio_api/{path}", headers=headers), host)
            upgrade = {"connection": "upgrade", "upgrade": "websocket", "host": "evil.example"}
            assert client.get("/", headers=upgrade).status_code == 403
    finally:
        blocks.close(verbose=False)
        asyncio.set_event_loop(None)
        gc.collect()


def ask(host: str, *named: str, kind: str = "http") -> tuple[bool, list]:
    """Whether a request comes through to a server on a host, and what is answered if not."""
    sent, passed = [], []

    async def app(*_):
        passed.append(True)

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    headers = [(b"host", name.encode()) for name in named]
    scope = {"type": kind, "headers": headers, "method": "GET", "path": "/"}
    asyncio.run(KnownHosts(app, host)(scope, receive, send))
    return bool(passed), sent


def test_a_websocket_is_closed_before_it_opens():
    assert ask("127.0.0.1", "evil.example", kind="websocket") == (
        False,
        [{"type": "websocket.close", "code": 1008}],
    )
    assert ask("127.0.0.1", "localhost", kind="websocket") == (True, [])


def test_one_foreign_name_among_several_and_none_at_all():
    for names in ((), ("localhost", "evil.example")):
        passed, sent = ask("127.0.0.1", *names)
        assert not passed and sent[0]["status"] == 403
        assert json.loads(sent[1]["body"])["error"]["code"] == "foreign_host"


def test_a_name_that_leads_to_loopback_may_be_asked_by_that_name(monkeypatch):
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(*kind, ("127.0.1.1", 0))])
    assert ask("box.example", "box.example:80")[0] and ask("box.example", "localhost")[0]
    assert not ask("box.example", "evil.example")[0]
    for host in ("[::1]", "::1", "127.0.0.5"):
        assert ask(host, "[::1]:80")[0] and not ask(host, "evil.example")[0]
