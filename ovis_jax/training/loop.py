"""The loop of training: steps, scores, checkpoints; it can be stopped and taken up at any step."""

import math
import signal
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from ovis_jax.checkpoint.adapters import save_adapters
from ovis_jax.checkpoint.params import declared_dtype, save_params
from ovis_jax.checkpoint.safetensors_files import DTYPES
from ovis_jax.checkpoint.source import small_files
from ovis_jax.errors import CheckpointError, TrainingError
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.config import TrainConfig
from ovis_jax.training.data import ExampleMaker, batches
from ovis_jax.training.evaluation import Answer, answer_rows, scores
from ovis_jax.training.losses import Batch, Pairs, answer_log_probs
from ovis_jax.training.metrics import Metrics, read_metrics
from ovis_jax.training.parts import Flat, join
from ovis_jax.training.progress import Bar
from ovis_jax.training.run import Run, prepare
from ovis_jax.training.step import Metrics as StepMetrics
from ovis_jax.training.step import State, start, step
from ovis_jax.training.store import Store

MODEL_FOLDER = "model"
ADAPTERS_FOLDER = "adapters"
MAY_CHANGE = ("config.optimizer.learning_rate", "config.optimizer.clip_norm")
"""Of what decides the result, so that a run whose loss is no number any more can go on."""


def train(config: TrainConfig, console: Console) -> bool:
    """Run a config, or take up its run where the last checkpoint left it.

    Fills the folder `config.output`: run.json, checkpoints/, metrics.jsonl, tensorboard/, and at
    the end loss.png and what was learned: model/, a converted folder in the dtype of the model that
    the run began from, or adapters/. On SIGTERM or SIGINT it ends the step at hand and saves a
    checkpoint.

    Returns:
      Whether the run came to its end; otherwise the same call goes on with it.

    Raises:
      ConfigError: the config asks for what the model or the devices do not have.
      DataError: a dataset file or a row cannot be used.
      CheckpointError: the model cannot be loaded, or the output folder is of another run, or holds
        a result without the checkpoint that it was made of.
      TrainingError: the loss or the gradient is no number any more.
      OSError: a file cannot be read or written, or the disk is full; the last checkpoint stays.
    """
    run, learned = prepare(config)
    for fault in run.faults:
        console.print(f"left out: {fault}", markup=False, soft_wrap=True)
    console.print(
        f"{len(run.train):,} rows to learn from, {len(run.validation):,} to score answers on",
        highlight=False,
    )
    facts = {
        "config": _facts(config),
        "model": run.model.config.to_hf()[0],
        "padded": run.padded(learned),
        "rows": len(run.train),
    }
    store = Store(config.output, config.run.keep, facts, MAY_CHANGE)
    if _result(config).exists() and (store.latest() or 0) < config.run.steps:
        store.close()
        raise CheckpointError(
            f"{_result(config)} is there, and the checkpoint that it was made of is not; move it,"
            " or give another output"
        )
    maker = run.example_maker()
    data = batches(run.train, maker, run.batch_shape(), config.run.seed)
    state = start(run.recipe, learned)
    del learned
    state = jax.tree.map(lambda x: x if x.ndim else run.place(x), state)
    if store.latest() is not None:
        state, position = store.restore(state)
        data.set_state(position)
        console.print(f"resumed at step {int(state.step)}")
    with _Stop() as stop:
        state = _go_on(run, state, data, maker, store, console, stop)
        done = int(state.step)
        if done == config.run.steps:
            _write_result(run, state.learned)
    if left_out := len(run.faults) + len(maker.faults):
        console.print(f"rows left out: {left_out:,}", highlight=False)
    if done < config.run.steps:
        console.print(f"stopped at step {done}; the same command goes on from there")
        return False
    console.print(f"learned: {_result(config)}", soft_wrap=True)
    return True


def _go_on(
    run: Run,
    state: State,
    data: grain.DatasetIterator,
    maker: ExampleMaker,
    store: Store,
    console: Console,
    stop: "_Stop",
) -> State:
    """Make the steps that are left, or those until somebody asks to stop."""
    settings, done = run.config.run, int(state.step)
    saved, measured = done, None
    metrics = Metrics(run.config.output, done)
    scored = {line["step"] for line in read_metrics(run.config.output) if "accuracy" in line}
    reported: set[str] = set()

    def name_faults() -> None:
        for name in maker.faults.keys() - reported:
            bar.say(f"left out: {maker.faults[name]}")
            reported.add(name)

    def score() -> None:
        due = done == settings.steps or (done and done % settings.evaluate_every == 0)
        if not (run.validation and due) or stop.asked:
            return
        found = evaluate(run, state.learned, maker, stop)
        name_faults()
        if found:
            accuracy = float(np.mean(list(found.values())))
            metrics.write(done, {"accuracy": accuracy, "accuracy_by_kind": found})
            bar.say(f"step {done}: {accuracy:.1%} of held-out answers exact, mean of the kinds")

    # A checkpoint that was begun is whole before an error ends the run.
    with closing(store), Bar(console, done, settings.steps) as bar:
        if done not in scored:  # stopped before or while it was
            score()
        while done < settings.steps and not stop.asked:
            batch = _on_devices(run, next(data))
            state, measured = step(run.model, run.recipe, state, run.frozen, batch)
            done += 1
            last = done == settings.steps
            rate = bar.step(done, _positions(batch), measured.loss)
            if last or done % settings.log_every == 0:
                metrics.write(done, _numbers(measured, done) | {"tokens_per_second": rate})
            name_faults()
            if last or done % settings.save_every == 0:
                saved = _save(store, state, data, measured)
            score()
        if measured is not None and saved < done:
            _save(store, state, data, measured)
    data.close()
    metrics.close()
    return state


