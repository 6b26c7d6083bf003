"""The commands `ovis-jax generate` and `ovis-jax chat`."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console

from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    KVCacheDtypeOption,
    MaxNewTokensOption,
    MaxPartitionOption,
    ModelOption,
    QuantizationOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TensorParallelOption,
    TopKOption,
    TopPOption,
    parse_image_path,
    print_error,
)
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import PartialAnswer, load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.process_agreement import agree
from ovis_jax.process_options import (
    CoordinatorOption,
    DistributedOption,
    NumProcessesOption,
    ProcessIdOption,
    run_in_processes,
)


def generate_command(
    prompt: Annotated[
        str, typer.Option(help='Text of the prompt; "<image>" marks the place of an image.')
    ],
    model: ModelOption = "ovis-tiny",
    image: Annotated[
        list[str] | None,
        typer.Option(parser=parse_image_path, metavar="PATH", help="Image file; may be repeated."),
    ] = None,
    assistant_prefix: Annotated[
        str, typer.Option(help="Text with which the answer begins; it is not printed.")
    ] = "",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = 0,
    max_partition: MaxPartitionOption = 9,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as a JSON object.")
    ] = False,
    distributed: DistributedOption = False,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Answer a prompt about images, and print the text while it is generated."""
    with run_in_processes(distributed, coordinator, num_processes, process_id):
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        sampling.check()
        with agree("the question") as values:
            images = [open_image(path) for path in image or []]
            values["sizes of the images"] = ", ".join(f"{x.width} x {x.height}" for x in images)
        ovis = load(
            model,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            adapters=adapters,
            mesh=tensor_parallel_mesh(tensor_parallel),
        )
        steps = ovis.stream_answer(
            prompt,
            images,
            assistant_prefix=assistant_prefix,
            sampling=sampling,
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_partition=max_partition,
        )
        if as_json:
            *_, answer = steps
            fields = {key: value for key, value in asdict(answer).items() if key != "delta"}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            _print_answer(steps)


def chat_command(
    model: ModelOption = "ovis-tiny",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = 0,
    max_partition: MaxPartitionOption = 9,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Chat with a model about images in the terminal."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    sampling.check()
    ovis = load(
        model,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        adapters=adapters,
        mesh=tensor_parallel_mesh(tensor_parallel),
    )
    answer = partial(
        ovis.stream_answer,
        sampling=sampling,
        seed=seed,
        max_new_tokens=max_new_tokens,
        max_partition=max_partition,
        parse_image_placeholders=False,  # neither a question nor an answer can place an image
    )
    notes = Console(stderr=True, highlight=False)
    notes.print(
        "/image FILE adds an image to the next message, /new starts a new conversation, /exit ends"
    )
    turns: list[Turn] = []
    images: list[Image.Image] = []
    attached: list[Image.Image] = []
    while (line := _read_line()) is not None and line != "/exit":
        try:
            if line == "/new":
                turns, images, attached = [], [], []
            elif line.startswith("/image "):
                attached.append(open_image(parse_image_path(line.removeprefix("/image ").strip())))
            elif line.startswith("/"):
                raise OvisError(
                    f"{line.split()[0]} is not a command; use /image FILE, /new or /exit"
                )
            elif line:
                parts = [*[{"type": "image"}] * len(attached), {"type": "text", "text": line}]
                asked = [*turns, {"role": "user", "content": parts}]
                text = _print_answer(answer(asked, images + attached))
                turns = [*asked, {"role": "assistant", "content": text}]
                images, attached = images + attached, []
        except OvisError as error:
            print_error(notes, error)


def _print_answer(steps: Iterable[PartialAnswer]) -> str:
    """Print an answer while it is generated, and return its text."""
    text = ""
    for step in steps:
        print(step.delta, end="", flush=True)
        text = step.text
    print(flush=True)
    return text


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
