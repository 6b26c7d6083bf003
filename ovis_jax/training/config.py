"""What a training run is told: a TOML file, and single fields from the command line."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ovis_jax.errors import ConfigError
from ovis_jax.training.parts import PARTS
from ovis_jax.training.step import Recipe

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A table of the file: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LowRankSection(Section):
    """`[learn.lora]`: low-rank adapters instead of whole parts."""

    rank: Size
    targets: str = r"decoder/.*/attn/[qkvo]"
    """A pattern of parameter paths; `ovis_jax.sharding.PARAM_AXES` lists them."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Multiplies the adapters' products (alpha / rank in the literature)."""


class LearnSection(Section):
    """`[learn]`: what is learned, and from what; give `parts` or `lora`."""

    parts: tuple[str, ...] = ()
    """Some of visual_tokenizer, visual_embedding, llm."""
    lora: LowRankSection | None = None
    objective: Literal["supervised", "dpo"] = "supervised"
    beta: Number = 0.1
    """Of DPO."""
    label_smoothing: Fraction = 0.0
    """Of DPO."""
    chosen_weight: Number = 0.0
    """Of the preferred answers' own cross-entropy beside DPO's loss."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "LearnSection":
        if bool(self.parts) == (self.lora is not None):
            raise ValueError("give parts or lora, one of the two")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts {unknown}: expected some of {', '.join(PARTS)}")
        return self


class DataSection(Section):
    """`[data]`: dataset files, and how they become batches."""

    train: tuple[Path, ...] = Field(min_length=1)
    validation: tuple[Path, ...] = ()
    unreadable: Literal["error", "skip"] = "error"
    max_partition: Size = 9
    max_length: Size | None = None
    """Positions of the longest example; None for the model's own limit."""
    truncate: bool = False
    """Cut what is longer at its end; otherwise it counts as unreadable."""
    rows: Size = 8
    """Of a micro-batch."""
    accumulate: Size = 1
    """Micro-batches of a step."""
    length_unit: Size = 64
    """Lengths are padded to multiples of it; each padded shape compiles once."""


class OptimizerSection(Section):
    """`[optimizer]`: AdamW."""

    learning_rate: Number = 1e-4
    warmup_steps: Count = 0
    decay_steps: Count = 0
    """The last steps, over which the rate falls linearly to 0."""
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    weight_decay: Number = 0.0
    clip_norm: Number = 1.0


class RunSection(Section):
    """`[run]`: how long, how precisely, and what is written when."""

    steps: Size
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    """Compute each block again for its gradient instead of keeping its activations."""
    log_every: Size = 10
    save_every: Size = 500
    keep: Size = 2
    """Checkpoints that are kept."""
    evaluate_every: Size = 1000
    max_new_tokens: Size = 64
    """Of an answer that is scored."""


class MeshSection(Section):
    """`[mesh]`: the devices; without it the default device alone."""

    data: Size = 1
    model: Size = 1
    rules: Literal["tensor", "fsdp", "tensor_fsdp"] = "fsdp"


class TrainConfig(Section):
    """A whole run; paths are relative to the current folder."""

    model: str
    """A converted folder, or a folder or repo id in the Hub's layout."""
    output: Path
    """The folder of the run: checkpoints, metrics, and at the end the model."""
    learn: LearnSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection
    mesh: MeshSection | None = None

    def recipe(self) -> Recipe:
        """The step's own settings."""
        lora = self.learn.lora
        return Recipe(
            **self.optimizer.model_dump(),
            total_steps=self.run.steps,
            compute_dtype=self.run.compute_dtype,
            adapter_scale=1.0 if lora is None else lora.scale,
            beta=self.learn.beta,
            label_smoothing=self.learn.label_smoothing,
            chosen_weight=self.learn.chosen_weight,
        )


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's config.

    Args:
      path: a TOML file.
      overrides: "section.field=value", the value as TOML writes it; a text needs no quotes.

    Raises:
      ConfigError: the file or an override cannot be read, or a field is missing, unknown or out of
        range; names every such field.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _set(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"{path}: {faults}") from error


def _set(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: expected section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} is not a section")
    values[key] = value
