"""`FreezeSchedule`: which parts of the model train when, and how fast."""

from __future__ import annotations

import difflib
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from callbacks.freeze_stages import FIELD, Plateau, factor_at, parse_stages
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.lit_module import megatron_strategy
from step37_lit.parameter_groups import layer_depths, split_parameters


class FreezeSchedule(pl.Callback):
    """Trains parts of the model in stages; everything that a stage does not name is frozen in it.

        - class_path: callbacks.freeze_schedule.FreezeSchedule
          init_args:
            stages:
              - {name: projector, until: {step: 200}, train: {projector: 1.0}}
              - name: text
                until: {plateau: {metric: val/loss, patience: 2, min_delta: 0.01}}
                train: {projector: 1.0, text_decoder: 0.5}
                warmup_steps: 50
              - name: all
                train: {projector: 1.0, text_decoder: 0.5, vision_tower: {factor: 0.1, gradual: {every_steps: 100}}}

    A group is `vision_tower`, `projector`, `text_decoder`, `router`, `mtp` (see `step37_lit.parameter_groups`) or a
    regular expression that matches the whole names of its parameters. Its number is a factor on the learning rate of
    the module's schedule and `model.lr_factors`. With `gradual` it is unfrozen layer by layer, the last layer first.
    Over `warmup_steps` a factor goes linearly from its former value to the stage's.

    A stage is over at an optimizer `step`, at the start of an `epoch`, or when a metric of the validations has not
    improved by more than `min_delta` for `patience` validations (`mode` min or max). One that is over as it begins,
    since the ones before took longer, is left out with a warning. What trains in a step follows from the step and the
    steps at which the stages began, which checkpoints keep.

    Frozen parameters keep their bits, need no gradient and no moments, and begin with fresh moments when they train
    again. Parameters that no stage trains are not in the optimizer at all. Logs `train/stage`, the stage's number
    from 0, at each step. A metric of a plateau must be in `validation_metrics` (a list of names) of the module or of a
    callback, so that a wrong name is found before training.

    Args:
        stages: The stages in order; the first begins at step 0 and the last one has no end.

    Raises:
        ConfigError: a stage that cannot be read; a stage's name and field are in the message.
    """

    def __init__(self, stages: list[dict[str, Any]]):
        self.stages = parse_stages(stages)
        self._parts: dict[str, tuple[str, int]] = {}  # name -> group, depth of the layer
        self._reset()

    def _reset(self) -> None:
        self.starts = [0]
        self._best: float | None = None
        self._waited = 0

    @property
    def stage_index(self) -> int:
        """Number of the current stage."""
        return len(self.starts) - 1

    # ---- before training ----

    def check(self, trainer: pl.Trainer, module: Any) -> None:
        """Refuses a schedule that does not fit the model and the Trainer.

        Raises:
            ConfigError: names the stage's field.
        """
        frozen = any(module.frozen)
        require(not frozen, "model.freeze_*", "false with a FreezeSchedule (leave the part out of its stages)", frozen)
        overlaps = megatron_strategy(trainer).overlap_data_parallel
        require(not overlaps, "strategy.overlap_data_parallel", "false with a FreezeSchedule", overlaps)
        self._split(module.config)
        for index, stage in enumerate(self.stages):
            if stage.plateau is not None:
                self._check_metric(stage.plateau, f"{FIELD}[{index}].until.plateau.metric", trainer, module)

    def _check_metric(self, plateau: Plateau, field: str, trainer: pl.Trainer, module: Any) -> None:
        batches = trainer.limit_val_batches
        require(batches != 0, "trainer.limit_val_batches", f"validations (a plateau of {plateau.metric} ends)", batches)
        known = [name for source in (module, *trainer.callbacks) for name in getattr(source, "validation_metrics", ())]
        if not any(plateau.metric == name or plateau.metric.startswith(f"{name}/") for name in known):
            close = difflib.get_close_matches(plateau.metric, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(field, f"one of {', '.join(known)}{hint}", plateau.metric)

    def _split(self, config: Step37Config) -> dict[str, str]:
        """Fills `_parts`; gives the part of each parameter that a stage trains."""
        groups = list(dict.fromkeys(group for stage in self.stages for group in stage.train))
        part_of: dict[str, str] = {}
        self._parts = {}
        for group, names in split_parameters(config, groups, FIELD).items():
            depths = dict.fromkeys(names, 0)
            layered = any(group in stage.train and stage.train[group].every_steps for stage in self.stages)
            if layered:
                found = layer_depths(names)
                if found is None:
                    raise ConfigError(f"{FIELD}: gradual", "a group with one stack of layers", group)
                depths = found
            for name, depth in depths.items():
                part = f"{group}/{max(depths.values()) - depth}" if layered else group
                self._parts[part] = (group, depth)
                part_of[name] = part
        return part_of

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.check(trainer, pl_module)
            self._reset()
            trainer.strategy.part_of = self._split(pl_module.config)

    # ---- training ----

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        # Rates are written over those in the groups, which other schedulers go on from.
        require(isinstance(scheduler, LambdaLR), "configure_optimizers", "a LambdaLR", type(scheduler).__name__)
        if any(stage.plateau for stage in self.stages):
            require(trainer.enable_validation, FIELD, "no plateau where the data has no validation", "plateau")
        self._advance(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._advance(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train/stage", float(self.stage_index), on_step=True, on_epoch=False, batch_size=1)
        self._advance(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        plateau = self.stages[self.stage_index].plateau
        if plateau is not None and self._stands_still(plateau, trainer):
            self._begin_next(trainer.global_step)
            self._advance(trainer)

    def _stands_still(self, plateau: Plateau, trainer: pl.Trainer) -> bool:
        logged = trainer.callback_metrics
        if plateau.metric not in logged:
            field = f"{FIELD}[{self.stage_index}].until.plateau.metric"
            raise ConfigError(field, f"a value of this validation: {', '.join(sorted(logged))}", plateau.metric)
        value = trainer.strategy.broadcast(float(logged[plateau.metric]))  # ranks must not part ways
        if plateau.improves(value, self._best):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        return self._waited >= plateau.patience

    def _advance(self, trainer: pl.Trainer) -> None:
        """Between two steps: begins what is due, freezes, and sets the learning rates of the next step."""
        step = trainer.global_step
        while self._is_over(step, trainer.current_epoch):
            if self.starts[-1] == step > 0:
                rank_zero_warn(f"{FIELD}: stage {self.stages[self.stage_index].name!r} is over as it begins: left out")
            self._begin_next(step)
        factors = {part: self.factor(part, step) for part in self._parts}
        trainer.optimizers[0].train_parts(factors, trainer.lr_scheduler_configs[0].scheduler.get_last_lr())

    def _is_over(self, step: int, epoch: int) -> bool:
        stage = self.stages[self.stage_index]
        return (stage.step is not None and step >= stage.step) or (stage.epoch is not None and epoch >= stage.epoch)

    def _begin_next(self, step: int) -> None:
        self.starts.append(step)
        self._best, self._waited = None, 0

    def factor(self, part: str, step: int) -> float:
        """Factor on the learning rate of a part at an optimizer step that is not before the current stage."""
        group, depth = self._parts[part]
        return factor_at(self.stages, self.starts, step, group, depth)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and hasattr(pl_module, "model"):
            pl_module.model.requires_grad_(True)  # a later fit without a schedule trains everything
            trainer.strategy.part_of = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        names = [stage.name for stage in self.stages[: len(self.starts)]]
        plateau = {"best": self._best, "waited": self._waited}
        return {"starts": list(self.starts), "stages": names, **plateau}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        reached = state_dict["stages"]
        own = [stage.name for stage in self.stages[: len(reached)]]
        require(own == reached, f"checkpoint: {FIELD} that were reached", own, reached)
        self.starts = list(state_dict["starts"])
        self._best, self._waited = state_dict["best"], state_dict["waited"]
