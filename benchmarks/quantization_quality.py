"""How much does each quantized format change the next token, compared with bfloat16?

`python -m benchmarks.quantization_quality --model FOLDER`, or `--preset bench` with random weights.
A model with a processor gets questions about pictures from the generator of ovis-tiny. All formats
read bfloat16's greedy answers token by token, from the KV cache. Random weights repeat one token,
so all formats read random tokens instead. The results are the KL divergence from bfloat16's
distributions, and the share of positions where the most probable token is the same. On a CPU, int8
also rounds the activations.
"""

import random
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from jaxtyping import Float, Int

from benchmarks.support.benchmark_model import (
    CheckpointOption,
    PresetOption,
    load_or_init_model,
    quantize_params,
)
from benchmarks.support.random_inputs import random_inputs
from benchmarks.support.results import JsonOption, print_results, write_results
from ovis_jax import Inputs, Ovis, Processor, generate
from ovis_jax.inputs.batch import pad_batch
from ovis_jax.inputs.conversation import turns_from_sharegpt
from ovis_jax.model.ovis import Params
from ovis_jax.verify_goldens import mean_kl_divergence
from recipes.ovis_tiny.dataset_rows import evaluation_row
from recipes.ovis_tiny.languages import LANGUAGES
from recipes.ovis_tiny.questions import KINDS
from recipes.ovis_tiny.scenes import draw_scene

NUM_TEXT_POSITIONS = 60
"""Number of random text tokens in a random prompt, in addition to a crop."""


def make_questions(processor: Processor, num_questions: int) -> Inputs:
    """Encode a batch of questions about test scenes; kinds and languages take turns."""
    examples, kinds = [], [(kind, language) for language in LANGUAGES for kind in KINDS]
    for n in range(num_questions):
        row = evaluation_row(random.Random(n), "test", *kinds[n % len(kinds)], unseen=False)
        turns = turns_from_sharegpt(row.entry["conversations"][:-1], processor.chat_format)
        examples.append(processor.encode(turns, [draw_scene(scene) for scene in row.scenes]))
    pixels = np.concatenate([example.pixels for example in examples])
    return pad_batch([example.tokens for example in examples], pixels, processor.config)


@partial(jax.jit, static_argnums=0)
def teacher_forced_logits(
    model: Ovis, params: Params, inputs: Inputs, answers: Int[Array, "B n"]
) -> Float[Array, "B n V"]:
    """Compute the logits of each token of given answers, with a prefill and decode steps."""
    first, cache = model.prefill(params, inputs, inputs.tokens.shape[1] + answers.shape[1])

    def step(cache: Any, tokens: Array) -> tuple[Any, Array]:
        logits, cache = model.decode(params, tokens, cache)
        return cache, logits

    _, rest = jax.lax.scan(step, cache, answers[:, :-1].T)
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "bench",
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of questions (default 130) or random prompts (default 4)."
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Largest number of tokens per answer.")
    ] = 32,
    json_path: JsonOption = None,
) -> None:
    """Compare the formats with bfloat16."""
    loaded = load_or_init_model(model, preset, "bfloat16")
    ovis, params, config = loaded.model, loaded.params, loaded.model.config
    if loaded.processor is None:
        length = config.visual_tokenizer.tokens_per_crop + NUM_TEXT_POSITIONS + new_tokens
        inputs = random_inputs(config, rows or 4, length, crops_per_row=1)
        tokens, positions = (np.split(x, [-new_tokens], axis=1) for x in inputs[:2])
        inputs, answers = inputs._replace(tokens=tokens[0], positions=positions[0]), tokens[1]
        is_token = np.ones(answers.shape, bool)
    else:
        inputs = make_questions(loaded.processor, rows or 130)
        found = generate(ovis, params, inputs, max_new_tokens=new_tokens)
        answers = np.asarray(found.tokens)
        is_token = np.arange(new_tokens) < np.asarray(found.lengths)[:, None]

    def read_answers(model: Ovis, params: Params) -> np.ndarray:
        """Return the logits [N, V] of all tokens of all answers."""
        return np.asarray(teacher_forced_logits(model, params, inputs, answers))[is_token]

    expected = read_answers(ovis, params)
    results = []
    for name in ("float32", "int8", "int4", "int8 KV cache"):
        match name:
            case "float32":
                found = read_answers(ovis, jax.tree.map(lambda x: x.astype(jnp.float32), params))
            case "int8 KV cache":
                found = read_answers(replace(ovis, kv_cache_dtype="int8"), params)
            case _:
                found = read_answers(ovis, quantize_params(params, config, name))
        same = np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))
        divergence = mean_kl_divergence(expected, found)
        results.append({"format": name, "kl_divergence": divergence, "same_tokens": float(same)})
    print_results(
        f"{loaded.name}, {len(expected)} tokens of {len(answers)} answers,"
        f" {jax.devices()[0].device_kind}: compared with bfloat16",
        ["format", "KL divergence in nats", "same greedy token"],
        [(r["format"], r["kl_divergence"], f"{r['same_tokens']:.2%}") for r in results],
    )
    write_results(json_path, name=loaded.name, num_tokens=len(expected), rows=results)


if __name__ == "__main__":
    typer.run(main)
