"""Pretrain the visual path alone: `python -m recipes.ovis_tiny.pretrain_vision SRC DST`.

A linear probe on the visual embeddings classifies the content of each visual token's cell. The
probe is discarded; the vision encoder, the visual tokenizer and the visual embedding table remain.

With `--align-words`, the probe's row of a class that has a word is the text embedding of that word.
The embedding of a big blue star then moves towards "big", "blue" and "star" in both languages, so
that the decoder can match words in a question with visual tokens. `--anchor-weight` keeps the
embeddings close to those of the source, for a decoder that has already learned to read them.
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.checkpoint.params import save_params
from ovis_jax.checkpoint.resolve import find_processor_files
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.model.layers import rms_norm
from ovis_jax.model.linear import linear
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.config import StepConfig
from ovis_jax.training.train_step import make_optimizer
from ovis_jax.training.trainable import FlatParams, join_params, split_params
from recipes.ovis_tiny import german_grammar
from recipes.ovis_tiny.questions import PLACES
from recipes.ovis_tiny.scenes import (
    COLOURS,
    DIGITS,
    ROWS,
    SHAPES,
    SIZES,
    SQUARE,
    WORDS,
    Scene,
    draw_scene,
    random_scene,
)

NOTHING = "nothing"
CONTENTS = (NOTHING, *SHAPES, *DIGITS, *WORDS)
PROBE_TARGETS: Mapping[str, tuple[str, ...]] = {
    "content": CONTENTS,
    "colour": (NOTHING, *COLOURS),
    "size": (NOTHING, *SIZES),
    "place": tuple(f"cell {i}" for i in range(ROWS * SQUARE)),
}
"""Properties of a cell that the probe classifies, and the classes of each."""

ENDINGS = ("", "e", "en", "er", "es")
"""Endings of German adjectives."""

TEXT_SHARE = 0.35
"""Fraction of pictures with a digit or a word."""
BATCH_SIZE = 128
NUM_PICTURES = 20_000


def cell_labels(scene: Scene) -> np.ndarray:
    """Return the class of each target in each cell of a square scene, int [cells, targets]."""
    labels = [[NOTHING, NOTHING, NOTHING, place] for place in PROBE_TARGETS["place"]]
    for thing in scene.things:
        labels[thing.row * SQUARE + thing.column][:3] = [thing.shape, thing.colour, thing.size]
    if scene.text:
        first = scene.text_row * SQUARE + scene.text_column
        for cell in range(first, first + (1 if scene.digit else SQUARE)):
            labels[cell][0] = scene.text
    names = list(PROBE_TARGETS.values())
    return np.array([[names[n].index(name) for n, name in enumerate(cell)] for cell in labels])


def training_picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a training picture as uint8 [h, w, C], and its labels."""
    rng = random.Random(f"first sight {seed}")
    texts = (DIGITS if rng.random() < 0.4 else WORDS) if rng.random() < TEXT_SHARE else ()
    scene = random_scene(rng, "train", columns=SQUARE, texts=texts)
    return np.asarray(draw_scene(scene)), cell_labels(scene)


class Alignment(NamedTuple):
    """Constraints on the visual embeddings.

    Attributes:
      word_rows: for each target, the probe rows [classes, D] that text embeddings determine, and
        whether a class has such a row [classes, 1].
      anchor_weight: weight of the distance to the embeddings under `anchor_params`.
      anchor_params: the parameters before training.
    """

    word_rows: dict[str, tuple[np.ndarray, np.ndarray]]
    anchor_weight: float
    anchor_params: Params


def words_for_class(name: str, cell: int | None = None) -> list[str]:
    """Return the words of both languages that name a class, each after a space; may be empty.

    Args:
      name: a class of PROBE_TARGETS.
      cell: index of the cell, for classes of the target "place".
    """
    if cell is not None:
        place = [*sum(PLACES, ())][cell]
        words = [*place.split(), *german_grammar.PLACE_WORDS[place].removeprefix("in der ").split()]
    elif name in SHAPES:
        words = [name, german_grammar.definite_nominative(name).split()[-1]]
    elif name in COLOURS:
        words = [
            name,
            *(
                german_grammar.inflect_adjective(german_grammar.COLOUR_WORDS[name], e)
                for e in ENDINGS
            ),
        ]
    elif name in SIZES:
        words = [name, *(german_grammar.SIZE_WORDS[name] + ending for ending in ENDINGS)]
    else:
        return [name] if name in DIGITS else []
    return [f" {word}" for word in words]


