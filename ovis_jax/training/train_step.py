"""One optimizer step as one jitted program: the gradients of all micro-batches, then AdamW."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Key

from ovis_jax.errors import RequestError
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import (
    PreferenceBatch,
    TrainBatch,
    answer_log_probs,
    cross_entropy_sum_and_count,
    dpo_losses,
)
from ovis_jax.training.trainable import FlatParams, FrozenParams, cast_params, join_params


class TrainState(NamedTuple):
    """The state that a training step updates.

    Attributes:
      trainable: The trainable parameters or adapters by path, in float32.
      opt_state: The optimizer's state.
      step: Number of completed steps, int32.
    """

    trainable: FlatParams
    opt_state: optax.OptState
    step: Array


class StepMetrics(NamedTuple):
    """The metrics of one step, in float32.

    Attributes:
      loss: Mean loss over answer tokens or preference pairs.
      grad_norm: Global norm of the gradient before clipping.
      learning_rate: Learning rate in the step.
      num_targets: Number of answer tokens or preference pairs.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    num_targets: Array


def learning_rate_at(config: StepConfig, step: Any) -> Array:
    """Return the learning rate, with linear warm-up and decay, for a step counted from 0."""
    rising = (step + 1) / max(config.warmup_steps, 1)
    falling = (config.max_steps - step) / max(config.decay_steps, 1)
    return config.learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def make_optimizer(config: StepConfig) -> optax.GradientTransformation:
    """Return an optimizer that clips by global norm, then applies AdamW."""
    adamw = optax.adamw(
        partial(learning_rate_at, config),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        weight_decay=config.weight_decay,
        mask=partial(jax.tree.map, lambda x: x.ndim >= 2),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def init_train_state(config: StepConfig, trainable: FlatParams) -> TrainState:
    """Return the state for the first step, with a float32 copy of the trainable parameters."""
    trainable = {path: jnp.array(x, jnp.float32) for path, x in trainable.items()}
    return TrainState(trainable, make_optimizer(config).init(trainable), jnp.int32(0))


class GradientSums(NamedTuple):
    """What the micro-batches of a step add up to.

    Attributes:
      gradients: The gradients of the summed loss, by path, in float32.
      loss: The loss, summed over answer tokens or preference pairs, float32.
      count: The number of answer tokens or preference pairs, float32.
    """

    gradients: FlatParams
    loss: Array
    count: Array


def init_gradient_sums(state: TrainState) -> GradientSums:
    """Return the sums over no micro-batch, on the devices of the state."""
    zero = jnp.zeros_like(state.step, jnp.float32)
    return GradientSums(jax.tree.map(jnp.zeros_like, state.trainable), zero, jnp.copy(zero))


def stack_micro_batches(
    batches: Sequence[TrainBatch | PreferenceBatch],
) -> TrainBatch | PreferenceBatch:
    """Stack micro-batches with the same shape along a new leading axis, as `train_step` expects.

    Raises:
      RequestError: There are no micro-batches, or their shapes differ.
    """
    shapes = {tuple(jnp.shape(x) for x in jax.tree.leaves(batch)) for batch in batches}
    if len(shapes) != 1:
        raise RequestError(f"micro-batches have {len(shapes)} shapes, expected one: {shapes}")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)


