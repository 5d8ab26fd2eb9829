"""What a checkpoint costs: steps with a save under way against steps without, and verification's share of a load.

    python benchmarks/checkpoint_save.py [--hidden 384] [--rounds 6]

Steps are timed in one process and in turns: a round is `--steps` steps without a save, then all those during which one
is written. The copy that the training thread makes at the beginning of a save is counted in the second ratio, spread
over the save's steps. Loads are timed with the files in the page cache, as after a save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.checkpoint.manifest import verify
from step37_lit.megatron.sharding import load_optimizer, load_weights
from tests.training import TinyData, trainer_arguments


class Rounds(pl.Callback):
    """Alternates steps without a save and steps beside one."""

    def __init__(self, folder: Path, steps: int, rounds: int):
        self.folder, self.steps, self.rounds = folder, steps, rounds
        self.quiet: list[float] = []
        self.beside: list[float] = []
        self.copies: list[float] = []
        self.saves: list[float] = []
        self._count = 0
        self._started = self._saving = 0.0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        seconds = time.perf_counter() - self._started
        self._count += 1
        thread = trainer.strategy.saver._thread
        if self._saving:
            if thread.is_alive():
                self.beside.append(seconds)
            else:
                self.saves.append(time.perf_counter() - self._saving)
                self._saving, self._count = 0.0, 0
                trainer.should_stop = len(self.saves) == self.rounds
        elif self._count > 1:  # the first one behind a save was partly beside it
            self.quiet.append(seconds)
            if self._count > self.steps:
                begun = time.perf_counter()
                trainer.save_checkpoint(self.folder / "saved")
                self.copies.append(time.perf_counter() - begun)
                self._saving = begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hidden = options.hidden
        text = {"vocab_size": 8192, "hidden_size": hidden, "ffn_hidden_size": 4 * hidden}
        module = Step37LitModule(preset="tiny", text=text, warmup_steps=1, decay_steps=10**6)
        rounds = Rounds(folder, options.steps, options.rounds)
        arguments = trainer_arguments(folder, max_steps=-1, max_epochs=10**6, limit_val_batches=0)
        trainer = pl.Trainer(strategy=MegatronStrategy(cpu_threads=1), callbacks=[rounds], **arguments)
        trainer.fit(module, datamodule=TinyData(steps=10**6, packs=1))
        quiet, beside = statistics.median(rounds.quiet), statistics.median(rounds.beside)
        per_save = statistics.median(rounds.copies) / max(1, len(rounds.beside) / len(rounds.saves))
        size = sum(path.stat().st_size for path in (folder / "saved").rglob("*") if path.is_file())
        parameters = sum(p.numel() for p in module.model.parameters())
        seconds = statistics.median(rounds.saves)
        print(f"{parameters / 1e6:.1f}M parameters, checkpoint of {size / 1e6:.0f} MB, save {seconds:.2f} s")
        print(f"step {quiet * 1e3:.1f} ms ({len(rounds.quiet)} steps)")
        print(f"step with a save under way {beside * 1e3:.1f} ms ({len(rounds.beside)} steps)")
        print(f"ratio {beside / quiet:.3f}; copies included {(beside + per_save) / quiet:.3f}")
        report_load(trainer, module, folder / "saved")


def report_load(trainer: pl.Trainer, module: Step37LitModule, checkpoint: Path) -> None:
    shares, steps = [], dict.fromkeys(dict(module.model.named_parameters()), 1)
    for _ in range(5):
        begun = time.perf_counter()
        verify(checkpoint)
        verified = time.perf_counter()
        load_weights([module.model], checkpoint)
        load_optimizer([module.model], trainer.optimizers[0], checkpoint, steps)
        shares.append((verified - begun) / (time.perf_counter() - begun))
    print(f"verification's share of a load {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
