"""The few shapes that batches are padded to, so that little is compiled and little is wasted.

Each shape is a program of its own, and padding is computed like everything else. The ladder of
`bucket` weighs one against the other: a step adds at most a quarter to the step below it, so less
than a fifth of a padded length is padding (below 4 steps of the unit: less than one unit). With
eighths that would be a ninth, but 8 programs an octave instead of 4. Up to 8192 positions there are
24 lengths; up to 10 crops a row none of the first 8 counts is padded.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError

TOKEN_BUCKET = 64
"""Rows are padded to 64, 128, ... 512, 640, 768, 896, 1024, 1280, ... positions."""
CROP_BUCKET = 1
"""Crops are padded to 0, 1, ... 8, 10, 12, 14, 16, 20, ... crops."""


def bucket(n: int, unit: int) -> int:
    """The smallest length >= n of a fixed ladder: 8 steps of `unit`, then 4 steps an octave.

    What it adds to n is less than `unit`, or less than a quarter of n and so less than a fifth of
    what it gives. Zero stays zero.
    """
    step = unit
    while 8 * step < n:
        step *= 2
    return -(-n // step) * step


class Bucket(NamedTuple):
    """The shape of a batch.

    Attributes:
      rows: prompts. `Processor` pads them only where it was given buckets: a row of padding is
        computed like any other.
      length: positions of each row.
      crops: of all rows together.
    """

    rows: int
    length: int
    crops: int = 0

    def holds(self, rows: int, length: int, crops: int) -> bool:
        """Whether a batch of so many fits in."""
        return rows <= self.rows and length <= self.length and crops <= self.crops

    def check(self, config: OvisConfig) -> None:
        """Raise `RequestError` for a shape that no batch of this model can have."""
        if not all(type(n) is int for n in self) or self.rows < 1 or self.length < 1:
            raise RequestError(f"{self}: expected whole numbers, rows and length at least 1")
        if self.length > config.multimodal_max_length:
            raise RequestError(
                f"{self}: a row has at most {config.multimodal_max_length} positions "
                "(multimodal_max_length of config.json)"
            )
        tokens = config.visual_tokenizer.tokens_per_crop
        most = self.rows * (self.length // tokens)
        if not 0 <= self.crops <= bucket(most, CROP_BUCKET):
            raise RequestError(
                f"{self}: {self.rows} row(s) of {self.length} positions hold 0 to {most} crops of "
                f"{tokens} visual tokens; give longer rows or fewer crops"
            )


def choose(buckets: Sequence[Bucket], rows: int, length: int, crops: int) -> Bucket:
    """The bucket that holds a batch with the least padding: of positions first, then of crops.

    Raises:
      RequestError: none holds it.
    """
    fitting = [Bucket(*b) for b in buckets if Bucket(*b).holds(rows, length, crops)]
    if not fitting:
        known = ", ".join("x".join(map(str, b)) for b in buckets)
        raise RequestError(
            f"a batch of {rows} row(s), {length} positions and {crops} crop(s) exceeds every "
            f"bucket; there are {known} (rows x positions x crops); give fewer prompts at once, "
            "images in fewer crops (max_partition), or a larger bucket"
        )
    return min(fitting, key=lambda b: (b.rows * b.length, b.crops))
