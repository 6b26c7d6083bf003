"""The command `ovis-jax eval`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    MaxPartitionOption,
    ModelOption,
    TensorParallelOption,
)
from ovis_jax.errors import RequestError
from ovis_jax.evaluation.batch_answering import accuracy_by_kind
from ovis_jax.evaluation.evaluate import (
    ChooseBy,
    EvalSettings,
    accuracy_table,
    evaluate_questions,
)
from ovis_jax.evaluation.published_prompts_and_scores import load_published_benchmarks
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.evaluation.results_file import (
    ResultsFile,
    fingerprint_model,
    fingerprint_questions,
)
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh

DEFAULTS = EvalSettings()


def eval_(
    questions: Annotated[
        Path, typer.Argument(help="Question file (.jsonl), or a folder of such files.")
    ],
    model: ModelOption = "ovis-tiny",
    output: Annotated[
        Path | None,
        typer.Option(help="File for the results; if it exists, the evaluation resumes."),
    ] = None,
    dtype: DtypeOption = None,
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
    choose_by: Annotated[
        ChooseBy, typer.Option(help="How the model chooses among the options of a question.")
    ] = DEFAULTS.choose_by,
    raw_prompts: Annotated[
        bool,
        typer.Option("--raw-prompts", help="Ask without the published prompt templates."),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Number of questions per batch.")
    ] = DEFAULTS.batch_size,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens per answer.")
    ] = DEFAULTS.max_new_tokens,
    max_partition: MaxPartitionOption = DEFAULTS.max_partition,
) -> None:
    """Measure a model's accuracy on question files, and compare it with published scores."""
    if batch_size < 1:
        raise RequestError(f"--batch-size is {batch_size}, expected at least 1")
    mesh = tensor_parallel_mesh(tensor_parallel)
    asked = read_questions(questions, raw_prompts=raw_prompts)
    settings = EvalSettings(batch_size, max_new_tokens, max_partition, choose_by)
    folders = [resolve_checkpoint(model).folder, *([adapters] if adapters else [])]
    header = {
        "model": fingerprint_model(folders) if output else "",
        "questions": fingerprint_questions(asked),
        "max_new_tokens": max_new_tokens,
        "max_partition": max_partition,
        "choose_by": choose_by,
        "dtype": dtype,
    }
    notes = Console(stderr=True, highlight=False)
    with ResultsFile(output, header) as file:
        answered = {result["id"] for result in file.results}
        rest = [question for question in asked if question.id not in answered]
        if answered:
            notes.print(f"{len(answered)} of {len(asked)} questions are already in {output}")
        if rest:
            ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
            results = evaluate_questions(ovis, rest, settings)
            hidden = not notes.is_terminal
            for result in track(results, "answering", len(rest), console=notes, disable=hidden):
                file.add(result)
    accuracies = accuracy_by_kind((result["kind"], result["correct"]) for result in file.results)
    console = Console(highlight=False)
    console.print(accuracy_table(accuracies))
    published = load_published_benchmarks()
    for benchmark in filter(None, map(published.find_benchmark, accuracies)):
        if benchmark in published.metric_notes:
            console.print(
                f"{benchmark}: the published score is not exact match:"
                f" {published.metric_notes[benchmark]}"
            )
