"""What a plan needs of a recipe: the model, the layout, the precision and the size of packs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.weights import DType, Part
from step37_lit.recipe import load_recipes

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
        microbatches: `data.microbatches`, packs of a step over all ranks, or None.
        recompute: The strategy's.
        recompute_layers: The strategy's.
        vision_recompute: The strategy's `recompute_vision`.
    """

    config: Step37Config
    frozen: frozenset[Part]
    layout: PlannedLayout
    dtype: DType
    pack_tokens: int | None
    microbatches: int | None
    recompute: str
    recompute_layers: int | None
    vision_recompute: bool


def read_recipe(files: list[str], ranks: int | None) -> Recipe:
    """A recipe of one or more YAML files, of which later ones override earlier ones, as for `fit`.

    Args:
        files: Paths.
        ranks: Processes in place of the recipe's devices and nodes.

    Raises:
        ConfigError: a file is missing or no YAML mapping, there is no model, or a field has another type.
    """
    content = load_recipes(files)
    name = ", ".join(files)
    model = _section(content, "model", name)
    trainer = content.get("trainer") or {}
    try:
        config = _config(model, name)
        layout = _layout(trainer, ranks)
        arguments = _strategy(trainer)
    except (TypeError, AttributeError) as error:
        raise ConfigError("model, trainer", "fields of their types", " ".join(str(error).split()), name) from error
    data = ((content.get("data") or {}).get("init_args")) or {}
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError("trainer.precision", " or ".join(PRECISIONS), precision, name)
    frozen = frozenset(part for argument, part in FREEZING.items() if model.get(argument))
    packs = data.get("max_length"), data.get("microbatches")
    recompute = arguments.get("recompute", "none"), arguments.get("recompute_layers")
    return Recipe(
        config, frozen, layout, PRECISIONS[precision], *packs, *recompute, bool(arguments.get("recompute_vision"))
    )


def _section(content: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    if not isinstance(content.get(name), dict):
        raise ConfigError(name, "a section with preset or init_from", content.get(name), file)
    return content[name]


def _config(model: dict[str, Any], file: str) -> Step37Config:
    from step37_lit.initial_weights import read_initial_config
    from step37_lit.lit_module import with_overrides

    preset, start = model.get("preset"), model.get("init_from")
    if preset is None and start is None:
        raise ConfigError("model.preset, model.init_from", "one of them", None, file)
    base = Step37Config.preset(preset) if preset is not None else read_initial_config(str(start))
    return with_overrides(base, **{part: model.get(part) for part in ("text", "vision", "tokens")})


def _strategy(trainer: dict[str, Any]) -> dict[str, Any]:
    strategy = trainer.get("strategy") or {}
    return (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}


def _layout(trainer: dict[str, Any], ranks: int | None) -> PlannedLayout:
    arguments = _strategy(trainer)
    if ranks is None:
        devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
        require(isinstance(devices, int), "trainer.devices", "a number (or give --gpus)", devices)
        ranks = devices * nodes
    sizes: dict[str, Any] = {
        name: arguments.get(name) or 1
        for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
    }
    stages = tuple(arguments.get("pipeline_layout") or ())
    shared = bool(arguments.get("sequence_parallel"))
    return PlannedLayout(ranks=ranks, sequence_parallel=shared, stage_layers=stages, **sizes)
