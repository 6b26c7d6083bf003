"""One training step beside PyTorch's: tokens a second and peak memory, on one small model.

`python -m benchmarks.train_against_torch`. Both sides learn everything of the same model from the
same batch with the same loss and AdamW behind clipping. Each side is a process of its own, and the
two take turns, repeat by repeat, so that what else the machine does meets both. PyTorch's side is
`tests/reference/ovis_torch.py`; its bfloat16 is autocast over float32 weights. Peak memory is the
process's own; "in steps" is what the steps added to the libraries, the model and compiled code.
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

from benchmarks.models import prompts
from ovis_jax import Ovis
from ovis_jax.config import DecoderConfig, OvisConfig, VisionConfig, VisualTokenizerConfig
from ovis_jax.inputs.conversation import IGNORED
from ovis_jax.training.losses import Batch
from ovis_jax.training.parts import PARTS, split
from ovis_jax.training.step import Recipe, stack, start, step

ROOT = Path(__file__).parent.parent
SIDES = ("jax", "torch")
HUGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Memory is kept from step to step, in pages of 2 MiB."""


@dataclass(frozen=True)
class Case:
    """What is trained: `width` is that of vision and decoder; one 84-pixel crop a row."""

    width: int
    dtype: str
    rows: int
    length: int
    threads: int


def config(width: int) -> OvisConfig:
    """A small model: heads of 32, four blocks on either side."""
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


def batch(case: Case) -> Batch:
    """Random rows that begin with a crop; the second half of each is learned."""
    inputs = prompts(config(case.width), case.rows, case.length, crops=1)
    learned = np.arange(case.length) >= case.length // 2
    return Batch(inputs, jnp.where(learned, inputs.tokens, IGNORED))


def jax_step(case: Case) -> Callable[[], float]:
    """A call that makes one step and gives its loss."""
    model = Ovis(config(case.width))
    recipe = Recipe(compute_dtype=jnp.dtype(case.dtype))
    learned, frozen = split(jax.jit(model.init)(jax.random.key(0)), list(PARTS))
    state = start(recipe, learned)
    batches = jax.device_put(stack([batch(case)]))
    compiled = step.lower(model, recipe, state, frozen, batches).compile()

    def call() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batches)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return call


def torch_step(case: Case) -> Callable[[], float]:
    """The same in PyTorch."""
    sys.path.insert(0, str(ROOT / "tests"))
    # Neither is installed where the package is only used.
    torch: Any = import_module("torch")
    reference_module: Any = import_module("reference.ovis_torch")
    torch.set_num_threads(case.threads)
    reference = reference_module.OvisTorch.random(config(case.width), seed=0)
    parameters = list(reference.model.requires_grad_(True).parameters())
    recipe = Recipe()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(recipe.b1, recipe.b2),
        weight_decay=0.0,
        fused=True,
    )
    inputs, labels = batch(case)
    pixels = np.ascontiguousarray(inputs.pixels.transpose(0, 3, 1, 2))
    labels = np.array(labels)

    def call() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = reference.loss(inputs.tokens, labels, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        return loss.item()

    return call


def side(name: str, case: Case) -> None:
    """Be one side: for each line read make a step, and say what it took.

    The first answer comes after two steps that nobody asked for.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-case.threads :])
    call = {"jax": jax_step, "torch": torch_step}[name](case)
    before = peak_bytes()
    for _ in range(2):
        call()
    print(json.dumps({"before": before}), flush=True)
    for _ in sys.stdin:
        begun, cpu = time.perf_counter(), time.process_time()
        loss = call()
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        answer = {"seconds": took, "cpu_seconds": cpu, "loss": loss, "peak": peak_bytes()}
        print(json.dumps(answer), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Side:
    """A process that is one side."""

    def __init__(self, name: str, case: Case, huge_pages: bool):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(case.threads)}
        if huge_pages:
            environment |= HUGE_PAGES
        code = f"from benchmarks.train_against_torch import *; side({name!r}, {case!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.before: int = self.read()["before"]
        self.answers: list[dict[str, float]] = []

    def read(self) -> dict[str, Any]:
        """The next answer."""
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            raise SystemExit(f"a side ended with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> None:
        """Ask for a step."""
        print("step", file=self.process.stdin, flush=True)
        self.answers.append(self.read())

    def summary(self, case: Case) -> dict[str, Any]:
        """Medians and extremes over the steps; ends the process."""
        self.process.communicate()
        seconds = [answer["seconds"] for answer in self.answers]
        return {
            "tokens_per_second": case.rows * case.length / statistics.median(seconds),
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "cpu_seconds": statistics.median(answer["cpu_seconds"] for answer in self.answers),
            "peak": self.answers[-1]["peak"],
            "before": self.before,
            "losses": [answer["loss"] for answer in self.answers],
        }


def compare(case: Case, repeats: int, huge_pages: bool = False) -> dict[str, dict[str, Any]]:
    """Let both sides make steps in turn; what each took, by side."""
    sides = {name: Side(name, case, huge_pages) for name in SIDES}
    for _ in range(repeats):
        for one in sides.values():
            one.step()
    return {name: one.summary(case) for name, one in sides.items()}


def main(
    width: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="Of a batch, each with one crop.")] = 32,
    length: Annotated[int, typer.Option(help="Positions of a row.")] = 96,
    repeats: Annotated[int, typer.Option(help="Steps a side.")] = 7,
    threads: Annotated[int, typer.Option(help="Cores that each side may use.")] = 2,
    huge_pages: Annotated[bool, typer.Option(help="For both sides' memory (glibc).")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Measure one training step of both sides in turn."""
    names = (
        "width",
        "dtype",
        "side",
        "tokens/s",
        "s a step",
        "spread",
        "CPU s",
        "peak MiB",
        "in steps",
    )
    table = Table(*(Column(name, justify="right", no_wrap=True) for name in names))
    found = []
    for one_width in width or [128, 512]:
        for one_dtype in dtype or ["float32", "bfloat16"]:
            case = Case(one_width, one_dtype, rows, length, threads)
            for name, result in compare(case, repeats, huge_pages).items():
                found.append({"side": name, **asdict(case), **result})
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
    Console().print(f"{rows} rows x {length} positions, one crop a row, {threads} core(s) a side")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps({"huge_pages": huge_pages, "rows": found}, indent=2))


if __name__ == "__main__":
    typer.run(main)
