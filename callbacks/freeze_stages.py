"""Stages of a freezing schedule as a recipe gives them, and the factor of each group as a pure function of the step."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from step37_lit.errors import ConfigError, require

FIELD = "freeze_schedule.stages"


@dataclass(frozen=True)
class Plateau:
    """Ends a stage when a metric stands still.

    Args:
        metric: Name of a value that validations log.
        patience: Validations in a row without improvement that end the stage.
        min_delta: What counts as improvement is more than this.
        mode: Whether the metric is to fall ("min") or to rise ("max").
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    mode: str = "min"

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`; NaN is never better."""
        if best is None:
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


@dataclass(frozen=True)
class GroupTraining:
    """How a group trains in a stage.

    Args:
        factor: On the learning rate of the module's schedule and `lr_factors`.
        every_steps: Unfreeze one layer more every so many steps, the last layer first; None for all at once.
    """

    factor: float
    every_steps: int | None = None


@dataclass(frozen=True)
class Stage:
    """What trains, and until when.

    Args:
        name: For people.
        train: Groups that train; all others are frozen.
        step: Optimizer step at which the stage is over.
        epoch: Epoch at which the stage is over.
        plateau: Or the plateau that ends it; the last stage has no end.
        warmup_steps: Steps in which a factor goes linearly from its former value (0 where frozen) to its new one.
    """

    name: str
    train: Mapping[str, GroupTraining]
    step: int | None = None
    epoch: int | None = None
    plateau: Plateau | None = None
    warmup_steps: int = 0

    def factor(self, group: str, depth: int, index: int, before: float) -> float:
        """Factor of a group's layer in step `index` of the stage.

        Args:
            group: The group.
            depth: Distance of the layer from the end of its stack; 0 where the group is not split into layers.
            index: 0 for the stage's first step.
            before: The factor in the last step of the stage before.
        """
        training = self.train.get(group)
        if training is None:
            return 0.0
        # A layer that trains already goes on.
        waits = 0 if before > 0 or training.every_steps is None else depth * training.every_steps
        if index < waits:
            return 0.0
        share = min(1.0, (index - waits + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return training.factor if share == 1.0 else before + (training.factor - before) * share


def factor_at(stages: Sequence[Stage], starts: Sequence[int], step: int, group: str, depth: int) -> float:
    """Factor on the learning rate of a group's layer; 0 means frozen.

    Args:
        stages: The schedule.
        starts: Step at which each stage that was reached began; the first is 0.
        step: The optimizer step, at or behind the last start.
        group: The group.
        depth: See `Stage.factor`.
    """
    value = 0.0
    for stage, start, end in zip(stages, starts, [*starts[1:], step + 1], strict=False):
        if end > start:  # a stage may have been over as it began
            value = stage.factor(group, depth, end - 1 - start, value)
    return value


def parse_stages(stages: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """The stages of a recipe.

    Raises:
        ConfigError: names the stage and the field.
    """
    require(len(stages) > 0, FIELD, "at least one stage", list(stages))
    parsed = [_stage(raw, f"{FIELD}[{index}]") for index, raw in enumerate(stages)]
    for index, stage in enumerate(parsed[:-1]):
        ends = stage.step is not None or stage.epoch is not None or stage.plateau is not None
        require(ends, f"{FIELD}[{index}].until", "step, epoch or plateau (only the last stage has no end)", None)
    found = stages[-1].get("until")
    require(found is None, f"{FIELD}[{len(parsed) - 1}].until", "none: the last stage has no end", found)
    names = [stage.name for stage in parsed]
    require(len(set(names)) == len(names), f"{FIELD}: names", "different ones", names)
    for kind in ("step", "epoch"):
        border = [(index, getattr(stage, kind)) for index, stage in enumerate(parsed) if getattr(stage, kind)]
        for (_, former), (index, end) in itertools.pairwise(border):
            advice = f"more than {former}, where an earlier stage ends"
            require(end > former, f"{FIELD}[{index}].until.{kind}", advice, end)
    return parsed


def _stage(raw: Mapping[str, Any], where: str) -> Stage:
    _check_keys(raw, ("name", "until", "train", "warmup_steps"), where)
    require(isinstance(raw.get("name"), str), f"{where}.name", "a name", raw.get("name"))
    train = raw.get("train")
    advice = "at least one group and its factor, such as {projector: 1.0}"
    require(isinstance(train, Mapping) and len(train) > 0, f"{where}.train", advice, train)
    warmup = raw.get("warmup_steps", 0)
    require(_is_count(warmup, 0), f"{where}.warmup_steps", "0 or more steps", warmup)
    groups = {group: _group_training(value, f"{where}.train[{group}]") for group, value in dict(train or {}).items()}
    return Stage(name=raw["name"], train=groups, warmup_steps=warmup, **_until(raw.get("until"), f"{where}.until"))


def _until(raw: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    if raw is None:
        return {}
    kinds = ("step", "epoch", "plateau")
    _check_keys(raw, kinds, where)
    require(len(raw) == 1, where, f"one of {', '.join(kinds)}", raw)
    ((kind, value),) = raw.items()
    if kind != "plateau":
        require(_is_count(value, 1), f"{where}.{kind}", "a number above 0", value)
        return {kind: value}
    where = f"{where}.plateau"
    _check_keys(value, [known.name for known in dataclasses.fields(Plateau)], where)
    require(isinstance(value.get("metric"), str), f"{where}.metric", "a logged value, as val/loss", value.get("metric"))
    require(_is_count(value.get("patience"), 1), f"{where}.patience", "1 or more validations", value.get("patience"))
    delta, mode = value.get("min_delta", 0.0), value.get("mode", "min")
    require(_is_number(delta) and delta >= 0, f"{where}.min_delta", "0 or more", delta)
    require(mode in ("min", "max"), f"{where}.mode", "min or max", mode)
    return {"plateau": Plateau(value["metric"], value["patience"], float(delta), mode)}


def _group_training(value: Any, where: str) -> GroupTraining:
    if not isinstance(value, Mapping):
        value = {"factor": value}
    _check_keys(value, ("factor", "gradual"), where)
    factor, gradual = value.get("factor", 1.0), value.get("gradual")
    advice = "a factor above 0 (leave the group out to freeze it)"
    require(_is_number(factor) and 0 < factor < math.inf, where, advice, factor)
    if gradual is None:
        return GroupTraining(float(factor))
    _check_keys(gradual, ("every_steps",), f"{where}.gradual")
    steps = gradual.get("every_steps")
    require(_is_count(steps, 1), f"{where}.gradual.every_steps", "1 or more steps", steps)
    return GroupTraining(float(factor), steps)


def _check_keys(raw: Any, known: Sequence[str], where: str) -> None:
    require(isinstance(raw, Mapping), where, f"a mapping with {', '.join(known)}", raw)
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{where}.{key}", f"one of {', '.join(known)}{hint}", raw[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
