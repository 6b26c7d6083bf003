"""Buckets: a small set of shapes that batches are padded to.

Each shape needs its own compiled program, and the model also computes the padding. Buckets are
therefore a trade-off between the number of compilations and wasted work. In the default sizes,
which `bucket_size` returns, each size is at most a quarter larger than the previous one. Less than
a fifth of a padded length is therefore padding (or less than one unit if the length is below 4
units). Steps of one eighth would waste at most a ninth, but they would need 8 programs instead of 4
each time the length doubles. There are 24 lengths up to 8192 positions. Up to 8 crops need no
padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError

TOKEN_BUCKET = 64
"""The unit for lengths: rows are padded to 64, 128, ..., 512, 640, 768, 896, 1024, 1280, ...
positions."""
CROP_BUCKET = 1
"""The unit for crops: their number is padded to 0, 1, ..., 8, 10, 12, 14, 16, 20, ..."""


def bucket_size(length: int, unit: int) -> int:
    """Return the smallest default size that is at least `length`.

    The default sizes are the first 8 multiples of `unit`, then 4 equal steps for each doubling. The
    padding is less than `unit` or less than a fifth of the result. Zero stays zero.
    """
    step = unit
    while 8 * step < length:
        step *= 2
    return -(-length // step) * step


class Bucket(NamedTuple):
    """The shape of a batch.

    Attributes:
      rows: Number of prompts. `Processor` adds padding rows only if it has buckets, because a
        padding row takes as much computation as any other row.
      length: Number of positions per row.
      crops: Total number of crops in all rows.
    """

    rows: int
    length: int
    crops: int = 0

    def check(self, config: OvisConfig) -> None:
        """Check that a batch for a model can have this shape.

        Raises:
          RequestError: No batch for this model can have this shape.
        """
        if not all(type(n) is int for n in self) or self.rows < 1 or self.length < 1:
            raise RequestError(f"{self}: expected whole numbers, rows and length at least 1")
        if self.length > config.multimodal_max_length:
            raise RequestError(
                f"{self}: a row has at most {config.multimodal_max_length} positions "
                "(multimodal_max_length in config.json)"
            )
        tokens = config.visual_tokenizer.tokens_per_crop
        most = self.rows * (self.length // tokens)
        if not 0 <= self.crops <= bucket_size(most, CROP_BUCKET):
            raise RequestError(
                f"{self}: {self.rows} row(s) of {self.length} positions hold 0 to {most} crops of "
                f"{tokens} visual tokens; use longer rows or fewer crops"
            )


def choose_bucket(buckets: Sequence[Bucket], rows: int, length: int, crops: int) -> Bucket:
    """Return the bucket with the least padding for a batch, comparing positions first, then crops.

    Raises:
      RequestError: The batch does not fit into any bucket.
    """
    fitting = [
        b
        for b in (Bucket(*given) for given in buckets)
        if rows <= b.rows and length <= b.length and crops <= b.crops
    ]
    if not fitting:
        known = ", ".join("x".join(map(str, b)) for b in buckets)
        raise RequestError(
            f"a batch of {rows} row(s), {length} positions and {crops} crop(s) exceeds every "
            f"bucket; there are {known} (rows x positions x crops); pass fewer prompts at once, "
            "cut images into fewer crops (max_partition), or add a larger bucket"
        )
    return min(fitting, key=lambda b: (b.rows * b.length, b.crops))
