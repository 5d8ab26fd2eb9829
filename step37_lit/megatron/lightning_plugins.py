"""The precision plugin of Lightning that `MegatronStrategy` brings along."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch.optim import Optimizer

from step37_lit.errors import ConfigError


class MegatronPrecision(Precision):
    """The model is built in its dtype, so nothing is cast here; clipping happens in megatron's step."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.precision = "bf16-true" if dtype == torch.bfloat16 else "32-true"

    @classmethod
    def from_flag(cls, plugin: Precision | None) -> MegatronPrecision:
        """The plugin for what the Trainer made of its `precision`.

        Raises:
            ConfigError: anything but fp32 and bf16.
        """
        if isinstance(plugin, cls):
            return plugin
        if plugin is None or type(plugin) is Precision:
            return cls(torch.float32)
        if isinstance(plugin, HalfPrecision) and plugin.precision == "bf16-true":
            return cls(torch.bfloat16)
        found = plugin.precision
        raise ConfigError("trainer.precision", "32-true or bf16-true (bf16 with fp32 main parameters)", found)

    def clip_gradients(self, optimizer: Optimizer, clip_val: Any = 0.0, gradient_clip_algorithm: Any = None) -> None:
        """Nothing: megatron clips by the norm over all ranks in its step."""