def _save(store: Store, state: State, data: grain.DatasetIterator, measured: StepMetrics) -> int:
    """Begin to save a checkpoint of a step that measured numbers; which step it was."""
    done = int(state.step)
    _numbers(measured, done)  # what is no number must not push a good checkpoint out
    store.save(state, data.get_state())
    return done


def evaluate(run: Run, learned: Flat, maker: ExampleMaker, stop: "_Stop") -> dict[str, float]:
    """Exact-match accuracy on the validation rows, by kind; nothing when asked to stop meanwhile.

    Rows that cannot be answered are noted in the faults of `maker`, if it may skip them.
    """
    answers = answer_rows(
        run.processor,
        run.model,
        run.params(learned),
        run.validation,
        max_new_tokens=run.config.run.max_new_tokens,
        max_partition=run.config.data.max_partition,
        faults=maker.faults if maker.skip_unreadable else None,
    )
    found: list[Answer] = []
    for answer in answers:
        if stop.asked:
            return {}
        found.append(answer)
    return scores(found)


def _on_devices(run: Run, batch: Batch | Pairs) -> Batch | Pairs:
    """A step's micro-batches on the mesh; for preference pairs with what the reference thinks."""
    batch = run.place(batch, None, "data")
    if isinstance(batch, Batch) or run.reference is None:
        return batch
    chosen, rejected = (_opinion(run.model, run.reference, side) for side in batch[:2])
    return batch._replace(reference_chosen=chosen, reference_rejected=rejected)


@partial(jax.jit, static_argnums=0)
def _opinion(model: Ovis, params: Params, batch: Batch) -> Float[Array, "micro B"]:
    """Log-probabilities of the answers of stacked micro-batches."""

    def log_probs(micro: Batch) -> Float[Array, "B"]:
        return answer_log_probs(model.forward(params, micro.inputs)[0], micro.labels)

    return jax.lax.map(log_probs, batch)


def _positions(batch: Batch | Pairs) -> int:
    """How many positions a step reads, padding left out."""
    sides = (batch,) if isinstance(batch, Batch) else (batch.chosen, batch.rejected)
    return sum(int(np.count_nonzero(np.asarray(side.inputs.positions) >= 0)) for side in sides)


def _numbers(measured: StepMetrics, done: int) -> dict[str, float]:
    """A step's measurements as JSON takes them.

    Raises:
      TrainingError: the loss or the gradient is no number any more.
    """
    values = {name: float(value) for name, value in measured._asdict().items()}
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise TrainingError(
                f"the {name} of step {done} is {values[name]}; go on from the last checkpoint with"
                " a smaller optimizer.learning_rate or clip_norm"
            )
    return values


def _facts(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that decides the result; the rest may change when a run is resumed."""
    values = config.model_dump(mode="json", exclude={"output", "mesh"})
    for name in ("log_every", "save_every", "keep", "evaluate_every", "max_new_tokens"):
        del values["run"][name]
    del values["data"]["validation"]
    return values


def _result(config: TrainConfig) -> Path:
    """The folder of what was learned."""
    return config.output / (MODEL_FOLDER if config.learn.lora is None else ADAPTERS_FOLDER)


def _write_result(run: Run, learned: Flat) -> None:
    """What was learned as a folder: adapters, or a model with the tokenizer of the one before."""
    lora, folder = run.config.learn.lora, _result(run.config)
    if folder.exists():
        return
    if lora is not None:
        save_adapters(folder, learned, run.model.config, scale=lora.scale)
        return
    params = join(learned, run.frozen)
    files = {name: path.read_bytes() for name, path in small_files(run.source).items()}
    dtype = DTYPES[declared_dtype(run.source)]
    save_params(folder, params, run.model.config, dtype=dtype, files=files)


class _Stop:
    """Turns the first SIGTERM or SIGINT into `asked`; the second one ends the process."""

    asked = False

    def __enter__(self) -> "_Stop":
        asks = (signal.SIGTERM, signal.SIGINT)
        self._before: dict[int, Any] = {ask: signal.signal(ask, self._ask) for ask in asks}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self._before[number])