def probe_rows_from_words(ovis: LoadedOvis) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return `Alignment.word_rows`: summed word embeddings, scaled to the size of one."""
    table, encode = np.asarray(ovis.params["decoder"]["embed"]), ovis.processor.tokenizer.encode
    rows = {}
    for target, names in PROBE_TARGETS.items():
        found = np.zeros((len(names), table.shape[1]), np.float32)
        for number, name in enumerate(names):
            cell = number if target == "place" else None
            pieces = sorted({encode(word)[0] for word in words_for_class(name, cell)})
            if pieces:
                found[number] = table[pieces].sum(0) / len(pieces) ** 0.5
        rows[target] = (found, found.any(axis=1, keepdims=True))
    return rows


def probe_loss(
    model: Ovis,
    alignment: Alignment,
    learned: FlatParams,
    frozen: FlatParams,
    pixels: Float[Array, "I h w C"],
    targets: Int[Array, "I M targets"],
) -> tuple[Float[Array, ""], Float[Array, "targets"]]:
    """Compute the cross-entropy summed over the targets, and the accuracy of each target."""
    params = join_params({k: x for k, x in learned.items() if not k.startswith("probe/")}, frozen)

    def normalized_embeddings(params: Params) -> Float[Array, "I M D"]:
        embeddings = model.embed_images_with_states(params, pixels).embeddings
        return rms_norm(embeddings, jnp.zeros(embeddings.shape[-1:]), 1e-6)

    embeddings = normalized_embeddings(params)
    anchors = normalized_embeddings(alignment.anchor_params)
    losses = [alignment.anchor_weight * jnp.mean(jnp.square(embeddings - anchors))]
    accuracies = []
    for number, name in enumerate(PROBE_TARGETS):
        rows, has_word = alignment.word_rows[name]
        probe = jnp.where(has_word, rows, learned[f"probe/{name}"])
        logits = linear(embeddings, probe)  # [I, M, classes]
        target = targets[..., number]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, target).mean())
        accuracies.append(jnp.mean(jnp.argmax(logits, -1) == target))
    return sum(losses, jnp.float32(0)), jnp.stack(accuracies)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def update_step(
    model: Ovis,
    step_config: StepConfig,
    alignment: Alignment,
    learned: FlatParams,
    state: optax.OptState,
    frozen: FlatParams,
    pixels: Array,
    targets: Array,
) -> tuple[FlatParams, optax.OptState, Array, Array]:
    """Update the visual path and the probe; also return the loss and the accuracies."""
    gradient = jax.value_and_grad(partial(probe_loss, model, alignment), has_aux=True)
    (loss, accuracies), gradients = gradient(learned, frozen, pixels, targets)
    updates, state = make_optimizer(step_config).update(gradients, state, learned)
    updated = optax.apply_updates(learned, updates)
    return updated, state, loss, accuracies  # pyright: ignore


def pretrain_visual_path(
    ovis: LoadedOvis,
    num_steps: int,
    num_pictures: int,
    seed: int,
    *,
    align_words: bool,
    anchor_weight: float,
) -> Params:
    """Train the visual path of a model with a probe.

    Args:
      ovis: the model.
      num_steps: number of updates.
      num_pictures: number of training pictures.
      seed: seed of the pictures and batches.
      align_words: use text embeddings as probe rows.
      anchor_weight: weight of the distance to the embeddings before training.

    Returns:
      The trained parameters.
    """
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        seeds = range(seed * num_pictures, (seed + 1) * num_pictures)
        drawn = pool.map(training_picture, seeds, chunksize=500)
    settings = ovis.processor.image_config
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    images, targets = (np.stack(column) for column in zip(*drawn, strict=True))
    learned, frozen = split_params(ovis.params, ["visual_tokenizer", "visual_embedding"])
    rows = probe_rows_from_words(ovis)
    if not align_words:
        rows = {name: (row, np.zeros_like(has_word)) for name, (row, has_word) in rows.items()}
    alignment = Alignment(rows, anchor_weight, ovis.params)
    width = ovis.config.decoder.width
    learned = {path: jnp.array(x) for path, x in learned.items()}
    learned |= {f"probe/{name}": jnp.zeros((len(v), width)) for name, v in PROBE_TARGETS.items()}
    step_config = StepConfig(
        learning_rate=1.5e-3,
        max_steps=num_steps,
        warmup_steps=50,
        decay_steps=num_steps // 4,
        adam_beta2=0.98,
        weight_decay=0.05,
    )
    state = make_optimizer(step_config).init(learned)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    for number in range(num_steps):
        chosen = rng.integers(0, num_pictures, BATCH_SIZE)
        pixels = images[chosen].astype(np.float32) * np.float32(settings.rescale_factor)
        pixels = (pixels - mean) / std
        learned, state, loss, accuracies = update_step(
            ovis.model, step_config, alignment, learned, state, frozen, pixels, targets[chosen]
        )
        if number % 50 == 49:
            accuracy = ", ".join(
                f"{name} {value:.1%}" for name, value in zip(PROBE_TARGETS, accuracies, strict=True)
            )
            seconds = time.perf_counter() - start
            print(f"step {number + 1}, {seconds:.0f} s: loss {loss:.3f}; {accuracy}", flush=True)
    learned = {path: x for path, x in learned.items() if not path.startswith("probe/")}
    params = join_params(learned, frozen)
    if anchor_weight:
        return params
    return params | {"visual_embedding": _rescaled_table(ovis.model, params, pixels)}


def _rescaled_table(model: Ovis, params: Params, pixels: np.ndarray) -> Array:
    """The visual embedding table, scaled so that visual embeddings have an RMS of 1 / sqrt(D)."""
    table = params["visual_embedding"]
    embeddings = jax.jit(model.embed_images_with_states)(params, pixels).embeddings
    return table * table.shape[1] ** -0.5 / jnp.sqrt(jnp.mean(jnp.square(embeddings)))


def main() -> None:
    """Parse the command line, train, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint folder to start from")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write to")
    parser.add_argument("--steps", type=int, default=400, help="number of updates")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures")
    parser.add_argument(
        "--align-words",
        action="store_true",
        help="use text embeddings of words as rows of the probe",
    )
    parser.add_argument(
        "--anchor-weight",
        type=float,
        default=0.0,
        help="weight of the loss term that keeps embeddings close to those of SRC",
    )
    args = parser.parse_args()
    ovis = load(args.source)
    params = pretrain_visual_path(
        ovis,
        args.steps,
        args.pictures,
        args.seed,
        align_words=args.align_words,
        anchor_weight=args.anchor_weight,
    )
    files = {name: path.read_bytes() for name, path in find_processor_files(args.source).items()}
    save_params(args.destination, params, ovis.config, files=files)


if __name__ == "__main__":
    main()
