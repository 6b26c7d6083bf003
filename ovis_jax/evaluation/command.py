"""The command `ovis-jax eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.console import (
    AdaptersOption,
    BatchSizeOption,
    DtypeOption,
    KVCacheDtypeOption,
    MaxNewTokensOption,
    MaxPartitionOption,
    ModelOption,
    QuantizationOption,
    TensorParallelOption,
)
from ovis_jax.errors import count_noun
from ovis_jax.evaluation.batch_answering import accuracy_by_kind
from ovis_jax.evaluation.evaluate import ChooseBy, accuracy_table, evaluate_questions
from ovis_jax.evaluation.published_prompts_and_scores import load_published_benchmarks
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.evaluation.results_file import (
    fingerprint_model,
    fingerprint_questions,
    open_results,
)
from ovis_jax.inputs.conversation import CHAT_FORMATS
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.process_options import (
    CoordinatorOption,
    DistributedOption,
    NumProcessesOption,
    ProcessIdOption,
    run_in_processes,
)

PUBLISHED = load_published_benchmarks()


def eval_(
    questions: Annotated[
        Path,
        typer.Argument(help="Question file (.jsonl or .parquet), or a folder of .jsonl files."),
    ],
    model: ModelOption = "ovis-tiny",
    output: Annotated[
        Path | None,
        typer.Option(help="File to write the results to; if it exists, the evaluation resumes."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder that image paths are relative to; by default, the question file's.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
    choose_by: Annotated[
        ChooseBy,
        typer.Option(
            help="How to choose an option: by the generated letter, or by log-probability."
        ),
    ] = "letter",
    raw_prompts: Annotated[
        bool,
        typer.Option("--raw-prompts", help="Use the questions as they are, without a template."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Accept only answers in the form that the prompt asks for."),
    ] = False,
    batch_size: BatchSizeOption = 16,
    max_new_tokens: MaxNewTokensOption = PUBLISHED.settings["max_new_tokens"],
    max_partition: MaxPartitionOption = PUBLISHED.settings["max_partition"],
    distributed: DistributedOption = False,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Measure a model's accuracy on question files, and compare it with published scores."""
    with run_in_processes(distributed, coordinator, num_processes, process_id):
        mesh = tensor_parallel_mesh(tensor_parallel)
        config = OvisConfig.from_folder(resolve_checkpoint(model, weights=False).folder)
        system_turns = CHAT_FORMATS[config.decoder.model_type].has_system_turns
        asked = read_questions(
            questions, raw_prompts=raw_prompts, images=images, system_turns=system_turns
        )
        folders = [resolve_checkpoint(model).folder, *([adapters] if adapters else [])]
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_partition": max_partition,
            "choose_by": choose_by,
            "strict": strict,
        }
        header = {
            "model": fingerprint_model(folders) if output else "",
            "questions": fingerprint_questions(asked),
            **settings,
            "dtype": dtype,
            "quantization": quantization,
            "kv_cache_dtype": kv_cache_dtype,
        }
        notes = Console(stderr=True, highlight=False)
        with open_results(output, header) as file:
            answered = {result["id"] for result in file.results}
            rest = [question for question in asked if question.id not in answered]
            if answered:
                total = count_noun(len(asked), "question")
                notes.print(f"{len(answered)} of {total} already answered in {output}")
            if rest:
                ovis = load(
                    model,
                    dtype=dtype,
                    quantization=quantization,
                    kv_cache_dtype=kv_cache_dtype,
                    adapters=adapters,
                    mesh=mesh,
                )
                results = evaluate_questions(ovis, rest, batch_size=batch_size, **settings)
                hidden = not notes.is_terminal
                for result in track(results, "answering", len(rest), console=notes, disable=hidden):
                    file.add(result)
        accuracies = accuracy_by_kind(
            (result["kind"], result["correct"]) for result in file.results
        )
        console = Console(highlight=False)
        console.print(accuracy_table(accuracies))
        for benchmark in filter(None, map(PUBLISHED.find_benchmark, accuracies)):
            if note := PUBLISHED.metric_notes.get(benchmark):
                console.print(f"{benchmark}: the published score is not exact match: {note}")
