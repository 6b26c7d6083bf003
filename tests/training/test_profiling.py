"""Profiles of training runs."""

import io
import re

import jax
import pytest
from rich.console import Console

from ovis_jax.errors import TrainingError
from ovis_jax.training.config import read_train_config
from ovis_jax.training.profiling import StepProfiler
from ovis_jax.training.trainer import Trainer


@pytest.mark.slow
def test_run_writes_a_profile(write_config, tmp_path):
    console = Console(file=io.StringIO(), width=80, record=True)
    config = read_train_config(write_config(), ["training.max_steps=4"])
    with pytest.raises(TrainingError, match=r"--profile 3: expected at most 2, because 4 of 4"):
        Trainer(config, console, 3).train()
    assert Trainer(config, console, 1).train()
    folder = tmp_path / "run/profile"
    assert re.search(rf"profile of steps 3 to 3: {folder};.*xprof", console.export_text())
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_stopped_run_ends_its_profile(tmp_path):
    for _ in range(2):  # JAX has one profiler, so a second trace fails if the first one runs
        with StepProfiler(tmp_path, 0, 10, 3) as profiler:
            profiler.after_step(2, jax.numpy.zeros(()), Console(quiet=True))
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
