"""What Lightning and `MegatronStrategy` cost over a bare megatron loop, per optimizer step.

    python benchmarks/strategy_overhead.py [--steps 60] [--threads 2] [--preset tiny]

Both loops train the same model on the same packs in one process and take turns: the loader of the Lightning run times
the step that follows each pack it hands over (everything until it is asked for the next one: hooks, logging to
metrics.csv, throughput) and then runs one step of the bare loop on the same packs. The ratio of the medians counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from datamodules.scenes import ScenesDataModule
from step37_lit import MegatronStrategy, PackedBatch, Step37Config, Step37LitModule, build_model
from step37_lit.megatron import cuda_names, data_parallel, process, schedule
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer

WARM_UP = 10  # steps that are not counted


class BareLoop:
    """megatron's DDP, schedule and optimizer, and nothing else."""

    def __init__(self, config: Step37Config):
        process.initialize()
        model = build_model(config)
        (self.ddp,) = data_parallel.wrap(model)
        self.optimizer = ForwardingOptimizer([self.ddp], AdamWSettings(lr=1e-3), clip_grad=1.0, dtype=torch.float32)

    def step(self, packs: list[PackedBatch]) -> float:
        self.ddp.zero_grad_buffer()
        self.optimizer.clear_gradients()
        sums = schedule.run_schedule([self.ddp], packs, forward, finish, forward_only=False)
        with cuda_names.cpu_for_cuda():
            self.optimizer.megatron.step()
        return sum(float(total) for total, _ in sums) / sum(int(tokens) for _, tokens in sums)


def forward(model: torch.nn.Module, pack: PackedBatch) -> torch.Tensor:
    return model(**pack.model_inputs())


def finish(pack: PackedBatch, losses: torch.Tensor) -> tuple:
    total, tokens = (losses * pack.loss_mask).sum(), pack.loss_mask.sum().to(torch.int32)
    return total, tokens, (total.detach(), tokens)


class TakingTurns:
    """Hands packs to Lightning, times its step, and runs the bare loop's step on the same packs."""

    def __init__(self, steps: list[list[PackedBatch]], bare: BareLoop):
        self.steps, self.bare = steps, bare
        self.lightning: list[float] = []
        self.bare_loop: list[float] = []
        self.trainer: pl.Trainer | None = None
        self.losses: list[tuple[float, float]] = []  # of Lightning's step and of the bare loop's

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for packs in self.steps:
            start = time.perf_counter()
            yield packs
            middle = time.perf_counter()
            loss = self.bare.step(packs)
            self.bare_loop.append(time.perf_counter() - middle)
            self.lightning.append(middle - start)
            assert self.trainer is not None
            self.losses.append((float(self.trainer.callback_metrics["train/loss"]), loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="tiny")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")

    data = ScenesDataModule(preset=options.preset, num_steps=options.steps)
    steps = list(data.train_dataloader())
    turns = TakingTurns(steps, BareLoop(Step37Config.preset(options.preset)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=MegatronStrategy(),
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            max_steps=options.steps,
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            logger=CSVLogger(Path(folder), name="", version=""),
            callbacks=[LearningRateMonitor()],
        )
        lit = Step37LitModule(preset=options.preset, lr=1e-3, warmup_steps=0, min_lr_factor=1.0)
        turns.trainer = trainer
        trainer.fit(lit, train_dataloaders=turns)

    # Both loops have trained the same model on the same packs. (The loader is not asked again behind the last step.)
    difference = max(abs(ours - bare) / bare for ours, bare in turns.losses)
    assert difference < 1e-4, turns.losses
    ours, bare = (statistics.median(times[WARM_UP:]) for times in (turns.lightning, turns.bare_loop))
    print(f"{options.steps} steps, {len(steps[0])} packs a step, {options.threads} threads, preset {options.preset}")
    print(f"losses differ by at most {difference:.1e} (relative)")
    print(f"Lightning + MegatronStrategy {ours * 1e3:8.2f} ms a step (median)")
    print(f"bare megatron loop           {bare * 1e3:8.2f} ms a step (median)")
    print(f"ratio {ours / bare:.3f} (target <= 1.05)")


if __name__ == "__main__":
    main()
