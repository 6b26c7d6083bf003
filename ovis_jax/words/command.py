"""The command `ovis-jax words`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import typer
from PIL import Image
from rich.console import Console

from ovis_jax.console import (
    MaxPartitionOption,
    ModelOption,
    QuantizationOption,
    TensorParallelOption,
    parse_image_path,
    print_table,
)
from ovis_jax.errors import RequestError, require_extra
from ovis_jax.inference.visual_words import nearest_tokens, shared_words, visual_words
from ovis_jax.inputs.image_processing import choose_grid
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.model.linear import lookup
from ovis_jax.model.ovis import activation_dtype
from ovis_jax.words.crop_regions import CropRegion, crop_regions


def draw_visual_words(
    image: Annotated[
        list[str],
        typer.Option(
            parser=parse_image_path,
            metavar="PATH",
            help="Image file; give the option twice to compare two images.",
        ),
    ],
    heatmap: Annotated[
        Path, typer.Option(help="File to write the entropy heat map to, such as words.png.")
    ],
    model: ModelOption = "ovis-tiny",
    top: Annotated[int, typer.Option(help="Number of visual words to list.")] = 8,
    max_partition: MaxPartitionOption = 9,
    quantization: QuantizationOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Draw the entropy of an image's visual tokens, and list its most frequent visual words."""
    with require_extra("train"):
        from ovis_jax.words import entropy_heatmap
    if len(image) > 2:
        raise RequestError(f"--image is given {len(image)} times, expected once or twice")
    formats = entropy_heatmap.Figure().canvas.get_supported_filetypes()
    if heatmap.suffix.lstrip(".").lower() not in formats:
        raise RequestError(
            f"--heatmap {heatmap}: the suffix {heatmap.suffix!r} is not an image format; use one of"
            f" {', '.join(formats)}"
        )
    images = [open_image(path) for path in image]
    ovis = load(model, quantization=quantization, mesh=tensor_parallel_mesh(tensor_parallel))
    usages = [_measure_usage(ovis, one, max_partition) for one in images]
    names = [Path(path).name for path in image]
    console = Console(highlight=False)
    columns = ["image", "crops", "visual tokens", "mean entropy (nats)", "mean effective words"]
    rows = [
        (
            name,
            str(len(usage.regions)),
            str(usage.entropy.size),
            f"{usage.entropy.mean():.3f}",
            f"{np.exp(usage.entropy).mean():.2f}",
        )
        for name, usage in zip(names, usages, strict=True)
    ]
    print_table(console, columns, rows)
    _print_words(ovis, names, [usage.word_probabilities for usage in usages], top, console)
    figure = entropy_heatmap.plot_entropy(
        [
            entropy_heatmap.ImageEntropy(name, one, usage.regions, usage.entropy)
            for name, one, usage in zip(names, images, usages, strict=True)
        ]
    )
    figure.savefig(heatmap, dpi=120)
    console.print(f"wrote {heatmap}", markup=False, soft_wrap=True)


class _WordUsage(NamedTuple):
    regions: Sequence[CropRegion]
    entropy: np.ndarray
    """Entropy of each visual token in each crop, float32 [I, M], in nats."""
    word_probabilities: np.ndarray
    """Mean probability of each visual word, float32 [words]."""


def _measure_usage(ovis: LoadedOvis, image: Image.Image, max_partition: int) -> _WordUsage:
    inputs = ovis.processor(["Look."], [[image]], max_partition=max_partition)
    grid = choose_grid(image.width, image.height, ovis.config.vision.image_size, max_partition)
    regions = crop_regions(image.width, image.height, grid, ovis.config.visual_tokenizer)
    found = visual_words(ovis.model, ovis.params, inputs, k=1)
    # The crops after the last region are padding.
    entropy, mean = (np.asarray(x)[: len(regions)] for x in (found.entropy, found.mean))
    return _WordUsage(regions, entropy, mean.mean(axis=0))


def _print_words(
    ovis: LoadedOvis,
    names: Sequence[str],
    probabilities: Sequence[np.ndarray],
    top: int,
    console: Console,
) -> None:
    """Print the most frequent visual words of an image, or the words that two images share."""
    shared = shared_words(jnp.asarray(probabilities[0]), jnp.asarray(probabilities[-1]), k=top)
    table, dtype = ovis.params["visual_embedding"], activation_dtype(ovis.params)
    rows = lookup(table, jnp.asarray(shared.words), dtype)
    ids, _ = nearest_tokens(ovis.params, rows)
    texts = [
        " ".join(repr(ovis.processor.tokenizer.decode([i], skip_special_tokens=False)) for i in row)
        for row in np.asarray(ids).tolist()
    ]
    shares = [[f"{x[word]:.2%}" for word in np.asarray(shared.words)] for x in probabilities]
    if len(names) == 2:
        console.print(
            f"the two images share {float(shared.mass):.1%} of the probability of their visual"
            " words",
            soft_wrap=True,
        )
    columns = ["visual word", *(f"in {name}" for name in names), "nearest text tokens"]
    print_table(
        console, columns, zip(map(str, np.asarray(shared.words)), *shares, texts, strict=True)
    )
