"""The sockets of the server and the page: a taken port is an error before a model is loaded."""

import importlib
import socket

import pytest

from ovis_jax.errors import OvisError
from ovis_jax.server.sockets import bind_sockets, http_url


@pytest.mark.parametrize("name", ["serve", pytest.param("ui", marks=pytest.mark.slow)])
def test_a_taken_port_is_an_error_before_the_model_is_loaded(name, monkeypatch):
    if name == "ui":
        pytest.importorskip("ovis_jax.ui.page")
    module = importlib.import_module(f"ovis_jax.{'server' if name == 'serve' else name}.command")
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("loaded"))
    command = getattr(module, name)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OvisError, match=f"cannot listen on http://127.0.0.1:{port}: Addr"):
            command(port=port)
    with pytest.raises(OvisError, match=r"cannot listen on http://192.0.2.1:8000: .* --host"):
        command(host="192.0.2.1", port=8000)


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
