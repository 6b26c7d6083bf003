"""The plan of an epoch: which rows form which micro-batch, in which order and padded to what.

A plan depends only on the sizes of the rows, the seed and the number of the epoch. Processes that
measured the same rows therefore have the same plan. Random numbers are the raw output of PCG64,
which NumPy keeps the same in all versions.

Rows are grouped by size, and each group is padded to one shape. The groups are chosen by merging:
each size is a group at first, and the two groups whose union costs the least additional padding
become one, until there are at most `MAX_SHAPES` groups and each of them saves enough. The shapes
are the same in all epochs, because each of them is compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_SHAPES = 12
"""Maximum number of shapes."""

MAX_GROUPS = 512
"""Maximum number of groups before merging. If there are more sizes, similar ones form a group."""

MIN_SAVING = 200
"""A shape must save at least 1 / `MIN_SAVING` of the computation of an epoch."""


class RowSizes(NamedTuple):
    """The sizes of all rows of a training set, int64 [n].

    Attributes:
      lengths: Number of positions; for a preference pair, of the longer conversation.
      crops: Number of crops.
    """

    lengths: np.ndarray
    crops: np.ndarray


class RowShape(NamedTuple):
    """The padded size of each row of a micro-batch: positions, and crops."""

    length: int
    crops: int


class MicroBatch(NamedTuple):
    """The rows of a micro-batch, by index. If they are too few, padding rows fill it.

    Attributes:
      rows: Indices of 1 to `micro_batch_size` rows.
      shape: The padded size of each row.
    """

    rows: tuple[int, ...]
    shape: RowShape


Step = tuple[MicroBatch, ...]
"""The micro-batches of an optimizer step."""


@dataclass(frozen=True)
class EpochPlanner:
    """Plans the epochs of a run.

    Attributes:
      sizes: The sizes of the rows.
      sources: The number of the dataset that each row comes from, int64 [n].
      weights: For each dataset, how often its rows appear in an epoch. A fraction of a dataset is a
        different one in each epoch, until all rows have appeared.
      shapes: The shapes of micro-batches.
      shape_of_row: The index of each row's shape, int64 [n].
      micro_batch_size: Number of rows per micro-batch.
      gradient_accumulation_steps: Maximum number of micro-batches per step.
      seed: The seed of the run.
    """

    sizes: RowSizes
    sources: np.ndarray
    weights: tuple[float, ...]
    shapes: tuple[RowShape, ...]
    shape_of_row: np.ndarray
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int

    def rows_of_epoch(self, epoch: int) -> np.ndarray:
        """Return the rows that appear in an epoch, in the order of the datasets, int64 [rows]."""
        chosen = [np.zeros(0, np.int64)]
        for number, weight in enumerate(self.weights):
            rows = np.flatnonzero(self.sources == number)
            if not len(rows):
                continue
            times, rest = divmod(max(1, round(weight * len(rows))), len(rows))
            window = (epoch * rest + np.arange(rest)) % len(rows)
            order = _permutation(len(rows), self.seed, 0, number)
            chosen += [np.tile(rows, times), rows[order[window]]]
        return np.concatenate(chosen)

    def plan(self, epoch: int) -> tuple[Step, ...]:
        """Plan an epoch, in which each row is trained as often as the weight of its dataset says.

        Rows are shuffled within their shape. The micro-batches of a shape differ by at most one
        row, and the steps differ by at most one micro-batch, so that no small rest remains.
        """
        rows = self.rows_of_epoch(epoch)
        rows = rows[_permutation(len(rows), self.seed, 1, epoch)]
        micro_batches = [
            MicroBatch(tuple(part.tolist()), shape)
            for number, shape in enumerate(self.shapes)
            for part in _split(rows[self.shape_of_row[rows] == number], self.micro_batch_size)
        ]
        order = _permutation(len(micro_batches), self.seed, 2, epoch)
        return tuple(
            tuple(micro_batches[index] for index in part)
            for part in _split(order, self.gradient_accumulation_steps)
        )

    def padding(self, steps: Sequence[Step]) -> tuple[float, float]:
        """Return the fractions of positions and of crops in these steps that are padding."""
        micro_batches = [micro_batch for step in steps for micro_batch in step]
        rows = np.concatenate([micro_batch.rows for micro_batch in micro_batches])
        shapes = np.array([micro_batch.shape for micro_batch in micro_batches])
        padded = self.micro_batch_size * shapes.sum(0)
        used = [sizes[rows].sum() for sizes in self.sizes]
        positions, crops = (
            1 - float(a) / int(b) if b else 0.0 for a, b in zip(used, padded, strict=True)
        )
        return positions, crops


def make_planner(
    sizes: RowSizes,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    pad_to_multiple_of: int,
    tokens_per_crop: int,
    seed: int,
    sources: np.ndarray | None = None,
    weights: tuple[float, ...] = (1.0,),
) -> EpochPlanner:
    """Choose the shapes of micro-batches, and return a planner that uses them.

    Args:
      sizes: The sizes of the rows.
      micro_batch_size: Number of rows per micro-batch.
      gradient_accumulation_steps: Maximum number of micro-batches per step.
      pad_to_multiple_of: Padded lengths are multiples of this number.
      tokens_per_crop: Number of positions that cost as much computation as one crop of padding.
      seed: The seed of the run.
      sources: The number of the dataset that each row comes from, int64 [n]; by default, all rows
        come from one dataset.
      weights: For each dataset, how often its rows appear in an epoch.
    """
    if sources is None:
        sources = np.zeros(len(sizes.lengths), np.int64)
    shapes, shape_of_row = _choose_shapes(
        sizes, np.array(weights)[sources], micro_batch_size, pad_to_multiple_of, tokens_per_crop
    )
    return EpochPlanner(
        sizes,
        sources,
        weights,
        shapes,
        shape_of_row,
        micro_batch_size,
        gradient_accumulation_steps,
        seed,
    )


def _choose_shapes(
    sizes: RowSizes, weights: np.ndarray, micro_batch_size: int, unit: int, tokens_per_crop: int
) -> tuple[tuple[RowShape, ...], np.ndarray]:
    """Return the shapes, and the index of each row's shape. All costs are exact integers."""
    if not len(weights):
        return (), np.zeros(0, np.int64)
    padded = np.stack([-(-sizes.lengths // unit) * unit, sizes.crops], 1)
    step = np.array([unit, 1])
    while True:
        cells, group = np.unique(-(-padded // step), axis=0, return_inverse=True)
        if len(cells) <= MAX_GROUPS:
            break
        step *= 2
    group = group.reshape(-1)
    counts = np.ceil(np.bincount(group, weights)).astype(np.int64)
    shapes = np.zeros((len(cells), 2), np.int64)
    np.maximum.at(shapes, group, padded)

    def cost(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        rows = -(-counts // micro_batch_size) * micro_batch_size
        return rows * (shapes[..., 0] + tokens_per_crop * shapes[..., 1])

    def growth_of_unions(a: np.ndarray) -> np.ndarray:
        """Return the additional cost of merging the groups `a` with each group, [a, groups]."""
        unions = np.maximum(shapes[a, None], shapes)
        growth = cost(unions, counts[a, None] + counts) - costs[a, None] - costs
        return np.where(alive[a, None] & alive & (a[:, None] != numbers), growth, never)

    never = np.iinfo(np.int64).max
    numbers, alive, costs = np.arange(len(cells)), np.ones(len(cells), bool), cost(shapes, counts)
    growth = growth_of_unions(numbers)
    while (num_shapes := np.count_nonzero(alive)) > 1:
        a, b = np.unravel_index(np.argmin(growth), growth.shape)
        if num_shapes <= MAX_SHAPES and growth[a, b] * MIN_SAVING > costs[alive].sum():
            break
        shapes[a] = np.maximum(shapes[a], shapes[b])
        counts[a] += counts[b]
        costs[a] += costs[b] + growth[a, b]
        alive[b] = False
        group[group == b] = a
        growth[b] = growth[:, b] = never
        growth[a] = growth[:, a] = growth_of_unions(np.array([a]))[0]
    kept = np.flatnonzero(alive)
    kept = kept[np.lexsort(shapes[kept].T)]
    number_of_group = np.zeros(len(cells), np.int64)
    number_of_group[kept] = np.arange(len(kept))
    return tuple(RowShape(*shapes[i].tolist()) for i in kept), number_of_group[group]


def _split(values: np.ndarray, size: int) -> list[np.ndarray]:
    """Split values into as few parts of at most `size` as possible, of almost equal sizes."""
    return np.array_split(values, -(-len(values) // size)) if len(values) else []


def _permutation(number: int, *key: int) -> np.ndarray:
    """Return a permutation of 0 to number - 1 that depends only on the key."""
    entropy = [part % 2**64 for part in key]
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(number)
    return np.argsort(bits, kind="stable")
