"""The command `ovis-jax serve`, up to the point where it listens."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi.testclient import TestClient
from serving_setup import MAX_NUM_SEQS

from ovis_jax.errors import OvisError
from ovis_jax.server.command import serve
from ovis_jax.server.connections import SPARE_CONNECTIONS, TimedProtocol
from ovis_jax.server.shutdown import DrainingServer


@pytest.fixture
def run_serve(make_scheduler, monkeypatch, capsys):
    """Run the command up to the server.

    Returns the server's config and addresses, the sizes that were compiled, and the notes.
    """

    def run_serve(**options):
        compiled, servers = {}, []

        @contextmanager
        def run_engines(ovis, meshes, **sizes):
            compiled.update(sizes, meshes=meshes)
            yield [make_scheduler() for _ in meshes]

        monkeypatch.setattr("ovis_jax.server.command.run_engines", run_engines)

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
    assert compiled == {
        "meshes": [None],
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": 1024,  # the model's own
        "chunk_size": 128,
        "max_queued_requests": 64,
        "max_num_batched_tokens": None,
        "max_num_partial_prefills": 1,
        "enable_prefix_caching": True,
    }
    assert config.http is TimedProtocol
    assert config.limit_concurrency == 4 * (MAX_NUM_SEQS + 64) + 64 + SPARE_CONNECTIONS
    client = TestClient(config.app, base_url="http://localhost")
    assert client.get("/v1/models").status_code == 401
    key = {"authorization": "Bearer sesame"}
    (model,) = client.get("/v1/models", headers=key).json()["data"]
    assert model["id"] == "ovis-tiny"
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 401
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.slow
def test_several_engines(run_serve):
    options = dict(port=0, max_num_seqs=MAX_NUM_SEQS, tensor_parallel=2)
    (config, _), compiled, notes = run_serve(data_parallel=3, **options)
    assert [mesh.devices.size for mesh in compiled["meshes"]] == [2, 2, 2]
    assert "in each of 3 engines" in notes
    assert config.limit_concurrency == 4 * 3 * (MAX_NUM_SEQS + 64) + 64 + SPARE_CONNECTIONS
    client = TestClient(config.app, base_url="http://localhost")
    assert client.get("/health").json()["max_num_seqs"] == 3 * MAX_NUM_SEQS
    with pytest.raises(OvisError, match="data 5 x model 2 needs 10 devices, and JAX has 8"):
        run_serve(data_parallel=5, **options)


def test_a_note_says_that_a_server_is_open(run_serve):
    _, _, notes = run_serve(host="0.0.0.0", port=0)
    assert "no --api-key is set" in notes


@pytest.mark.parametrize(
    "origin",
    [
        *["localhost:3000", "http://localhost:3000/", "http://*.example", "", "null"],
        *["http://Localhost:3000", "http://me@localhost:3000"],
    ],
)
def test_an_origin_that_no_browser_sends_is_rejected(run_serve, origin):
    with pytest.raises(OvisError, match="--allow-origin: .* is not an origin; expected"):
        run_serve(allow_origin=["*", origin])


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
