"""`JsonFields`: reads the fields of one JSON object and makes sure that none is left over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from step37_lit.errors import ConfigError
from step37_lit.text_file import read_bytes

T = TypeVar("T")
_MISSING = object()


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: the file is no JSON object, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return parse_json_object(read_bytes(file), file)


def parse_json_object(content: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in UTF-8; `file` is for messages.

    Raises:
        ConfigError: it is something else, or an object in it names a field twice (of which JSON readers keep one
            without a word).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(twice, "one field of this name", f"{names.count(twice)} of them", file)
        return fields

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8 and of endless digits
        raise ConfigError("the file", "JSON", str(error), file) from error
    if not isinstance(value, dict):
        raise ConfigError("the file", "a JSON object", type(value).__name__, file)
    return value


class JsonFields:
    """One JSON object, read field by field.

    Every field is taken, checked or declared irrelevant; `done` refuses what is left.

    Args:
        values: The object.
        prefix: Where it stands in the file (`text_config.`), for messages.
        file: The file, for messages.
    """

    def __init__(self, values: Any, prefix: str, file: Path):
        self.prefix, self.file = prefix, file
        if not isinstance(values, dict):
            raise self.error("", "a JSON object", values)
        self.values: dict[str, Any] = values
        self.read: set[str] = set()

    def error(self, name: str, expected: object, found: object) -> ConfigError:
        """A `ConfigError` for field `name` of this object."""
        return ConfigError(f"{self.prefix}{name}".rstrip("."), expected, found, self.file)

    def require(self, condition: bool, name: str, expected: object, found: object) -> None:
        if not condition:
            raise self.error(name, expected, found)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def take(self, name: str, convert: Callable[[JsonFields, str, Any], T], default: Any = _MISSING) -> T:
        """The field's value through `convert`; null and absent are `default`, or an error where there is none."""
        self.read.add(name)
        if not self.has(name):
            if default is _MISSING:
                raise self.error(name, "a value", self.values.get(name, "no such field"))
            return default
        return convert(self, name, self.values[name])

    def first_of(
        self, names: Iterable[str], convert: Callable[[JsonFields, str, Any], T], default: Any = _MISSING
    ) -> T:
        """One value that goes by several names; those that are there must agree."""
        names = tuple(names)
        found = {name: self.take(name, convert) for name in names if self.has(name)}
        self.read.update(names)
        if not found:
            return self.take(names[0], convert, default)
        first = next(iter(found))
        for name, value in found.items():
            self.require(value == found[first], name, f"{found[first]!r} as {first}", value)
        return found[first]

    def fixed(self, **allowed: Any) -> None:
        """Fields with one supported value (or a tuple of spellings of it): checked where they are there."""
        for name, value in allowed.items():
            self.read.add(name)
            spellings = value if isinstance(value, tuple) else (value,)
            if self.has(name):
                # 1 == True in Python, but not in a config
                same = any(self.values[name] == s and type(self.values[name]) is type(s) for s in spellings)
                self.require(same, name, " or ".join(map(repr, spellings)), self.values[name])

    def section(self, name: str) -> JsonFields:
        """The object in a field."""
        self.read.add(name)
        return JsonFields(self.values.get(name, "no such field"), f"{self.prefix}{name}.", self.file)

    def done(self, irrelevant: Iterable[str] = ()) -> None:
        """Refuses every field that was neither read nor is in `irrelevant`."""
        unknown = sorted(set(self.values) - self.read - set(irrelevant))
        if unknown:
            raise self.error(unknown[0], f"no such field ({len(unknown)} unknown)", self.values[unknown[0]])


def integer(fields: JsonFields, name: str, value: Any) -> int:
    fields.require(isinstance(value, int) and not isinstance(value, bool), name, "an integer", value)
    return value


def number(fields: JsonFields, name: str, value: Any) -> float:
    fields.require(isinstance(value, int | float) and not isinstance(value, bool), name, "a number", value)
    return float(value)


def boolean(fields: JsonFields, name: str, value: Any) -> bool:
    fields.require(isinstance(value, bool), name, "true or false", value)
    return value


def list_of(convert: Callable[[JsonFields, str, Any], T]) -> Callable[[JsonFields, str, Any], list[T]]:
    """A JSON list whose entries go through `convert`; messages name the entry."""

    def convert_list(fields: JsonFields, name: str, value: Any) -> list[T]:
        fields.require(isinstance(value, list), name, "a list", value)
        return [convert(fields, f"{name}[{i}]", entry) for i, entry in enumerate(value)]

    return convert_list


def integers(fields: JsonFields, name: str, value: Any) -> tuple[int, ...]:
    """One integer or a list of them."""
    return tuple(list_of(integer)(fields, name, value if isinstance(value, list) else [value]))


def text(fields: JsonFields, name: str, value: Any) -> str:
    fields.require(isinstance(value, str), name, "a string", value)
    return value
