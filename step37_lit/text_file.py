"""Small files: those of others are read strictly, own ones are written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from step37_lit.errors import ConfigError

LARGEST = 256 * 2**20  # bytes


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place at the end; a failure or a kill leaves `path` alone.

    Its name is always the same, so that the next write takes the place of what a kill has left.
    """
    staged = path.with_name(f".{path.name}.part")
    try:
        yield staged
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of a disk that cannot be written to
            staged.unlink(missing_ok=True)
        raise


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
