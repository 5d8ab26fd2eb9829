"""A run that stops behind step k and goes on is the straight run, to the last bit: rows, random numbers, all state."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from step37_lit import MegatronStrategy, Step37LitModule
from tests.reliability.figure import Figure
from tests.reliability.runs import Place, compare, make_set
from tests.training import Record, TinyData, module_arguments, trainer_arguments

COMMAND_STEPS, NUM_CHAINS = 24, 12
# Steps, and the stops of the short version; bf16 products are slow on a CPU.
RUNS: dict[str, tuple[int, tuple[int, ...]]] = {"32-true": (40, (1, 7, 23)), "bf16-true": (6, (2,))}


def measure(full: bool, seed: int, folder: Path) -> Figure:
    good, tried = 0, 0
    for precision, (steps, few) in RUNS.items():
        pl.seed_everything(seed)
        trainer, lit, straight = fit(folder, steps, precision=precision)
        expected = {**state_of(trainer, lit), "rows": straight}
        assert len({loss for loss, _, _ in straight}) == steps, "the run learns nothing"
        for stop in range(1, steps) if full else few:
            different = differences(_stopped(folder, steps, stop, seed, precision), expected, f"{precision}, {stop}")
            good, tried = good + (not different), tried + 1
            print("\n".join(different[:3]), end="")
    if full:
        chains = _chains(random.Random(seed))
        different = [each for each in chains if not _same_by_command(folder, each)]
        good, tried = good + len(chains) - len(different), tried + len(chains)
        print(f"stops that changed the run: {different}")
    compared = "loss, gradient norm, learning rate, weights, moments, scheduler, random numbers"
    stops = "a stop at each k of 40 fp32 steps and of 6 bf16 ones" if full else "some stops"
    commands = f"; {NUM_CHAINS} runs of packs by the command with 2 to 6 stops each" if full else ""
    return Figure(good, tried, f"{stops}{commands}; {compared}")


def _chains(draw: random.Random) -> list[list[int]]:
    """Stops of each run; epochs are three steps long, and validations come every seven."""
    chains = [[6, 12], [3, 6, 9, 12, 15, 18], [7, 14, 21], [21, 22]]
    return chains + [sorted(draw.sample(range(1, COMMAND_STEPS), draw.randint(2, 6))) for _ in range(NUM_CHAINS - 4)]


def _same_by_command(folder: Path, stops: list[int]) -> bool:
    data, straight = folder / "data", Place(folder / "straight", folder / "straight" / "run")
    if not data.exists():
        make_set(data)
        Place.make(straight.folder, data, COMMAND_STEPS).finish()
    place = Place.make(folder / "-".join(map(str, stops)), data, COMMAND_STEPS)
    for stop in [*stops, COMMAND_STEPS]:
        place.finish(f"--trainer.max_steps={stop}")
    return compare(straight, place, COMMAND_STEPS) == []


def _stopped(folder: Path, steps: int, stop: int, seed: int, precision: str) -> dict[str, Any]:
    """Rows and state of a run of two parts."""
    pl.seed_everything(seed)
    _, _, first = fit(folder, stop, [save_at(stop, folder)], precision=precision, enable_checkpointing=True)
    pl.seed_everything(seed + 96)  # another state of everything that the checkpoint has to bring back
    path = folder / f"at{stop}.ckpt"
    trainer, lit, second = fit(folder, steps, ckpt_path=path, module={"seed": 77}, precision=precision)
    assert trainer.global_step == steps and len(first) == stop
    shutil.rmtree(path)
    return {**state_of(trainer, lit), "rows": first + second}


def fit(
    root: Path,
    steps: int = 8,
    callbacks: list[pl.Callback] | None = None,
    ckpt_path: Path | None = None,
    strategy: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    data: TinyData | None = None,
    **trainer_changes: Any,
) -> tuple[pl.Trainer, Step37LitModule, list]:
    """Trains on one rank in this process; also gives each step's loss, gradient norm and learning rate."""
    record = Record()
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**(strategy or {})),
        callbacks=[record, *(callbacks or [])],
        **trainer_arguments(root, max_steps=steps, **trainer_changes),
    )
    lit = Step37LitModule(**module_arguments(**({"decay_steps": 40} | (module or {}))))
    trainer.fit(lit, datamodule=data or TinyData(steps=40), ckpt_path=ckpt_path)
    return trainer, lit, record.rows


def save_at(step: int, root: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        root, filename="at{step}", every_n_train_steps=step, save_top_k=-1, auto_insert_metric_name=False
    )


def state_of(trainer: pl.Trainer, lit: Step37LitModule) -> dict[str, Any]:
    return {
        "weights": {name: weight.clone() for name, weight in lit.model.state_dict().items() if torch.is_tensor(weight)},
        "optimizer": [(shard.start, shard.end, dict(shard.state)) for shard in trainer.optimizers[0].shards()],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "random": (random.random(), float(np.random.rand()), float(torch.rand(()))),
    }


def differences(found: Any, expected: Any, where: str) -> list[str]:
    """Places where two nested values are not the same to the last bit."""
    if torch.is_tensor(expected):
        return [] if torch.equal(found, expected) else [where]
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [where]
        return [line for key in expected for line in differences(found[key], expected[key], f"{where}.{key}")]
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [where]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{where}[{i}]")]
    return [] if found == expected else [where]
