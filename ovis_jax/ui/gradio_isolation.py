"""A private folder for Gradio's files, and an empty working folder for the process.

Visitors are not trusted, so they must not be able to read files on this machine. Import this module
before Gradio, because Gradio reads some of the environment variables when it is imported.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

PRIVATE_DIR = Path(tempfile.mkdtemp(prefix="ovis-jax-page-")).resolve()
"""A folder that only this user can read; it is removed when the process exits."""
SERVED_DIR = PRIVATE_DIR / "served"
"""The folder with the files that Gradio may serve: uploads, and copies of the examples."""
EMPTY_DIR = PRIVATE_DIR / "empty"

for _folder in (SERVED_DIR, EMPTY_DIR):
    _folder.mkdir()
atexit.register(shutil.rmtree, PRIVATE_DIR, ignore_errors=True)

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(SERVED_DIR)  # all Gradio programs share the default
os.environ["GRADIO_EXAMPLES_CACHE"] = str(SERVED_DIR / "cached")  # default: the working folder


@contextmanager
def use_empty_working_dir() -> Iterator[None]:
    """Use an empty folder as the working folder and the temporary folder of this process.

    If an event handler returns the path of a file in one of these two folders, Gradio serves a copy
    of the file. The page's handlers never return a path that a client sent. If a handler did so by
    mistake, the empty folders would contain nothing to reveal. These settings affect the whole
    process, so use this function only in a process that only serves the page.
    """
    previous = tempfile.tempdir
    with chdir(EMPTY_DIR):
        tempfile.tempdir = str(EMPTY_DIR)
        try:
            yield
        finally:
            tempfile.tempdir = previous
