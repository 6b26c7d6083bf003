"""The command `ovis-jax batch`."""

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ovis_jax.batch.answer_in_order import answer_in_order
from ovis_jax.batch.plain_rows import PlainRows
from ovis_jax.batch.progress import BatchProgress
from ovis_jax.batch.requests_file import read_requests
from ovis_jax.batch.results_file import BatchResultsFile
from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.console import (
    INTERRUPTED,
    AdaptersOption,
    DtypeOption,
    KVCacheDtypeOption,
    MaxModelLenOption,
    MaxNewTokensOption,
    MaxNumSeqsOption,
    MaxPartitionOption,
    ModelOption,
    QuantizationOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TensorParallelOption,
    TopKOption,
    TopPOption,
    interrupt_on_sigterm,
    model_display_name,
    print_error,
)
from ovis_jax.engine.request import EngineError
from ovis_jax.engine.scheduler import run_engine
from ovis_jax.engine.sizes import choose_sizes
from ovis_jax.errors import OvisError, RequestError, count_noun, require_extra
from ovis_jax.evaluation.results_file import fingerprint_model
from ovis_jax.inference.sampling import Sampling
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh

NUM_PREPARED = 16
"""Number of rows that are prepared while the answers to earlier rows are generated."""

NO_TOKEN_BUDGET = 2**31
"""A maximum number of prompt positions between two decode steps that is never reached. In a batch
run, nobody waits for the next token, so new rows can start at once."""


def batch(
    requests: Annotated[
        Path,
        typer.Argument(help="File of requests (.jsonl), or a folder of pictures."),
    ],
    results: Annotated[
        Path,
        typer.Argument(help="File to write the results to; if it exists, the run resumes."),
    ],
    model: ModelOption = "ovis-tiny",
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of each picture in a folder, or of rows without one.")
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in requests of OpenAI's format; by default, the name of its"
            " folder."
        ),
    ] = None,
    max_num_seqs: MaxNumSeqsOption = None,
    max_model_len: MaxModelLenOption = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            help="Reuse the KV cache and the images of earlier rows; rounding may then change an"
            " answer."
        ),
    ] = False,
    max_new_tokens: MaxNewTokensOption = 2048,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = 0,
    max_partition: MaxPartitionOption = 9,
    allow_remote_images: Annotated[
        bool,
        typer.Option(
            help="Fetch images from http(s) URLs with public addresses in requests of OpenAI's"
            " format."
        ),
    ] = False,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
    num_processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of processes, on any machines, that share the rows. Each writes a file of"
            " its own.",
        ),
    ] = 1,
    process_id: Annotated[int, typer.Option(help="Index of this process, from 0.")] = 0,
) -> None:
    """Answer a file of requests. If a run was stopped, run the same command to resume it."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    sampling.check()
    asked = read_requests(requests).share(process_id, num_processes)
    is_openai = asked.format == "openai"
    plain_options = {
        "prompt": prompt,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
    }
    openai_options = {
        "served_model_name": served_model_name or model_display_name(model),
        "allow_remote_images": allow_remote_images,
    }
    limits = {"seed": seed, "max_new_tokens": max_new_tokens, "max_partition": max_partition}
    if is_openai:
        with require_extra("serve"):
            from ovis_jax.batch.openai_rows import OpenAIRows
        _check_not_given(plain_options, requests)
        make_answerer = partial(OpenAIRows, **limits, **openai_options)
        has_failed = OpenAIRows.has_failed
    else:
        if asked.pictures is not None and prompt is None:
            raise RequestError(f"{requests} is a folder of pictures; give a question as --prompt")
        make_answerer = partial(
            PlainRows, folder=asked.folder, prompt=prompt, sampling=sampling, **limits
        )
        has_failed = PlainRows.has_failed
    mesh = tensor_parallel_mesh(tensor_parallel)
    config = OvisConfig.from_folder(resolve_checkpoint(model, weights=False).folder)
    max_model_len = max_model_len or config.multimodal_max_length
    folders = [resolve_checkpoint(model).folder, *([adapters] if adapters else [])]
    settings = {
        "model": fingerprint_model(folders),
        "requests": asked.fingerprint,
        "first_row": asked.first_row,
        "num_rows": asked.num_rows,
        **(openai_options if is_openai else plain_options),
        **limits,
        "max_model_len": max_model_len,
        "dtype": dtype,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
    }
    notes = Console(stderr=True, highlight=False)
    note = partial(notes.print, soft_wrap=True, markup=False)
    total = count_noun(asked.num_rows, "row")
    try:
        with (
            interrupt_on_sigterm(),
            BatchResultsFile(results, settings, asked.num_rows, has_failed) as file,
        ):
            if file.num_results:
                note(f"{file.num_results:,} of {total} already answered in {results}")
            if file.num_results < asked.num_rows:
                ovis = load(
                    model,
                    dtype=dtype,
                    quantization=quantization,
                    kv_cache_dtype=kv_cache_dtype,
                    adapters=adapters,
                    mesh=mesh,
                )
                max_num_seqs, _ = choose_sizes(ovis, max_num_seqs, max_model_len)
                note(f"compiling for {max_num_seqs} sequences of {max_model_len} positions")
                max_concurrent = max_num_seqs + NUM_PREPARED
                with (
                    run_engine(
                        ovis,
                        max_num_seqs=max_num_seqs,
                        max_model_len=max_model_len,
                        max_queued_requests=max_concurrent,
                        max_num_batched_tokens=NO_TOKEN_BUDGET,
                        enable_prefix_caching=enable_prefix_caching,
                    ) as scheduler,
                    BatchProgress(notes, file.num_results, asked.num_rows) as progress,
                ):
                    answers = answer_in_order(
                        make_answerer(scheduler),
                        asked.rows(file.num_results),
                        max_concurrent=max_concurrent,
                        on_answered=progress.add_row,
                        on_result=file.add,
                    )
                    asyncio.run(answers)
                note(f"{progress.num_tokens:,} tokens, {progress.rate:,.0f} tokens/s")
    except EngineError as error:
        raise OvisError(
            f"the model failed ({error}); the same command resumes {results}"
        ) from error
    except KeyboardInterrupt:
        print_error(notes, f"interrupted; the same command resumes {results}")
        raise typer.Exit(INTERRUPTED) from None
    note(f"{total} answered in {results}, {file.num_failed:,} with errors")
    if file.num_failed:
        raise typer.Exit(1)


def _check_not_given(options: Mapping[str, Any], requests: Path) -> None:
    """Check that no option for plain rows is given with a file in OpenAI's format."""
    for name, value in options.items():
        if value is not None:
            raise RequestError(
                f"--{name.replace('_', '-')} is {value!r}, but {requests} has OpenAI's batch"
                " format, in which each request has its own; remove the option"
            )
