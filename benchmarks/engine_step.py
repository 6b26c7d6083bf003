"""How much longer does a step of the engine take than the compiled decode step alone?

`python -m benchmarks.engine_step --model ovis-tiny`, or `--preset bench` with random weights. In
the engine, the tokens of each step also go to the host, which turns them into text for their
requests. A step of the engine is the difference between long and short answers to the same prompts.
Both kinds of step take turns.
"""

import time
from typing import Annotated

import jax
import numpy as np
import typer

from benchmarks.support.accelerator.correctness import submit_and_wait
from benchmarks.support.benchmark_model import (
    CheckpointOption,
    PresetOption,
    load_or_init_model,
)
from benchmarks.support.placeholder_tokenizer import with_placeholder_tokenizer
from benchmarks.support.results import JsonOption, print_results, write_results
from benchmarks.support.timing import Timings, format_timing
from ovis_jax import LoadedOvis
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.scheduler import Scheduler

PROMPT_LENGTH = 8
SHORT_ANSWER = 8


def answer(scheduler: Scheduler, num_seqs: int, num_tokens: int) -> float:
    """Generate answers of a fixed length to different prompts; return the seconds."""
    pixels = np.zeros((0, 1, 1, 3), np.float32)
    prompts = [(np.full(PROMPT_LENGTH, 300 + n, np.int32), pixels) for n in range(num_seqs)]
    start = time.perf_counter()
    submit_and_wait(scheduler, prompts, num_tokens, ignore_eos=True)
    return time.perf_counter() - start


def engine_step(scheduler: Scheduler, num_seqs: int, steps: int) -> float:
    """Return the seconds of a step in the engine while all sequences are running."""
    short = answer(scheduler, num_seqs, SHORT_ANSWER)
    return (answer(scheduler, num_seqs, SHORT_ANSWER + steps) - short) / steps


def bare_step(runner: ModelRunner, cache_length: int, steps: int) -> float:
    """Return the seconds of the compiled decode step."""
    state = jax.block_until_ready(runner.init_decode_state(cache_length))
    active = np.ones(runner.max_num_seqs, bool)
    start = time.perf_counter()
    for _ in range(steps):
        state, _ = runner.run_decode(state, active, "greedy")
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "bench",
    num_seqs: Annotated[
        int, typer.Option(min=1, help="Number of sequences, which fill all slots.")
    ] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Number of timed steps per round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    json_path: JsonOption = None,
) -> None:
    """Compare a step of the engine with the compiled decode step."""
    chosen = load_or_init_model(model, preset, "bfloat16")
    if chosen.processor is None:
        loaded = with_placeholder_tokenizer(chosen.model, chosen.params)
    else:
        loaded = LoadedOvis(chosen.model.config, chosen.model, chosen.params, chosen.processor)
    length = PROMPT_LENGTH + SHORT_ANSWER + steps
    runner = ModelRunner(
        loaded.model, loaded.params, max_num_seqs=num_seqs, max_model_len=length, chunk_size=8
    )
    scheduler = Scheduler(loaded, runner, max_queued_requests=num_seqs, enable_prefix_caching=False)
    seconds: dict[str, list[float]] = {"decode step alone": [], "step of the engine": []}
    for number in range(rounds + 1):
        found = (
            bare_step(runner, runner.cache_lengths[-1], steps),
            engine_step(scheduler, num_seqs, steps),
        )
        for values, value in zip(seconds.values(), found, strict=True):
            values += [value] if number else []  # the first round is a warm-up
    scheduler.close(60.0)
    timings = {name: Timings(tuple(values)).to_json() for name, values in seconds.items()}
    bare, engine = (timing["median"] for timing in timings.values())
    host_share = 1 - bare / engine
    print_results(
        f"{chosen.name}: {num_seqs} sequences, {jax.devices()[0].device_kind}; the host's share of"
        f" the engine's step is {host_share:.0%}",
        ["", "ms, median (fastest - slowest)"],
        [(name, format_timing(timing)) for name, timing in timings.items()],
    )
    write_results(json_path, name=chosen.name, num_seqs=num_seqs, host_share=host_share, **timings)


if __name__ == "__main__":
    typer.run(main)
