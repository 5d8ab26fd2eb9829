"""What tests of the training loop share: a very small model, packs by seed, a loader that knows its position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.presets import TINY_TOKENS

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "head_dim": 16,
    "sliding_window": 8,
    "num_sliding_heads": 6,
}
# The same with two MTP layers behind its two.
MTP_TEXT = TEXT | {
    "num_mtp_layers": 2,
    "mtp": True,
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
    "swiglu_limits": [None] * 4,
    "swiglu_limits_shared": [None] * 4,
}
VISION = {"width": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64, "image_size": 56}


def sample(index: int, seed: int, salt: str = "") -> Sample:
    """One picture (1 token of 56 pixels) and a text of 6 to 20 tokens, a pure function of (seed, index)."""
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    length = int(torch.randint(6, 21, (), generator=generator))
    words = torch.randint(10, 64, (length,), generator=generator)
    tokens = torch.cat([torch.tensor([TINY_TOKENS.im_start, TINY_TOKENS.im_patch, TINY_TOKENS.im_end]), words])
    mask = torch.zeros(len(tokens))
    mask[5:] = 1
    pixels = torch.randint(0, 256, (1, 3, 56, 56), generator=generator, dtype=torch.uint8)
    spans = {"colour": torch.tensor([[6, 7]]), "shape": torch.tensor([[7, 9]])}
    return Sample(f"{salt}{index}", tokens, mask, [ImageForInsert(TINY_TOKENS.im_start, pixels)], spans)


class Steps(Dataset):
    """Item = the microbatches of one step for one data-parallel rank; the global batch does not depend on ranks."""

    def __init__(self, steps: int, packs: int, rank: int, ranks: int, seed: int):
        self.steps, self.packs, self.rank, self.ranks, self.seed = steps, packs, rank, ranks, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[PackedBatch]:
        own = range(self.rank, self.packs, self.ranks)
        return [self._pack(step * self.packs + pack) for pack in own]

    def _pack(self, index: int) -> PackedBatch:
        return PackedBatch.from_samples([sample(3 * index + i, self.seed) for i in range(3)], pad_to=72)


class StatefulLoader(DataLoader):
    """Goes on where it was: Lightning saves and loads the state of a loader that has these two methods."""

    position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in range(self.position, len(self.dataset)):
            self.position = step + 1
            yield self.dataset[step]
        self.position = 0


class TinyData(pl.LightningDataModule):
    """`steps` training steps of `packs` packs an epoch, and two evaluation splits."""

    def __init__(self, steps: int = 20, packs: int = 4, seed: int = 1, eval_steps: int = 2):
        super().__init__()
        self.steps, self.packs, self.seed, self.eval_steps = steps, packs, seed, eval_steps

    def _loader(self, steps: int, seed: int, kind: type[DataLoader]) -> DataLoader:
        share = self.trainer.strategy.distributed_sampler_kwargs
        return kind(Steps(steps, self.packs, share["rank"], share["num_replicas"], seed), batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.steps, self.seed, StatefulLoader)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(self.eval_steps, self.seed + split, DataLoader) for split in (50, 60)]

    def test_dataloader(self) -> list[DataLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.eval_steps, self.seed + 50, DataLoader)


def module_arguments(**changed: Any) -> dict[str, Any]:
    arguments = {"preset": "tiny", "text": TEXT, "vision": VISION, "lr": 1e-3, "warmup_steps": 3, "seed": 5}
    return arguments | changed


class Record(pl.Callback):
    """Loss, gradient norm and learning rate of every step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        self.rows.append((float(outputs["loss"]), optimizer.grad_norm, group["lr"]))


def trainer_arguments(root: Path, **changed: Any) -> dict[str, Any]:
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "max_steps": 20,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
    }
    return arguments | changed
