"""A schedule of three stages and runs with it, for the tests of freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from training import Record, TinyData, module_arguments, trainer_arguments

from callbacks.freeze_schedule import FreezeSchedule
from step37_lit import MegatronStrategy, Step37LitModule

PROJECTOR = {"name": "projector", "until": {"step": 4}, "train": {"projector": 1.0}}
TEXT = {
    "name": "text",
    "until": {"step": 8},
    "train": {"projector": 1.0, "text_decoder": {"factor": 0.5, "gradual": {"every_steps": 2}}},
    "warmup_steps": 2,
}
VISION = {"name": "vision", "train": {"text_decoder": 0.5, "vision_tower": 0.1}}
STAGES = [PROJECTOR, TEXT, VISION]
STEPS = 12


class Parts(pl.Callback):
    """Weights before each step, what torch's AdamW holds behind it, and the rates of the step by group."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[set[float]] = []  # step counts of the shards with moments
        self.rates: list[dict[str, float]] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: p.detach().clone() for name, p in lit.model.named_parameters()})
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_before_zero_grad(self, trainer: Any, lit: Any, optimizer: Any) -> None:  # gradients are there, not clipped
        trained = [p.main_grad for p in lit.model.parameters() if p.requires_grad]
        self.norms.append(float(torch.stack([grad.double().square().sum() for grad in trained]).sum().sqrt()))

    def on_train_batch_end(self, trainer: Any, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        states = [state for inner in trainer.optimizers[0].inner for state in inner.state.values()]
        self.moments.append({float(state["step"]) for state in states})

    def on_train_end(self, trainer: Any, lit: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in lit.model.named_parameters()})

    def changed(self, first: int, last: int) -> set[str]:
        """Parameters that moved between the start of step `first` and the end of step `last - 1`."""
        before, after = self.weights[first], self.weights[last]
        return {name for name in before if not torch.equal(before[name], after[name])}


def fit(
    root: Path,
    stages: list[dict[str, Any]] | None,
    steps: int = STEPS,
    callbacks: list[pl.Callback] | None = None,
    module: dict[str, Any] | None = None,
    lit: Step37LitModule | None = None,
    ckpt_path: Path | None = None,
    **trainer_changes: Any,
) -> tuple[pl.Trainer, Step37LitModule, list]:
    record = Record()
    schedule = [FreezeSchedule(stages)] if stages is not None else []
    trainer = pl.Trainer(
        strategy=MegatronStrategy(),
        callbacks=[*schedule, record, *(callbacks or [])],
        **trainer_arguments(root, **({"max_steps": steps, "limit_val_batches": 0} | trainer_changes)),
    )
    lit = lit or Step37LitModule(**module_arguments(**({"decay_steps": 40} | (module or {}))))
    trainer.fit(lit, datamodule=TinyData(steps=40), ckpt_path=ckpt_path)
    return trainer, lit, record.rows


def in_groups(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


TEXT_PREFIXES = ("embedding.", "decoder.", "output_layer.")
