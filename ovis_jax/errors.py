"""Exceptions for bad input. A message says what is wrong, where, and what to do."""


class OvisError(Exception):
    """Base class of all errors for bad input. The command line prints its message in one line."""


class ConfigError(OvisError):
    """A config file lacks a required field or has an unsupported value."""


class CheckpointError(OvisError):
    """The files, keys, shapes or dtypes of a folder are not those of an Ovis checkpoint."""


class ImageError(OvisError):
    """An image cannot be decoded or cut into crops."""


class PromptError(OvisError):
    """A prompt or conversation is malformed."""


class PromptTooLongError(PromptError):
    """A prompt has more positions than the model's maximum."""


class RequestError(OvisError):
    """Options of a request are out of range, or contradict each other, the model or the inputs."""


class DataError(OvisError):
    """A dataset file, or a row in it, is malformed."""


class TrainingError(OvisError):
    """A training run cannot continue."""
