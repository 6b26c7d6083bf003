"""The command line's cache of compiled programs, so that a second run compiles nothing."""

import os
import sys
import tempfile
from pathlib import Path

import jax

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def cache_folder() -> Path:
    """Where compiled programs are kept: $XDG_CACHE_HOME/ovis_jax/compiled, or below ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (given if given.is_absolute() else Path.home() / ".cache") / "ovis_jax" / "compiled"


def keep_compiled() -> None:
    """Let JAX keep what it compiles, and read it again in later runs.

    What the user has set in JAX's own variables stands: the folder, and from how many seconds of
    compiling on a program is kept. Where nothing is set, all are kept, even the small ones: they
    are many, and each takes longer to compile than to read. JAX's key of a program holds the
    versions and the device, so none is taken for another. Without a folder that can be written it
    says so on stderr and goes on.
    """
    if not os.environ.get(SHORTEST):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if os.environ.get(FOLDER):
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home folder
        print(
            f"note: what is compiled is not kept for the next run: {error}; "
            f"set {FOLDER} to a folder that can be written",
            file=sys.stderr,
        )
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
