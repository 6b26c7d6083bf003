"""The command `ovis-jax ui`: startup, shutdown and the files that it leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ovis_jax.errors import OvisError
from ovis_jax.ui.command import ui

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_missing_gradio_is_an_error_that_says_what_to_install():
    program = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['ovis-jax', 'ui'];"
        "from ovis_jax.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    assert "pip install '.[ui]'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("auth", ["", "s3cret", "s3cret:", ":s3cret", " :s3cret"])
@pytest.mark.parametrize("as_variable", [False, True])
def test_auth_without_a_name_or_a_password_is_an_error(auth, as_variable, monkeypatch):
    if as_variable:
        monkeypatch.setenv("OVIS_UI_AUTH", auth)
    with pytest.raises(OvisError, match="--auth or OVIS_UI_AUTH: expected USER:PASSWORD") as error:
        ui(auth=None if as_variable else auth)
    assert "s3cret" not in str(error.value)


def test_examples_are_copies_of_the_projects_examples():
    for path in (ROOT / "ovis_jax" / "assets" / "page").glob("*.png"):
        assert path.read_bytes() == (ROOT / "examples" / path.name).read_bytes()


@pytest.mark.exhaustive
def test_sigterm_closes_the_page_and_removes_the_private_folder(tmp_path):
    command = [sys.executable, "-m", "ovis_jax", "ui", "--max-model-len", "64"]
    process = subprocess.Popen(
        [*command, "--max-num-seqs", "1"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "OVIS_UI_AUTH": "ann:s3cret"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr
        try:
            line = next(line for line in process.stderr if line.startswith("open http"))
            (private,) = tmp_path.glob("ovis-jax-page-*")
            assert list(private.glob("served/examples/*.png"))
            with httpx.Client(base_url=line.split()[1]) as client:
                assert client.get("config").status_code == 401
                client.post("login", data={"username": "ann", "password": "s3cret"})
                assert client.get("config").status_code == 200
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert "Traceback" not in rest and "s3cret" not in line + rest
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not private.exists()
