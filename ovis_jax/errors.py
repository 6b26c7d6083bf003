"""The exceptions that bad input gets: each message names what is wrong, where, and what to do."""


class OvisError(Exception):
    """Base of every error raised on bad input; the command line prints it as one line."""


class ConfigError(OvisError):
    """A config.json that lacks a field, or asks for mathematics that this model does not have."""


class CheckpointError(OvisError):
    """A folder whose files, keys, shapes or dtypes are not those of an Ovis checkpoint."""


class ImageError(OvisError):
    """An image that cannot be decoded or cut into crops."""


class PromptError(OvisError):
    """A prompt or conversation that the model cannot be given as it is."""


class PromptTooLong(PromptError):
    """A prompt of more positions than the model reads."""


class RequestError(OvisError):
    """A generation request whose options contradict each other, the model or the inputs."""


class DataError(OvisError):
    """A dataset file, or a row of one, that nothing can be learned from as it is."""


class TrainingError(OvisError):
    """A run of training that cannot go on."""
