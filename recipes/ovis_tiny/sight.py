"""The visual path learns to see, apart from the rest: `python -m recipes.ovis_tiny.sight`.

A linear probe on the visual embeddings names what stands in the cell of each visual token. It is
thrown away; what stays are the vision encoder, the visual tokenizer and the table.

With `--words` the probe's row of a thing that has a word is that of the word in the text's own
table of embeddings: a big blue star comes to lie near "big", "blue" and "star", in both languages,
so that what is asked about can be found as a word is found again. `--hold` keeps the embeddings of
a model that has learned to read them close to what they were.
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
from ovis_jax.checkpoint.source import small_files
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.model.layers import linear, rms_norm
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.parts import Flat, join, split
from ovis_jax.training.step import Recipe
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
    draw,
    random_scene,
)

NOTHING = "nothing"
CONTENTS = (NOTHING, *SHAPES, *DIGITS, *WORDS)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "content": CONTENTS,
    "colour": (NOTHING, *COLOURS),
    "size": (NOTHING, *SIZES),
    "place": tuple(f"cell {i}" for i in range(ROWS * SQUARE)),
}
"""What the probe names of each cell, and the names it has to choose from."""

ENDINGS = ("", "e", "en", "er", "es")
"""Of German adjectives."""

TEXT_SHARE = 0.35
"""The share of pictures with a digit or a word."""
BATCH = 128
PICTURES = 20_000


def labels(scene: Scene) -> np.ndarray:
    """What is in each cell of a square scene: int32 [cells, targets], indices into TARGETS."""
    found = [[NOTHING, NOTHING, NOTHING, place] for place in TARGETS["place"]]
    for thing in scene.things:
        found[thing.row * SQUARE + thing.column][:3] = [thing.shape, thing.colour, thing.size]
    if scene.text:
        first = scene.text_row * SQUARE + scene.text_column
        for cell in range(first, first + (1 if scene.digit else SQUARE)):
            found[cell][0] = scene.text
    names = list(TARGETS.values())
    return np.array([[names[n].index(name) for n, name in enumerate(cell)] for cell in found])


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A training picture as uint8 [h, w, C], and its labels."""
    rng = random.Random(f"first sight {seed}")
    texts = (DIGITS if rng.random() < 0.4 else WORDS) if rng.random() < TEXT_SHARE else ()
    scene = random_scene(rng, "train", columns=SQUARE, texts=texts)
    return np.asarray(draw(scene)), labels(scene)


class Aim(NamedTuple):
    """What the visual path is to learn, beside the targets.

    Attributes:
      words: of each target the rows [names, D] that words give, and whether they do [names, 1].
      hold: the weight of staying close to `before`.
      before: the parameters as they were.
    """

    words: dict[str, tuple[np.ndarray, np.ndarray]]
    hold: float
    before: Params


def wordings(name: str, cell: int | None = None) -> list[str]:
    """The words of both languages that name a thing, as they stand behind a space; or none."""
    if cell is not None:
        place = [*sum(PLACES, ())][cell]
        words = [*place.split(), *german_grammar.PLACES[place].removeprefix("in der ").split()]
    elif name in SHAPES:
        words = [name, german_grammar.the(name).split()[-1]]
    elif name in COLOURS:
        words = [name, *(german_grammar.bend(german_grammar.COLOURS[name], e) for e in ENDINGS)]
    elif name in SIZES:
        words = [name, *(german_grammar.SIZES[name] + ending for ending in ENDINGS)]
    else:
        return [name] if name in DIGITS else []
    return [f" {word}" for word in words]


