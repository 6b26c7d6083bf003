"""The command `ovis-jax ui`: startup, shutdown and the files that it leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

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


def test_examples_are_copies_of_the_projects_examples():
    for path in (ROOT / "ovis_jax" / "assets" / "page").glob("*.png"):
        assert path.read_bytes() == (ROOT / "examples" / path.name).read_bytes()


@pytest.mark.exhaustive
def test_sigterm_closes_the_page_and_removes_the_private_folder(tmp_path):
    command = [sys.executable, "-m", "ovis_jax", "ui", "--max-model-len", "64"]
    process = subprocess.Popen(
        [*command, "--max-num-seqs", "1"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr
        try:
            line = next(line for line in process.stderr if line.startswith("open http"))
            (private,) = tmp_path.glob("ovis-jax-page-*")
            assert list(private.glob("served/examples/*.png"))
            assert httpx.get(f"{line.split()[1]}config").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert "Traceback" not in process.stderr.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not private.exists()
