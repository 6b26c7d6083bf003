"""The command `ovis-jax eval`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ovis_jax import mesh_axes
from ovis_jax.checkpoint.source import find_source
from ovis_jax.console import Adapters, MaxPartition, Model, OtherDtype, TensorParallel
from ovis_jax.errors import RequestError
from ovis_jax.evaluation.published import published
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.evaluation.results import Results, model_fingerprint, questions_fingerprint
from ovis_jax.evaluation.run import By, Settings, accuracy, evaluate, table
from ovis_jax.loading import load

DEFAULTS = Settings()


def eval_(
    questions: Annotated[Path, typer.Argument(help="A .jsonl file, or a folder of such files.")],
    model: Model = "ovis-tiny",
    out: Annotated[
        Path | None, typer.Option(help="Where the answers go; a run that was stopped goes on.")
    ] = None,
    dtype: OtherDtype = None,
    adapters: Adapters = None,
    tensor_parallel: TensorParallel = 1,
    by: Annotated[By, typer.Option(help="How options are chosen.")] = "letter",
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask as the file says, not with published prompts.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Questions asked at once.")] = 16,
    max_new_tokens: Annotated[
        int, typer.Option(help="The longest answer, in tokens.")
    ] = DEFAULTS.max_new_tokens,
    max_partition: MaxPartition = DEFAULTS.max_partition,
) -> None:
    """Ask the questions of a file, and say how many answers are right, beside published figures."""
    if batch < 1:
        raise RequestError(f"batch is {batch}, expected at least 1")
    mesh = mesh_axes.tensor_parallel(tensor_parallel)
    asked = read_questions(questions, plain=plain)
    settings = Settings(batch, max_new_tokens, max_partition, by)
    folders = [find_source(model).folder, *([adapters] if adapters else [])]
    head = {
        "model": model_fingerprint(folders) if out else "",
        "questions": questions_fingerprint(asked),
        "max_new_tokens": max_new_tokens,
        "max_partition": max_partition,
        "choices_by": by,
        "dtype": dtype,
    }
    notes = Console(stderr=True, highlight=False)
    with Results(out, head) as results:
        answered = {result["id"] for result in results.done}
        rest = [question for question in asked if question.id not in answered]
        if answered:
            notes.print(f"{len(answered)} of {len(asked)} questions are answered in {out}")
        if rest:
            ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
            new = evaluate(ovis, rest, settings)
            hidden = not notes.is_terminal
            for result in track(new, "answering", len(rest), console=notes, disable=hidden):
                results.add(result)
    counts = accuracy(results.done)
    console = Console(highlight=False)
    console.print(table(counts))
    for name in filter(None, map(published().benchmark, counts)):
        if name in published().otherwise:
            console.print(f"{name}: published otherwise than here: {published().otherwise[name]}")
