"""The training loop with steps, validation and checkpoints, which can be resumed."""

import math
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from ovis_jax.checkpoint.adapters import save_adapters
from ovis_jax.checkpoint.params import load_params, read_config_dtype, save_params
from ovis_jax.checkpoint.resolve import find_processor_files, resolve_checkpoint
from ovis_jax.checkpoint.safetensors_reader import DTYPES
from ovis_jax.config import OvisConfig
from ovis_jax.distributed import describe_devices
from ovis_jax.errors import CheckpointError, TrainingError, count_noun
from ovis_jax.evaluation.batch_answering import ScoredAnswer, accuracy_by_kind, answer_rows
from ovis_jax.global_arrays import shard_array
from ovis_jax.inference.sampling import derive_image_key
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis
from ovis_jax.mesh import data_model_mesh
from ovis_jax.model.linear import Quantized
from ovis_jax.model.lora import init_adapters
from ovis_jax.model.ovis import Ovis
from ovis_jax.plan.topologies import find_peak_flops
from ovis_jax.process_agreement import agree, checksum
from ovis_jax.sharding import RULES_BY_NAME, TENSOR, adapter_shapes, adapter_shardings, param_shapes
from ovis_jax.training.batches import RowEncoder, StepBatches
from ovis_jax.training.checkpoints import TrainingCheckpoints
from ovis_jax.training.config import TrainConfig, check_micro_batch_size
from ovis_jax.training.losses import PreferenceBatch, TrainBatch
from ovis_jax.training.model_flops import ModelWork, count_work, training_flops
from ovis_jax.training.output_lock import lock_output
from ovis_jax.training.profiling import StepProfiler
from ovis_jax.training.reporting import AnswerSample, MetricsWriter, ProgressBar, read_metrics
from ovis_jax.training.train_step import (
    GradientSums,
    StepMetrics,
    accumulate_gradients,
    apply_gradients,
    init_gradient_sums,
    init_train_state,
    reference_log_probs,
    train_step,
)
from ovis_jax.training.trainable import FrozenParams, cast_params, join_params, split_params
from ovis_jax.training.training_set import (
    plan_training_set,
    raise_if_invalid,
    read_training_rows,
    read_validation_rows,
)

MODEL_FOLDER = "model"
ADAPTERS_FOLDER = "adapters"
CHANGEABLE = ("config.training.learning_rate", "config.training.max_grad_norm")
"""Settings that may change when a run is resumed, so that a diverged run can continue."""
NUM_SAMPLES = 4
"""Number of validation rows whose answers are reported at each validation."""


