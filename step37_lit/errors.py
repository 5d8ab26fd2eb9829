"""What a user is told of a mistake: one line with the field, what was expected and what was found; exit code 2."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# A disk that is full (for everyone, for this user, for one file) or cannot be written to.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LONGEST_SHOWN = 1000  # characters of a part of a message


class UserError(ValueError):
    """A mistake of the user's: one line that says what to change, and exit code 2."""


class ConfigError(UserError):
    """A mistake of the user's: one line that names the field, what was expected and what was found."""

    def __init__(self, field_name: str, expected: object, found: object, file: str | Path | None = None):
        self.field_name, self.expected, self.found, self.file = field_name, expected, found, file
        where = f"{file}: " if file is not None else ""
        super().__init__(f"{where}{_short(field_name)}: expected {_short(str(expected))}, found {_shown(found)}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[object, ...]]:
        # Pickled by an exception's args it could not be made again, and a pool of processes would break.
        return type(self), (self.field_name, self.expected, self.found, self.file)


def disk_error(error: OSError, folder: str | Path) -> UserError | None:
    """What a failed write is for the user: one line; None where the disk is not the reason.

    A write that fails while another failure is cleaned up behind is not what is told, but that failure.

    Args:
        error: As it came.
        folder: Named where the error names no file, as a failed write does not.
    """
    within: BaseException | None = error
    while within is not None and not isinstance(within, UserError):
        within = within.__cause__ or within.__context__
    if within is not None:
        return within
    if error.errno not in DISK_ERRORS:
        return None
    file = folder if error.filename is None else os.fsdecode(error.filename)
    return ConfigError("files", "a disk that can be written to", error.strerror, file)


def _shown(found: object) -> str:
    """On one line, whatever a file held."""
    try:
        text = repr(found)
    except RecursionError:
        return f"a deeply nested {type(found).__name__}"
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def require(condition: bool, field_name: str, expected: object, found: object) -> None:
    """Raises `ConfigError` for `field_name` unless `condition` holds."""
    if not condition:
        raise ConfigError(field_name, expected, found)
