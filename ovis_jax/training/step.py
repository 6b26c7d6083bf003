"""One step of training: gradients of all micro-batches, one update, in one jitted program."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ovis_jax.errors import RequestError
from ovis_jax.inputs.conversation import IGNORED
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.training.losses import Batch, Pairs, answer_log_probs, dpo, supervised
from ovis_jax.training.parts import Flat, join


@dataclass(frozen=True)
class Recipe:
    """How a model learns. Hashable: it is a static argument of the step."""

    learning_rate: float = 1e-4
    total_steps: int = 1000
    warmup_steps: int = 0
    """The first steps, over which the rate rises linearly."""
    decay_steps: int = 0
    """The last steps, over which the rate falls linearly to 0."""
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    """On matrices only."""
    clip_norm: float = 1.0
    compute_dtype: DTypeLike = jnp.float32
    """Of activations and of the weights that they meet; what learns is kept in float32."""
    adapter_scale: float = 1.0
    beta: float = 0.1
    """Of DPO."""
    label_smoothing: float = 0.0
    """Of DPO."""
    chosen_weight: float = 0.0
    """Of the preferred answers' own cross-entropy, a mean over each one's tokens, beside DPO's: it
    keeps them likely (Pang et al. 2024, "Iterative reasoning preference optimization")."""

    def rate(self, step: Any) -> Array:
        """The learning rate of a step, counted from 0."""
        rising = (step + 1) / max(self.warmup_steps, 1)
        falling = (self.total_steps - step) / max(self.decay_steps, 1)
        return self.learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind clipping by the global norm."""
        adamw = optax.adamw(
            self.rate,
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            mask=partial(jax.tree.map, lambda x: x.ndim >= 2),
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


class State(NamedTuple):
    """What a step changes.

    Attributes:
      learned: float32, by path.
      optimizer: the optimizer's own.
      step: int32, the steps made.
    """

    learned: Flat
    optimizer: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """What a step measured, float32.

    Attributes:
      loss: mean over answer tokens, or over pairs.
      gradient_norm: before clipping.
      rate: the learning rate.
      count: answer tokens, or pairs.
    """

    loss: Array
    gradient_norm: Array
    rate: Array
    count: Array


def start(recipe: Recipe, learned: Flat) -> State:
    """The state before the first step; what learns is copied to float32."""
    learned = {path: jnp.array(x, jnp.float32) for path, x in learned.items()}
    return State(learned, recipe.optimizer().init(learned), jnp.int32(0))


def stack(batches: Sequence[Batch | Pairs]) -> Batch | Pairs:
    """Micro-batches of one shape as one tree with a leading axis, the form that `step` takes.

    Raises:
      RequestError: there is none, or their shapes differ.
    """
    shapes = {tuple(jnp.shape(x) for x in jax.tree.leaves(batch)) for batch in batches}
    if len(shapes) != 1:
        raise RequestError(f"micro-batches have {len(shapes)} shapes, expected one: {shapes}")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def step(
    model: Ovis, recipe: Recipe, state: State, frozen: Flat, batches: Batch | Pairs
) -> tuple[State, Metrics]:
    """Learn from micro-batches as if they were one batch.

    Args:
      model: static; with `remat` each block's activations are computed again for its gradient.
      recipe: static.
      state: given away.
      frozen: what does not learn, by path, in any dtype.
      batches: micro-batches stacked by `stack`.

    Returns:
      The next state, and metrics of all micro-batches together.
    """
    losses = jax.value_and_grad(partial(_loss, model, recipe), has_aux=True)

    def accumulate(sums: tuple[Flat, Array, Array], batch: Batch | Pairs):
        (loss, count), gradients = losses(state.learned, frozen, batch)
        return jax.tree.map(jnp.add, sums, (gradients, loss, count)), None

    zero = jnp.float32(0)
    sums = (jax.tree.map(jnp.zeros_like, state.learned), zero, zero)
    (gradients, loss, count), _ = jax.lax.scan(accumulate, sums, batches)
    count = jnp.maximum(count, 1.0)
    gradients = jax.tree.map(lambda x: x / count, gradients)
    updates, optimizer = recipe.optimizer().update(gradients, state.optimizer, state.learned)
    learned = cast(Flat, optax.apply_updates(state.learned, updates))
    norm = optax.tree.norm(gradients)
    metrics = Metrics(loss / count, norm, recipe.rate(state.step), count)
    return State(learned, optimizer, state.step + 1), metrics


def _loss(
    model: Ovis, recipe: Recipe, learned: Flat, frozen: Flat, batch: Batch | Pairs
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of a micro-batch as a sum, and over how many tokens or pairs."""
    dtype = recipe.compute_dtype
    rounded = partial(jax.tree.map, lambda x: x.astype(dtype))
    params = join(rounded(learned), rounded(frozen), recipe.adapter_scale)
    if isinstance(batch, Batch):
        return supervised(model.forward(params, batch.inputs)[0], batch.labels)
    chosen = _answers(model, params, batch.chosen)
    losses = dpo(
        chosen,
        _answers(model, params, batch.rejected),
        batch.reference_chosen,
        batch.reference_rejected,
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
    )
    lengths = jnp.maximum(jnp.sum(batch.chosen.labels != IGNORED, axis=1), 1)
    losses -= recipe.chosen_weight * chosen / lengths
    return jnp.sum(losses), jnp.float32(losses.shape[0])


def _answers(model: Ovis, params: Params, batch: Batch) -> Float[Array, "B"]:
    return answer_log_probs(model.forward(params, batch.inputs)[0], batch.labels)
