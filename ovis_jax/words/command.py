"""The command `ovis-jax words`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import typer
from PIL import Image
from rich.console import Console

from ovis_jax import mesh_axes
from ovis_jax.console import MaxPartition, Model, TensorParallel, print_table
from ovis_jax.errors import OvisError, RequestError
from ovis_jax.inference.visual_words import nearest_tokens, shared_words, visual_words
from ovis_jax.inputs.image import choose_grid, open_image
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.words.places import Place, places


def words(
    image: Annotated[list[Path], typer.Option(help="An image; give two to compare their words.")],
    out: Annotated[Path, typer.Option(help="The heat map to write, such as words.png.")],
    model: Model = "ovis-tiny",
    top: Annotated[int, typer.Option(help="How many words to list.")] = 8,
    max_partition: MaxPartition = 9,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Draw how sure the model is of the visual words of images, and list the words."""
    figures = _figures()
    if len(image) > 2:
        raise RequestError(f"{len(image)} images, expected one, or two to compare")
    kinds = figures.Figure().canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in kinds:
        raise RequestError(f"{out}: expected a name that ends with one of {', '.join(kinds)}")
    images = [open_image(path) for path in image]
    ovis = load(model, mesh=mesh_axes.tensor_parallel(tensor_parallel))
    looks = [_look(ovis, picture, max_partition) for picture in images]
    names = [path.name for path in image]
    pictures = [
        figures.Picture(name, picture, look.places, look.entropy)
        for name, picture, look in zip(names, images, looks, strict=True)
    ]
    console = Console(highlight=False)
    rows = [
        (
            name,
            str(len(look.places)),
            str(look.entropy.size),
            f"{look.entropy.mean():.3f}",
            f"{np.exp(look.entropy).mean():.2f}",
        )
        for name, look in zip(names, looks, strict=True)
    ]
    heads = ["image", "crops", "visual tokens", "mean entropy (nats)", "mean effective words"]
    print_table(console, heads, rows)
    _list_words(ovis, names, [look.used for look in looks], top, console)
    figures.entropy_figure(pictures).savefig(out, dpi=120)
    console.print(f"{out} written", markup=False, soft_wrap=True)


def _figures() -> Any:
    try:
        from ovis_jax.words import figure
    except ModuleNotFoundError as error:
        raise OvisError(f"{error}; the heat map needs: pip install 'ovis-jax[train]'") from error
    return figure


class _Look(NamedTuple):
    """What is seen of an image: of each crop its place and its tokens' entropy, and the words."""

    places: Sequence[Place]
    entropy: np.ndarray
    used: np.ndarray


def _look(ovis: LoadedOvis, image: Image.Image, max_partition: int) -> _Look:
    inputs = ovis.processor(["Look."], [[image]], max_partition=max_partition)
    side = ovis.config.vision.image_size
    grid = choose_grid(image.width, image.height, side, max_partition)
    placed = places(image.width, image.height, grid, ovis.config.visual_tokenizer)
    found = visual_words(ovis.model, ovis.params, inputs, k=1)
    # What stands behind the true crops fills up the bucket.
    entropy, mean = (np.asarray(x)[: len(placed)] for x in (found.entropy, found.mean))
    return _Look(placed, entropy, mean.mean(axis=0))


def _list_words(
    ovis: LoadedOvis, names: Sequence[str], used: Sequence[np.ndarray], top: int, console: Console
) -> None:
    """The words that an image uses most, or that two images share, and the text nearest to each."""
    shared = shared_words(jnp.asarray(used[0]), jnp.asarray(used[-1]), k=top)
    rows = ovis.params["visual_embedding"][jnp.asarray(shared.words)]
    ids, _ = nearest_tokens(ovis.params, rows)
    texts = [
        " ".join(repr(ovis.processor.tokenizer.decode([i], skip_special=False)) for i in row)
        for row in np.asarray(ids).tolist()
    ]
    shares = [[f"{x[word]:.2%}" for word in np.asarray(shared.words)] for x in used]
    table = zip(map(str, np.asarray(shared.words)), *shares, texts, strict=True)
    if len(names) == 2:
        text = f"the two images share {float(shared.mass):.1%} of their visual words' probability"
        console.print(text)
    heads = ["visual word", *(f"in {name}" for name in names), "nearest text tokens"]
    print_table(console, heads, table)
