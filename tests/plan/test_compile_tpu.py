"""The 9B decode step compiled for eight v5e chips, where libtpu is installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
def test_decode_of_the_9b_on_v5e(tmp_path):
    """In a process of its own: libtpu stays loaded, and this one's devices are the CPU's."""
    output = tmp_path / "plan.json"
    command = "benchmarks.accelerators --topology v5e:2x4 --step decode --by compiler --json"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [sys.executable, "-m", *command.split(), str(output)],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=1800,
    )
    (plan,) = json.loads(output.read_text())["plans"]
    assert len(plan["checks"]) == 7 and all(plan["checks"].values())
    decode = plan["steps"]["decode"]
    assert decode["arguments"] == pytest.approx(plan["arithmetic"]["decode_arguments"], rel=1e-2)
    assert decode["collectives"].keys() == {"all-reduce"}
    assert decode["collectives"]["all-reduce"]["count"] == 2 * 42 + 1
