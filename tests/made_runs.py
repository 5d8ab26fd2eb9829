"""Folders of runs as training leaves them, for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from browser import HOSTILE_TEXTS

from step37_lit.checkpoint.folder import commit, staging
from step37_lit.report.pictures import save_picture

CAPTIONS = (
    *HOSTILE_TEXTS,
    "two\nlines",
    "",
    "unbroken" * 60,
)
HOSTILE_KEY = "a\"><img id=taken src=x onerror='window taken'>"
STAGES = (
    {"name": "projector", "until": {"step": 200}, "train": {"projector": 1.0}},
    {"name": "text", "until": {"step": 320}, "train": {"projector": 1.0, "text_decoder": 0.5}, "warmup_steps": 50},
    {
        "name": "everything",
        "train": {"text_decoder": 0.5, "vision_tower": {"factor": 0.1, "gradual": {"every_steps": 100}}},
    },
)
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "strategy": {"class_path": "step37_lit.MegatronStrategy", "init_args": {"tensor": 2, "pipeline": 1}},
        "devices": 2,
        "max_steps": 600,
        "callbacks": [
            {"class_path": "callbacks.caption_metrics.CaptionMetrics", "init_args": {"max_samples": 128}},
            {"class_path": "callbacks.freeze_schedule.FreezeSchedule", "init_args": {"stages": list(STAGES)}},
        ],
    },
    "model": {"preset": "tiny", "lr": 0.0006, "warmup_steps": 100},
    "data": {"class_path": "datamodules.scenes.ScenesDataModule", "init_args": {"val_samples": 512}},
}
STEPS = 600
VALIDATIONS = (150, 300, 450, 600)
COLOURS = ("red", "green", "blue", "yellow", "pink", "brown", "gray", "cyan")
SHAPES = ("circle", "square", "cross", "star", "ring", "heart")


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """metrics.csv as Lightning writes it: sorted columns, a row for each call that logs."""
    names = sorted({name for row in rows for name in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def caption(key: str, text: str, references: Sequence[str], cider_d: float, **other: Any) -> dict[str, Any]:
    row = {"key": key, "caption": text, "references": list(references), "cider_d": cider_d, "rouge_l": 0.5}
    return row | {"logprob": -3.5, "finish": "stop"} | other


def training_rows(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """What training and validations log: a loss that falls, rates of two groups, three stages."""
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        rate = 6e-4 * min(1, (step + 1) / 100)
        rows.append({"step": step, "lr-ForwardingOptimizer/pg1": rate, "lr-ForwardingOptimizer/pg2": 0.5 * rate})
        loss = 0.35 + 6.3 * math.exp(-step / 60) + 0.05 * draw.standard_normal()
        stage = sum(step >= border for border in (200, 320))
        rows.append(
            {
                "epoch": 0, "step": step, "train/loss": loss, "train/stage": float(stage),
                "train/grad_norm": 1 + 4 * math.exp(-step / 50) + 0.3 * draw.random(), "train/mfu": 0.2,
                "train/tokens_per_second": 7000 - 2000 * stage + 400 * draw.standard_normal(),
                "train/padding": 0.03 * draw.random(), "train/data_wait": 0.04 * draw.random(),
            }
        )  # fmt: skip
        if step + 1 in VALIDATIONS:
            part = (step + 1) / 600
            values = {"val/loss": 0.3 + 0.4 * (1 - part), "val/loss_seen": 0.3 + 0.3 * (1 - part)}
            values |= {"val/cider_d": 2.4 * part, "val/bleu_1": 0.8 * part, "val/bleu_4": 0.6 * part}
            values |= {"val/rouge_l": 0.8 * part, "val/caption_words": 30 - 7 * part}
            values |= {"val/attribute_accuracy": 0.5 + 0.4 * part, "val/attribute_accuracy_seen": 0.5 + 0.45 * part}
            values |= {"val/generated_attribute_accuracy": 0.45 + 0.5 * part}
            values |= {f"val/attribute_accuracy/{kind}": 0.4 + 0.5 * part for kind in ("color", "shape", "size")}
            rows.append({"epoch": 0, "step": step, **values})
    return rows


def scene(number: int) -> np.ndarray:
    """[180, 240, 3] uint8: a disc on a slope."""
    y, x = np.mgrid[0:180, 0:240]
    pixels = np.stack([x, y, np.full_like(x, 20 * number % 256)], axis=2).astype(np.uint8)
    pixels[(x - 120) ** 2 + (y - 90) ** 2 < 60**2] = [(70 * number) % 256, 220, 60]
    return pixels


def plain_run(folder: Path) -> Path:
    """A finished run with four validations of 20 captioned pictures, stages, expert load and two checkpoints."""
    folder.mkdir(parents=True)
    write_metrics(folder, training_rows(STEPS))
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + json.dumps(CONFIG, indent=2))
    for step in VALIDATIONS:
        rows = []
        for i in range(20):
            colour, shape = COLOURS[i % 8], SHAPES[i % 6]
            right = (i * 37) % 20 < step / 40
            said = colour if right else COLOURS[(i + step // 150) % 8]
            references = [f"I see one shape: a {colour} {shape}, large.", f"This drawing has a large {colour} {shape}."]
            score = (2.0 + 0.1 * i if right else 0.05 * i) * step / 600
            rows.append(caption(f"unseen-{i}", f"I see one shape: a {said} {shape}, large.", references, score))
        write_lines(folder / "captions" / f"step_{step:06d}.jsonl", rows)
    for i in range(19):
        save_picture(folder, f"unseen-{i}", scene(i))
    write_lines(folder / "expert_load.jsonl", expert_load(layers=range(1, 5), experts=8, steps=VALIDATIONS))
    target = folder / "checkpoints" / "step_000600"
    with staging(target) as staged:
        (staged / "training.pt").write_bytes(bytes(5_400_000))
        commit(target, "training", step=600)
    return folder


def expert_load(layers: Sequence[int], experts: int, steps: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for step in steps:
        for layer in layers:
            tokens = np.round(20000 * draw.dirichlet(np.full(experts, 1.0 + step / 100))).astype(int)
            bias = 0.01 * draw.standard_normal(experts)
            rows.append({"step": step, "layer": layer, "tokens": tokens.tolist(), "bias": bias.tolist()})
    return rows


def hostile_run(folder: Path) -> Path:
    """A run that is going on, many experts, many validations, and texts and names that want to get out of the page."""
    folder.mkdir(parents=True)
    name = "val/<img id=taken src=x>"
    rows = [{"step": i, "train/loss": math.nan if i in (7, 9) else 5 / (i + 1), name: i / 9} for i in range(12)]
    write_metrics(folder, [*rows, {"step": 11, "lr-<u id=taken>/pg1": 1e-5, "train/stage": 1.0}])
    config = json.loads(json.dumps(CONFIG))
    config["trainer"]["callbacks"][1]["init_args"]["stages"][1]["name"] = "<b id=taken>\u202e"
    config["data"]["class_path"] = "</pre><script>window.taken = 5</script>"
    (folder / "config.yaml").write_text(json.dumps(config, indent=2))
    for step in range(1, 13):
        records = [
            caption(f"{HOSTILE_KEY}{i}", text[: 60 * step], [text, CAPTIONS[0]], 0.1 * i * step, finish="length")
            for i, text in enumerate(CAPTIONS)
        ]
        write_lines(folder / "captions" / f"step_{step:06d}_<i>.jsonl".replace("<i>", "seen"), records)
    bad = {"epoch": 0, "rank": 0, "set": "s", "member": "png", "reason": "broken <i id=taken>"}
    write_lines(
        folder / "bad_samples.jsonl",
        [bad | {"step": i, "shard": '<b id=taken>"s".tar', "key": "k" * 90} for i in range(3)],
    )
    write_lines(folder / "expert_load.jsonl", expert_load(layers=range(3, 45), experts=288, steps=(6, 12)))
    with (folder / "metrics.csv").open("a") as file:
        file.write("13,0.")
    with (folder / "bad_samples.jsonl").open("ab") as file:
        file.write(b'{"key": "half\xe2\x80')
    return folder
