"""A training run of a very small model through the command line, and what is kept of it for a comparison.

Packs from shards, validations, checkpoints in the background. A ledger outside of the run's folder has a line for each
step that was trained: what a kill took back is trained again, and its line must be the same again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from step37_lit.checkpoint.metadata import METADATA
from step37_lit.checkpoint.tensors import TensorFolder
from step37_lit.saved_model import CHECKPOINTS
from tests import forks, shard_sets

SAMPLES = 48
TEXT = {"hidden_size": 32, "ffn_hidden_size": 64, "head_dim": 16, "sliding_window": 8, "num_sliding_heads": 6}
VISION = {"width": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64}
# One byte for each turn that a run takes, so that a kill can be aimed at and said where it hit.
LOADING, STEP, VALIDATION, BETWEEN = b"l", b"s", b"v", b"-"


def make_set(folder: Path, samples: int = SAMPLES) -> Path:
    """A set of shards with an index, and its tokenizer beside it."""
    shard_sets.write_shards(folder / "set", range(samples))
    shard_sets.index(folder / "set", shard_sets.tokenizer_file(folder))
    return folder


def recipe(data: Path, run: Path, steps: int, every: int = 3, validation: int = 7) -> dict[str, Any]:
    """What `fit` is given; the run's folder is `run`."""
    keeping = {"every_steps": every, "keep_last": 2, "monitor": "val/loss"}
    packed = {
        "sets": str(data / "set"), "tokenizer": str(data / "tokenizer.json"), "preset": "tiny", "val_share": 0.2,
        "max_length": 160, "microbatches": 4, "num_workers": 0,
    }  # fmt: skip
    return {
        "seed_everything": 5,
        "model": {
            "preset": "tiny", "text": TEXT, "vision": VISION, "lr": 1e-3, "warmup_steps": 3, "decay_steps": 1000,
        },
        "data": {"class_path": "datamodules.packed.PackedDataModule", "init_args": packed},
        "trainer": {
            "accelerator": "cpu",
            "strategy": {"class_path": "step37_lit.MegatronStrategy", "init_args": {"cpu_threads": 1}},
            "default_root_dir": str(run), "max_steps": steps, "max_epochs": 1000, "gradient_clip_val": 1.0,
            "val_check_interval": validation, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "step37_lit.RunCheckpoints", "init_args": keeping}],
        },
    }  # fmt: skip