def word_rows(ovis: LoadedOvis) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`Aim.words`: the sums of the embeddings of the words, scaled to the size of one."""
    table, encode = np.asarray(ovis.params["decoder"]["embed"]), ovis.processor.tokenizer.encode
    rows = {}
    for target, names in TARGETS.items():
        found = np.zeros((len(names), table.shape[1]), np.float32)
        for number, name in enumerate(names):
            cell = number if target == "place" else None
            pieces = sorted({encode(word)[0] for word in wordings(name, cell)})
            if pieces:
                found[number] = table[pieces].sum(0) / len(pieces) ** 0.5
        rows[target] = (found, found.any(axis=1, keepdims=True))
    return rows


def probe_loss(
    model: Ovis,
    aim: Aim,
    learned: Flat,
    frozen: Flat,
    pixels: Float[Array, "I h w C"],
    targets: Int[Array, "I M targets"],
) -> tuple[Float[Array, ""], Float[Array, "targets"]]:
    """Cross-entropy summed over the targets of a cell, and the share of each that is right."""
    params = join({k: x for k, x in learned.items() if not k.startswith("probe/")}, frozen)

    def look(params: Params) -> Float[Array, "I M D"]:
        seen = model.embed_images(params, pixels).embeddings
        return rms_norm(seen, jnp.zeros(seen.shape[-1:]), 1e-6)

    seen = look(params)
    losses = [aim.hold * jnp.mean(jnp.square(seen - look(aim.before)))]
    right = []
    for number, name in enumerate(TARGETS):
        rows, has_word = aim.words[name]
        probe = jnp.where(has_word, rows, learned[f"probe/{name}"])
        logits = linear(seen, probe)  # [I, M, names]
        target = targets[..., number]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, target).mean())
        right.append(jnp.mean(jnp.argmax(logits, -1) == target))
    return sum(losses, jnp.float32(0)), jnp.stack(right)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def step(
    model: Ovis,
    recipe: Recipe,
    aim: Aim,
    learned: Flat,
    state: optax.OptState,
    frozen: Flat,
    pixels: Array,
    targets: Array,
) -> tuple[Flat, optax.OptState, Array, Array]:
    """One update of the visual path and the probe; also the loss and the shares."""
    gradient = jax.value_and_grad(partial(probe_loss, model, aim), has_aux=True)
    (loss, right), gradients = gradient(learned, frozen, pixels, targets)
    updates, state = recipe.optimizer().update(gradients, state, learned)
    return optax.apply_updates(learned, updates), state, loss, right  # pyright: ignore


def learn(
    ovis: LoadedOvis, steps: int, pictures: int, seed: int, *, words: bool, hold: float
) -> Params:
    """Teach the visual path of a model to see; its parameters afterwards."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        drawn = pool.map(picture, range(seed * pictures, (seed + 1) * pictures), chunksize=500)
    settings = ovis.processor.image_settings
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    images, targets = (np.stack(column) for column in zip(*drawn, strict=True))
    learned, frozen = split(ovis.params, ["visual_tokenizer", "visual_embedding"])
    rows = word_rows(ovis)
    if not words:
        rows = {name: (row, np.zeros_like(has_word)) for name, (row, has_word) in rows.items()}
    aim = Aim(rows, hold, ovis.params)
    width = ovis.config.decoder.width
    learned = {path: jnp.array(x) for path, x in learned.items()}
    learned |= {f"probe/{name}": jnp.zeros((len(v), width)) for name, v in TARGETS.items()}
    recipe = Recipe(
        learning_rate=1.5e-3,
        total_steps=steps,
        warmup_steps=50,
        decay_steps=steps // 4,
        b2=0.98,
        weight_decay=0.05,
    )
    state = recipe.optimizer().init(learned)
    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    for number in range(steps):
        chosen = rng.integers(0, pictures, BATCH)
        pixels = images[chosen].astype(np.float32) * np.float32(settings.rescale_factor)
        pixels = (pixels - mean) / std
        learned, state, loss, right = step(
            ovis.model, recipe, aim, learned, state, frozen, pixels, targets[chosen]
        )
        if number % 50 == 49:
            shares = ", ".join(
                f"{name} {share:.1%}" for name, share in zip(TARGETS, right, strict=True)
            )
            seconds = time.perf_counter() - began
            print(f"step {number + 1}, {seconds:.0f} s: loss {loss:.3f}; {shares}", flush=True)
    learned = {path: x for path, x in learned.items() if not path.startswith("probe/")}
    params = join(learned, frozen)
    if hold:
        return params
    return params | {"visual_embedding": _rescaled(ovis.model, params, pixels)}


def _rescaled(model: Ovis, params: Params, pixels: np.ndarray) -> Array:
    """The table such that visual embeddings are as large as those of text, RMS 1 / sqrt(D)."""
    table = params["visual_embedding"]
    seen = jax.jit(model.embed_images)(params, pixels).embeddings
    return table * table.shape[1] ** -0.5 / jnp.sqrt(jnp.mean(jnp.square(seen)))


def main() -> None:
    """Read the command line, learn, and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="made by recipes.ovis_tiny.start")
    parser.add_argument("destination", type=Path, metavar="DST")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", action="store_true", help="see the top of this file")
    parser.add_argument("--hold", type=float, default=0.0, help="see the top of this file")
    args = parser.parse_args()
    ovis = load(args.source)
    params = learn(ovis, args.steps, args.pictures, args.seed, words=args.words, hold=args.hold)
    files = {name: path.read_bytes() for name, path in small_files(args.source).items()}
    save_params(args.destination, params, ovis.config, files=files)


if __name__ == "__main__":
    main()
