"""What is refused before a run writes anything or starts a process, and what the planner needs to know of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from step37_lit import determinism
from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.initial_weights import check_initial_weights
from step37_lit.lit_module import Step37LitModule, megatron_strategy
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.short import refuse_too_large
from step37_lit.planner.weights import DType, Part


def check(
    module: Step37LitModule, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None, fitting: bool
) -> None:
    """Refuses a run that cannot work.

    Raises:
        ConfigError: names the field of the recipe.
    """
    megatron_strategy(trainer).check(module.config, trainer, fitting)
    if module.init_from is not None:
        check_initial_weights(module.config, module.init_from)
    if fitting:
        determinism.check()
        if isinstance(trainer.accelerator, CUDAAccelerator):
            refuse_too_large(*planned(module, trainer), torch.cuda.get_device_properties(0).total_memory)
        module.lr_factor(trainer.max_steps)
        for callback in trainer.callbacks:
            if hasattr(callback, "check"):
                callback.check(trainer, module)
    if datamodule is not None:
        _check_packs(trainer, datamodule)
        if hasattr(datamodule, "config"):  # data made for a model: it must be this one
            _check_made_for(datamodule.config, module.config)


def _check_packs(trainer: pl.Trainer, datamodule: Any) -> None:
    layout = megatron_strategy(trainer).layout
    if hasattr(datamodule, "check"):
        ranks = layout.data_parallel_size(trainer.world_size)
        datamodule.check(ranks)
        if hasattr(datamodule, "microbatches"):
            layout.check_microbatches(datamodule.microbatches, ranks, "data.microbatches")
    if hasattr(datamodule, "row_length"):
        layout.check_row(*datamodule.row_length)


def _check_made_for(theirs: Step37Config, own: Step37Config) -> None:
    require(theirs.tokens == own.tokens, "data: special tokens", own.tokens, theirs.tokens)
    require(
        theirs.vision.image_size == own.vision.image_size,
        "data: image size",
        f"{own.vision.image_size} (model.vision.image_size)",
        theirs.vision.image_size,
    )
    require(
        theirs.text.vocab_size <= own.text.vocab_size,
        "data: vocabulary",
        f"at most {own.text.vocab_size} (model.text.vocab_size)",
        theirs.text.vocab_size,
    )


def planned(module: Step37LitModule, trainer: pl.Trainer) -> tuple[Step37Config, PlannedLayout, DType, frozenset[Part]]:
    """What the planner needs to know of a run."""
    strategy = megatron_strategy(trainer)
    layout = PlannedLayout.of(strategy.layout, trainer.world_size)
    parts: tuple[Part, ...] = ("language", "vision", "projection")
    frozen = frozenset(part for part, is_frozen in zip(parts, module.frozen, strict=True) if is_frozen)
    return module.config, layout, "bf16" if strategy.dtype == torch.bfloat16 else "fp32", frozen
