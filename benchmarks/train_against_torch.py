"""How does a training step compare with PyTorch in tokens per second and peak memory?

`python -m benchmarks.train_against_torch` measures a small model. Both implementations train all
its parameters on the same batch, with the same loss and with AdamW after gradient clipping. Each
implementation runs in its own process. They take turns step by step, so that other load on the
machine affects both. PyTorch's model is `tests/reference/ovis_torch.py`; in bfloat16, it uses
autocast over float32 weights. "Peak MiB" is the peak memory of the process; "in steps" excludes the
libraries, the model and compilation.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table

from benchmarks.support.machine_peaks import restrict_to_cores
from benchmarks.support.random_inputs import random_inputs
from benchmarks.support.results import JsonOption, write_results
from ovis_jax import Ovis
from ovis_jax.config import DecoderConfig, OvisConfig, VisionConfig, VisualTokenizerConfig
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import TrainBatch
from ovis_jax.training.train_step import init_train_state, stack_micro_batches, train_step
from ovis_jax.training.trainable import TRAINABLE_PARTS, split_params

ROOT = Path(__file__).parent.parent
IMPLEMENTATIONS = ("jax", "torch")
HUGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Environment that keeps memory between steps, in pages of 2 MiB."""


@dataclass(frozen=True)
class TrainingCase:
    """A step to measure.

    Attributes:
      width: width of the vision encoder and of the decoder.
      dtype: dtype of the computation.
      rows: rows per batch, with one crop of 84 x 84 pixels each.
      length: positions per row.
      threads: number of cores per implementation.
    """

    width: int
    dtype: str
    rows: int
    length: int
    threads: int


def small_config(width: int) -> OvisConfig:
    """Return the config of a small model: heads of 32, four blocks in each transformer."""
    vision = VisionConfig(
        width=width,
        depth=4,
        num_heads=width // 32,
        mlp_width=3 * width,
        image_size=84,
        patch_size=14,
        num_channels=3,
        norm_eps=1e-6,
    )
    decoder = DecoderConfig(
        vocab_size=1024,
        width=width,
        depth=4,
        num_heads=width // 32,
        num_kv_heads=width // 64,
        head_dim=32,
        mlp_width=3 * width,
        sliding_window=4096,
        query_pre_attn_scalar=32,
        attn_softcap=50.0,
        final_softcap=30.0,
        rope_theta=10000.0,
        norm_eps=1e-6,
    )
    tokenizer = VisualTokenizerConfig(vision, 256, 2, "softmax")
    return OvisConfig(tokenizer, decoder, 8192, eos_ids=(1, 107), bos_id=2, pad_id=0)


def random_batch(case: TrainingCase) -> TrainBatch:
    """Return random rows that begin with a crop and have labels in their second half."""
    inputs = random_inputs(small_config(case.width), case.rows, case.length, crops_per_row=1)
    has_label = np.arange(case.length) >= case.length // 2
    return TrainBatch(inputs, jnp.where(has_label, inputs.tokens, IGNORE_INDEX))


def make_jax_step(case: TrainingCase) -> Callable[[], float]:
    """Return a function that runs one step and returns its loss."""
    model = Ovis(small_config(case.width))
    config = StepConfig(max_steps=1000, compute_dtype=cast(Any, case.dtype))
    params = jax.jit(model.init)(jax.random.key(0))
    trainable, frozen = split_params(params, list(TRAINABLE_PARTS))
    state = init_train_state(config, trainable)
    batches = jax.device_put(stack_micro_batches([random_batch(case)]))
    compiled = train_step.lower(model, config, state, frozen, batches).compile()

    def run_step() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batches)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return run_step


