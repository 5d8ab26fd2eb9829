"""Loaders of packs from small sets of shards, as one of several ranks has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from datamodules.bad_samples import BadSampleLedger
from datamodules.packed import PackedDataModule
from datamodules.packed_steps import PackedEpochs
from datamodules.steps import DataShare, StepLoader
from step37_lit.batch import PackedBatch

MICROBATCHES, MAX_LENGTH = 4, 160


def module(folder: Path, name: str = "first", **changes: Any) -> PackedDataModule:
    """Of the set `name` in a folder that has the tokenizer."""
    arguments: dict[str, Any] = {
        "sets": str(folder / name),
        "preset": "tiny",
        "tokenizer": str(folder / "tokenizer.json"),
        "max_length": MAX_LENGTH,
        "microbatches": MICROBATCHES,
        "num_workers": 0,
    }
    return PackedDataModule(**(arguments | changes))


def loader(folder: Path, rank: int = 0, ranks: int = 1, workers: int = 0, **changes: Any) -> StepLoader:
    data = module(folder, **changes)
    source = PackedEpochs(data.planner, data.sets("train"), DataShare(rank, ranks))
    return StepLoader(source, workers, 2, ledger=BadSampleLedger(data.bad, data.max_bad_share))


def keys(packs: list[PackedBatch]) -> list[tuple[str, ...]]:
    return [pack.sample_keys for pack in packs]


def same(a: PackedBatch, b: PackedBatch) -> bool:
    tensors = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens")
    pixels = zip(a.images, b.images, strict=True)
    return (
        a.sample_keys == b.sample_keys
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
        and all(torch.equal(x.images, y.images) and x.insert_start_token == y.insert_start_token for x, y in pixels)
    )
