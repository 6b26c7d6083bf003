"""Exceptions for invalid input, and helpers for error messages.

An error message says what is wrong, where it is, and what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class OvisError(Exception):
    """Base class of all errors for invalid input. The command line prints only the message."""


class ConfigError(OvisError):
    """A config file of a checkpoint lacks a required field or has an unsupported value."""


class CheckpointError(OvisError):
    """The files, keys, shapes or dtypes in a folder do not form a valid Ovis checkpoint."""


class ImageError(OvisError):
    """An image cannot be decoded or cut into crops."""


class PromptError(OvisError):
    """A prompt or conversation is malformed."""


class PromptTooLongError(PromptError):
    """A prompt has more positions than the model supports."""


class RequestError(OvisError):
    """An option of a request is out of range, or conflicts with another option or the inputs."""


class DataError(OvisError):
    """A dataset file, or a row in it, is malformed."""


class TrainingError(OvisError):
    """A training config is invalid, or a training run cannot continue."""


def count_noun(number: int, noun: str) -> str:
    """Format a number with a noun, such as "1 row" or "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def install_command(*extras: str) -> str:
    """Return the command that installs one of the given extras of this package."""
    names = " or ".join(f"'.[{extra}]'" for extra in extras)
    return f"pip install {names} in a clone of ovis_jax"


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Wrap imports of packages that an extra installs, so that an error names the extra.

    Raises:
      OvisError: A package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise OvisError(f"{error}; install it with: {install_command(extra)}") from error
