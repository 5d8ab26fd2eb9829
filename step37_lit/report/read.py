"""A run's folder as the report needs it: what training, validations, callbacks and loaders have written so far.

The run may still be going on. A last line without its end is one that is just being written, and is left out; a whole
line that cannot be read is a mistake.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from step37_lit.checkpoint.folder import list_checkpoints
from step37_lit.errors import ConfigError, require

METRICS, CONFIG, BAD_SAMPLES, EXPERT_LOAD = "metrics.csv", "config.yaml", "bad_samples.jsonl", "expert_load.jsonl"
CAPTIONS, CHECKPOINTS = "captions", "checkpoints"
PAGE_FILE = "report.html"
STAGE = "train/stage"
NOT_METRICS = ("step", "epoch", STAGE)
CAPTION_FILE = re.compile(r"step_(\d+)(\w*)\.jsonl")
CAPTION_FIELDS = {"key": str, "caption": str, "references": list, "cider_d": float, "rouge_l": float, "finish": str}
LOAD_FIELDS = {"step": int, "layer": int, "tokens": list, "bias": list}


@dataclass(frozen=True)
class Series:
    """A logged value.

    Args:
        steps: [n] int64, ascending: optimizer steps that were done when the value was logged, 1 for the first.
        values: [n] float64, not finite ones included.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        """Without the values that are not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Caption:
    """A generated caption with its references and scores."""

    key: str
    caption: str
    references: tuple[str, ...]
    cider_d: float
    rouge_l: float
    finish: str


@dataclass(frozen=True)
class Validation:
    """The captions of one validation, behind `step` optimizer steps."""

    step: int
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class ExpertLoad:
    """The routed experts of one layer, in one step.

    Args:
        step: Optimizer steps done.
        layer: Of the decoder, from 0.
        tokens: [experts] float64, tokens that each expert was sent.
        bias: [experts] float64, the router's bias; empty where it has none.
    """

    step: int
    layer: int
    tokens: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: bytes of its files, and when it was written in seconds since 1970."""

    name: str
    num_bytes: int
    written: float


@dataclass(frozen=True)
class Run:
    """What is in a run's folder.

    Args:
        folder: The folder.
        metrics: The logged values by name.
        stages: Number of the freezing schedule's stage at each step, or None where there is no schedule.
        epoch: The last one that was begun, from 0; None before the first step.
        config: The recipe in full; empty where the run was not started from the command line.
        config_text: The same as written.
        validations: By suffix of the split, in the order of their steps.
        loads: Records of expert load in the order of the file.
        bad: Records of bad samples in the order in which they were met.
        checkpoints: By name.
        last_written: Seconds since 1970 of the last change of any of its files.
    """

    folder: Path
    metrics: dict[str, Series]
    stages: Series | None
    epoch: int | None
    config: dict[str, Any]
    config_text: str
    validations: dict[str, tuple[Validation, ...]]
    loads: tuple[ExpertLoad, ...]
    bad: tuple[dict[str, Any], ...]
    checkpoints: tuple[Checkpoint, ...]
    last_written: float

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as it is written."""
        logged = [int(series.steps[-1]) for series in self.metrics.values()]
        validated = [each[-1].step for each in self.validations.values()]
        return max([0, *logged, *validated, *(load.step for load in self.loads)])

    @property
    def max_steps(self) -> int | None:
        """Steps at which training ends; None where it ends by epochs or by time, or is not known."""
        found = self.config.get("trainer", {}).get("max_steps", -1)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def stage_configs(self) -> list[dict[str, Any]]:
        """Stages of the freezing schedule in the recipe."""
        callbacks = self.config["trainer"].get("callbacks") if self.config else None
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if isinstance(callback, dict) and str(callback.get("class_path")).endswith(".FreezeSchedule"):
                return list(callback["init_args"]["stages"])
        return []


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ConfigError: it is not there or not a run's, or one of its files has a line that cannot be read.
        OSError: a file cannot be read.
    """
    require(folder.is_dir(), "RUN", "the folder of a run", str(folder))
    present = [name for name in (METRICS, CONFIG) if (folder / name).is_file()]
    advice = f"the folder of a run, with {METRICS} or {CONFIG}"
    require(len(present) > 0, "RUN", advice, f"{folder} without them")
    metrics = _read_metrics(folder / METRICS) if METRICS in present else {}
    config, text = _read_config(folder / CONFIG) if CONFIG in present else ({}, "")
    epoch = metrics.get("epoch")
    return Run(
        folder=folder,
        metrics={name: series for name, series in metrics.items() if name not in NOT_METRICS},
        stages=metrics.get(STAGE),
        epoch=None if epoch is None else int(epoch.values.max()),
        config=config,
        config_text=text,
        validations=_read_validations(folder / CAPTIONS),
        loads=tuple(_read_loads(folder / EXPERT_LOAD)),
        bad=tuple(record for _, record in _records(folder / BAD_SAMPLES)),
        checkpoints=_read_checkpoints(folder / CHECKPOINTS),
        last_written=max(path.stat().st_mtime for path in _written_files(folder)),
    )