@partial(jax.jit, static_argnames=("model", "config", "lora_scale"), donate_argnames="state")
def train_step(
    model: Ovis,
    config: StepConfig,
    state: TrainState,
    frozen: FrozenParams,
    batches: TrainBatch | PreferenceBatch,
    lora_scale: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Update the trainable parameters with the gradient over all micro-batches together.

    The micro-batches have one shape. If their shapes differ, call `accumulate_gradients` for each
    of them and then `apply_gradients`, which gives the same result.

    Args:
      model: The model; static. With `remat`, the model's blocks are recomputed in the backward
        pass.
      config: Config of the step; static.
      state: The current state; donated.
      frozen: Frozen parameters by path, in any dtype or quantized.
      batches: The micro-batches, stacked by `stack_micro_batches`.
      lora_scale: Factor by which the adapters' products are multiplied; static.
      key: Random key of the run, only needed if the model samples visual words ("gumbel_argmax").
        The number of the step is folded into the key.

    Returns:
      The next state, and the metrics over all micro-batches.

    Raises:
      RequestError: The model samples visual words, and there is no key.
    """
    sums = init_gradient_sums(state)
    sums = accumulate_gradients(
        model, config, state.trainable, frozen, sums, batches, lora_scale, key, state.step
    )
    return apply_gradients(config, state, sums)


@partial(jax.jit, static_argnames=("model", "config", "lora_scale"), donate_argnames="sums")
def accumulate_gradients(
    model: Ovis,
    config: StepConfig,
    trainable: FlatParams,
    frozen: FrozenParams,
    sums: GradientSums,
    batches: TrainBatch | PreferenceBatch,
    lora_scale: float = 1.0,
    key: Key[Array, ""] | None = None,
    step: Int[ArrayLike, ""] = 0,
) -> GradientSums:
    """Add the gradients of stacked micro-batches to the sums of a step.

    Args:
      model: The model; static.
      config: Config of the step; static.
      trainable: The trainable parameters or adapters by path, in float32.
      frozen: Frozen parameters by path, in any dtype or quantized.
      sums: The sums over the previous micro-batches; donated.
      batches: The micro-batches, stacked by `stack_micro_batches`.
      lora_scale: Factor by which the adapters' products are multiplied; static.
      key: Random key of these micro-batches, only needed if the model samples visual words. The
        number of the step is folded into the key.
      step: Number of completed steps.

    Raises:
      RequestError: The model samples visual words, and there is no key.
    """
    loss_and_grad = jax.value_and_grad(
        partial(_summed_loss, model, config, lora_scale), has_aux=True
    )

    def accumulate(
        sums: GradientSums, step_inputs: tuple[TrainBatch | PreferenceBatch, Array | None]
    ):
        (loss, count), gradients = loss_and_grad(trainable, frozen, *step_inputs)
        return jax.tree.map(jnp.add, sums, GradientSums(gradients, loss, count)), None

    keys = _micro_batch_keys(model, key, step, batches)
    return jax.lax.scan(accumulate, sums, (batches, keys))[0]


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def apply_gradients(
    config: StepConfig, state: TrainState, sums: GradientSums
) -> tuple[TrainState, StepMetrics]:
    """Update the trainable parameters with the mean gradient over all micro-batches of a step.

    Args:
      config: Config of the step; static.
      state: The current state; donated.
      sums: The sums over all micro-batches of the step.

    Returns:
      The next state, and the metrics over all micro-batches.
    """
    count = jnp.maximum(sums.count, 1.0)
    gradients = jax.tree.map(lambda x: x / count, sums.gradients)
    with jax.numpy_dtype_promotion("standard"):  # AdamW in optax has powers of floats and integers
        updates, opt_state = make_optimizer(config).update(
            gradients, state.opt_state, state.trainable
        )
    trainable = cast(FlatParams, optax.apply_updates(state.trainable, updates))
    grad_norm = optax.tree.norm(gradients)
    metrics = StepMetrics(sums.loss / count, grad_norm, learning_rate_at(config, state.step), count)
    return TrainState(trainable, opt_state, state.step + 1), metrics


def _summed_loss(
    model: Ovis,
    config: StepConfig,
    lora_scale: float,
    trainable: FlatParams,
    frozen: FrozenParams,
    batch: TrainBatch | PreferenceBatch,
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return a micro-batch's loss, summed over tokens or pairs, and their number."""
    dtype = config.compute_dtype
    params = join_params(cast_params(trainable, dtype), cast_params(frozen, dtype), lora_scale)
    if isinstance(batch, TrainBatch):
        hidden = model.last_hidden_states(params, batch.inputs, key)
        return cross_entropy_sum_and_count(model, params, hidden, batch.labels)
    chosen = _answer_log_probs(model, params, batch.chosen, key)
    losses = dpo_losses(
        chosen,
        _answer_log_probs(model, params, batch.rejected, key),
        batch.reference_chosen,
        batch.reference_rejected,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    num_targets = jnp.sum(batch.chosen.labels != IGNORE_INDEX, axis=1)
    losses -= config.rpo_alpha * chosen / jnp.maximum(num_targets, 1)
    is_pair = num_targets > 0  # padding rows have no answer
    return jnp.sum(jnp.where(is_pair, losses, 0.0)), jnp.sum(is_pair).astype(jnp.float32)


@partial(jax.jit, static_argnames="model")
def reference_log_probs(
    model: Ovis,
    params: Params,
    batches: TrainBatch,
    key: Key[Array, ""] | None = None,
    step: Int[ArrayLike, ""] = 0,
) -> Float[Array, "micro B"]:
    """Return the log-probabilities of the answers in stacked micro-batches.

    With the same key and step, this function samples the same visual words as `train_step`.
    """
    keys = _micro_batch_keys(model, key, step, batches)
    return jax.lax.map(lambda xs: _answer_log_probs(model, params, *xs), (batches, keys))


def _answer_log_probs(
    model: Ovis, params: Params, batch: TrainBatch, key: Key[Array, ""] | None
) -> Float[Array, "B"]:
    # A clone, because the answers of a pair see the same visual words.
    key = None if key is None else jax.random.clone(key)
    hidden = model.last_hidden_states(params, batch.inputs, key)
    return answer_log_probs(model, params, hidden, batch.labels)


def _micro_batch_keys(
    model: Ovis,
    key: Key[Array, ""] | None,
    step: Int[ArrayLike, ""],
    batches: TrainBatch | PreferenceBatch,
) -> Key[Array, "micro"] | None:
    """Return one key per micro-batch of a step, or None if the model needs no keys."""
    if model.config.visual_tokenizer.tokenize_function != "gumbel_argmax":
        return None
    if key is None:
        raise RequestError(
            "training a model whose tokenize_function is gumbel_argmax needs a key for the visual"
            " words: pass key=jax.random.key(seed)"
        )
    num_batches = jax.tree.leaves(batches)[0].shape[0]
    return jax.random.split(jax.random.fold_in(key, step), num_batches)
