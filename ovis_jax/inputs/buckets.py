"""Buckets: the few shapes that batches are padded to.

Each shape compiles its own program, and padding is computed like everything else, so buckets trade
compilations for wasted work. In the default ladder, `bucket_size`, each step is at most a quarter
longer than the one below, so less than a fifth of a padded length is padding (below 4 units: less
than one unit). Steps of an eighth would waste up to a ninth, but need 8 programs per octave instead
of 4. There are 24 lengths up to 8192 positions, and the first 8 numbers of crops need no padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError

TOKEN_BUCKET = 64
"""Rows are padded to 64, 128, ... 512, 640, 768, 896, 1024, 1280, ... positions."""
CROP_BUCKET = 1
"""Crops are padded to 0, 1, ... 8, 10, 12, 14, 16, 20, ... crops."""


def bucket_size(length: int, unit: int) -> int:
    """Return the smallest step >= `length` of a ladder: 8 steps of `unit`, then 4 per octave.

    The padding is less than `unit` or less than a fifth of the result. Zero stays zero.
    """
    step = unit
    while 8 * step < length:
        step *= 2
    return -(-length // step) * step


class Bucket(NamedTuple):
    """The shape of a batch.

    Attributes:
      rows: Number of prompts. `Processor` pads it only if it was given buckets, because a padding
        row costs as much as any other.
      length: Positions per row.
      crops: Crops of all rows together.
    """

    rows: int
    length: int
    crops: int = 0

    def holds(self, rows: int, length: int, crops: int) -> bool:
        """Whether a batch of this shape fits."""
        return rows <= self.rows and length <= self.length and crops <= self.crops

    def check(self, config: OvisConfig) -> None:
        """Check that a batch of this model can have this shape.

        Raises:
          RequestError: It cannot.
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
    """Return the bucket that holds a batch with the least padding: first positions, then crops.

    Raises:
      RequestError: No bucket holds the batch.
    """
    fitting = [Bucket(*b) for b in buckets if Bucket(*b).holds(rows, length, crops)]
    if not fitting:
        known = ", ".join("x".join(map(str, b)) for b in buckets)
        raise RequestError(
            f"a batch of {rows} row(s), {length} positions and {crops} crop(s) exceeds every "
            f"bucket; there are {known} (rows x positions x crops); pass fewer prompts at once, "
            "cut images into fewer crops (max_partition), or add a larger bucket"
        )
    return min(fitting, key=lambda b: (b.rows * b.length, b.crops))
