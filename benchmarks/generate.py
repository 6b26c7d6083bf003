"""How long until the first token, and how many tokens a second after it?

`python -m benchmarks.generate --model FOLDER` or `--preset tiny` with random weights. Times are of
this machine in this minute: compare figures of one run only.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table

from ovis_jax import Inputs, Ovis, generate, load, presets
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.image import IMAGE_SLOT

PRESETS = {
    "tiny": presets.tiny,
    "bench": presets.bench,
    "9b": presets.ovis1_6_gemma2_9b,
    "27b": presets.ovis1_6_gemma2_27b,
}


def prompts(config: OvisConfig, batch: int, length: int, crops: int) -> Inputs:
    """Random text rows of `length` positions, of which `crops` crops a row are visual slots."""
    slots = crops * config.visual_tokenizer.tokens_per_crop
    length = max(length, slots + 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, config.decoder.vocab_size, (batch, length)).astype(np.int32)
    tokens[:, 1 : 1 + slots] = IMAGE_SLOT
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    side = config.vision.image_size
    pixels = rng.normal(size=(batch * crops, side, side, 3)).astype(np.float32)
    return Inputs(tokens, positions, pixels)


def seconds(model: Ovis, params, inputs: Inputs, tokens: int, repeats: int) -> list[float]:
    """Times of whole warm calls of `generate`; the call that compiles is not among them."""

    def call() -> float:
        start = time.perf_counter()
        out = generate(model, params, inputs, max_new_tokens=tokens, eos_ids=())
        jax.block_until_ready(out)
        return time.perf_counter() - start

    call()
    return [call() for _ in range(repeats)]


def main(
    model: Annotated[str | None, typer.Option(help="A checkpoint.")] = None,
    preset: Annotated[str, typer.Option(help="Random weights: " + ", ".join(PRESETS))] = "tiny",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "bfloat16",
    batch: Annotated[list[int] | None, typer.Option(help="Rows; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Prompt positions.")] = 256,
    crops: Annotated[int, typer.Option(help="Crops a row.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after the first.")] = 32,
    repeats: Annotated[int, typer.Option()] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Measure `generate` end to end, warm."""
    if model is not None:
        loaded = load(model, dtype=dtype)
        ovis, params = loaded.model, loaded.params
    else:
        ovis = Ovis(PRESETS[preset]())
        params = jax.jit(ovis.init, static_argnums=1)(jax.random.key(0), jnp.dtype(dtype))
    names = ["batch", "first token s", "tokens/s", "spread"]
    table = Table(*(Column(name, justify="right") for name in names))
    rows = []
    for rows_a_batch in batch or [1, 4]:
        inputs = prompts(ovis.config, rows_a_batch, length, crops)
        first = statistics.median(seconds(ovis, params, inputs, 1, repeats))
        whole = seconds(ovis, params, inputs, new_tokens + 1, repeats)
        rates = [rows_a_batch * new_tokens / max(time - first, 1e-9) for time in whole]
        rate = statistics.median(rates)
        rows.append(
            {
                "batch": rows_a_batch,
                "first_token_seconds": first,
                "tokens_per_second": rate,
                "slowest": min(rates),
                "fastest": max(rates),
            }
        )
        spread = f"{min(rates):.1f} - {max(rates):.1f}"
        table.add_row(str(rows_a_batch), f"{first:.3f}", f"{rate:.1f}", spread)
    device = jax.devices()[0].device_kind
    Console().print(f"{model or preset}, {dtype}, {length} positions, {crops} crop(s), {device}")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps({"device": device, "dtype": dtype, "rows": rows}, indent=2))


if __name__ == "__main__":
    typer.run(main)
