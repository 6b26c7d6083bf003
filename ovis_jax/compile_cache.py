"""The command line's persistent compilation cache, so that a second run compiles nothing."""

import os
import sys
import tempfile
from pathlib import Path

import jax

DIR_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
MAX_SIZE_VARIABLE = "JAX_COMPILATION_CACHE_MAX_SIZE"

MAX_SIZE = 10 * 2**30
"""Default size limit of the cache in bytes. JAX removes the least recently used programs first."""


def compilation_cache_dir() -> Path:
    """Return the default folder: ovis_jax/compilation_cache in $XDG_CACHE_HOME, or in ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # According to the XDG specification, relative paths must be ignored.
    return (
        (base if base.is_absolute() else Path.home() / ".cache") / "ovis_jax" / "compilation_cache"
    )


def enable_compilation_cache() -> None:
    """Let JAX store compiled programs and load them in later runs.

    JAX's environment variables for the folder, the size limit and the minimum compile time take
    precedence. By default all programs are stored, because there are many small programs and even
    these take longer to compile than to load. JAX's cache key includes versions and devices, so a
    program is never loaded for a different setup. If the folder is not writable, a note is printed
    on stderr and nothing is stored.
    """
    if not os.environ.get(MIN_SECONDS_VARIABLE):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # The size limit applies only to the default folder: JAX cannot limit a folder that already
    # contains programs that were stored without a limit.
    if given := os.environ.get(DIR_VARIABLE):
        if "://" not in given:  # `ovis-jax ui` changes the working folder; a URL is a bucket
            jax.config.update("jax_compilation_cache_dir", os.path.abspath(given))
        return
    try:
        folder = compilation_cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError means that the home folder is unknown
        print(
            f"note: compiled programs are not stored for the next run: {error}; "
            f"set {DIR_VARIABLE} to a writable folder",
            file=sys.stderr,
        )
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if not os.environ.get(MAX_SIZE_VARIABLE):
            jax.config.update("jax_compilation_cache_max_size", MAX_SIZE)
