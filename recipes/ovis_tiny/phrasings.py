"""Alternative phrasings of a question, for training and for the test set."""

from typing import NamedTuple


class Phrasings(NamedTuple):
    """Templates of one kind of question, with `{slots}` for its facts.

    Attributes:
      seen: templates for all splits.
      unseen: templates for the test set only; all their words occur in training.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
