"""One short answer of a checkpoint as large as the machine: `python -m benchmarks.full_size DIR`.

What it takes from the folder to the last token: seconds, and resident memory in two parts. Mapped
pages of the weights are the file's own and the system may drop them; the rest is the process's own,
and has to fit.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.measure import machine, nbytes, print_table, write_json
from benchmarks.models import prompts
from ovis_jax import generate, load

STATUS = Path("/proc/self/status")


def resident() -> dict[str, int]:
    """Bytes of mapped files and of the process's own memory that are resident now (Linux)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    kib = {
        name: int(lines[key].split()[0])
        for name, key in (("mapped", "RssFile"), ("own", "RssAnon"))
    }
    return {name: 1024 * n for name, n in kib.items()}


def main(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Converted, or in the Hub's layout.")
    ],
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    length: Annotated[int, typer.Option(min=1, help="Positions of the prompt.")] = 64,
    crops: Annotated[int, typer.Option(min=0)] = 0,
    new_tokens: Annotated[int, typer.Option(min=1)] = 4,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Load, and answer twice."""
    rows: list[dict[str, Any]] = []

    def step(name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = jax.block_until_ready(call())
        rows.append({"step": name, "seconds": time.perf_counter() - begun, **resident()})
        return result

    ovis = step("load", lambda: load(folder, dtype=dtype))
    inputs = prompts(ovis.config, 1, length, crops)

    def answer() -> Any:
        how = {"max_new_tokens": new_tokens, "eos_ids": ()}
        return generate(ovis.model, ovis.params, inputs, **how).tokens

    for name in ("first answer, with compiling", "second answer"):
        found = step(name, answer)
    print_table(
        f"{folder.name}: {nbytes(ovis.params) / 2**30:.2f} GiB of {dtype}, {length} positions,"
        f" {crops} crop(s), {new_tokens} tokens",
        ["", "seconds", "mapped GiB", "own GiB"],
        [
            [
                row["step"],
                f"{row['seconds']:.1f}",
                *(f"{row[x] / 2**30:.2f}" for x in ("mapped", "own")),
            ]
            for row in rows
        ],
    )
    if output is not None:
        facts = {"weights": nbytes(ovis.params), "tokens": found.tolist(), "positions": length}
        write_json(output, machine=machine(**facts), rows=rows)


if __name__ == "__main__":
    typer.run(main)
