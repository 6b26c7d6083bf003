"""How something can be asked."""

from typing import NamedTuple


class Phrasings(NamedTuple):
    """Ways to ask one thing, with `{slots}` for what differs from question to question.

    Attributes:
      seen: those that are learned.
      unseen: those that stand in the test only; their words occur in what is learned.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
