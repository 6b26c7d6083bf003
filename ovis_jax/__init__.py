"""Ovis1.6-Gemma2 in pure JAX."""

from ovis_jax.config import OvisConfig
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
from ovis_jax.inputs.answers import encode_answers
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis, load
from ovis_jax.model.ovis import Ovis, forward
from ovis_jax.processes import start_processes
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
    "encode_answers",
    "forward",
    "generate",
    "load",
    "nearest_tokens",
    "score",
    "shared_words",
    "start_processes",
    "stream",
    "visual_words",
    "warmup",
]
