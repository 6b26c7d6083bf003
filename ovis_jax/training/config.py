"""The config of a training run: a TOML file, whose fields the command line can override."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ovis_jax.errors import ConfigError
from ovis_jax.model.lora import ATTENTION_MATRICES
from ovis_jax.training.trainable import TrainablePart

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Parts = Annotated[tuple[TrainablePart, ...], BeforeValidator(_as_list)]
Files = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class ConfigTable(BaseModel):
    """A table of the file; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(ConfigTable):
    """`[lora]`: train low-rank adapters instead of parts of the model."""

    rank: PositiveInt = Field(examples=[16])
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The products of the adapters are multiplied by alpha / rank; default: rank."""
    target_modules: str = ATTENTION_MATRICES
    """Regular expression for parameter paths; `ovis_jax.sharding.PARAM_AXES` lists them."""

    @property
    def scale(self) -> float:
        """The factor on the adapters' products."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class DataConfig(ConfigTable):
    """`[data]`: dataset files, and how their rows become batches."""

    train_files: Files = Field(min_length=1, examples=[["train.jsonl"]])
    validation_files: Files = Field(default=(), examples=[["validation.jsonl"]])
    invalid_rows: Literal["error", "skip"] = "error"
    """What an invalid row does: it ends the run, or it is skipped and reported."""
    max_partition: PositiveInt = 9
    """Maximum number of cells that an image is split into."""
    max_length: PositiveInt | None = Field(default=None, examples=[2048])
    """Maximum number of positions per example; default: the model's limit."""
    truncate: bool = False
    """Cut longer examples at their end instead of treating them as invalid rows."""
    micro_batch_size: PositiveInt = 8
    """Number of rows per micro-batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of micro-batches per optimizer step."""
    pad_to_multiple_of: PositiveInt = 64
    """Lengths are padded to a multiple of this; each padded shape compiles once."""


class StepConfig(ConfigTable):
    """`[training]`: objective, AdamW and precision; a static argument of `train_step`."""

    max_steps: PositiveInt = Field(examples=[1000])
    """Number of optimizer steps."""
    learning_rate: NonNegative = 1e-4
    warmup_steps: NonNegativeInt = 0
    """Number of first steps over which the learning rate rises linearly."""
    decay_steps: NonNegativeInt = 0
    """Number of last steps over which the learning rate falls linearly to 0."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    weight_decay: NonNegative = 0.0
    """Weight decay of matrices."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this global norm."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and weights in a step; trainable parameters are stored in float32."""
    objective: Literal["sft", "dpo"] = "sft"
    """Supervised fine-tuning, or direct preference optimization."""
    beta: NonNegative = 0.1
    """DPO: strength of the penalty on departing from the reference model."""
    label_smoothing: Fraction = 0.0
    """DPO: assumed share of pairs with swapped answers."""
    rpo_alpha: NonNegative = 0.0
    """DPO: weight of the chosen answer's mean cross-entropy, which keeps chosen answers probable
    (Pang et al. 2024, "Iterative reasoning preference optimization")."""


class RunConfig(ConfigTable):
    """`[run]`: seed, memory, and how often the run logs, evaluates and saves."""

    seed: int = 0
    remat: bool = False
    """Recompute the activations of each block in the backward pass to save memory."""
    logging_steps: PositiveInt = 10
    eval_steps: PositiveInt = 1000
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens per validation answer."""


class MeshConfig(ConfigTable):
    """`[mesh]`: sizes of the mesh axes; without it the run uses one device."""

    data: PositiveInt = 1
    model: PositiveInt = 1
    rules: Literal["tensor", "fsdp", "tensor_fsdp"] = "fsdp"


class TrainConfig(ConfigTable):
    """A training run; paths are relative to the current folder."""

    model: str = Field(examples=["ovis-tiny"])
    """Converted folder, or folder or repo id in the Hub's layout."""
    output_dir: Path = Field(examples=["runs/first"])
    """Folder for checkpoints, metrics and the result."""
    trainable: Parts = Field(default=(), examples=[["llm"]])
    """Trainable parts; give either these or `lora`."""
    lora: LoraConfig | None = None
    data: DataConfig
    training: StepConfig
    run: RunConfig = RunConfig()
    mesh: MeshConfig | None = None

    @property
    def lora_scale(self) -> float:
        """The factor on the adapters' products; 1 without adapters."""
        return 1.0 if self.lora is None else self.lora.scale

    @model_validator(mode="after")
    def _check_trainable(self) -> "TrainConfig":
        if bool(self.trainable) == (self.lora is not None):
            found = "both given" if self.trainable else "both missing"
            raise ValueError(
                f"trainable and lora are {found}, expected one of them, for example"
                ' trainable=["llm"] or lora.rank=16'
            )
        return self


def read_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training config.

    Args:
      path: TOML file.
      overrides: "FIELD=VALUE" with a dotted field name, such as "training.max_steps=100". Values
        are TOML; strings need no quotes.

    Raises:
      ConfigError: the file or an override cannot be parsed, or fields are missing, unknown or
        invalid; names every such field.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"override {override!r}: expected FIELD=VALUE, for example training.max_steps=1000"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, field = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {table} is not a table, so it has no fields")
    values[field] = value


def _explain(error: ErrorDetails) -> str:
    """Describe a validation error in the terms of the config file."""
    keys = [str(key) for key in error["loc"] if not isinstance(key, int)]
    name, found, kind = ".".join(keys), json.dumps(error["input"], default=str), error["type"]
    if kind == "value_error":  # raised above, with its own text
        return error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"{name} is missing; add it{_example(keys)}"
    if kind == "extra_forbidden":
        fields = (".".join([*keys[:-1], field]) for field in _table(keys[:-1]).model_fields)
        return f"{name} is not a field, expected one of {', '.join(fields)}"
    expected = {
        "too_short": "at least one entry",
        "tuple_type": "a list",
        "path_type": "a path",
        "model_type": "a table",
    }.get(kind, error["msg"].removeprefix("Input should be ").partition(", unable")[0])
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{name} is {found}, expected {expected}{_example(keys)}"


def _example(keys: Sequence[str]) -> str:
    """Return ", for example FIELD=VALUE"; for a table, with its first required field."""
    if table := _nested_table(_table(keys[:-1]), keys[-1]):
        required = [name for name, field in table.model_fields.items() if field.is_required()]
        return _example([*keys, required[0]]) if required else ""
    field = _table(keys[:-1]).model_fields[keys[-1]]
    value = field.examples[0] if field.examples else field.default
    return f", for example {'.'.join(keys)}={json.dumps(value)}"


def _table(keys: Sequence[str]) -> type[ConfigTable]:
    """Return the class of the table with a dotted name."""
    table: type[ConfigTable] = TrainConfig
    for key in keys:
        table = _nested_table(table, key) or table
    return table


def _nested_table(table: type[ConfigTable], field: str) -> type[ConfigTable] | None:
    annotation = table.model_fields[field].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, ConfigTable):
            return candidate
    return None
