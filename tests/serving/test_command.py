"""The command `ovis-jax serve`, up to the point where it listens."""

import socket
import subprocess
import sys

import pytest
import uvicorn
from fastapi.testclient import TestClient
from served import SLOTS

from ovis_jax.errors import OvisError
from ovis_jax.serving.command import serve
from ovis_jax.serving.listening import DrainingServer, bound, url


@pytest.fixture
def served(steps, monkeypatch, capsys):
    """Run the command; gives the server that would have run, what it asked for, and the notes."""

    def run(**options):
        asked, servers = {}, []

        def compiled(model, params, **sizes):
            asked.update(sizes)
            return steps

        monkeypatch.setattr("ovis_jax.serving.steps.Steps", compiled)

        def run(server, sockets):
            servers.append((server.config, [listener.getsockname() for listener in sockets]))

        monkeypatch.setattr(DrainingServer, "run", run)
        # It lets other packages' handlers close their streams, and one of those is pytest's.
        monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
        serve(**options)
        (server,) = servers
        return server, asked, capsys.readouterr().err

    return run


def test_what_it_serves(served):
    (config, names), asked, notes = served(api_key="sesame", port=0, slots=SLOTS, drain=1.0)
    ((host, port),) = names
    assert host == "127.0.0.1" and f"at http://127.0.0.1:{port}/v1" in notes
    assert "note:" not in notes and config.timeout_graceful_shutdown > 1
    assert asked == {"num_slots": SLOTS, "max_length": 1024 + 2048, "piece": 128}
    with TestClient(config.app, base_url="http://localhost") as client:  # and shuts its engine down behind it
        assert client.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer sesame"}
        (model,) = client.get("/v1/models", headers=key).json()["data"]
        assert model["id"] == "ovis-tiny"


def test_an_open_server_is_told_of(served):
    (config, _), _, notes = served(host="0.0.0.0", port=0, drain=1.0)
    assert "no --api-key is set" in notes
    with TestClient(config.app, base_url="http://localhost"):
        pass


def test_a_port_that_is_taken_is_told_of_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ovis_jax.serving.command.load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OvisError, match=f"http://127.0.0.1:{port} cannot be listened at: Addr"):
            serve(port=port)
    with pytest.raises(OvisError, match=r"http://192.0.2.1:8000 cannot be listened at: .* --host"):
        serve(host="192.0.2.1", port=8000)


def test_all_addresses_of_a_name_get_one_port(monkeypatch):
    def lookup(host, port, **_):
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        # The last is for documents, and of no machine.
        return [(*kind, (address, port)) for address in ("127.0.0.1", "127.0.0.2", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with bound("both.example", 0) as listeners:
        names = [listener.getsockname() for listener in listeners]
    assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1] > 0


def test_addresses_as_browsers_write_them():
    assert url("::1", 80) == "http://[::1]:80" and url("localhost", 80) == "http://localhost:80"


def test_an_empty_key_is_refused(served):
    with pytest.raises(OvisError, match="API key is empty"):
        served(api_key="")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(OvisError, match=r"pip install 'ovis-jax\[serve\]'"):
        serve()


def test_the_library_does_without_a_web_server():
    code = "import sys, ovis_jax.cli; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
