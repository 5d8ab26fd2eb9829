"""The report of a run as HTML."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from step37_lit.errors import ConfigError
from step37_lit.pages.render import render, write_page
from step37_lit.pages.style import BASE_CSS
from step37_lit.report.axes import short
from step37_lit.report.charts import CHARTS, lines_of, other_charts
from step37_lit.report.choose import Group, choose
from step37_lit.report.experts import LEVELS, balance, heat_map
from step37_lit.report.pictures import picture_uris
from step37_lit.report.plots import MOST_SPANS, bands, plot
from step37_lit.report.read import PAGE_FILE, Run, Series, read_run
from step37_lit.report.style import CSS
from step37_lit.report.template import TEMPLATE

IDLE_SECONDS = 600  # a run that has written nothing for longer is not going on
MAX_BAD_ROWS = 500
BAD_COLUMNS = ("met", "set", "shard", "key", "member", "reason")
PACKAGES = ("torch", "lightning", "megatron-core", "torchmetrics", "numpy")
RECIPE = {
    "Model": ("model.preset", "model.init_from"),
    "Data": ("data.class_path",),
    "Learning rate": ("model.lr",),
    "Warm-up steps": ("model.warmup_steps",),
    "Weight decay": ("model.weight_decay",),
    "Gradient clipping": ("trainer.gradient_clip_val",),
    "Devices": ("trainer.devices",),
    "Tensor ranks": ("trainer.strategy.init_args.tensor",),
    "Pipeline ranks": ("trainer.strategy.init_args.pipeline",),
    "Expert ranks": ("trainer.strategy.init_args.expert",),
    "Precision": ("trainer.precision",),
    "Seed": ("seed_everything",),
}


@dataclass(frozen=True)
class State:
    """Whether the run goes on: running, finished or stopped."""

    word: str
    detail: str


@dataclass(frozen=True)
class Fact:
    """A figure of the header."""

    name: str
    value: str
    note: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Result:
    """A validation's value: (step, text) of the first, the best and the last one; None where no value is best."""

    name: str
    first: tuple[int, str]
    best: tuple[int, str] | None
    last: tuple[int, str]


def write_report(folder: Path, ended: bool = False) -> Path:
    """Writes `report.html` into a run's folder; the file is whole or absent.

    Args:
        folder: Of the run, which may still be going on.
        ended: Whether the caller knows that training has come to its end, as by its epochs or its time.

    Returns:
        The page.

    Raises:
        ConfigError: the folder is not a run's, a file of it cannot be read, or the page cannot be written.
    """
    folder = Path(folder)
    try:
        html = page(read_run(folder), ended)
        write_page(html, folder / PAGE_FILE)
    except OSError as error:
        raise ConfigError("RUN", "a folder that can be read and written", error.strerror, file=folder) from error
    return folder / PAGE_FILE


