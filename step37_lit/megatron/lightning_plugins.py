"""Two plugins of Lightning that `MegatronStrategy` brings along: precision and the writing of checkpoint files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch.optim import Optimizer

from step37_lit.config import ConfigError


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


class StagedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that a killed save leaves the previous file whole.

    Lightning stages in `$TMPDIR`, which may be another file system: then its last move is a copy that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise ConfigError("storage_options", "None (checkpoints are local files)", storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with staged.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads tensors and plain values only: nothing in the file is executed.

        Raises:
            ConfigError: there is no such file, or `weights_only=False` is asked for.
        """
        if weights_only is False:
            raise ConfigError("weights_only", "True (a checkpoint must not run code)", False)
        if not Path(path).is_file():
            raise ConfigError("ckpt_path", "a checkpoint file", str(path))
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)
