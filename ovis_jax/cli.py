"""The command line: generate, chat, train, inspect, verify, plan, ui, serve, eval, words."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from ovis_jax import mesh_axes
from ovis_jax import verify as golden_files
from ovis_jax.answering import Answer, Answerer, mark_images
from ovis_jax.checkpoint import checksums
from ovis_jax.checkpoint.params import plan_parameters
from ovis_jax.checkpoint.problems import CheckpointProblems
from ovis_jax.checkpoint.source import BUILT_IN, find_source
from ovis_jax.compile_cache import keep_compiled
from ovis_jax.config import OvisConfig
from ovis_jax.console import (
    Adapters,
    MaxPartition,
    Model,
    OtherDtype,
    TensorParallel,
    print_error,
)
from ovis_jax.errors import OvisError
from ovis_jax.evaluation.command import eval_
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.image import open_image
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.plan.command import plan
from ovis_jax.serving.command import serve
from ovis_jax.serving.page_command import ui
from ovis_jax.words.command import words

app = typer.Typer(
    help="Ovis1.6-Gemma2 vision-language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(ui)
app.command("eval")(eval_)
app.command()(words)
app.command()(serve)

Folder = Annotated[str, typer.Argument(help="A converted folder, or one in the Hub's layout.")]
MaxNewTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(help="Sample at this temperature; without it take the likeliest.")
]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest up to this sum.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the likeliest.")]
Penalty = Annotated[float | None, typer.Option(help="Penalty on tokens that were generated.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help='May say where an image stands: "<image>".')],
    model: Model = "ovis-tiny",
    image: Annotated[list[Path] | None, typer.Option(help="An image; may be repeated.")] = None,
    preface: Annotated[str, typer.Option(help="How the answer begins.")] = "",
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    max_partition: MaxPartition = 9,
    dtype: OtherDtype = None,
    adapters: Adapters = None,
    tensor_parallel: TensorParallel = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt about images; the text is printed as it comes."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    sampling.check()
    images = [open_image(path) for path in image or []]
    mesh = mesh_axes.tensor_parallel(tensor_parallel)
    ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
    answer = Answerer(ovis, sampling, seed, max_new_tokens, max_partition)
    result = _follow(answer(prompt, images, preface), show=not as_json)
    if as_json:
        fields = {key: value for key, value in asdict(result).items() if key != "added"}
        print(json.dumps(fields, ensure_ascii=False))


@app.command()
def chat(
    model: Model = "ovis-tiny",
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    max_partition: MaxPartition = 9,
    dtype: OtherDtype = None,
    adapters: Adapters = None,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Talk with a model, several turns, with images."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    sampling.check()
    mesh = mesh_axes.tensor_parallel(tensor_parallel)
    ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
    answer = Answerer(ovis, sampling, seed, max_new_tokens, max_partition)
    notes = Console(stderr=True, highlight=False)
    notes.print("/image FILE adds an image to the next message, /new starts over, /exit ends")
    turns: list[Turn] = []
    images: list[Image.Image] = []
    added: list[Image.Image] = []
    while (line := _read_line()) is not None and line != "/exit":
        try:
            if line == "/new":
                turns, images, added = [], [], []
            elif line.startswith("/image "):
                added.append(open_image(line.removeprefix("/image ").strip()))
            elif line:
                asked = [*turns, {"role": "user", "content": mark_images(line, len(added))}]
                result = _follow(answer(asked, images + added), show=True)
                turns = [*asked, {"role": "assistant", "content": result.text}]
                images, added = images + added, []
        except OvisError as error:
            print_error(notes, error)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/training.md shows one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to set, such as run.steps=100.")
    ] = None,
) -> None:
    """Fine-tune a model; the same command goes on with a run that was stopped (exit code 4)."""
    try:
        from ovis_jax.training import config as configs
        from ovis_jax.training import loop
    except ModuleNotFoundError as error:
        raise OvisError(f"{error}; training needs: pip install 'ovis-jax[train]'") from error
    if not loop.train(configs.read_config(config, overrides or ()), Console()):
        raise typer.Exit(4)


@app.command()
def inspect(
    folder: Folder,
    check: Annotated[
        bool, typer.Option("--check", help="Also hash the weights; exit code 1 if one is wrong.")
    ] = False,
) -> None:
    """Show a checkpoint's config, parameters and bytes by part; reads headers only."""
    if not Path(folder).is_dir() and folder not in BUILT_IN:
        raise OvisError(f"{folder} is no folder; a repo is fetched by python -m convert.from_hf")
    path = find_source(folder).folder
    config = OvisConfig.from_folder(path)
    digests = checksums.recorded(path) if check else {}
    plan, dtype = plan_parameters(path, config)
    parts: dict[str, list[int]] = {}
    tensors = [(name.partition("/")[0], entry) for name, entry in plan.sources.items()]
    for part, entry in [*tensors, *(("(not used)", entry) for entry, _ in plan.unused)]:
        size = int(np.prod(entry.shape))
        sums = parts.setdefault(part, [0, 0, 0])
        parts[part] = [sums[0] + 1, sums[1] + size, sums[2] + entry.stop - entry.start]
    table = Table("part", *_numbers("tensors", "parameters", f"bytes ({dtype})"))
    for part, sums in parts.items():
        table.add_row(part, *(f"{value:,}" for value in sums))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*parts.values(), strict=True)))
    console = Console(highlight=False)
    console.print_json(data=asdict(config))
    console.print(table)
    if check:
        try:
            checksums.check(path, digests)
        except CheckpointProblems as problems:
            print_error(Console(stderr=True, highlight=False), problems)
            raise typer.Exit(1) from None
        console.print(f"{len(digests)} file(s) hash to what conversion.json says")


@app.command()
def verify(
    folder: Folder,
    golden: Annotated[list[Path], typer.Argument(help="Results of the original code, as .npz.")],
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Compare a checkpoint with results of the original code, stage by stage."""
    mesh = mesh_axes.tensor_parallel(tensor_parallel)
    loaded: dict[str, LoadedOvis] = {}
    table = Table("case", "stage", *_numbers("largest difference", "tolerance"), "result")
    failed = 0
    for path in golden:
        dtype = "bfloat16" if golden_files.is_bfloat16(path) else "float32"
        if dtype not in loaded:
            loaded[dtype] = load(folder, dtype=dtype, mesh=mesh)
        ovis = loaded[dtype]
        stages = golden_files.verify(ovis.processor, ovis.model, ovis.params, path)
        for n, stage in enumerate(stages):
            failed += not stage.passed
            numbers = f"{stage.difference:.2g}", f"{stage.tolerance:g}"
            result = "[green]pass[/]" if stage.passed else "[bold red]FAIL[/]"
            table.add_row("" if n else path.stem, stage.name, *numbers, result)
        table.add_section()
    Console().print(table)
    if failed:
        raise typer.Exit(1)


def _follow(steps: Iterator[Answer], *, show: bool) -> Answer:
    """The whole answer; its text is printed as it comes if it is to be shown."""
    answer = next(steps)
    for step in chain([answer], steps):
        answer = step
        if show:
            print(step.added, end="", flush=True)
    if show:
        print(flush=True)
    return answer


def _numbers(*names: str) -> list[Column]:
    """Table columns that hold numbers."""
    return [Column(name, justify="right") for name in names]


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    keep_compiled()
    try:
        app()
    except (OvisError, OSError) as error:
        print_error(Console(stderr=True, highlight=False), error)
        sys.exit(2)
