"""A private folder for Gradio's files, and an empty working folder.

Visitors may be strangers, so they must not be able to read files of this machine. Import this
module before Gradio, which reads some of the environment variables when it is imported.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

PRIVATE_DIR = Path(tempfile.mkdtemp(prefix="ovis-jax-page-")).resolve()
"""A folder that only this user can read. It is removed when the process exits."""
SERVED_DIR = PRIVATE_DIR / "served"
"""The files that Gradio may serve: uploads, and copies of the examples."""
EMPTY_DIR = PRIVATE_DIR / "empty"

for _folder in (SERVED_DIR, EMPTY_DIR):
    _folder.mkdir()
atexit.register(shutil.rmtree, PRIVATE_DIR, ignore_errors=True)

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(SERVED_DIR)  # the default is shared by all Gradio programs
os.environ["GRADIO_EXAMPLES_CACHE"] = str(SERVED_DIR / "cached")  # default: the working folder


@contextmanager
def use_empty_working_dir() -> Iterator[None]:
    """Make an empty folder the working folder and the temporary folder of this process.

    If an event handler returns the path of a file in one of these two folders, Gradio serves a copy
    of the file. The page's handlers never return a path that a client sent. Should one do so by
    mistake, the empty folders contain nothing to reveal. Both folders belong to the whole process,
    so only a process that does nothing but serve the page should use this.
    """
    previous = tempfile.tempdir
    with chdir(EMPTY_DIR):
        tempfile.tempdir = str(EMPTY_DIR)
        try:
            yield
        finally:
            tempfile.tempdir = previous
