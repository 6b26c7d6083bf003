"""How much time and memory does a full-size checkpoint take on this machine?

`python -m benchmarks.full_size_inference FOLDER` loads a checkpoint, and generates an answer and
its first token alone, each of them twice. Resident memory has two parts: mapped pages of the weight
files, which the system can drop, and the private memory of the process, which must fit.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.support.benchmark_model import BenchmarkDtypeOption
from benchmarks.support.random_inputs import random_inputs, tree_bytes
from benchmarks.support.results import JsonOption, print_results, write_results
from ovis_jax import generate, load

STATUS = Path("/proc/self/status")


def mapped_and_private_memory() -> dict[str, int]:
    """Return the resident bytes of mapped files and of private memory (Linux only)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {
        name: 1024 * int(lines[key].split()[0])
        for name, key in (("mapped", "RssFile"), ("own", "RssAnon"))
    }


def main(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder, converted or in the Hub's layout.")
    ],
    dtype: BenchmarkDtypeOption = "bfloat16",
    length: Annotated[int, typer.Option(min=1, help="Prompt length in positions.")] = 64,
    crops: Annotated[int, typer.Option(min=0, help="Number of crops.")] = 0,
    new_tokens: Annotated[int, typer.Option(min=2, help="Number of tokens per answer.")] = 4,
    json_path: JsonOption = None,
) -> None:
    """Load a checkpoint, generate answers, and print the time and memory."""
    rows: list[dict[str, Any]] = []

    def time_step(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds = time.perf_counter() - start
        rows.append({"step": name, "seconds": seconds, **mapped_and_private_memory()})
        return result

    ovis = time_step("load", lambda: load(folder, dtype=dtype))
    inputs = random_inputs(ovis.config, 1, length, crops)

    def answer(num_tokens: int) -> Callable[[], Any]:
        options = {"max_new_tokens": num_tokens, "eos_ids": ()}
        return lambda: generate(ovis.model, ovis.params, inputs, **options).tokens

    time_step("first answer, with compilation", answer(new_tokens))
    tokens = time_step("second answer", answer(new_tokens))
    time_step("first token, with compilation", answer(1))
    time_step("first token", answer(1))
    step = (rows[2]["seconds"] - rows[4]["seconds"]) / (new_tokens - 1)
    weight_bytes = tree_bytes(ovis.params)
    print_results(
        f"{folder.name}: {weight_bytes / 2**30:.2f} GiB, {dtype}, {length} positions,"
        f" {crops} crop(s), {new_tokens} tokens, {step:.2f} seconds per further token",
        ["", "seconds", "mapped GiB", "private GiB"],
        [
            [
                row["step"],
                f"{row['seconds']:.1f}",
                *(f"{row[part] / 2**30:.2f}" for part in ("mapped", "own")),
            ]
            for row in rows
        ],
    )
    facts = {"weights": weight_bytes, "tokens": tokens.tolist(), "positions": length, "step": step}
    write_results(json_path, facts, rows=rows)


if __name__ == "__main__":
    typer.run(main)
