"""What does it gain to write many answers at once, and does the server stay whole in a storm?

`python -m benchmarks.serving` has pictures described, the same ones one after the other and then so
many at a time, round by round in one run, over HTTP on the loopback from a client in a process of
its own. `--requests 1000` then sends a storm of all kinds: random sizes, clients that leave,
malformed bodies. It says what became of each, and what memory and slots were taken before and
after.
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

from benchmarks import measure, storm
from ovis_jax import load
from ovis_jax.serving.app import make_app
from ovis_jax.serving.engine import Engine
from ovis_jax.serving.prepare import Limits
from ovis_jax.serving.steps import Steps
from recipes.ovis_tiny import rows
from recipes.ovis_tiny.scenes import draw


def describe(seed: int) -> dict[str, Any]:
    """The body of a question with a long answer: everything in a picture of the test's kind."""
    row = rows.scored_row(random.Random(seed), "test", "describe", "en", False)
    text = row.entry["conversations"][0]["value"].replace("<image>", "").strip()
    return storm.ask(text, *(storm.data_url(draw(scene)) for scene in row.scenes), max_tokens=128)


@contextmanager
def listening(server: uvicorn.Server) -> Iterator[str]:
    """Run a server in a thread; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def compare(
    url: str, bodies: list[dict[str, Any]], concurrency: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second of both ways, in turn."""
    rates: dict[int, list[float]] = {1: [], concurrency: []}
    tokens = 0
    # A process that shares no interpreter with the server, as clients do not.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        for number in range(rounds + 1):
            for at_once, found in rates.items():
                tokens, seconds = client.submit(storm.ask_all, url, bodies, at_once).result()
                if number:  # the first round warms
                    found.append(tokens / seconds)
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    return {
        "one_at_a_time": measure.Times(tuple(rates[1])).to_json(),
        "concurrent": measure.Times(tuple(rates[concurrency])).to_json(),
        "tokens_per_answer": tokens / len(bodies),
        "ratio": measure.Times(tuple(ratios)).to_json(),
    }


def soak(url: str, engine: Engine, requests: int, at_once: int) -> dict[str, Any]:
    """Send a storm; what became of its requests, and what was taken before and after."""

    def memory() -> int:
        pages = Path("/proc/self/statm")
        if pages.exists():
            return int(pages.read_text().split()[1]) * resource.getpagesize()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, start = memory(), time.perf_counter()
    ends = asyncio.run(storm.storm(url, requests, at_once))
    seconds = time.perf_counter() - start
    while engine.running or engine.waiting:  # what clients have left ends at the next step
        time.sleep(0.01)
    return {
        "requests": requests,
        "seconds": seconds,
        "ends": dict(sorted(ends.items())),
        "memory_before": before,
        "memory_after": memory(),
        "slots_taken_after": engine.running,
    }


def main(
    model: Annotated[str, typer.Option(help="A checkpoint, or ovis-tiny.")] = "ovis-tiny",
    concurrency: Annotated[int, typer.Option(min=2, help="Requests at once, and slots.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Asked in each round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    piece: Annotated[int, typer.Option(min=1, help="Prompt positions read at a time.")] = 32,
    max_length: Annotated[int, typer.Option(min=64, help="Positions of a slot.")] = 256,
    requests: Annotated[int, typer.Option(min=0, help="Of a storm; 0 for none.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Measure the server's throughput, warm."""
    ovis = load(model)
    steps = Steps(
        ovis.model, ovis.params, num_slots=concurrency, max_length=max_length, piece=piece
    )
    engine = Engine(ovis, steps, queue=4 * concurrency)
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=Limits(seconds=600))
    bodies = [describe(n) for n in range(questions)]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with listening(server) as url:
        found = compare(url, bodies, concurrency, rounds)
        stayed = soak(url, engine, requests, 3 * concurrency) if requests else None
    measure.print_table(
        f"{model}, {questions} questions a round, answers of "
        f"{found['tokens_per_answer']:.0f} tokens, {jax.devices()[0].device_kind}; tokens/s",
        ["requests at once", "median (slowest - fastest)"],
        [
            ("1", measure.spread(found["one_at_a_time"], 1)),
            (str(concurrency), measure.spread(found["concurrent"], 1)),
            ("ratio of the two", measure.spread(found["ratio"], 1)),
        ],
    )
    if stayed is not None:
        measure.print_table(
            f"a storm of {requests} requests, {stayed['seconds']:.0f} s",
            ["what", "how many"],
            [
                *stayed["ends"].items(),
                ("slots taken afterwards", stayed["slots_taken_after"]),
                ("MiB before", stayed["memory_before"] / 2**20),
                ("MiB after", stayed["memory_after"] / 2**20),
            ],
        )
    if output is not None:
        settings = {"concurrency": concurrency, "questions": questions, "piece": piece}
        measure.write_json(
            output, machine=measure.machine(), name=model, **settings, **found, soak=stayed
        )
    if stayed is not None and (
        any(end.startswith("wrong") for end in stayed["ends"]) or stayed["slots_taken_after"]
    ):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
