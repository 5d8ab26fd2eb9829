"""`fit` on several ranks, one of which does something to itself at a known moment: a signal, a death, a loop.

The ranks are forked from a process with the imports done, with the environment of a launcher. Under Lightning's
launcher or torchrun this file is the script that they start.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import yaml

from step37_lit.checkpoint.folder import list_checkpoints
from tests import forks

TEXT = {"hidden_size": 32, "ffn_hidden_size": 64, "head_dim": 16, "sliding_window": 8, "num_sliding_heads": 6}
VISION = {"width": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64}
VALIDATED, LAST = 4, 12  # a validation every so many steps, and the last step
# When in step 3 or in what follows step 4; `start` is before anything is imported or made.
MOMENTS = ("start", "loading", "step", "between", "save", "validation", "captions")
LAYOUTS: dict[int, dict[str, Any]] = {1: {}, 2: {}, 3: {}, 4: {"tensor": 2, "pipeline": 2}}


@dataclass(frozen=True)
class Act:
    """What a rank does to itself.

    Args:
        rank: Which one.
        moment: One of `MOMENTS`.
        what: A signal's name, `loop` (without an end), `raise`, or `wait` (until there is a file `go`).
    """

    rank: int
    moment: str
    what: str


class Acting(pl.Callback):
    """Writes a file with this process's number, and acts once; `acted` then has the time and the step."""

    def __init__(self, act: Act, folder: Path):
        self.act, self.folder, self.done = act, folder, False

    def now(self, moment: str, step: int) -> None:
        rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
        (self.folder / f"pid{rank}").write_text(str(os.getpid()))
        if self.done or moment != self.act.moment or rank != self.act.rank:
            return
        self.done = True
        staged = self.folder / ".acted"
        staged.write_text(json.dumps({"time": time.time(), "step": step}))
        staged.rename(self.folder / "acted")
        while self.act.what == "loop":
            pass
        if self.act.what == "raise":
            raise ArithmeticError("raised on purpose")
        if self.act.what != "wait":
            os.kill(os.getpid(), getattr(signal, self.act.what))
        while self.act.what == "wait" and not (self.folder / "go").exists():
            time.sleep(0.01)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.now("loading", trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            self.now("step", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            self.now("between", trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self.now("save", trainer.global_step)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if batch_idx == 1:
            self.now("validation", trainer.global_step)

    def in_captions(self, trainer: pl.Trainer) -> None:
        self.now("captions", trainer.global_step)


def fit(act: dict[str, Any], folder: str, recipe: str) -> int:
    """`fit` in this process."""
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as it is in a command
    acting = Acting(Act(**act), Path(folder))
    warnings.simplefilter("ignore")  # what libraries say as a run begins
    from step37_lit import signals

    signals.listen()
    acting.now("start", 0)
    from callbacks import caption_metrics
    from step37_lit import cli

    generate = caption_metrics.CaptionMetrics._generate

    def acts_before_captions(self: Any, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        acting.in_captions(trainer)
        return generate(self, trainer, *args, **kwargs)

    caption_metrics.CaptionMetrics._generate = acts_before_captions  # type: ignore[method-assign]
    cli.TRAINER_DEFAULTS["callbacks"] = [acting]
    return cli.run(["fit", f"--config={recipe}"])


def write_recipe(folder: Path, ranks: int, **strategy: Any) -> Path:
    scenes = {
        "preset": "tiny", "num_steps": LAST, "microbatches": 4 * ranks, "samples_per_pack": 1,
        "val_samples": 4 * ranks * 3, "num_workers": 1,
    }  # fmt: skip
    captions = {"max_samples": 2 * ranks, "max_new_tokens": 4, "batch_size": 1}
    init_args = {"cpu_threads": 1, "launch_timeout": forks.PATIENCE, **LAYOUTS[ranks], **strategy}
    recipe = {
        "seed_everything": 5,
        "model": {"preset": "tiny", "text": TEXT, "vision": VISION, "lr": 1e-3, "warmup_steps": 3},
        "data": {"class_path": "datamodules.scenes.ScenesDataModule", "init_args": scenes},
        "trainer": {
            "accelerator": "cpu", "devices": ranks, "default_root_dir": str(folder / "run"), "max_steps": LAST,
            "strategy": {"class_path": "step37_lit.MegatronStrategy", "init_args": init_args},
            "max_epochs": 1, "gradient_clip_val": 1.0, "val_check_interval": VALIDATED, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "callbacks.caption_metrics.CaptionMetrics", "init_args": captions},
                {"class_path": "step37_lit.RunCheckpoints", "init_args": {"every_steps": 2, "monitor": "val/loss"}},
            ],
        },
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankRun:
    """`fit` on forked ranks.

    Args:
        folder: To be made: recipe, logs `rankN.out` and `rankN.err`, and the run's folder `run`.
        ranks: How many; the layout is `LAYOUTS`'.
        act: What one of them does.
        strategy: More of its arguments.
    """

    def __init__(self, folder: Path, ranks: int, act: Act, **strategy: Any):
        folder.mkdir(parents=True)
        self.folder, self.ranks = folder, ranks
        write_recipe(folder, ranks, **strategy)
        self.again(act)

    def again(self, act: Act) -> RankRun:
        """Starts the run once more."""
        port = str(free_port())
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.ranks), "NODE_RANK": "0"}
        arguments = (dataclasses.asdict(act), str(self.folder), str(self.folder / "recipe.yaml"))
        self.children = [
            forks.Child(fit, arguments, self.folder, self.folder / f"rank{rank}", where | {"LOCAL_RANK": str(rank)})
            for rank in range(self.ranks)
        ]
        return self

    def wait(self, without: int | None = None) -> list[forks.Done]:
        """The end of all ranks, or of all but one, which is then killed."""
        try:
            for rank, child in enumerate(self.children):
                if rank != without:
                    child.wait()
        finally:
            for child in self.children:
                child.kill()
        return [child.done() for child in self.children]


def acted(folder: Path) -> dict[str, Any]:
    """Time (seconds since the epoch) and step of the act in a run."""
    return json.loads((folder / "acted").read_text())


def newest(folder: Path) -> int:
    """Step of a run's newest complete checkpoint; -1 where there is none."""
    found = list_checkpoints(folder / "run" / "checkpoints")
    return max((each.manifest.step for each in found if each.manifest is not None), default=-1)


def launched(folder: Path, ranks: int, act: Act, launcher: str, **strategy: Any) -> subprocess.Popen:
    """The same under `lightning`'s launcher or `torchrun`; its output is in `out` and `err`."""
    folder.mkdir(parents=True)
    recipe = write_recipe(folder, ranks, **strategy)
    front = [sys.executable, "-W", "ignore"]
    if launcher == "torchrun":
        where = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        front += ["-m", "torch.distributed.run", *where]
    command = [*front, __file__, json.dumps(dataclasses.asdict(act)), str(folder), str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True)


def processes_of(folder: Path) -> list[int]:
    """Living processes that have the folder on their command line or as where they work: ranks and their loaders'."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and os.readlink(entry / "cwd") == str(folder):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def gone(folder: Path, patience: float = 30.0) -> bool:
    """Whether none of a run's processes is left; loader processes look every five seconds whether theirs lives."""
    deadline = time.monotonic() + patience
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    sys.exit(fit(json.loads(sys.argv[1]), *sys.argv[2:]))
