"""`Step37LitModule`: Step-3.7 as a LightningModule; its arguments are the `model:` section of a recipe."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from step37_lit import determinism, saved_model
from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError, require
from step37_lit.evaluation import EvaluationSums, swap_images
from step37_lit.flops import training_flops
from step37_lit.guard import StepGuard
from step37_lit.hub.config_writer import hub_facts
from step37_lit.initial_weights import load_initial_weights, read_initial_config
from step37_lit.lr_schedule import WarmupCosine
from step37_lit.megatron import process
from step37_lit.megatron.build import build_stage
from step37_lit.megatron.checkpointing import check_same_model, print_once
from step37_lit.megatron.chunks import chunks_of
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.optimizer import AdamWSettings, check_patterns
from step37_lit.megatron.schedule import StepResult
from step37_lit.megatron.strategy import MegatronStrategy
from step37_lit.spikes import SpikeAction
from step37_lit.throughput import StepTimer, measure_gemm_peak


class Step37LitModule(pl.LightningModule):
    """Trains and evaluates a Step-3.7 on lists of packs; needs `MegatronStrategy`.

    Logged at every optimizer step: `train/loss` (per token of the global batch), `train/grad_norm` (before clipping),
    `train/tokens_per_second`, `train/images_per_second`, `train/mfu` (share of the process's own GEMM peak),
    `train/padding` (share of positions that are padding), `train/skipped_steps` (so far, with `spike_action` skip),
    `train/data_wait` (share of the time spent waiting for a
    loader that counts it, as this project's do), and with `text.mtp` `train/mtp_loss_1`, ... (of each MTP layer, per
    token that it learns; not in `train/loss`). Logged by an evaluation: `val/loss` (per token of the whole
    split) and, where the data names attribute words, `val/attribute_accuracy` and one value for each kind.

    Args:
        preset: A named size (tiny, tiny_moe, flash); null takes the model of `init_from`.
        init_from: A hub folder, a checkpoint's folder or a run's: its weights are what training begins with, in any
            layout and dtype; where `preset` is given too, it must be of that model.
        random_weights: Start from random weights although `init_from` is given, for its model alone.
        text: Fields of the text decoder to replace (see `TextConfig`).
        vision: Fields of the vision tower to replace (see `VisionConfig`).
        tokens: Special tokens to replace (see `TokenIds`).
        lr: Peak learning rate of AdamW.
        min_lr_factor: The cosine ends at this share of `lr`.
        warmup_steps: Optimizer steps of the linear warm-up.
        decay_steps: Optimizer step at which the cosine ends; null is the Trainer's `max_steps`.
        weight_decay: Of matrices; norms, biases and gains have none.
        betas: AdamW's decay of the averages of the gradient and its square.
        eps: AdamW's epsilon.
        lr_factors: Factor on the learning rate by pattern of the parameter's name, such as `vision_model.*`.
        freeze_language_model: Keep the text decoder as it is.
        freeze_vision_model: Keep the vision tower as it is.
        freeze_vision_projection: Keep the projector as it is.
        spike_factors: A step whose `loss` or `grad_norm` is above this many times its median over the last 100 steps is
            a spike: `{loss: 2.0, grad_norm: 10.0}`. Null watches neither; what is not finite stops a run in any case.
        spike_action: `stop` the run at a spike, with a dump of the batch; or `skip` the step, up to three in a row.
        eval_suffixes: Suffix of the logged names for each of the data module's evaluation loaders.
        swap_images: Evaluate with each picture replaced by another sample's, to see what the pictures are worth.
        seed: Of the random initial weights.
    """

    def __init__(
        self,
        preset: str | None = None,
        init_from: str | None = None,
        random_weights: bool = False,
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        tokens: dict[str, Any] | None = None,
        lr: float = 1e-3,
        min_lr_factor: float = 0.1,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        lr_factors: dict[str, float] | None = None,
        freeze_language_model: bool = False,
        freeze_vision_model: bool = False,
        freeze_vision_projection: bool = False,
        spike_factors: dict[str, float] | None = None,
        spike_action: SpikeAction = "stop",
        eval_suffixes: tuple[str, ...] = ("", "_seen"),
        swap_images: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        require(preset is not None or init_from is not None, "model.preset, model.init_from", "one of them", None)
        base = Step37Config.preset(preset) if preset is not None else read_initial_config(str(init_from))
        self.config = with_overrides(base, text=text, vision=vision, tokens=tokens)
        self.init_from = None if random_weights else init_from
        if preset is not None and init_from is not None:
            check_same_model(hub_facts(read_initial_config(init_from)), hub_facts(self.config), Path(init_from))
        self.adamw = AdamWSettings(lr, weight_decay, tuple(betas), eps, lr_factors or {})
        check_patterns(self.config, self.adamw.lr_factors)
        self.warmup_steps, self.decay_steps, self.min_lr_factor = warmup_steps, decay_steps, min_lr_factor
        self.frozen = (freeze_language_model, freeze_vision_model, freeze_vision_projection)
        self.eval_suffixes, self.swap_images, self.seed = eval_suffixes, swap_images, seed
        self.guard = StepGuard(self.config, spike_factors or {}, spike_action)
        self.gemm_peak: float | None = None
        self._timer = StepTimer()
        self._packs: list[PackedBatch] = []
        self._result: StepResult | None = None
        self._evaluations: dict[int, EvaluationSums] = {}
        self._random_states: dict[str, Any] | None = None

    @property
    def strategy(self) -> MegatronStrategy:
        """The Trainer's strategy; raises `ConfigError` where it is not a `MegatronStrategy`."""
        return megatron_strategy(self.trainer)

    @property
    def validation_metrics(self) -> list[str]:
        """What a validation logs; `val/attribute_accuracy*` also with `/KIND` behind it."""
        return [f"val/{name}{suffix}" for suffix in self.eval_suffixes for name in ("loss", "attribute_accuracy")]

    def setup(self, stage: str) -> None:
        megatron_strategy(self.trainer)  # refuses another one before anything is built

    def configure_model(self) -> None:
        """Builds this rank's part of the model; without a Trainer, the whole model in this process."""
        if hasattr(self, "model"):
            return
        attached = self._trainer is not None
        layout = self.strategy.layout if attached else ParallelLayout()
        dtype = self.strategy.dtype if attached else torch.float32
        if not attached:
            process.initialize(layout)
        # A run that is resumed reads its own weights.
        begins = self.init_from is not None and not (attached and self.trainer.ckpt_path)
        recompute = self.strategy.recompute if attached else None
        self.model = build_stage(self.config, layout, dtype, recompute, None if begins else self.seed)
        if begins:
            load_initial_weights(chunks_of(self.model), str(self.init_from))
        self.model.freeze(*self.frozen)

    def configure_optimizers(self) -> Any:
        optimizer = self.strategy.build_optimizer(self.adamw)
        optimizer.admits = self._admits
        scheduler = LambdaLR(optimizer, self.lr_factor(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, max_steps: int) -> WarmupCosine:
        """Factor on the learning rate by step; raises `ConfigError` where the schedule has no end."""
        total = self.decay_steps if self.decay_steps is not None else max_steps
        require(total > 0, "model.decay_steps", "a number of steps where trainer.max_steps is not set", total)
        return WarmupCosine(self.warmup_steps, total, self.min_lr_factor)

    # ---- training ----

    def on_train_start(self) -> None:
        if determinism.enabled():
            print_once(determinism.described(self.device, self.trainer.world_size))
        if self.gemm_peak is None:
            self.gemm_peak = measure_gemm_peak(self.device, self.strategy.dtype)

    def on_train_batch_start(self, batch: list[PackedBatch], batch_idx: int) -> None:
        if self._random_states is not None:
            # Only now: setting up loaders and the sanity check have drawn numbers since the checkpoint was read.
            self.strategy.restore_random_state(self._random_states)
            self._random_states = None
        self._timer.start(self._seconds_waited())

    def training_step(self, batch: list[PackedBatch], batch_idx: int) -> Tensor:
        """Forward and backward of one global step; returns the loss of the global batch, 0-dim fp64, detached."""
        self._packs, self._result = batch, self.strategy.train_step(batch)
        loss = self._result.loss
        self.log("train/loss", loss.float(), on_step=True, on_epoch=False, prog_bar=True, batch_size=1)
        for layer, mtp_loss in enumerate(self._result.mtp_losses, start=1):
            self.log(f"train/mtp_loss_{layer}", mtp_loss.float(), on_step=True, on_epoch=False, batch_size=1)
        return loss

    def _admits(self, grad_norm: float) -> bool:
        assert self._result is not None
        return self.guard.admits(self.strategy, self._packs, self._result, grad_norm)

    def on_train_batch_end(self, outputs: Any, batch: list[PackedBatch], batch_idx: int) -> None:
        result = self._result
        seconds, waited = self._timer.lap(self._seconds_waited())
        assert result is not None and self.gemm_peak is not None
        flops = sum(training_flops(self.config, pack) for pack in batch) / self.strategy.layout.model_parallel_size
        values = {
            "train/grad_norm": self.trainer.optimizers[0].grad_norm,
            "train/tokens_per_second": result.tokens / seconds,
            "train/images_per_second": result.images / seconds,
            "train/mfu": flops / seconds / self.gemm_peak,
            "train/padding": 1.0 - result.tokens / result.row_tokens,
        }
        if self.guard.spikes.action == "skip":
            values["train/skipped_steps"] = float(self.guard.spikes.skipped)
        if self._counts_waiting:
            values["train/data_wait"] = waited / seconds
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    @property
    def _counts_waiting(self) -> bool:
        return hasattr(self.trainer.train_dataloader, "seconds_waited")

    def _seconds_waited(self) -> float:
        return self.trainer.train_dataloader.seconds_waited if self._counts_waiting else 0.0

    # ---- evaluation ----

    def on_validation_start(self) -> None:
        self._timer.pause()

    def on_validation_epoch_start(self) -> None:
        self._evaluations = {}

    def validation_step(self, batch: list[PackedBatch], batch_idx: int, dataloader_idx: int = 0) -> None:
        packs = [swap_images(pack) for pack in batch] if self.swap_images else batch
        sums = self._evaluations.setdefault(dataloader_idx, EvaluationSums())
        for pack, losses, predictions in self.strategy.evaluate_step(packs):
            sums.add_pack(pack, losses, predictions)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._evaluations = {}

    def test_step(self, batch: list[PackedBatch], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: list[PackedBatch], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """For each sample its key, its tokens [n] and the most likely next token at each position [n].

        Empty on pipeline stages but the last.
        """
        return [
            {"key": key, "input_ids": tokens, "predictions": predicted}
            for pack, _, predictions in self.strategy.evaluate_step(batch)
            for key, tokens, predicted in split_samples(pack, predictions)
        ]

    def _log_evaluation(self, prefix: str) -> None:
        for index, sums in sorted(self._evaluations.items()):
            suffixes = len(self.eval_suffixes)
            require(index < suffixes, "model.eval_suffixes", "one for each evaluation loader", self.eval_suffixes)
            total = EvaluationSums.total(self.strategy.gather_from_data_ranks(sums))
            total = self.strategy.broadcast_from_last_stage(total)
            # Equal on all ranks already; sync_dist says so to Lightning, whose mean of equal values changes nothing.
            self.log_dict(total.averages(prefix, self.eval_suffixes[index]), batch_size=1, sync_dist=True)

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = self.strategy.random_states()
        checkpoint["spikes"] = self.guard.spikes.state_dict()
        processor, prompt = (getattr(self.trainer.datamodule, name, None) for name in ("processor", "prompt"))
        checkpoint[saved_model.ENTRY] = saved_model.description(self.config, processor, prompt)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_states = checkpoint["random_states"]
        if "spikes" in checkpoint:  # not in those of weights and of earlier versions
            self.guard.spikes.load_state_dict(checkpoint["spikes"])


def megatron_strategy(trainer: pl.Trainer) -> MegatronStrategy:
    """The Trainer's strategy.

    Raises:
        ConfigError: it is another one, which would train without reducing anything.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, MegatronStrategy):
        raise ConfigError("trainer.strategy", "step37_lit.MegatronStrategy", type(strategy).__name__)
    return strategy


def split_samples(pack: PackedBatch, predictions: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Key, tokens [n] and predictions [n] of each sample of a pack, without the padded tail."""
    lengths = pack.cu_seqlens.diff().tolist()
    tokens = pack.input_ids[0].split(lengths)
    return list(zip(pack.sample_keys, tokens, predictions[0].split(lengths), strict=False))


def with_overrides(config: Step37Config, **parts: dict[str, Any] | None) -> Step37Config:
    """`config` with fields of its parts replaced, as a recipe gives them (lists for tuples).

    Raises:
        ConfigError: a part has no such field, or the result is inconsistent.
    """
    replaced = {}
    for part, overrides in parts.items():
        if not overrides:
            continue
        known = [f.name for f in dataclasses.fields(getattr(config, part))]
        for name in overrides:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ConfigError(f"model.{part}.{name}", f"a field of the {part} config{hint}", overrides[name])
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
        _check_numbers(part, getattr(config, part), values)
        try:
            replaced[part] = dataclasses.replace(getattr(config, part), **values)
        except TypeError as error:
            raise ConfigError(f"model.{part}", f"values of the fields' types ({error})", overrides) from error
    return dataclasses.replace(config, **replaced)


def _check_numbers(name: str, config: Any, values: dict[str, Any]) -> None:
    """Raises `ConfigError` for a fraction or a text where the config has a whole number, and the like."""
    kinds: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
    for field, value in values.items():
        kind = type(getattr(config, field))
        if kind in kinds and type(value) not in kinds[kind]:
            raise ConfigError(f"model.{name}.{field}", f"a value such as {getattr(config, field)}", value)