def _read_metrics(path: Path) -> dict[str, Series]:
    """Columns of metrics.csv by name; a row has a step, counted from 0, and any of the values."""
    rows = csv.reader(_whole_lines(path))
    header = next(rows, ["step"])  # a run empties the file when a new column comes
    require("step" in header, f"{path}: header", "a column named step", ",".join(header)[:80])
    column = header.index("step")
    steps: dict[str, list[int]] = {name: [] for name in header}
    values: dict[str, list[float]] = {name: [] for name in header}
    try:
        for row in rows:
            require(len(row) == len(header), f"{path}: line {rows.line_num}", f"{len(header)} cells", len(row))
            step = int(row[column]) + 1
            for name, cell in zip(header, row, strict=True):
                if cell:
                    values[name].append(float(cell))
                    steps[name].append(step)
    except ConfigError:
        raise
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: line {rows.line_num}", "numbers", str(error)) from error
    return {name: _series(steps[name], values[name]) for name in header if values[name]}


def _series(steps: list[int], values: list[float]) -> Series:
    """Of values of one step the last: a validation and its step can both log one."""
    order = np.array(steps, dtype=np.int64)
    distinct, first = np.unique(order[::-1], return_index=True)
    return Series(distinct, np.array(values, dtype=np.float64)[::-1][first])


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    text = _text(path, path.read_bytes())
    try:
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError("config", "YAML", str(error), file=path) from error
    known = isinstance(config, dict) and isinstance(config.get("trainer"), dict)
    require(known, f"{path}: trainer", "the section of a recipe", None)
    return config, text


def _read_validations(folder: Path) -> dict[str, tuple[Validation, ...]]:
    found: dict[str, list[Validation]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := CAPTION_FILE.fullmatch(path.name):
            captions = tuple(_caption(record, where) for where, record in _records(path, CAPTION_FIELDS))
            if captions:
                found.setdefault(match[2].lstrip("_"), []).append(Validation(int(match[1]), captions))
    return {suffix: tuple(sorted(each, key=lambda v: v.step)) for suffix, each in sorted(found.items())}


def _caption(record: dict[str, Any], where: str) -> Caption:
    references = record["references"]
    texts = all(isinstance(reference, str) for reference in references)
    require(texts, f"{where}: references", "strings", references)
    return Caption(**{name: record[name] for name in CAPTION_FIELDS} | {"references": tuple(references)})


def _read_loads(path: Path) -> Iterator[ExpertLoad]:
    for where, record in _records(path, LOAD_FIELDS):
        try:
            tokens, bias = (np.array(record[name], dtype=np.float64).reshape(-1) for name in ("tokens", "bias"))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: tokens, bias", "lists of numbers", str(error)) from error
        advice = f"{len(tokens)} entries, as tokens, or none"
        require(
            len(tokens) > 0 and bool((tokens >= 0).all()), f"{where}: tokens", "numbers of tokens", record["tokens"]
        )
        require(len(bias) in (0, len(tokens)), f"{where}: bias", advice, len(bias))
        yield ExpertLoad(record["step"], record["layer"], tokens, bias)


def _read_checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    whole = [(each.path.name, each.manifest) for each in list_checkpoints(folder) if each.manifest is not None]
    return tuple(sorted((Checkpoint(name, m.num_bytes, m.created) for name, m in whole), key=lambda each: each.name))


def _written_files(folder: Path) -> list[Path]:
    """Files of the run; the report itself is none of them."""
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return [path for path in files if not path.name.endswith(PAGE_FILE) and not path.name.startswith(".")]


def _records(path: Path, fields: dict[str, type] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a JSONL file with where they stand; none where there is no file.

    Args:
        path: The file.
        fields: Fields that each line must have, and their types.
    """
    for number, line in enumerate(_whole_lines(path) if path.is_file() else (), 1):
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(where, "JSON", line[:80]) from error
        require(isinstance(record, dict), where, "a JSON object", line[:80])
        for name, kind in (fields or {}).items():
            value = record.get(name)
            fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
            require(fits, f"{where}: {name}", f"a {kind.__name__}", value)
        yield where, record


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what is behind the last line's end is not whole
    return _text(path, b"\n".join(lines)).split("\n") if lines else []


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("contents", "UTF-8 text", str(error), file=path) from error
