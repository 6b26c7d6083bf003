"""Type checks of public functions: swapped or mistyped arguments raise an error that names them."""

HINTS = {
    "model": "an Ovis, such as ovis.model",
    "params": "a dict of parameters, such as ovis.params",
    "inputs": "Inputs, as returned by ovis.processor(...)",
    "processor": "a Processor, such as ovis.processor",
    "config": "an OvisConfig, such as ovis.config",
    "sampling": "a Sampling, such as Sampling(temperature=0.7)",
    "max_new_tokens": "an int, which is static under jax.jit",
}


def check_argument_types(function: str, **arguments: tuple[object, type]) -> None:
    """Check the types of a function's arguments.

    It looks only at containers, never at arrays, so it also works while JAX traces.

    Args:
      function: Name of the function, for the message.
      **arguments: The value and the expected type of each argument.

    Raises:
      TypeError: An argument has another type.
    """
    for name, (value, expected) in arguments.items():
        if not isinstance(value, expected):
            raise TypeError(
                f"{function}: {name} is a {type(value).__name__}, "
                f"expected {HINTS.get(name, expected.__name__)}"
            )
