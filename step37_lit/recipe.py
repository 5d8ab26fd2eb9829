"""Recipes: YAML files that say what differs from another one, named by `base` at their top.

The one place that resolves `base`, for `fit` and the other subcommands of Lightning's, for the data commands and the
planner.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step37_lit.errors import ConfigError, require

BASE = "base"


def load_recipe(file: str | Path) -> dict[str, Any]:
    """A recipe with what it inherits, `base` itself left out.

    Args:
        file: YAML; `base` is the path of another recipe, relative to the folder of the one that names it.

    Raises:
        ConfigError: a file is missing or no YAML mapping, or recipes are each other's base.
    """
    content: dict[str, Any] = {}
    for part in reversed(_with_bases(Path(file))):
        content = merge(content, part)
    return content


def load_recipes(files: Sequence[str | Path]) -> dict[str, Any]:
    """Several recipes, of which later ones override earlier ones. Raises `ConfigError` as `load_recipe`."""
    content: dict[str, Any] = {}
    for file in files:
        content = merge(content, load_recipe(file))
    return content


def inherits(file: str | Path) -> bool:
    """Whether a file is a recipe with a base; False also for what cannot be read."""
    try:
        return BASE in _read(Path(file))
    except ConfigError:
        return False


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `over` in it. Sections are merged, lists replaced, and so are the arguments of a class
    when `over` names another class."""
    if "class_path" in base and over.get("class_path", base["class_path"]) != base["class_path"]:
        return over
    both = {
        name: merge(base[name], over[name])
        for name in base.keys() & over.keys()
        if isinstance(base[name], dict) and isinstance(over[name], dict)
    }
    return base | over | both


def _with_bases(file: Path) -> list[dict[str, Any]]:
    """Contents of a recipe, of its base, of that one's base and so on."""
    contents: list[dict[str, Any]] = []
    seen: list[Path] = []
    following: Path | None = file
    while following is not None:
        current = following
        if current.resolve() in seen:
            chain = " -> ".join(path.name for path in [*seen, current])
            raise ConfigError(BASE, "a recipe that is not built on this one", chain, file=file)
        if not current.is_file() and contents:
            raise ConfigError(BASE, "a file", str(current), file=seen[-1])
        content = _read(current)
        seen.append(current.resolve())
        base = content.pop(BASE, None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(BASE, "the path of a recipe", base, file=current)
        following = None if base is None else current.parent / base
        contents.append(content)
    return contents


def _read(file: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    require(file.is_file(), "--config", "a file", str(file))
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError("recipe", "YAML", " ".join(str(error).split()), file=file) from error
    if not isinstance(content, dict):
        raise ConfigError("recipe", "a mapping of sections", type(content).__name__, file=file)
    return content


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, which takes the last of two fields of one name without a word; this one refuses them."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"field {name!r} twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
