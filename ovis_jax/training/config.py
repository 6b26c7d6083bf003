"""The config of a training run: a TOML file whose fields can be overridden on the command line."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    DirectoryPath,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ovis_jax.errors import TrainingError
from ovis_jax.model.lora import ATTENTION_MATRICES
from ovis_jax.quantization import QuantizationFormat
from ovis_jax.training.trainable import TrainablePart
from ovis_jax.user_files import read_text

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Parts = Annotated[tuple[TrainablePart, ...], BeforeValidator(_as_list)]
Files = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


def _as_three_numbers(value: Any) -> Any:
    numbers = [value] * 3 if isinstance(value, int) else str(value).split("|")
    try:
        numbers = tuple(map(int, numbers))
    except ValueError:
        numbers = ()
    if isinstance(value, bool) or len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(
            f"data.max_partition is {json.dumps(value, default=str)}, expected a number of at least"
            ' 1, or three such numbers for one image, several images and video: "9|1|1"'
        )
    return numbers


MaxPartitions = Annotated[tuple[int, int, int], BeforeValidator(_as_three_numbers)]


class ConfigTable(BaseModel):
    """A table in the config file; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(ConfigTable):
    """The table `[lora]`. If given, the run trains LoRA adapters instead of parts of the model."""

    rank: PositiveInt = Field(examples=[16])
    alpha: PositiveFloat | None = None
    """The products of the adapters are multiplied by alpha / rank. The default is the rank."""
    target_modules: str = ATTENTION_MATRICES
    """Regular expression for the paths of adapted matrices; `PARAM_AXES` in `ovis_jax.sharding`
    lists all paths."""

    @property
    def scale(self) -> float:
        """The factor by which the adapters' products are multiplied."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class DataConfig(ConfigTable):
    """The table `[data]`: dataset files, and how their rows are converted to batches."""

    train_files: Files = Field(min_length=1, examples=[["train.jsonl"]])
    validation_files: Files = Field(default=(), examples=[["validation.jsonl"]])
    train_weights: tuple[PositiveFloat, ...] = Field(default=(), examples=[[1.0, 0.5]])
    """For each of `train_files`, how often its rows appear in an epoch. With 0.5, each epoch has
    one half of the file's rows, and the next epoch has the other half. The default is 1."""
    invalid_rows: Literal["error", "skip"] = "error"
    """Handling of invalid rows: an error ends the run, or the rows are skipped and reported."""
    exact_images: bool = False
    """Whether to read image files exactly as the original does. By default, they are turned upright
    by their EXIF orientation, scaled from 16 bits to 8, and put on white where transparent."""
    images: DirectoryPath | None = Field(default=None, examples=["images"])
    """Folder that image paths in rows are relative to. By default, they are relative to the folder
    of the dataset file."""
    max_partition: MaxPartitions = Field(default=(9, 1, 1), examples=["9|1|1"])
    """Maximum number of cells that an image is split into: one number for all rows, or a string
    with the numbers for rows with one image, with several images, and for video, as in the original
    ("9|1|1"). Rows with videos are not supported, so the last number has no effect."""
    max_length: PositiveInt | None = Field(default=None, examples=[2048])
    """Maximum number of positions per example. The default is the model's limit."""
    truncate: bool = False
    """Whether to truncate longer examples at the end instead of treating them as invalid rows."""
    micro_batch_size: PositiveInt = 8
    """Number of rows in a micro-batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of micro-batches per optimizer step. Some steps of an epoch may have one less."""
    pad_to_multiple_of: PositiveInt = 64
    """Lengths are padded to a multiple of this number; each padded shape is compiled once."""

    @model_validator(mode="after")
    def _check_weights(self) -> "DataConfig":
        if self.train_weights and len(self.train_weights) != len(self.train_files):
            raise ValueError(
                f"data.train_weights has {len(self.train_weights)} numbers, expected one for each"
                f" of the {len(self.train_files)} data.train_files"
            )
        return self

    def max_partition_for(self, num_images: int) -> int:
        """Return the maximum number of cells of each image in a row with this many images."""
        return self.max_partition[num_images > 1]


class StepConfig(ConfigTable):
    """The table `[training]`: objective, AdamW and precision; a static argument of `train_step`."""

    max_steps: PositiveInt = Field(examples=[1000])
    """Number of optimizer steps."""
    learning_rate: NonNegative = 1e-4
    warmup_steps: NonNegativeInt = 0
    """Number of steps at the beginning, in which the learning rate rises linearly."""
    decay_steps: NonNegativeInt = 0
    """Number of steps at the end, in which the learning rate falls linearly to 0."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    weight_decay: NonNegative = 0.0
    """Weight decay, which is applied to matrices only."""
    max_grad_norm: NonNegative = 1.0
    """Maximum global norm to which gradients are clipped."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and weights in a step. Trainable parameters are stored in float32."""
    objective: Literal["sft", "dpo"] = "sft"
    """Supervised fine-tuning (sft), or direct preference optimization (dpo)."""
    beta: NonNegative = 0.1
    """DPO: strength of the penalty for deviating from the reference model."""
    label_smoothing: Fraction = 0.0
    """DPO: assumed fraction of pairs in which the answers are swapped."""
    rpo_alpha: NonNegative = 0.0
    """DPO: weight of an additional loss, the mean cross-entropy of the chosen answer, which keeps
    chosen answers likely (Pang et al. 2024, "Iterative reasoning preference optimization")."""


