"""Ovis1.6 in pure JAX: the models with Gemma2 and with Llama 3.2."""

import tomllib
from importlib import metadata
from pathlib import Path

from ovis_jax.checkpoint.params import save_params
from ovis_jax.config import OvisConfig
from ovis_jax.distributed import initialize_distributed
from ovis_jax.errors import OvisError
from ovis_jax.inference.generate import Generation, generate, stream
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inference.score import Scores, score
from ovis_jax.inference.visual_words import (
    VisualWords,
    nearest_tokens,
    shared_words,
    visual_words,
)
from ovis_jax.inference.warmup import warmup
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.inputs.candidate_answers import encode_answers
from ovis_jax.inputs.open_image import open_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.model.ovis import Ovis, forward
from ovis_jax.sharding import FSDP, TENSOR, TENSOR_FSDP

__all__ = [
    "Bucket",
    "FSDP",
    "TENSOR",
    "TENSOR_FSDP",
    "Generation",
    "Inputs",
    "LoadedOvis",
    "Ovis",
    "OvisConfig",
    "OvisError",
    "Processor",
    "Sampling",
    "Scores",
    "VisualWords",
    "__version__",
    "encode_answers",
    "forward",
    "generate",
    "load",
    "nearest_tokens",
    "open_image",
    "save_params",
    "score",
    "shared_words",
    "initialize_distributed",
    "stream",
    "visual_words",
    "warmup",
]

try:
    __version__ = metadata.version("ovis-jax")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    _project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    __version__: str = _project["project"]["version"]
