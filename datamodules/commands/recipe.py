"""The data section of a recipe, for commands that need what training would use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from step37_lit.errors import ConfigError
from step37_lit.recipe import load_recipe

if TYPE_CHECKING:
    from datamodules.packed import PackedDataModule

CLASS_PATH = "datamodules.packed.PackedDataModule"


def recipe_data(file: str) -> dict[str, Any]:
    """`data.init_args` of a recipe.

    Raises:
        ConfigError: there is no such file, it is not YAML, or its data are not a `PackedDataModule`.
    """
    content = load_recipe(file)
    try:
        class_path, init_args = content["data"]["class_path"], content["data"]["init_args"]
    except (KeyError, TypeError) as error:
        raise ConfigError("data", "class_path and init_args", " ".join(str(error).split()), file=file) from error
    if class_path != CLASS_PATH or not isinstance(init_args, dict):
        raise ConfigError("data.class_path", CLASS_PATH, class_path, file=file)
    return init_args


def packed_data_module(init_args: dict[str, Any]) -> PackedDataModule:
    """The data module of a recipe; values are checked and converted as `fit` does it."""
    from datamodules.packed import PackedDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PackedDataModule, "data")
    return parser.instantiate(parser.parse_object({"data": init_args})).data