class RunConfig(ConfigTable):
    """The table `[run]`: seed, memory, and how often the run logs, evaluates and saves."""

    seed: int = 0
    remat: bool = False
    """Whether to recompute the activations of each block in the backward pass to save memory."""
    logging_steps: PositiveInt = 10
    eval_steps: PositiveInt = 1000
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens per validation answer."""


class MeshConfig(ConfigTable):
    """The table `[mesh]`: sizes of the mesh axes. Without this table, the run uses one device."""

    data: PositiveInt = 1
    model: PositiveInt = 1
    rules: Literal["tensor", "fsdp", "tensor_fsdp"] = "fsdp"


class TrainConfig(ConfigTable):
    """The config of a training run. Paths are relative to the current folder."""

    model: str = Field(examples=["ovis-tiny"])
    """A converted folder, or a folder or repo id in the Hub's layout."""
    quantization: QuantizationFormat | None = None
    """Format to which the model's matrices are quantized while the model is loaded. Adapters can be
    trained on quantized matrices (QLoRA, Dettmers et al. 2023), which do not change."""
    output_dir: Path = Field(examples=["runs/first"])
    """Output folder for checkpoints, metrics and the result."""
    trainable: Parts = Field(default=(), examples=[["llm"]])
    """Trainable parts of the model. Either `trainable` or `lora` must be set, but not both."""
    lora: LoraConfig | None = None
    data: DataConfig
    training: StepConfig
    run: RunConfig = RunConfig()
    mesh: MeshConfig | None = None

    @property
    def lora_scale(self) -> float:
        """The factor by which the adapters' products are multiplied; 1 without adapters."""
        return 1.0 if self.lora is None else self.lora.scale

    @model_validator(mode="after")
    def _check_trainable(self) -> "TrainConfig":
        if self.trainable and self.lora:
            raise ValueError(
                "trainable and lora are both given, expected one of them: set trainable=[] to train"
                " adapters, or remove lora to train parts of the model"
            )
        if not self.trainable and not self.lora:
            raise ValueError(
                "trainable and lora are both missing, expected one of them, for example"
                ' trainable=["llm"] or lora.rank=16'
            )
        return self


def check_micro_batch_size(config: TrainConfig) -> None:
    """Check that the mesh axis "data" divides the rows of a micro-batch.

    Raises:
      TrainingError: It does not.
    """
    rows, data = config.data.micro_batch_size, config.mesh.data if config.mesh else 1
    if rows % data:
        raise TrainingError(
            f"data.micro_batch_size is {rows}, expected a multiple of the size of mesh axis data,"
            f" {data}"
        )


def _list_fields(table: type[ConfigTable], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of a table and of its nested tables, by dotted name."""
    fields: dict[str, FieldInfo] = {}
    for name, field in table.model_fields.items():
        fields[prefix + name] = field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, ConfigTable):
                fields |= _list_fields(kind, f"{prefix}{name}.")
    return fields


_FIELDS = _list_fields(TrainConfig)


def read_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training config.

    Args:
      path: Path of the TOML file.
      overrides: Overrides "FIELD=VALUE" with dotted field names, such as "training.max_steps=100".
        Values are in TOML syntax, but strings need no quotes.

    Raises:
      TrainingError: The file or an override cannot be parsed, or fields are missing, unknown or
        invalid. The error names every such field, and the file or override that sets it.
    """
    try:
        values = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for one in error.errors():
            lines.setdefault(_find_source(one, path, overrides), []).append(_explain(one))
        texts = (f"{source}: {'; '.join(found)}" for source, found in lines.items())
        raise TrainingError("; ".join(texts)) from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise TrainingError(
            f"override {override}: expected FIELD=VALUE, for example training.max_steps=1000"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, field = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise TrainingError(f"override {override}: {table} is not a table, so it has no fields")
    values[field] = value


def _find_source(error: ErrorDetails, path: Path, overrides: Sequence[str]) -> str:
    """Return the override that sets an invalid field, or else the config file."""
    names = [_field_name(error)] if error["loc"] else ["trainable", "lora"]
    for override in reversed(overrides):
        field = f"{override.partition('=')[0]}."
        if any(f"{name}.".startswith(field) or field.startswith(f"{name}.") for name in names):
            return f"override {override}"
    return str(path)


def _field_name(error: ErrorDetails) -> str:
    return ".".join(str(key) for key in error["loc"] if not isinstance(key, int))


def _explain(error: ErrorDetails) -> str:
    """Describe a validation error in terms of the config file."""
    name, kind = _field_name(error), error["type"]
    if kind == "value_error":  # raised above with a complete message
        return error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"{name} is missing; add it{_example(name)}"
    if kind == "extra_forbidden":
        table, _, field = name.rpartition(".")
        known = [known for known in _FIELDS if known.rpartition(".")[2] == field]
        known = known or [known for known in _FIELDS if known.rpartition(".")[0] == table]
        expected = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
        return f"{name} is not a field, expected {expected}"
    expected = {
        "too_short": "at least one entry",
        "tuple_type": "a list",
        "path_type": "a path",
        "path_not_directory": "an existing folder",
        "model_type": "a table",
    }.get(kind, error["msg"].removeprefix("Input should be ").partition(", unable")[0])
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    found = json.dumps(error["input"], default=str)
    return f"{name} is {found}, expected {expected}{_example(name)}"


def _example(name: str) -> str:
    """Return ", for example FIELD=VALUE"; for a table, FIELD is its first required field."""
    if nested := [field for field in _FIELDS if field.startswith(f"{name}.")]:
        required = (field for field in nested if _FIELDS[field].is_required())
        return next(map(_example, required), "")
    field = _FIELDS[name]
    value = field.examples[0] if field.examples else field.default
    return f", for example {name}={json.dumps(value)}"
