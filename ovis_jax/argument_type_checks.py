"""Type checks for public functions, with errors that name the argument with the wrong type."""

from types import UnionType

HINTS = {
    "model": "an Ovis, such as ovis.model",
    "params": "a dict of parameters, such as ovis.params",
    "inputs": "Inputs, as returned by ovis.processor(...)",
    "processor": "a Processor, such as ovis.processor",
    "config": "an OvisConfig, such as ovis.config",
    "sampling": "a Sampling, such as Sampling(temperature=0.7)",
    "max_new_tokens": "an int, which is static under jax.jit",
    "chunk_size": "an int, which is static under jax.jit",
    "eos_ids": "a sequence of token ids, such as (1, 107)",
    "mesh": "a jax.sharding.Mesh",
    "rules": 'a dict from letters to mesh axes, such as ovis_jax.TENSOR, or its name "tensor"',
}


def check_argument_types(function: str, **arguments: tuple[object, type | UnionType]) -> None:
    """Check the types of a function's arguments.

    Only the types of containers are checked, never those of arrays, so the check also works while
    JAX traces a function.

    Args:
      function: Name of the function in the error message.
      **arguments: The value and the expected type of each argument.

    Raises:
      TypeError: An argument has the wrong type.
    """
    for name, (value, expected) in arguments.items():
        if not isinstance(value, expected):
            raise TypeError(
                f"{function}: {name} has type {type(value).__name__}, expected {HINTS[name]}"
            )
