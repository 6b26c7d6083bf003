"""How much faster is a decode step with quantized matrices than with bfloat16?

`python -m benchmarks.quantized_decode_speed --model FOLDER`, or `--preset bench` with random
weights. The formats take turns, so that the ratios hold also on a machine with other load. A step
is a complete step of the decoder, from the token to the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import Array
from jaxtyping import Float

from benchmarks.support.benchmark_model import (
    CheckpointOption,
    PresetOption,
    load_or_init_model,
    quantize_params,
)
from benchmarks.support.results import JsonOption, print_results, write_results
from benchmarks.support.timing import time_in_turns
from ovis_jax import Ovis
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Params

FORMATS = ("bfloat16", "int8", "int4")


@partial(jax.jit, static_argnums=(0, 3))
def decode_steps(model: Ovis, params: Params, cache: Cache, steps: int) -> Float[Array, "B V"]:
    """Run decode steps that feed the most probable tokens; return the last logits."""

    def step(_: int, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        logits, cache = carry
        return model.decode(params, jnp.argmax(logits, axis=-1).astype(jnp.int32), cache)

    rows, decoder = len(cache.lengths), model.config.decoder
    logits = jnp.zeros((rows, decoder.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (logits, cache))[0]


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "bench",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size in rows; may be repeated.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Positions in the KV cache.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps per call.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 9,
    json_path: JsonOption = None,
) -> None:
    """Time the decode step in each format."""
    loaded = load_or_init_model(model, preset, "bfloat16")
    ovis, config = loaded.model, loaded.model.config
    params = {
        name: loaded.params if name == "bfloat16" else quantize_params(loaded.params, config, name)
        for name in FORMATS
    }
    results: list[dict[str, Any]] = []
    for rows in batch or [1, 8]:
        cache = ovis.empty_cache(rows, max_length, jnp.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(decode_steps, ovis, params[name], cache, steps) for name in FORMATS
        }
        timings = time_in_turns(calls, repeats)
        reference = timings["bfloat16"].seconds
        for name in FORMATS:
            ratios = sorted(a / b for a, b in zip(reference, timings[name].seconds, strict=True))
            seconds = timings[name].median / steps
            speedup = ratios[len(ratios) // 2]
            results.append({"format": name, "rows": rows, "seconds": seconds, "speedup": speedup})
    print_results(
        f"{loaded.name}: decode step, {jax.devices()[0].device_kind}",
        ["format", "rows", "ms per step", "speed relative to bfloat16"],
        [(r["format"], r["rows"], 1e3 * r["seconds"], f"{r['speedup']:.2f}") for r in results],
    )
    write_results(json_path, name=loaded.name, rows=results)


if __name__ == "__main__":
    typer.run(main)
