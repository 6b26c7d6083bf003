"""The settings of a part, which its process reads from a JSON file, and the sizes it measures."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ovis_jax import presets
from ovis_jax.config import OvisConfig


@dataclass(frozen=True)
class Settings:
    """What a part needs to know.

    Attributes:
      part: Name of the part.
      out: Folder for results.
      rehearse: Whether to run small sizes, on the CPU too.
      seconds: Time limit of the part.
      facts: Results of the part "facts"; empty in that part itself.
    """

    part: str
    out: Path
    rehearse: bool
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the settings as a JSON file."""
        path.write_text(json.dumps(asdict(self) | {"out": str(self.out)}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the settings that `write` wrote."""
        fields = json.loads(path.read_text())
        return cls(**fields | {"out": Path(fields["out"])})

    @property
    def sizes(self) -> "Sizes":
        """The sizes to measure."""
        return REHEARSAL if self.rehearse else FULL


@dataclass(frozen=True)
class Sizes:
    """The sizes that the parts measure, in the order in which they are measured.

    Attributes:
      preset: Function of `ovis_jax.presets` that returns the model's config.
      decoder_depth: Number of decoder blocks; None for the preset's.
      decode_rows: Batch sizes of decode.
      decode_length: Positions in the KV cache of a decode step.
      prompt_lengths: Prompt lengths of prefill.
      num_crops: Numbers of crops of the vision stages.
      timed_steps: Decode steps per timed call.
      repeats: Timed calls per measurement.
      concurrent_requests: Numbers of requests that the engine answers at the same time.
      max_model_len: Positions of a request to the engine.
      request_tokens: New tokens per request to the engine.
      train_length: Positions of a training row.
      train_crops: Crops of a training row.
      attention_lengths: Prompt lengths at which attention kernels are compared.
      attention_window: Sliding window of the comparison.
      copy_bytes: Size of the array whose copy is timed.
      product_sizes: Numbers of rows of the square matrix products that are timed.
    """

    preset: str
    decoder_depth: int | None
    decode_rows: tuple[int, ...]
    decode_length: int
    prompt_lengths: tuple[int, ...]
    num_crops: tuple[int, ...]
    timed_steps: int
    repeats: int
    concurrent_requests: tuple[int, ...]
    max_model_len: int
    request_tokens: int
    train_length: int
    train_crops: int
    attention_lengths: tuple[int, ...]
    attention_window: int
    copy_bytes: int
    product_sizes: tuple[int, ...]

    @property
    def decode_calls(self) -> int:
        """Number of timed decode calls that the cache has room for, in every part alike.

        Each comparison with PyTorch makes `repeats` calls and a warm-up, for up to three variants.
        """
        return 3 * (self.repeats + 2)

    @property
    def config(self) -> OvisConfig:
        """The model's config."""
        config: OvisConfig = getattr(presets, self.preset)()
        if self.decoder_depth is not None:
            # Windows longer than the prompts, as in the 9B.
            decoder = replace(config.decoder, depth=self.decoder_depth, sliding_window=4096)
            config = replace(config, decoder=decoder)
        return config


FULL = Sizes(
    preset="ovis1_6_gemma2_9b",
    decoder_depth=None,
    decode_rows=(1, 8, 32),
    decode_length=2048,
    prompt_lengths=(2048, 512, 8192),
    num_crops=(1, 10),
    timed_steps=32,
    repeats=5,
    concurrent_requests=(1, 8, 32, 64),
    max_model_len=1024,
    request_tokens=64,
    train_length=2048,
    train_crops=4,
    attention_lengths=(1000, 5000),
    attention_window=4096,
    copy_bytes=2**31,
    product_sizes=(8192,),
)

REHEARSAL = Sizes(
    preset="tiny",
    decoder_depth=2,
    decode_rows=(1, 2),
    decode_length=24,
    prompt_lengths=(24,),
    num_crops=(1,),
    timed_steps=4,
    repeats=1,
    concurrent_requests=(1, 4),
    max_model_len=64,
    request_tokens=4,
    train_length=24,
    train_crops=1,
    attention_lengths=(200,),
    attention_window=64,
    copy_bytes=2**24,
    product_sizes=(256,),
)
