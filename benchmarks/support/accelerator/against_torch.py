"""How does each stage compare with PyTorch on the same device?

Both sides have the same shapes and dtype, and random weights. They take turns. PyTorch runs prompts
with each kind of attention that keeps the soft cap and works there, and decodes with a dynamic
cache, and with a static one under `torch.compile`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from benchmarks.support.accelerator.random_model import param_bytes_per_device
from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from benchmarks.support.accelerator.speed import PreparedStage, SpeedMeasurements
from benchmarks.support.timing import Timings, time_in_turns
from ovis_jax.config import OvisConfig


class TorchError(Exception):
    """PyTorch's side raised an error."""


class TorchWorker:
    """A process that runs PyTorch's side.

    Args:
      process: The process of `torch_worker`.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def wait_until_ready(self) -> str:
        """Wait until the models are on the device; return PyTorch's version."""
        return self._read()["version"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TorchError("PyTorch's process ended; see log.txt")
        reply = json.loads(line)
        if "error" in reply:
            raise TorchError(reply["error"])
        return reply

    def call(self, **command: Any) -> float:
        """Prepare a stage if one is given, run it once, and return its seconds.

        Raises:
          TorchError: PyTorch raised an error.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]


@contextmanager
def start_torch(config: OvisConfig) -> Iterator[TorchWorker]:
    """Start PyTorch's process on the device that JAX uses."""
    fields, _ = config.to_hf()
    settings = {
        "configs": {
            "decoder": fields["llm_config"],
            "vision": fields["visual_tokenizer_config"]["backbone_config"],
        },
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "settings.json"
        path.write_text(json.dumps(settings))
        module = "benchmarks.support.accelerator.torch_worker"
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield TorchWorker(process)
        finally:
            process.kill()
            process.communicate()


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        cases.omit("PyTorch", f"not installed: {', '.join(missing)}")
        return
    if jax.default_backend() == "tpu":
        cases.omit("PyTorch", "it does not run on TPUs")
        return
    speed = SpeedMeasurements(settings)
    with start_torch(settings.sizes.config) as worker:

        def start() -> dict[str, Any]:
            _ = speed.random  # made while PyTorch starts
            return {"torch": worker.wait_until_ready()}

        if cases.run("PyTorch", start, 2 * param_bytes_per_device(settings.sizes.config)):
            compare_stages(settings, cases, worker, speed)


def compare_stages(
    settings: Settings, cases: CaseRunner, worker: TorchWorker, speed: SpeedMeasurements
) -> None:
    """Compare the stages: first PyTorch's plain variants, then those that compile."""
    sizes = settings.sizes
    needed = 2 * param_bytes_per_device(sizes.config)

    @cache
    def ours(stage: str, size: int) -> PreparedStage:
        if stage == "decode":
            return speed.prepare_decode(size)
        if stage == "prefill":
            return speed.prepare_prefill(size)
        return speed.prepare_vision(size, through_embeddings=False)

    def add(case: str, stage: str, size: int, **command: Any) -> None:
        cases.run(
            case,
            lambda: compare(worker, speed, ours(stage, size), {"stage": stage, **command}),
            needed,
        )

    def decode(rows: int, mode: str) -> None:
        add(
            f"decode, {rows} row(s), {mode}",
            "decode",
            rows,
            rows=rows,
            positions=sizes.decode_length,
            steps=sizes.timed_steps,
            calls=sizes.decode_calls,
            mode=mode,
        )

    def prefill(length: int, attention: str) -> None:
        case = f"prompt of {length} positions, {attention}"
        add(case, "prefill", length, positions=length, attention=attention)

    rows, lengths = sizes.decode_rows, sizes.prompt_lengths
    decode(rows[0], "dynamic")
    prefill(lengths[0], "eager")
    for crops in sizes.num_crops:
        add(f"vision encoder, {crops} crop(s)", "vision", crops, crops=crops)
    for length in lengths[1:]:
        prefill(length, "eager")
    for number in rows[1:]:
        decode(number, "dynamic")
    compiler = "eager" if settings.rehearse else "inductor"  # inductor takes a minute
    if not settings.rehearse:
        prefill(lengths[0], "flex_attention")
    decode(rows[0], compiler)
    decode(rows[1], compiler)
    if find_spec("flash_attn") is not None:
        prefill(lengths[0], "flash_attention_2")


def compare(
    worker: TorchWorker, speed: SpeedMeasurements, stage: PreparedStage, command: dict[str, Any]
) -> dict[str, Any]:
    """Time a stage on both sides, in turn.

    Args:
      worker: PyTorch's side.
      speed: Our side.
      stage: The stage on our side.
      command: The stage on PyTorch's side.

    Returns:
      Our result, PyTorch's times, and their ratio: above 1, ovis_jax is faster.

    Raises:
      TorchError: PyTorch raised an error.
    """
    worker.call(**command)  # includes compilation
    # PyTorch's own clock does not count the way to its process.
    torch_seconds: list[float] = []
    calls = {"ours": stage.call, "torch": lambda: torch_seconds.append(worker.call())}
    ours = time_in_turns(calls, speed.sizes.repeats)["ours"]
    theirs = Timings(tuple(torch_seconds[1:]))
    ratios = [t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True)]
    return {
        **speed.stage_fields(stage, ours),
        "torch_step": Timings(tuple(t / stage.steps for t in theirs.seconds)).to_json(),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }
