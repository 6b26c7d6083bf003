"""How much faster is continuous batching, and does the server survive a load test?

`python -m benchmarks.server_throughput` starts a server, and a client in another process. In each
round, the client asks for descriptions of the same pictures, first one at a time, then several at a
time. `--requests 1000` then sends random requests: images of random sizes, clients that disconnect,
and malformed bodies. The report contains the result of each request, and the memory and the number
of slots in use before and after the load test.
"""

import asyncio
import multiprocessing
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
import uvicorn

from benchmarks.support import server_load
from benchmarks.support.results import JsonOption, print_results, write_results
from benchmarks.support.timing import Timings, format_timing
from ovis_jax import load
from ovis_jax.engine.scheduler import Scheduler, run_engine
from ovis_jax.server.app import create_app
from ovis_jax.server.preprocess import RequestLimits
from recipes.ovis_tiny import dataset_rows
from recipes.ovis_tiny.scenes import draw_scene


def description_request(seed: int) -> dict[str, Any]:
    """Return the body of a question with a long answer: a description of a test picture."""
    row = dataset_rows.evaluation_row(random.Random(seed), "test", "describe", "en", False)
    text = row.entry["conversations"][0]["value"].replace("<image>", "").strip()
    urls = [server_load.png_data_url(draw_scene(scene)) for scene in row.scenes]
    return server_load.chat_body(text, *urls, max_tokens=128)


@contextmanager
def run_server(server: uvicorn.Server) -> Iterator[str]:
    """Run a server in a thread, on any free port; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections from now on
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def compare_throughput(
    url: str, bodies: list[dict[str, Any]], concurrency: int, rounds: int
) -> dict[str, Any]:
    """Measure tokens per second, one request at a time and `concurrency` at a time, in turn."""
    rates: dict[int, list[float]] = {1: [], concurrency: []}
    tokens = 0
    # The client must not share a Python interpreter with the server.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        for number in range(rounds + 1):
            for at_once, found in rates.items():
                timed = client.submit(server_load.time_requests, url, bodies, at_once)
                tokens, seconds = timed.result()
                if number:  # the first round is a warm-up
                    found.append(tokens / seconds)
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    return {
        "one_at_a_time": Timings(tuple(rates[1])).to_json(),
        "concurrent": Timings(tuple(rates[concurrency])).to_json(),
        "tokens_per_answer": tokens / len(bodies),
        "ratio": Timings(tuple(ratios)).to_json(),
    }


def run_soak_test(
    url: str, scheduler: Scheduler, num_requests: int, concurrency: int
) -> dict[str, Any]:
    """Send random requests; return their results, and the memory and slots in use."""

    def memory() -> int:
        pages = Path("/proc/self/statm")
        if pages.exists():
            return int(pages.read_text().split()[1]) * resource.getpagesize()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, start = memory(), time.perf_counter()
    results = asyncio.run(server_load.send_random_requests(url, num_requests, concurrency))
    seconds = time.perf_counter() - start
    with scheduler.changed:  # requests of clients that left
        scheduler.changed.wait_for(lambda: not (scheduler.num_running or scheduler.num_waiting))
    return {
        "requests": num_requests,
        "seconds": seconds,
        "results": dict(sorted(results.items())),
        "memory_before": before,
        "memory_after": memory(),
        "slots_in_use_after": scheduler.num_running,
    }


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or ovis-tiny.")] = "ovis-tiny",
    concurrency: Annotated[
        int, typer.Option(min=2, help="Number of concurrent requests and of slots.")
    ] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Number of questions per round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 7,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Number of prompt positions per prefill step.")
    ] = 32,
    max_model_len: Annotated[
        int,
        typer.Option(min=64, help="Maximum length of a prompt and its answer."),
    ] = 256,
    requests: Annotated[
        int, typer.Option(min=0, help="Number of requests in the load test; 0 skips it.")
    ] = 0,
    output: JsonOption = None,
) -> None:
    """Measure the throughput of a server after compilation."""
    ovis = load(model)
    bodies = [description_request(n) for n in range(questions)]
    load_test = None
    with run_engine(
        ovis,
        max_num_seqs=concurrency,
        max_model_len=max_model_len,
        chunk_size=prefill_chunk,
        max_queued_requests=4 * concurrency,
    ) as scheduler:
        app = create_app([scheduler], "ovis-tiny", limits=RequestLimits(request_timeout=600))
        with run_server(uvicorn.Server(uvicorn.Config(app, log_level="warning"))) as url:
            found = compare_throughput(url, bodies, concurrency, rounds)
            if requests:
                load_test = run_soak_test(url, scheduler, requests, 3 * concurrency)
    print_results(
        f"{model}, {questions} questions per round, answers of "
        f"{found['tokens_per_answer']:.0f} tokens, {jax.devices()[0].device_kind}; tokens/s",
        ["concurrent requests", "median (slowest - fastest)"],
        [
            ("1", format_timing(found["one_at_a_time"], 1)),
            (str(concurrency), format_timing(found["concurrent"], 1)),
            ("ratio", format_timing(found["ratio"], 1)),
        ],
    )
    if load_test is not None:
        print_results(
            f"load test of {requests} requests, {load_test['seconds']:.0f} s",
            ["result", "count"],
            [
                *load_test["results"].items(),
                ("slots in use afterwards", load_test["slots_in_use_after"]),
                ("MiB before", load_test["memory_before"] / 2**20),
                ("MiB after", load_test["memory_after"] / 2**20),
            ],
        )
    write_results(
        output,
        name=model,
        concurrency=concurrency,
        questions=questions,
        prefill_chunk=prefill_chunk,
        **found,
        load_test=load_test,
    )
    if load_test is not None and (
        any(result.startswith("wrong") for result in load_test["results"])
        or load_test["slots_in_use_after"]
    ):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