class Trainer:
    """A training run, loaded from its config.

    Args:
      config: Config of the run.
      console: Console on which progress is printed.
      profile_steps: Number of steps that are traced with the JAX profiler.

    Raises:
      TrainingError: The batch cannot be split over the mesh.
      ConfigError: A config of the model is missing or not supported.
      DataError: A dataset file is invalid, or a row is invalid and the config does not skip invalid
        rows.
      CheckpointError: The model cannot be loaded.
      OvisError: The mesh needs more devices than JAX has, a trainable part is quantized, or the
        processes have different versions, configs or datasets.
    """

    def __init__(self, config: TrainConfig, console: Console, profile_steps: int | None = None):
        self._config, self._console, self._profile_steps = config, console, profile_steps
        with agree("the start of the run") as values:
            self._mesh = mesh = _make_mesh(config)
            folder = resolve_checkpoint(config.model, weights=False).folder
            ovis_config = OvisConfig.from_folder(folder)
            self._processor = Processor.from_folder(folder, ovis_config)
            self._encode_row = RowEncoder(self._processor, config.data)
            system_turns = self._processor.chat_format.has_system_turns
            dataset = read_training_rows(config, system_turns, config.data.train_files)
            raise_if_invalid(config, dataset)
            self._validation_set = read_validation_rows(
                config, system_turns, config.data.validation_files
            )
            raise_if_invalid(config, self._validation_set)
            self._train_set = plan_training_set(config, dataset, self._encode_row)
            raise_if_invalid(config, self._train_set)
            self._source = resolve_checkpoint(config.model).folder
            if jax.process_count() > 1:
                values.update(self._fingerprint())
        self._model = Ovis(ovis_config, remat=config.run.remat)
        rules = RULES_BY_NAME[config.mesh.rules] if config.mesh else TENSOR
        params = load_params(
            self._source, ovis_config, mesh=mesh, rules=rules, quantization=config.quantization
        )
        if config.lora is None:
            trainable, frozen = split_params(params, config.trainable)
        else:
            trainable = init_adapters(
                params,
                jax.random.key(config.run.seed),
                rank=config.lora.rank,
                target_modules=config.lora.target_modules,
            )
            frozen = cast(FrozenParams, flatten_dict(params, sep="/"))
            if mesh is not None:
                shardings = adapter_shardings(ovis_config, mesh, rules)
                trainable = {path: shard_array(x, shardings[path]) for path, x in trainable.items()}
        self._frozen = self._cast(frozen)
        self._reference = None
        if config.training.objective == "dpo":
            # LoRA starts at zero, so the reference model is the frozen base model.
            self._reference = join_params(
                {} if config.lora else self._cast(trainable), self._frozen
            )
        self._flops = training_flops(ovis_config, {k: x.shape for k, x in trainable.items()})
        if self._reference is not None:
            self._flops = self._flops.plus(training_flops(ovis_config, {}))
        state = init_train_state(config.training, trainable)
        if self._mesh is None:  # placed as a restored state is, which runs the same program
            state = jax.device_put(state, jax.local_devices()[0])
        self._state = jax.tree.map(lambda x: x if x.ndim else self._place(x), state)
        self._image_key = self._place(derive_image_key(jax.random.key(config.run.seed)))

    def train(self) -> bool:
        """Start the run, or resume it from its latest checkpoint.

        The run writes run.json, checkpoints/, metrics.jsonl and tensorboard/ to the folder
        `output_dir`. It also writes samples.jsonl if there are validation rows, and profile/ if
        `profile_steps` is given. At the end, it writes loss.png and either adapters/ or model/,
        which is a converted folder in the dtype of the initial model. On SIGTERM or SIGINT, the run
        finishes the current step and saves a checkpoint.

        Returns:
          True if the run is complete; False if it was stopped. In that case, calling `train` again
          resumes the run.

        With several processes, process 0 writes everything except its part of the checkpoints.

        Raises:
          DataError: A row is invalid, and the config does not skip invalid rows.
          CheckpointError: The output folder belongs to a different run, or it contains a result but
            not the checkpoint of the last step.
          TrainingError: The loss or the gradient norm is not finite, another process is writing to
            the output folder, or too few steps remain for the profile.
          OvisError: With several processes, their batches differ, or one of them failed to read its
            batch.
          OSError: A file cannot be read or written, or the disk is full. The latest checkpoint
            remains.
        """
        with ExitStack() as stack:
            with agree("the output folder"):
                if jax.process_index() == 0:
                    stack.enter_context(lock_output(self._config.output_dir))
            return self._run()

    def _run(self) -> bool:
        """Start or resume the run while this process owns the output folder."""
        config, console = self._config, self._console
        errors = (*self._train_set.errors, *self._validation_set.errors)
        for error in errors:
            console.print(f"skipped: {error}", markup=False, soft_wrap=True)
        num_train = count_noun(len(self._train_set.rows), "training row")
        num_validation = count_noun(len(self._validation_set.rows), "validation row")
        planner = self._train_set.planner
        num_shapes = count_noun(len(planner.shapes), "shape")
        positions, crops = planner.padding(steps := planner.plan(0))
        console.print(
            f"{num_train}, {num_validation}; an epoch is {count_noun(len(steps), 'step')} with"
            f" micro-batches of {num_shapes}; {positions:.1%} of positions and {crops:.1%} of crops"
            " are padding",
            highlight=False,
            soft_wrap=True,
        )
        checkpoints = TrainingCheckpoints(
            config.output_dir, config.run.save_total_limit, self._run_settings(), CHANGEABLE
        )
        latest, max_steps = checkpoints.latest_step(), config.training.max_steps
        with agree(f"output_dir {config.output_dir}, which all processes must share") as values:
            values["latest checkpoint"] = str(latest)
            values["result"] = "exists" if self._result_folder.exists() else "does not exist"
        if self._result_folder.exists() and (latest or 0) < max_steps:
            checkpoints.close()
            raise CheckpointError(
                f"{self._result_folder} exists, and the checkpoint of its last step does not; move"
                " the folder, or choose another output_dir"
            )
        batches = StepBatches(self._train_set.rows, planner, self._encode_row)
        if latest is not None:
            self._state, position = checkpoints.restore(self._state)
            batches.set_state(position)
            console.print(f"resumed at step {latest}")
        with _StopSignal() as stop:
            step = self._run_steps(checkpoints, batches, stop)
            if step == max_steps:
                self._write_result()
        if jax.process_count() > 1:  # process 0 may still be writing
            multihost_utils.sync_global_devices("ovis_jax: the run has ended")
        if num_skipped := len(errors) + len(self._encode_row.skipped):
            console.print(f"rows skipped: {num_skipped:,}", highlight=False)
        if step < max_steps:
            console.print(f"stopped at step {step}; run the same command to resume")
            return False
        console.print(f"result: {self._result_folder}", soft_wrap=True)
        return True

    def _run_steps(
        self, checkpoints: TrainingCheckpoints, batches: StepBatches, stop: "_StopSignal"
    ) -> int:
        """Run the remaining steps until the end or a requested stop; return the last step."""
        run, max_steps = self._config.run, self._config.training.max_steps
        step = saved_step = int(self._state.step)
        metrics = None
        lines = read_metrics(self._config.output_dir)
        is_validated = any("accuracy" in line and line["step"] == step for line in lines)
        with agree("metrics.jsonl") as values:  # all have read it before process 0 writes it
            values["validation"] = f"of step {step} {'exists' if is_validated else 'is missing'}"
        writer = MetricsWriter(self._config.output_dir, step) if jax.process_index() == 0 else None
        reported: set[str] = set()

        def report_skipped() -> None:
            for name in self._encode_row.skipped.keys() - reported:
                bar.print(f"skipped: {self._encode_row.skipped[name]}")
                reported.add(name)

        def validate_if_due() -> None:
            is_due = step == max_steps or (step and step % run.eval_steps == 0)
            if not (self._validation_set.rows and is_due) or stop.requested:
                return
            answers = self._validation_answers(bar, stop)
            report_skipped()
            if answers:
                outcomes = [(answer.row.kind or "all", answer.is_correct) for answer in answers]
                by_kind = accuracy_by_kind(outcomes)
                accuracies = {kind: accuracy.fraction for kind, accuracy in by_kind.items()}
                mean = float(np.mean(list(accuracies.values())))
                samples = self._select_samples(answers)
                if writer:
                    writer.write_samples(step, samples)
                    writer.write(step, {"accuracy": mean, "accuracy_by_kind": accuracies})
                bar.print(
                    f"step {step}: {mean:.1%} exact match on validation rows, mean over kinds"
                )
                for sample in samples:
                    bar.print(sample.describe())

        def save() -> int:
            with agree(f"step {step}"):
                _finite_metrics(metrics, step)  # a diverged state must not be saved
            checkpoints.save(self._state, batches.get_state())
            bar.print(f"step {step}: saving a checkpoint")
            return step

        # After an error, closing waits until the current checkpoint is saved.
        with (
            checkpoints,
            closing(batches),
            self._make_profiler(step) as profiler,
            ProgressBar(self._console, step, max_steps, self._peak_flops) as bar,
        ):
            with bar.paused():
                if not is_validated:
                    validate_if_due()  # the run was stopped before or during this validation
                if num_compiled := self._compile_shapes(batches, max_steps - step, stop):
                    bar.print(f"compiled {count_noun(num_compiled, 'shape')} of micro-batches")
            while step < max_steps and not stop.poll():
                micro_batches = _agreed_micro_batches(step + 1, next(batches))
                metrics, work = self._train_step(micro_batches)
                step += 1
                is_last = step == max_steps
                flops = work.times(self._flops) / self._num_devices
                rates = bar.update(step, work.positions, flops, metrics.loss)
                if is_last or step % run.logging_steps == 0:
                    with agree(f"step {step}"):
                        numbers = _finite_metrics(metrics, step)
                    if writer:
                        writer.write(step, numbers | rates)
                report_skipped()
                if profiler and profiler.is_due(step):
                    with bar.paused():
                        profiler.after_step(step, metrics.loss, self._console)
                is_save_due = is_last or step % run.save_steps == 0
                if is_save_due or step % run.eval_steps == 0:
                    with bar.paused():
                        if is_save_due:
                            saved_step = save()
                        validate_if_due()
            if saved_step < step:
                save()
        if writer:
            writer.close()
        return step

    def _train_step(
        self, micro_batches: Iterable[TrainBatch | PreferenceBatch]
    ) -> tuple[StepMetrics, ModelWork]:
        """Run one step, and return its metrics and its work without padding."""
        if not self._accumulates:
            (batch,) = micro_batches
            placed = self._place_batch(batch, self._image_key)
            self._state, metrics = train_step(*self._step_arguments(placed))
            return metrics, self._count_work(batch)
        sums, work = init_gradient_sums(self._state), ModelWork()
        for number, batch in enumerate(micro_batches):
            work = work.plus(self._count_work(batch))
            key = jax.random.fold_in(self._image_key, number)
            placed = self._place_batch(batch, key)
            # At most one micro-batch waits on the devices, which bounds the memory of its images.
            jax.block_until_ready(sums.loss)
            sums = accumulate_gradients(*self._accumulation_arguments(sums, placed, key))
        self._state, metrics = apply_gradients(self._config.training, self._state, sums)
        return metrics, work

    def _count_work(self, batch: TrainBatch | PreferenceBatch) -> ModelWork:
        work = ModelWork()
        for part in _parts(batch):
            work = work.plus(count_work(self._model.config, part))
        return work

    @property
    def _num_devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.size

    @property
    def _peak_flops(self) -> float | None:
        """The peak rate of each device in FLOPs per second, or None if it is unknown."""
        return find_peak_flops(jax.local_devices()[0].device_kind)

    def _make_profiler(self, step: int) -> StepProfiler | nullcontext[None]:
        """Return the profiler for the remaining steps; only process 0 writes a trace."""
        if self._profile_steps is None:
            return nullcontext()
        folder, max_steps = self._config.output_dir, self._config.training.max_steps
        with agree("--profile"):
            profiler = StepProfiler(folder, step, max_steps, self._profile_steps)
        return profiler if jax.process_index() == 0 else nullcontext()

    def _compile_shapes(self, batches: StepBatches, num_steps: int, stop: "_StopSignal") -> int:
        """Compile the shapes of the next steps, and return their number."""
        num_compiled, key = 0, jax.random.fold_in(self._image_key, 0)
        for shape in batches.upcoming_shapes(num_steps):
            if stop.requested:
                break
            placed = self._place_batch(batches.padding_batch(shape), key)
            if self._accumulates:
                sums = init_gradient_sums(self._state)
                arguments = self._accumulation_arguments(sums, placed, key)
                accumulate_gradients.lower(*arguments).compile()
            else:
                train_step.lower(*self._step_arguments(placed)).compile()
            num_compiled += 1
        return num_compiled

    @property
    def _accumulates(self) -> bool:
        """Whether steps have several micro-batches. If not, one program needs less memory."""
        return self._config.data.gradient_accumulation_steps > 1

    def _step_arguments(self, placed: TrainBatch | PreferenceBatch) -> tuple[Any, ...]:
        config = self._config
        run = (config.lora_scale, self._image_key)
        return (self._model, config.training, self._state, self._frozen, placed, *run)

    def _accumulation_arguments(
        self, sums: GradientSums, placed: TrainBatch | PreferenceBatch, key: Array
    ) -> tuple[Any, ...]:
        config, state = self._config, self._state
        micro_batch = (sums, placed, config.lora_scale, key, state.step)
        return (self._model, config.training, state.trainable, self._frozen, *micro_batch)

    def _validation_answers(self, bar: ProgressBar, stop: "_StopSignal") -> list[ScoredAnswer]:
        """Return the answers to the validation rows, or [] if a stop was requested."""
        trainable = self._cast(self._state.trainable)
        params = join_params(trainable, self._frozen, self._config.lora_scale)
        answers = answer_rows(
            LoadedOvis(self._model.config, self._model, params, self._processor),
            self._validation_set.rows,
            max_new_tokens=self._config.run.max_new_tokens,
            max_partition=self._config.data.max_partition_for,
            exact_images=self._config.data.exact_images,
            skipped=self._encode_row.skipped if self._config.data.invalid_rows == "skip" else None,
        )
        found: list[ScoredAnswer] = []
        for answer in answers:
            if stop.poll():
                return []
            found.append(answer)
            num_rows = len(self._validation_set.rows)
            bar.print_at_intervals(f"validation: {len(found):,} of {num_rows:,} rows answered")
        return found

    def _select_samples(self, answers: Iterable[ScoredAnswer]) -> list[AnswerSample]:
        """Return the answers to `NUM_SAMPLES` rows that are spread over the validation rows."""
        rows = self._validation_set.rows
        by_row = {answer.row.name: answer for answer in answers}
        chosen = (rows[i] for i in range(0, len(rows), -(-len(rows) // NUM_SAMPLES)))
        samples = []
        for row in chosen:
            if answer := by_row.get(row.name):
                questions = [turn["content"] for turn in row.turns if turn["role"] == "user"]
                # Unlike the question, the expected answer may have unpaired surrogates.
                expected = answer.expected.encode(errors="replace").decode()
                sample = AnswerSample(row.name, questions[-1], expected, answer.text)
                samples.append(sample)
        return samples

    def _cast(self, params: Mapping[str, Array | Quantized]) -> FrozenParams:
        return cast_params(params, self._config.training.compute_dtype)

    def _place(self, arrays: Any, *axes: str | None) -> Any:
        """Shard arrays over the given mesh axes; without a mesh, return them unchanged."""
        if self._mesh is None:
            return arrays
        sharding = NamedSharding(self._mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda x: shard_array(x, sharding), arrays)

    def _place_batch(
        self, batch: TrainBatch | PreferenceBatch, key: Array
    ) -> TrainBatch | PreferenceBatch:
        """Shard a micro-batch, and add reference log-probabilities to preference pairs."""
        batch = self._place(batch, None, "data")
        if isinstance(batch, TrainBatch) or self._reference is None:
            return batch
        log_probs = [
            reference_log_probs(self._model, self._reference, part, key, self._state.step)
            for part in (batch.chosen, batch.rejected)
        ]
        return batch._replace(reference_chosen=log_probs[0], reference_rejected=log_probs[1])

    def _fingerprint(self) -> dict[str, str]:
        """Return versions and checksums of everything that must be equal in all processes."""
        packages = "ovis-jax", "jax", "numpy", "pillow"
        values = {name: metadata.version(name) for name in packages}
        values["config"] = checksum([repr(self._config).encode()])
        for name, dataset in (("training", self._train_set), ("validation", self._validation_set)):
            rows = ((row.turns, row.preference, row.kind) for row in dataset.rows)
            found = checksum(repr(row).encode() for row in rows)
            values[f"{name} rows"] = f"{len(dataset.rows):,} ({found})"
        return values

    def _run_settings(self) -> dict[str, Any]:
        """Return the settings that determine the result; a resumed run may change all others."""
        config = self._config
        values = config.model_dump(
            mode="json",
            exclude={
                "output_dir": True,
                "mesh": True,
                "run": {
                    "logging_steps",
                    "save_steps",
                    "save_total_limit",
                    "eval_steps",
                    "max_new_tokens",
                },
                "data": {"validation_files"},
            },
        )
        unpadded = param_shapes(self._model.config)
        if config.lora is not None:
            unpadded = adapter_shapes(self._model.config, config.lora.rank)
        trainable = self._state.trainable
        return {
            "config": values,
            "model": self._model.config.to_hf()[0],
            # On a mesh, the visual vocabulary may be padded.
            "padded": {k: list(x.shape) for k, x in trainable.items() if x.shape != unpadded[k]},
            "rows": len(self._train_set.rows),
        }

    @property
    def _result_folder(self) -> Path:
        name = MODEL_FOLDER if self._config.lora is None else ADAPTERS_FOLDER
        return self._config.output_dir / name

    def _write_result(self) -> None:
        """Write the adapters, or the model together with the initial model's tokenizer."""
        folder, config = self._result_folder, self._model.config
        if folder.exists():
            return
        if self._config.lora is not None:
            save_adapters(folder, self._state.trainable, config, scale=self._config.lora_scale)
            return
        params = join_params(self._state.trainable, self._frozen)
        files = {
            name: path.read_bytes() for name, path in find_processor_files(self._source).items()
        }
        dtype = DTYPES[read_config_dtype(self._source)]
        save_params(folder, params, config, dtype=dtype, files=files)


def _make_mesh(config: TrainConfig) -> Mesh | None:
    if config.mesh is None and jax.process_count() > 1:
        raise TrainingError(
            f"mesh is missing; set mesh.data and mesh.model to use the {jax.device_count()} devices"
            f" of the {jax.process_count()} processes"
        )
    if config.mesh is None:
        return None
    sizes = config.mesh
    num_devices = sizes.data * sizes.model
    if jax.process_count() > 1 and num_devices != jax.device_count():
        raise TrainingError(
            f"mesh: data {sizes.data} x model {sizes.model} is {count_noun(num_devices, 'device')},"
            f" expected all {jax.device_count()} of the {jax.process_count()} processes"
            f" ({describe_devices()})"
        )
    mesh = data_model_mesh(sizes.data, sizes.model)
    check_micro_batch_size(config)
    return mesh


def _agreed_micro_batches(
    step: int, micro_batches: Iterator[TrainBatch | PreferenceBatch]
) -> Iterator[TrainBatch | PreferenceBatch]:
    """Yield the micro-batches of a step, after checking that they are equal in all processes."""
    for number in count(1):
        with agree(f"step {step}, micro-batch {number}") as values:
            batch = next(micro_batches, None)
            if batch is not None and jax.process_count() > 1:
                values.update(_describe_batch(batch))
        if batch is None:
            return
        yield batch


def _parts(batch: TrainBatch | PreferenceBatch) -> tuple[TrainBatch, ...]:
    return (batch,) if isinstance(batch, TrainBatch) else (batch.chosen, batch.rejected)


def _describe_batch(batch: TrainBatch | PreferenceBatch) -> dict[str, str]:
    """Return the shapes of a batch, and a checksum of its tokens and labels."""
    arrays = [
        x
        for part in _parts(batch)
        for x in (part.inputs.tokens, part.inputs.positions, part.labels)
    ]
    shapes = [
        f"{list(part.inputs.tokens.shape)} and {list(part.inputs.pixels.shape)}"
        for part in _parts(batch)
    ]
    return {"shapes": ", ".join(shapes), "rows": checksum(np.asarray(x).tobytes() for x in arrays)}


def _finite_metrics(metrics: StepMetrics | None, step: int) -> dict[str, float]:
    """Return the metrics of a step as floats.

    Raises:
      TrainingError: The loss or the gradient norm is not finite.
    """
    values = {} if metrics is None else {k: float(v) for k, v in metrics._asdict().items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values.get(name, 0.0)):
            raise TrainingError(
                f"the {name} of step {step} is {values[name]}; resume from the last checkpoint with"
                " a smaller training.learning_rate or training.max_grad_norm"
            )
    return values


class _StopSignal:
    """Context manager in which the first SIGTERM or SIGINT requests a stop; a second one exits.

    With several processes, a signal to one of them stops all of them. JAX has its own handler for
    SIGTERM, and lets all processes continue to the same call of `poll`. A second SIGTERM has no
    effect.
    """

    requested = False

    def __init__(self):
        self._several, self._polls = jax.process_count() > 1, 0

    def __enter__(self) -> "_StopSignal":
        signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous: dict[int, Any] = {x: signal.signal(x, self._request) for x in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def poll(self) -> bool:
        """Return whether to stop now; all processes must call this function equally often."""
        if self._several and not self.requested:
            self._polls += 1
            self.requested = multihost_utils.reached_preemption_sync_point(self._polls)
        return self.requested

    def _request(self, number: int, frame: object) -> None:
        signal.signal(number, self._previous[number])
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.requested = True
