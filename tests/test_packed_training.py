"""Training on packs from shards through Lightning: epochs of different lengths, exact resume in the middle of one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from training import Record, trainer_arguments

from datamodules.packed import PackedDataModule
from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.errors import ConfigError
from tests import shard_sets

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    shard_sets.write_shards(root / "first", range(36))
    shard_sets.index(root / "first", shard_sets.tokenizer_file(root))
    return root


class Keys(Record):
    """The samples of every step, too."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self.keys.append([key for pack in batch for key in pack.sample_keys])


def fit(root: Path, sets: Path, ckpt_path: Path | None = None, workers: int = 0, **changed: Any) -> Keys:
    keys = Keys()
    saving = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    arguments = trainer_arguments(root, max_epochs=3, max_steps=-1, enable_checkpointing=True)
    arguments |= {"reload_dataloaders_every_n_epochs": 1, "logger": CSVLogger(root, "", ""), **changed}
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=[keys, saving], **arguments)
    data = PackedDataModule(
        sets=str(sets / "first"),
        tokenizer=str(sets / "tokenizer.json"),
        preset="tiny",
        max_length=160,
        microbatches=3,
        val_share=0.2,
        num_workers=workers,
    )
    module = Step37LitModule(preset="tiny", lr=1e-3, warmup_steps=2, decay_steps=50, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return keys


def test_exact_resume_in_the_middle_of_an_epoch_and_at_its_end(sets: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", sets)
    epoch = len(whole.keys) // 3
    # In the middle of the second epoch, and at the end of the first.
    for stop, workers in ((epoch + 1, 1), (epoch, 0)):
        (checkpoint,) = (tmp_path / "whole").glob(f"step={stop}.ckpt")
        resumed = fit(tmp_path / f"resumed{stop}", sets, checkpoint, workers)
        assert resumed.keys == whole.keys[stop:]
        assert resumed.rows == whole.rows[stop:]  # to the last bit
    # The run that was resumed at the first epoch's end stops at the second's: no epoch comes twice.
    (checkpoint,) = (tmp_path / f"resumed{epoch}").glob(f"step={2 * epoch}.ckpt")
    again = fit(tmp_path / "again", sets, checkpoint)
    assert again.keys == whole.keys[2 * epoch :] and again.rows == whole.rows[2 * epoch :]


def test_what_is_logged(sets: Path, tmp_path: Path) -> None:
    fit(tmp_path, sets, workers=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    waits = [float(row["train/data_wait"]) for row in rows if row["train/data_wait"]]
    assert len(waits) > 3 and all(0 <= wait <= 1 for wait in waits)
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "tokenizer.json").read_bytes() == (sets / "tokenizer.json").read_bytes()


def test_epochs_without_reloading_are_refused(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.reload_dataloaders_every_n_epochs: expected 1 .*, found 0"):
        fit(tmp_path, sets, reload_dataloaders_every_n_epochs=0)


def test_no_global_random_numbers_are_drawn(sets: Path) -> None:
    data = PackedDataModule(
        sets=str(sets / "first"), tokenizer=str(sets / "tokenizer.json"), preset="tiny", max_length=160, num_workers=0
    )
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)
