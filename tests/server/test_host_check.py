"""A server and a page on loopback reject requests that name another host."""

import asyncio
import gc
import json
import socket
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving_setup import LIMITS

from ovis_jax.server.app import create_app
from ovis_jax.server.host_check import HostCheckMiddleware

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


def assert_rejected(response: Any, host: str) -> None:
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["code"] == "foreign_host" and repr(host) in error["message"]
    assert "--host" in error["message"]


def test_a_server_on_loopback(scheduler):
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS, host="127.0.0.1")
    client = TestClient(app)
    for host in OWN:
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in FOREIGN:
        for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
            assert_rejected(client.get(path, headers={"host": host}), host)
        assert_rejected(client.post("/v1/chat/completions", headers={"host": host}), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", None])
def test_a_server_on_other_addresses_accepts_every_host(scheduler, host):
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS, host=host)
    assert TestClient(app).get("/health", headers={"host": "gpu.example"}).status_code == 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_page_on_loopback(scheduler):
    page = pytest.importorskip("ovis_jax.ui.page")
    blocks = page.create_page(scheduler, "ovis-tiny")
    try:
        with httpx.Client(base_url=page.launch_page_in_thread(blocks)) as client:
            for host in OWN:
                assert client.get("/config", headers={"host": host}).status_code == 200
            for host in FOREIGN:
                headers = {"host": host}
                for path in ("/", "/config", "/gradio_api/queue/data?session_hash=1", "/theme.css"):
                    assert_rejected(client.get(path, headers=headers), host)
                for path in ("queue/join", "upload", "run/predict"):
                    assert_rejected(client.post(f"/gradio_api/{path}", headers=headers), host)
            upgrade = {"connection": "upgrade", "upgrade": "websocket", "host": "evil.example"}
            assert client.get("/", headers=upgrade).status_code == 403
    finally:
        blocks.close(verbose=False)
        asyncio.set_event_loop(None)
        gc.collect()


def send_request(host: str, *headers: str, kind: str = "http") -> tuple[bool, list]:
    """Send a request to a server on `host` with some Host headers.

    Returns whether the application received it, and the messages sent back otherwise.
    """
    sent, received = [], []

    async def app(*_):
        received.append(True)

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    pairs = [(b"host", value.encode()) for value in headers]
    scope = {"type": kind, "headers": pairs, "method": "GET", "path": "/"}
    asyncio.run(HostCheckMiddleware(app, host)(scope, receive, send))
    return bool(received), sent


def test_a_websocket_is_closed_before_it_opens():
    received, sent = send_request("127.0.0.1", "evil.example", kind="websocket")
    assert not received and sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 403
    assert send_request("127.0.0.1", "localhost", kind="websocket") == (True, [])


@pytest.mark.parametrize("headers", [(), ("localhost", "evil.example")])
def test_no_header_and_one_foreign_header_of_several(headers):
    received, sent = send_request("127.0.0.1", *headers)
    assert not received and sent[0]["status"] == 403
    assert json.loads(sent[1]["body"])["error"]["code"] == "foreign_host"


def test_a_name_of_loopback_is_accepted(monkeypatch):
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(*kind, ("127.0.1.1", 0))])
    for host, header in [
        ("box.example", "box.example:80"),
        ("box.example", "localhost"),
        ("[::1]", "[::1]:80"),
        ("::1", "[::1]:80"),
        ("127.0.0.5", "[::1]:80"),
    ]:
        assert send_request(host, header)[0]
        assert not send_request(host, "evil.example")[0]
