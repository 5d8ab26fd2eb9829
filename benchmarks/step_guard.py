"""What the guard before the optimizer's step costs: steps with it and without it, taking turns in one process.

    python benchmarks/step_guard.py [--steps 60] [--threads 1] [--preset tiny_moe]

Both train the same model on the same packs with megatron's loop. With the guard a step also sums up outputs, gradients
and weights (`step37_lit.megatron.finite`) and looks for spikes (`step37_lit.spikes`). What counts is the ratio of the
medians of this process's processor time, which a busy neighbour disturbs less than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch

from datamodules.scenes import ScenesDataModule
from step37_lit import PackedBatch, Step37Config, build_model
from step37_lit.megatron import data_parallel, process, schedule
from step37_lit.megatron.finite import StepWatch
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer
from step37_lit.spikes import SpikeWatch

WARM_UP = 10  # steps that are not counted


class Loop:
    """megatron's DDP, schedule and optimizer, with the guard or without it."""

    def __init__(self, config: Step37Config, guarded: bool):
        process.initialize()
        (self.ddp,) = data_parallel.wrap(build_model(config))
        self.optimizer = ForwardingOptimizer([self.ddp], AdamWSettings(lr=1e-3), clip_grad=1.0, dtype=torch.float32)
        self.watch = StepWatch([self.ddp]) if guarded else None
        self.spikes = SpikeWatch({"loss": 1e9, "grad_norm": 1e9})
        self.seconds: list[float] = []
        if guarded:
            self.optimizer.admits = self._admits

    def _admits(self, grad_norm: float) -> bool:
        values = {"loss": float(self.result.loss), "grad_norm": grad_norm}
        assert self.result.finite and self.spikes.find(values) is None
        self.spikes.add(values)
        return True

    def step(self, packs: list[PackedBatch]) -> None:
        start = time.process_time()
        self.ddp.zero_grad_buffer()
        self.optimizer.clear_gradients()
        self.result = schedule.train_step([self.ddp], packs, watch=self.watch)
        self.optimizer.step()
        self.seconds.append(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="tiny_moe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")

    data = ScenesDataModule(preset=options.preset, num_steps=options.steps)
    loops = [Loop(Step37Config.preset(options.preset), guarded) for guarded in (True, False)]
    for number, packs in enumerate(data.train_dataloader()):
        for loop in loops if number % 2 else reversed(loops):
            loop.step(packs)
    guarded, bare = loops
    assert guarded.result.loss == bare.result.loss, "the guard changed what is computed"
    ours, without = (statistics.median(loop.seconds[WARM_UP:]) for loop in loops)
    print(f"{options.steps} steps, {len(packs)} packs a step, {options.threads} threads, preset {options.preset}")
    print(f"with the guard {ours * 1e3:8.2f} ms a step (median), without {without * 1e3:8.2f} ms")
    print(f"ratio {ours / without:.3f}")


if __name__ == "__main__":
    main()