def make_torch_step(case: TrainingCase) -> Callable[[], float]:
    """Return the same function for PyTorch."""
    sys.path.insert(0, str(ROOT / "tests"))
    # Type checkers cannot resolve these: users of the package do not have them.
    torch: Any = import_module("torch")
    reference_module: Any = import_module("reference.ovis_torch")
    torch.set_num_threads(case.threads)
    reference = reference_module.OvisTorch.random(small_config(case.width), seed=0)
    parameters = list(reference.model.requires_grad_(True).parameters())
    config = StepConfig(max_steps=1000)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=0.0,
        fused=True,
    )
    inputs, labels = random_batch(case)
    pixels = np.ascontiguousarray(inputs.pixels.transpose(0, 3, 1, 2))
    labels = np.array(labels)

    def run_step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = reference.loss(inputs.tokens, labels, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        return loss.item()

    return run_step


def worker_main(implementation: str, case: TrainingCase) -> None:
    """Run two steps, then one step per input line, and print each measurement as a JSON line."""
    restrict_to_cores(case.threads)
    run_step = {"jax": make_jax_step, "torch": make_torch_step}[implementation](case)
    before = peak_process_memory()
    for _ in range(2):
        run_step()
    print(json.dumps({"before": before}), flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = run_step()
        measurement = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "loss": loss,
            "peak": peak_process_memory(),
        }
        print(json.dumps(measurement), flush=True)


def peak_process_memory() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepWorker:
    """A process that runs the steps of one implementation."""

    def __init__(self, implementation: str, case: TrainingCase, huge_pages: bool):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(case.threads)}
        if huge_pages:
            environment |= HUGE_PAGES
        code = (
            "from benchmarks.train_against_torch import *;"
            f" worker_main({implementation!r}, {case!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._before: int = self._read()["before"]
        self._measurements: list[dict[str, float]] = []

    def _read(self) -> dict[str, Any]:
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise SystemExit(f"a worker exited with code {self._process.wait()}")
        return json.loads(line)

    def run_step(self) -> None:
        """Run a step and record its measurement."""
        print("step", file=self._process.stdin, flush=True)
        self._measurements.append(self._read())

    def finish(self, case: TrainingCase) -> dict[str, Any]:
        """End the process, and return medians and extremes over the steps."""
        self._process.communicate()
        seconds = [x["seconds"] for x in self._measurements]
        return {
            "tokens_per_second": case.rows * case.length / statistics.median(seconds),
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "cpu_seconds": statistics.median(x["cpu_seconds"] for x in self._measurements),
            "peak": self._measurements[-1]["peak"],
            "before": self._before,
            "losses": [x["loss"] for x in self._measurements],
        }


def compare_training_steps(
    case: TrainingCase, repeats: int, huge_pages: bool = False
) -> dict[str, dict[str, Any]]:
    """Run steps of both implementations in turn, and return the measurements of each."""
    workers = {name: StepWorker(name, case, huge_pages) for name in IMPLEMENTATIONS}
    for _ in range(repeats):
        for worker in workers.values():
            worker.run_step()
    return {name: worker.finish(case) for name, worker in workers.items()}


def main(
    width: Annotated[
        list[int] | None, typer.Option(help="Width of the model; may be repeated.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype of the computation; may be repeated.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Number of rows per batch, each with one crop.")] = 32,
    length: Annotated[int, typer.Option(help="Number of positions per row.")] = 96,
    repeats: Annotated[int, typer.Option(help="Number of measured steps.")] = 7,
    threads: Annotated[int, typer.Option(help="Number of cores per implementation.")] = 2,
    huge_pages: Annotated[bool, typer.Option(help="Use huge pages (glibc).")] = False,
    output: JsonOption = None,
) -> None:
    """Measure training steps of ovis_jax and PyTorch in turn."""
    names = (
        "width",
        "dtype",
        "implementation",
        "tokens/s",
        "s/step",
        "spread",
        "CPU s",
        "peak MiB",
        "in steps",
    )
    table = Table(*(Column(name, justify="right", no_wrap=True) for name in names))
    results = []
    for one_width in width or [128, 512]:
        for one_dtype in dtype or ["float32", "bfloat16"]:
            case = TrainingCase(one_width, one_dtype, rows, length, threads)
            for name, result in compare_training_steps(case, repeats, huge_pages).items():
                results.append({"implementation": name, **asdict(case), **result})
                table.add_row(
                    str(one_width),
                    one_dtype,
                    name,
                    f"{result['tokens_per_second']:.0f}",
                    f"{result['seconds']:.3f}",
                    f"{result['fastest']:.2f}-{result['slowest']:.2f}",
                    f"{result['cpu_seconds']:.3f}",
                    f"{result['peak'] / 2**20:.0f}",
                    f"{(result['peak'] - result['before']) / 2**20:.0f}",
                )
    Console().print(
        f"{rows} rows x {length} positions, one crop per row, {threads} core(s) per implementation"
    )
    Console().print(table)
    write_results(output, huge_pages=huge_pages, rows=results)


if __name__ == "__main__":
    typer.run(main)
