"""The command `ovis-jax serve`, up to the point where it listens."""

import subprocess
import sys

import pytest
import uvicorn
from fastapi.testclient import TestClient
from served import SLOTS

from ovis_jax.errors import OvisError
from ovis_jax.serving.command import serve


@pytest.fixture
def served(steps, monkeypatch, capsys):
    """Run the command; gives what uvicorn would have run, what it asked for, and the notes."""

    def run(**options):
        asked, ran = {}, {}

        def compiled(model, params, **sizes):
            asked.update(sizes)
            return steps

        monkeypatch.setattr("ovis_jax.serving.steps.Steps", compiled)
        monkeypatch.setattr(uvicorn, "run", lambda app, **how: ran.update(how, app=app))
        serve(**options)
        return ran, asked, capsys.readouterr().err

    return run


def test_what_it_serves(served):
    ran, asked, notes = served(api_key="sesame", port=1234, slots=SLOTS, drain=1.0)
    assert (ran["host"], ran["port"]) == ("127.0.0.1", 1234) and "note:" not in notes
    assert asked == {"num_slots": SLOTS, "max_length": 1024 + 2048, "piece": 128}
    with TestClient(ran["app"]) as client:  # and shuts its engine down behind it
        assert client.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer sesame"}
        (model,) = client.get("/v1/models", headers=key).json()["data"]
        assert model["id"] == "ovis-tiny"
    assert "127.0.0.1:1234" in notes


def test_an_open_server_is_told_of(served):
    ran, _, notes = served(host="0.0.0.0", drain=1.0)
    assert "no --api-key is set" in notes
    with TestClient(ran["app"]):
        pass


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