def page(run: Run, ended: bool = False) -> str:
    """The whole page; `ended` as for `write_report`."""
    galleries = [
        (split, len(validations[-1].captions), choose(validations)) for split, validations in run.validations.items()
    ]
    heat, results = heat_map(run.loads), _results(run)
    now = time.time()
    return render(
        TEMPLATE,
        BASE_CSS + CSS,
        name=run.folder.resolve().name,
        path=str(run.folder.resolve()),
        state=state(run, ended, now),
        facts=_facts(run),
        span=-(-run.step // MOST_SPANS),
        bands=bands(run.stages, run.stage_configs, run.step),
        plots=[plot(chart, lines, run.step) for chart in CHARTS if (lines := lines_of(chart, run.metrics))],
        other_plots=[plot(chart, lines, run.step) for chart, lines in other_charts(run.metrics)],
        results=[result for result in results if "/" not in result.name],
        other_results=[result for result in results if "/" in result.name],
        galleries=galleries,
        pictures=_pictures(run.folder, [group for *_, groups in galleries for group in groups]),
        heat=heat,
        heat_height=0 if heat is None else len(heat.rows) * (26 if len(heat.rows) <= 12 else 12),
        label_every=1 if heat is None or len(heat.rows) <= 12 else 3,
        levels=LEVELS,
        balance_plots=[plot(chart, lines, run.step) for chart, lines in balance(run.loads)] if heat else [],
        bad=[_bad_row(record) for record in run.bad[:MAX_BAD_ROWS]],
        bad_count=len(run.bad),
        bad_columns=BAD_COLUMNS,
        recipe=_recipe(run.config),
        environment=_environment(),
        checkpoints=[(each.name, each.num_bytes, _clock(each.written)) for each in run.checkpoints],
        config_text=run.config_text,
        now=_clock(now),
    )


def state(run: Run, ended: bool, now: float) -> State:
    """What the files tell of a run's state.

    Args:
        run: The run.
        ended: Whether it is known that training has come to its end.
        now: Seconds since 1970.
    """
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    epoch = "" if run.epoch is None else f" in epoch {run.epoch}"
    reached = f"step {run.step:,}{of}{epoch}"
    written = f"last file written {_clock(run.last_written)}"
    if ended or (run.max_steps and run.step >= run.max_steps):
        return State("finished", f"{reached}, {written}")
    quiet = now - run.last_written
    if quiet <= IDLE_SECONDS:
        return State("running", f"{reached}, {written}")
    return State("stopped", f"{reached}, nothing written since {_clock(run.last_written)}")


def _facts(run: Run) -> list[Fact]:
    facts = []
    metrics = run.metrics
    if loss := metrics.get("train/loss"):
        recent = loss.values[-max(1, len(loss.values) // MOST_SPANS) :]
        facts.append(Fact("Training loss", short(float(recent.mean())), "of the last steps"))
    for title, name, percent in (
        ("Validation loss", "val/loss", False),
        ("CIDEr-D", "val/cider_d", False),
        ("Attributes", "val/generated_attribute_accuracy", True),
    ):
        if (series := metrics.get(name)) and (best := _best(name, series)) is not None:
            note = f"best {short(series.values[best], percent)} at step {series.steps[best]:,}"
            facts.append(Fact(title, short(float(series.values[-1]), percent), note))
    if speed := metrics.get("train/tokens_per_second"):
        facts.append(Fact("Tokens per second", short(float(np.median(speed.values)), digits=3), "median"))
    if padding := metrics.get("train/padding"):
        facts.append(Fact("Padding", short(float(padding.values.mean()), percent=True), "mean"))
    return [*facts, Fact("Bad samples", f"{len(run.bad):,}", alarm=bool(run.bad))]


def _best(name: str, series: Series) -> int | None:
    """Place of a series' best value; None where neither low nor high ones are better, or none is finite."""
    finite = np.isfinite(series.values)
    if not finite.any():
        return None
    if "loss" in name:
        return int(np.where(finite, series.values, np.inf).argmin())
    if any(word in name for word in ("cider", "bleu", "rouge", "accuracy")):
        return int(np.where(finite, series.values, -np.inf).argmax())
    return None


def _results(run: Run) -> list[Result]:
    found = []
    for name, series in sorted(run.metrics.items()):
        if name.startswith("val/"):
            percent = "accuracy" in name
            texts = [(int(s), short(float(v), percent)) for s, v in zip(series.steps, series.values, strict=True)]
            best = _best(name, series)
            found.append(Result(name.removeprefix("val/"), texts[0], None if best is None else texts[best], texts[-1]))
    return found


def _pictures(folder: Path, groups: list[Group]) -> dict[str, tuple[str, ...]]:
    return {card.key: picture_uris(folder, card.key) for group in groups for card in group.cards}


def _recipe(config: dict[str, Any]) -> list[tuple[str, str]]:
    found = (
        (name, [v for field in fields if (v := _at(config, field)) is not None]) for name, fields in RECIPE.items()
    )
    return [(name, str(values[0])) for name, values in found if values]


def _at(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _environment() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((name, "not installed"))
    return [*versions, ("Platform", platform.platform())]


def _bad_row(record: dict[str, Any]) -> dict[str, str]:
    found = {name: str(record.get(name) or "–") for name in BAD_COLUMNS}
    return found | {"met": ", ".join(f"{name} {record[name]}" for name in ("epoch", "step") if name in record) or "–"}


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
