"""`RunCheckpoints`: when a run writes a checkpoint, and which ones it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from step37_lit.checkpoint import folder
from step37_lit.errors import ConfigError, require
from step37_lit.saved_model import CHECKPOINTS
from step37_lit.validations import validation_follows

MODES = {"min": 1.0, "max": -1.0}


class RunCheckpoints(Checkpoint):
    """Writes `checkpoints/step_000200` and so on below the run's folder, and removes what is not kept.

    A checkpoint is written every `every_steps` steps, behind every validation (with `monitor`), and where training ends
    or is stopped. Training goes on while it is written. Where a validation follows a step, the step's checkpoint waits
    for it, so that its result is part of it.

    As with Lightning's own callback, a `fast_dev_run` writes none.

    Lightning's `ModelCheckpoint` works too: its `NAME.ckpt` is a folder then.

    Args:
        every_steps: Optimizer steps between two checkpoints; null writes none but those of validations and the end.
        keep_last: How many of the newest are kept, at least 2: a damaged one must have one before it.
        keep_every: Those whose step is a multiple of this are kept, too; null keeps none for that.
        monitor: A logged value of validations, such as `val/loss`: the checkpoint with the best one is kept, too.
        mode: Whether the best value is the `min` or the `max`.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        keep_last: int = 2,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
    ):
        for name, value in (("every_steps", every_steps), ("keep_every", keep_every)):
            require(value is None or value > 0, f"RunCheckpoints.{name}", "null or a positive number", value)
        require(keep_last >= 2, "RunCheckpoints.keep_last", "2 or more", keep_last)
        require(mode in MODES, "RunCheckpoints.mode", " or ".join(MODES), mode)
        self.every_steps, self.keep_last, self.keep_every = every_steps, keep_last, keep_every
        self.monitor, self.mode = monitor, mode
        self.best_score: float | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._folder = Path(trainer.default_root_dir) / CHECKPOINTS

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        due = self.every_steps is not None and step % self.every_steps == 0
        if (due or _ends(trainer)) and not (validation_follows(trainer, batch_idx) and not trainer.should_stop):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if trainer.should_stop and trainer.global_step == self._last_step:
            return  # stopped behind a step: a run that goes on from there has no validation there
        due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        best = self._is_best(trainer)
        if due or self.monitor is not None or _ends(trainer):
            self._save(trainer, best)

    def on_validation_cut(self, trainer: pl.Trainer) -> None:
        """Called by the strategy on all ranks where a signal ends the run in the midst of a validation."""
        self._save(trainer)

    def _is_best(self, trainer: pl.Trainer) -> bool:
        if self.monitor is None:
            return False
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise ConfigError("RunCheckpoints.monitor", f"a logged value: {', '.join(sorted(logged))}", self.monitor)
        score = trainer.strategy.broadcast(float(logged[self.monitor]))  # ranks must not part ways
        sign = MODES[self.mode]
        if self.best_score is not None and not sign * score < sign * self.best_score:
            return False
        self.best_score = score
        return True

    def _save(self, trainer: pl.Trainer, best: bool = False) -> None:
        step = trainer.global_step
        path = self._folder / f"step_{step:06d}"
        if trainer.fast_dev_run or (step == self._last_step and not best):
            return
        # What was complete before this save begins may go; the one that is being written is not counted yet.
        with trainer.strategy.progress.untimed("a wait for the last save"):
            trainer.strategy.saver.wait()
        if trainer.is_global_zero:
            kept = [Path(each).name for each in (self.best_model_path, self.last_model_path) if each]
            folder.prune(self._folder, self.keep_last, self.keep_every, kept)
        self._last_step, self.last_model_path = step, str(path)
        if best:
            self.best_model_path = str(path)
        trainer.save_checkpoint(path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with trainer.strategy.progress.untimed("the last save"):
            trainer.strategy.saver.wait()
        if trainer.is_global_zero:
            kept = [Path(self.best_model_path).name] if self.best_model_path else []
            folder.prune(self._folder, self.keep_last, self.keep_every, kept)

    def state_dict(self) -> dict[str, Any]:
        names = {"best": Path(self.best_model_path).name, "last": Path(self.last_model_path).name}
        return {"best_score": self.best_score, "step": self._last_step, **names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._last_step = state_dict["best_score"], state_dict["step"]
        self.best_model_path, self.last_model_path = (
            str(self._folder / state_dict[name]) if state_dict[name] else "" for name in ("best", "last")
        )


def _ends(trainer: pl.Trainer) -> bool:
    """Whether this step is the last one, as far as steps and not epochs say it."""
    return trainer.should_stop or trainer.global_step == trainer.max_steps
