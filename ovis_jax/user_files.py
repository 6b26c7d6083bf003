"""Reading files from users: texts in UTF-8 or UTF-16, and Git LFS pointers."""

import codecs
import io
from pathlib import Path

GIT_LFS_POINTER = (
    "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file"
    " again"
)
"""Description of a pointer in error messages, with advice."""

GIT_LFS_START = b"version https://git-lfs.github.com/spec/"
"""The bytes that a pointer begins with."""


def read_text(path: Path) -> str:
    """Read a text in UTF-8, with or without a byte order mark, or in UTF-16 with a mark.

    Editors and shells on Windows write byte order marks. The mark is not part of the result.

    Raises:
      OSError: The file cannot be read.
      UnicodeDecodeError: The file is not valid in this encoding.
    """
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    return io.TextIOWrapper(io.BytesIO(content), encoding).read()


def is_git_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a pointer: the small text that Git leaves in place of a large file.

    Git leaves such pointers when a repository is cloned without Git LFS.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GIT_LFS_START)) == GIT_LFS_START


def describe_missing_file(path: Path) -> str:
    """Return a description of a missing file for error messages; the path may be a broken link."""
    if path.is_symlink():
        return f"a symbolic link to {path.readlink()}, which does not exist"
    return "no file of that name"
