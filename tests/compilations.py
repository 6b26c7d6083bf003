"""What JAX compiles, counted."""

from contextlib import contextmanager

import jax.monitoring


@contextmanager
def compilations():
    """The compilations (or reads of a compiled program) within the block."""
    found = []

    def count(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
