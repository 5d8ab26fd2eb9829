"""How `MegatronStrategy` ends a run that was asked to: on all ranks alike, behind the same step or evaluation batch.

    a step          the request travels with the step's counts; a checkpoint follows, and no validation
    an evaluation   the ranks agree before each batch; what was computed so far is dropped

A validation that training owes to a step, because it was cut short or a checkpoint lies between the two, is made up for
by the run that goes on from there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from step37_lit import signals
from step37_lit.signals import Stop, Stopped
from step37_lit.validations import validation_follows


class StopHooks:
    """Mixed into `MegatronStrategy`."""

    lightning_module: Any
    root_device: torch.device
    saver: Any

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.stop = Stop.NONE  # what the ranks have agreed on
        self._validation_due = False
        self._validated = -1  # the step behind which the last complete validation was

    @property
    def requested(self) -> Stop:
        """What this rank asks for."""
        return max(signals.requested(), Stop.SAVE_FAILED if self.saver.failed else Stop.NONE)

    def end_behind_step(self, stop: Stop) -> None:
        """Training ends when the step is done."""
        trainer, self.stop = self.lightning_module.trainer, stop
        fit_loop = trainer.fit_loop
        fit_loop.min_epochs = fit_loop.epoch_loop.min_steps = None  # of early stopping, which Lightning takes this for
        fit_loop.epoch_loop._skip_next_val = True  # Lightning would validate behind the last step, due or not
        trainer.should_stop = True

    def end_here_if_asked(self) -> None:
        """Ends an evaluation on all ranks where any of them was asked to; all must call it.

        Raises:
            Stopped: within `fit` nobody but the strategy sees it.
        """
        self.stop = max(self.stop, self._agreed(signals.requested()))
        if self.stop:
            raise Stopped(self.stop)

    def _agreed(self, stop: Stop) -> Stop:
        if dist.get_world_size() == 1:
            return stop
        held = torch.tensor(int(stop), device=self.root_device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return Stop(int(held))

    def agree_at_the_end(self) -> None:
        """A request that came behind the last step counts on all ranks, too."""
        if self.lightning_module.trainer.state.status == TrainerStatus.RUNNING:
            self.stop = max(self.stop, self._agreed(signals.requested()))
        if self.stop:
            signals.over()

    # ---- validations of a fit ----

    def watch_validations(self, trainer: pl.Trainer) -> None:
        """Lets a validation be cut short without an end of `fit` in its midst."""
        val_loop = trainer.fit_loop.epoch_loop.val_loop
        val_loop.run = partial(self._validate, trainer, partial(type(val_loop).run, val_loop))  # type: ignore[method-assign]

    def _validate(self, trainer: pl.Trainer, run: Any) -> list[Any]:
        try:
            outputs = run()
        except Stopped:
            trainer.fit_loop.epoch_loop.val_loop._on_evaluation_model_train()
            if not trainer.sanity_checking:
                self.end_behind_step(self.stop)
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if hasattr(callback, "on_validation_cut"):
                        callback.on_validation_cut(trainer)
            return []
        if not trainer.sanity_checking:
            self._validated = trainer.global_step
        return outputs

    def owes_validation(self) -> bool:
        """Whether the last step is one behind which Lightning validates, and that is not done."""
        trainer = self.lightning_module.trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0:
            return False
        if trainer.validating:  # behind the validation, where it was not cut
            return bool(self.stop)
        return self._validated != trainer.global_step and validation_follows(
            trainer, trainer.fit_loop.epoch_loop.batch_idx
        )

    def on_train_start(self) -> None:
        """Makes up for the validation that the checkpoint was written before."""
        super().on_train_start()  # type: ignore[misc]
        trainer = self.lightning_module.trainer
        if self._validation_due and trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False  # all of it
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._validation_due = False