class Ledger(pl.Callback):
    """Appends a line for each step, and a byte for each phase; both outlive a kill of the process.

    Args:
        file: Of the lines; the bytes are beside it, with `.phases` behind its name.
    """

    def __init__(self, file: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._lines, self._phases = (os.open(path, flags, 0o644) for path in (file, phases_file(file)))

    def setup(self, *args: Any, **kwargs: Any) -> None:
        os.write(self._phases, LOADING)

    def on_train_batch_start(self, *args: Any) -> None:
        os.write(self._phases, STEP)

    def on_train_batch_end(self, trainer: pl.Trainer, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer: Any = trainer.optimizers[0]
        line = {
            "step": trainer.global_step,
            "keys": [list(pack.sample_keys) for pack in batch],
            "loss": float(outputs["loss"]).hex(),
            "norm": float(optimizer.grad_norm).hex(),
            "lr": float(optimizer.param_groups[0]["lr"]).hex(),
        }
        os.write(self._lines, (json.dumps(line) + "\n").encode())
        os.write(self._phases, BETWEEN)

    def on_validation_start(self, *args: Any) -> None:
        os.write(self._phases, VALIDATION)

    def on_validation_end(self, *args: Any) -> None:
        os.write(self._phases, BETWEEN)


def phases_file(ledger: Path) -> Path:
    return ledger.with_suffix(".phases")


def read_ledger(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def fit(recipe_file: str, ledger: str, *options: str) -> int:
    """`fit` in this process, with a ledger; for a child."""
    from step37_lit import cli

    cli.TRAINER_DEFAULTS["callbacks"] = [Ledger(Path(ledger))]
    return forks.command(["fit", f"--config={recipe_file}", *options])


@dataclass(frozen=True)
class Place:
    """Where a run and what is kept of it are.

    Args:
        folder: Has the recipe, the logs and the ledger.
        run: The run's folder.
    """

    folder: Path
    run: Path

    @classmethod
    def make(cls, folder: Path, data: Path, steps: int, run: Path | None = None, **changes: int) -> Place:
        folder.mkdir(parents=True)
        place = cls(folder, run or folder / "run")
        place.recipe.write_text(yaml.safe_dump(recipe(data, place.run, steps, **changes)))
        return place

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.run / CHECKPOINTS

    def ledger_of(self, rank: int) -> Path:
        return self.ledger if rank == 0 else self.ledger.with_name(f"ledger{rank}.jsonl")

    def start(self, *options: str) -> forks.Child:
        """One rank."""
        (child,) = self.start_ranks(1, *options)
        return child

    def start_ranks(self, ranks: int, *options: str) -> list[forks.Child]:
        number = len(list(self.folder.glob("fit*-0.out")))
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        children = []
        for rank in range(ranks):
            arguments = (str(self.recipe), str(self.ledger_of(rank)), f"--trainer.devices={ranks}", *options)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            log = self.folder / f"fit{number:03d}-{rank}"
            environment = common | own if ranks > 1 else None
            children.append(forks.Child(fit, arguments, self.folder, log, environment))
        return children

    def finish(self, *options: str, ranks: int = 1) -> forks.Done:
        """Runs to the end, which must be a good one; gives rank 0's."""
        ends = [child.wait() for child in self.start_ranks(ranks, *options)]
        for rank, done in enumerate(ends):
            assert done.code == 0, f"rank {rank}: exit code {done.code}\n{done.out[-3000:]}\n{done.err[-3000:]}"
        return ends[0]

    def phase(self) -> bytes:
        """The last phase that was begun; empty before the first one."""
        file = phases_file(self.ledger)
        return file.read_bytes()[-1:] if file.exists() else b""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def digests(checkpoint: Path, parts: Sequence[str] = ("model", "optimizer")) -> dict[str, str]:
    """Of each whole tensor of a checkpoint's weights and optimizer state."""
    found = {}
    for part in parts:
        tensors = TensorFolder(checkpoint / part)
        for name in sorted(tensors.names()):
            raw = tensors.tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{part}/{name}"] = hashlib.sha256(raw).hexdigest()
    return found


def metrics(run: Path) -> dict[str, list[tuple[int, str]]]:
    """Step and text of each value in `metrics.csv`, by column, of those that do not depend on the time."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name in ("train/loss", "train/grad_norm") or name.startswith("val/")]
    return {name: [(int(row["step"]), row[name]) for row in rows if row[name]] for name in names}


def compare(straight: Place, disturbed: Place, steps: int, ranks: int = 1) -> list[str]:
    """What a run that was disturbed has otherwise than the straight one; empty where all is the same."""
    wrong = []
    for rank in range(ranks):
        expected = {line["step"]: line for line in read_ledger(straight.ledger_of(rank))}
        lines = read_ledger(disturbed.ledger_of(rank))
        wrong += [f"step {line['step']} differs" for line in lines if line != expected[line["step"]]]
        kept = {line["step"]: line for line in lines}
        if sorted(kept) != list(range(1, steps + 1)):
            wrong.append(f"steps {sorted(set(range(1, steps + 1)) - set(kept))} are missing")
        counts = _miscounted(kept, expected)
        wrong += [f"sample {key}: {found} times, expected {wanted}" for key, found, wanted in counts]
    last = f"step_{steps:06d}"
    one, other = digests(straight.checkpoints / last), digests(disturbed.checkpoints / last)
    wrong += [f"{name} differs" for name in one | other if other.get(name) != one.get(name)]
    before, after = metrics(straight.run), metrics(disturbed.run)
    wrong += [f"metrics.csv: {name} differs" for name in before if _logged(name, before, after) != before[name]]
    return wrong


def _logged(name: str, straight: dict[str, Any], disturbed: dict[str, Any]) -> list[tuple[int, str]]:
    """A column of a disturbed run; a run that a signal ends validates there, which the straight one does not."""
    steps = {step for step, _ in straight[name]}
    return [row for row in disturbed.get(name, []) if not name.startswith("val/") or row[0] in steps]


def _miscounted(kept: dict[int, Any], expected: dict[int, Any]) -> list[tuple[str, int, int]]:
    """Samples that the kept steps have more or less often than the straight run."""
    found, wanted = (
        Counter(key for line in each.values() for pack in line["keys"] for key in pack) for each in (kept, expected)
    )
    return [(key, found[key], wanted[key]) for key in sorted(found | wanted) if found[key] != wanted[key]]


def debris(run: Path) -> Sequence[str]:
    """Half-written files below a run's folder."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*") if path.name != METADATA)
