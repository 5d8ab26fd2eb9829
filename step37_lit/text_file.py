"""Small files that were written by others."""

from __future__ import annotations

from pathlib import Path

from step37_lit.errors import ConfigError

LARGEST = 256 * 2**20  # bytes


def read_bytes(path: Path) -> bytes:
    """A text file's content.

    Raises:
        ConfigError: it cannot be read, or is larger than any text file of a model.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ConfigError("the file", f"a text file of at most {LARGEST} bytes", size, path)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("the file", "a file that can be read", error.strerror, path) from error


def read_text(path: Path) -> str:
    """A text file in UTF-8, with its line ends as they are.

    Raises:
        ConfigError: as `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("the file", "UTF-8", str(error), path) from error
