"""The command `ovis-jax serve`, up to the point where it listens."""

import socket
import subprocess
import sys

import pytest
import uvicorn
from fastapi.testclient import TestClient
from serving_setup import MAX_NUM_SEQS

from ovis_jax.errors import OvisError
from ovis_jax.server.command import bind_sockets, http_url, serve
from ovis_jax.server.shutdown import DrainingServer


@pytest.fixture
def run_serve(runner, monkeypatch, capsys):
    """Run the command up to the server.

    Returns the server's config and addresses, the sizes that were compiled, and the notes.
    """

    def run_serve(**options):
        compiled, servers = {}, []

        def make_runner(model, params, **sizes):
            compiled.update(sizes)
            return runner

        monkeypatch.setattr("ovis_jax.engine.runner.ModelRunner", make_runner)

        def run(server, sockets):
            servers.append((server.config, [bound.getsockname() for bound in sockets]))

        monkeypatch.setattr(DrainingServer, "run", run)
        # It lets handlers of other packages close their streams, pytest's among them.
        monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
        serve(**options)
        (server,) = servers
        return server, compiled, capsys.readouterr().err

    return run_serve


@pytest.mark.slow
def test_the_server_and_its_app(run_serve):
    (config, names), compiled, notes = run_serve(
        api_key="sesame", port=0, max_num_seqs=MAX_NUM_SEQS, shutdown_timeout=1.0
    )
    ((host, port),) = names
    assert host == "127.0.0.1" and f"at http://127.0.0.1:{port}/v1" in notes
    assert "note:" not in notes and config.timeout_graceful_shutdown > 1
    sizes = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 1024 + 2048, "chunk_size": 128}
    assert compiled == sizes
    with TestClient(
        config.app, base_url="http://localhost"
    ) as client:  # which closes the engine at the end
        assert client.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer sesame"}
        (model,) = client.get("/v1/models", headers=key).json()["data"]
        assert model["id"] == "ovis-tiny"
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_a_note_says_that_a_server_is_open(run_serve):
    (config, _), _, notes = run_serve(host="0.0.0.0", port=0, shutdown_timeout=1.0)
    assert "no --api-key is set" in notes
    with TestClient(config.app):
        pass


def test_a_taken_port_is_an_error_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("ovis_jax.server.command.load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OvisError, match=f"cannot listen on http://127.0.0.1:{port}: Addr"):
            serve(port=port)
    with pytest.raises(OvisError, match=r"cannot listen on http://192.0.2.1:8000: .* --host"):
        serve(host="192.0.2.1", port=8000)


def test_all_addresses_of_a_host_get_one_port(monkeypatch):
    def getaddrinfo(host, port, **_):
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        # The last address is reserved for documentation.
        return [(*kind, (address, port)) for address in ("127.0.0.1", "127.0.0.2", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with bind_sockets("both.example", 0) as sockets:
        names = [bound.getsockname() for bound in sockets]
    assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1] > 0


def test_urls():
    assert http_url("::1", 80) == "http://[::1]:80"
    assert http_url("localhost", 80) == "http://localhost:80"


def test_an_empty_key_is_rejected(run_serve):
    with pytest.raises(OvisError, match="API key is empty"):
        run_serve(api_key="")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(OvisError, match=r"pip install '\.\[serve\]'"):
        serve()


@pytest.mark.slow
def test_the_library_does_not_import_a_web_server():
    code = "import sys, ovis_jax.cli; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
