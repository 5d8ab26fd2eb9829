"""Packs with pictures of two sizes, none to two a sample, and a small MoE with MTP layers that is trained on them.

Sub-sequences have 6 to 40 tokens, so that seams of 24 (two context ranks, rows of 96) fall into texts and pictures.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset
from training import TEXT, VISION

from step37_lit.batch import ImageForInsert, PackedBatch, Sample
from step37_lit.presets import TINY_TOKENS

ROW, PACKS, SEED = 96, 4, 1
LAYERS = 4 + 2  # decoder and MTP
MODULE: dict[str, Any] = {
    "preset": "tiny_moe",
    "text": TEXT
    | {
        "num_mtp_layers": 2,
        "mtp": True,
        "mtp_loss_weight": 1.0,  # so that the MTP layers weigh as much as the main head
        "layer_types": ["full_attention", *["sliding_attention"] * 3, *["sliding_attention"] * 2],
        "swiglu_limits": [None] * LAYERS,
        "swiglu_limits_shared": [None] * LAYERS,
        "expert_ffn_size": 32,
        "shared_expert_ffn_size": 32,
    },
    "vision": VISION | {"image_size": 84, "crop_size": 56},
    "lr": 2e-4,  # small: later steps would show how training amplifies rounding
    "warmup_steps": 3,
    "seed": 5,
}

# The same with dense layers only: megatron refuses experts under tensor parallelism without sequence parallelism.
DENSE: dict[str, Any] = {
    "preset": "tiny",
    "text": {name: value for name, value in MODULE["text"].items() if "expert" not in name} | {"num_layers": 4},
}


def module_arguments(**changed: Any) -> dict[str, Any]:
    return MODULE | changed


def sample(index: int, seed: int) -> Sample:
    """A text of 3 to 28 words behind `index % 3` pictures, of 4 tokens and of 1."""
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    ids, images = [], []
    kinds = [(TINY_TOKENS.im_start, TINY_TOKENS.im_end, 84, 4), (TINY_TOKENS.patch_start, TINY_TOKENS.patch_end, 56, 1)]
    for start, end, side, tokens in kinds[: index % 3]:
        ids += [start, *[TINY_TOKENS.im_patch] * tokens, end]
        pixels = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
        images.append(ImageForInsert(start, pixels))
    words = torch.randint(10, 64, (int(torch.randint(3, 29, (), generator=generator)),), generator=generator)
    tokens = torch.cat((torch.tensor(ids, dtype=torch.int64), words))
    mask = torch.ones(len(tokens))
    mask[: len(ids) + 1] = 0
    return Sample(f"{index}", tokens, mask, images)


def pack(index: int, seed: int = SEED) -> PackedBatch:
    """Up to three samples that fit a row; every fifth pack has no picture."""
    samples: list[Sample] = []
    for i in range(3):
        following = sample(3 * (3 * index + i) if index % 5 == 4 else 3 * index + i, seed)
        if sum(map(len, samples)) + len(following) <= ROW:
            samples.append(following)
    return PackedBatch.from_samples(samples, pad_to=ROW)


class _Steps(Dataset):
    def __init__(self, steps: int, rank: int, ranks: int, seed: int):
        self.steps, self.share, self.seed = steps, range(rank, PACKS, ranks), seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[PackedBatch]:
        return [pack(step * PACKS + number, self.seed) for number in self.share]


class PicturePacks(pl.LightningDataModule):
    """`steps` steps of `PACKS` packs, and a step that validates."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def _loader(self, steps: int, seed: int) -> DataLoader:
        share = self.trainer.strategy.distributed_sampler_kwargs
        return DataLoader(_Steps(steps, share["rank"], share["num_replicas"], seed), batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.steps, SEED)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1, SEED + 50)
