"""What a plan needs of a recipe: the model, the layout, the precision and the size of packs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step37_lit.config import ConfigError, Step37Config, require
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.weights import DType, Part

FREEZING: dict[str, Part] = {
    "freeze_language_model": "language",
    "freeze_vision_model": "vision",
    "freeze_vision_projection": "projection",
}
PRECISIONS: dict[str, DType] = {"32-true": "fp32", "32": "fp32", "bf16-true": "bf16", "bf16": "bf16"}


@dataclass(frozen=True)
class Recipe:
    """Parts of a recipe.

    Args:
        config: The model.
        frozen: Parts that do not train.
        layout: The strategy's layout on the recipe's devices.
        dtype: Of the parameters.
        pack_tokens: `data.max_length`, or None where the data have none.
        microbatches: `data.microbatches`, or None.
    """

    config: Step37Config
    frozen: frozenset[Part]
    layout: PlannedLayout
    dtype: DType
    pack_tokens: int | None
    microbatches: int | None


def read_recipe(files: list[str], ranks: int | None) -> Recipe:
    """A recipe of one or more YAML files, of which later ones override earlier ones, as for `fit`.

    Args:
        files: Paths.
        ranks: Processes in place of the recipe's devices and nodes.

    Raises:
        ConfigError: a file is missing or no YAML mapping, there is no model, or a field has another type.
    """
    content: dict[str, Any] = {}
    for file in files:
        content = _merged(content, _read(file))
    name = ", ".join(files)
    model = _section(content, "model", name)
    trainer = content.get("trainer") or {}
    try:
        config = _config(model, name)
        layout = _layout(trainer, ranks)
    except (TypeError, AttributeError) as error:
        raise ConfigError("model, trainer", "fields of their types", " ".join(str(error).split()), name) from error
    data = ((content.get("data") or {}).get("init_args")) or {}
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError("trainer.precision", " or ".join(PRECISIONS), precision, name)
    frozen = frozenset(part for argument, part in FREEZING.items() if model.get(argument))
    return Recipe(config, frozen, layout, PRECISIONS[precision], data.get("max_length"), data.get("microbatches"))


def _read(file: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    require(Path(file).is_file(), "--config", "a file", file)
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", "YAML", " ".join(str(error).split()), file) from error
    if not isinstance(content, dict):
        raise ConfigError("recipe", "a mapping with a model section", type(content).__name__, file)
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if _mappings(base[key], over[key])}
    return base | over | both


def _mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _section(content: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    if not isinstance(content.get(name), dict):
        raise ConfigError(name, "a section with preset or hub", content.get(name), file)
    return content[name]


def _config(model: dict[str, Any], file: str) -> Step37Config:
    from step37_lit.lit_module import with_overrides

    given = {name: model[name] for name in ("preset", "hub") if model.get(name) is not None}
    if len(given) != 1:
        raise ConfigError("model.preset, model.hub", "exactly one of them", given, file)
    base = Step37Config.preset(model["preset"]) if "preset" in given else Step37Config.from_hub(model["hub"])
    return with_overrides(base, **{part: model.get(part) for part in ("text", "vision", "tokens")})


def _layout(trainer: dict[str, Any], ranks: int | None) -> PlannedLayout:
    strategy = trainer.get("strategy") or {}
    arguments = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    if ranks is None:
        devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
        require(isinstance(devices, int), "trainer.devices", "a number (or give --gpus)", devices)
        ranks = devices * nodes
    sizes: dict[str, Any] = {
        name: arguments.get(name) or 1 for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "context")
    }
    return PlannedLayout(ranks=ranks, sequence_parallel=bool(arguments.get("sequence_parallel")), **sizes)
