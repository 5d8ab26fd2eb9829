"""Time of a step of two ranks against one rank at the same work a rank, by layout, and the share of communication.

    python benchmarks/weak_scaling.py [--rounds 3] [--layouts "data 2" "tensor 2"]

Every rank has one thread. One rank trains N packs a step, two ranks 2 N (data and expert parallel: N each; tensor and
pipeline parallel: half of the model for 2 N), so that perfect scaling is a ratio of 1. All sides are fresh processes
that take turns; the ratio of the medians counts. Communication is the time in torch.distributed's calls and in waiting
for what they started: with two ranks on two shared cores it is mostly waiting for the other rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2 + sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
    "expert 2": {"expert": 2},
}
PACKS = 4  # of one rank
TOKENS = 256
TEXT = {"hidden_size": 256, "ffn_hidden_size": 704, "expert_ffn_size": 128, "shared_expert_ffn_size": 128}
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
MESSAGES = ("isend", "irecv")


class Clock:
    """Seconds in torch.distributed; made before megatron binds its functions."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.seconds = 0.0
        for name in (*COLLECTIVES, *MESSAGES):
            timed = self._timed(getattr(dist, name))
            setattr(dist, name, timed)
            setattr(dist.distributed_c10d, name, timed)  # P2POp takes no other isend and irecv than these

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return None if result is None else _Waiting(result, self)

        return timed


class _Waiting:
    """A request whose `wait` is timed."""

    def __init__(self, work: Any, clock: Clock):
        self._work, self._clock = work, clock

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._clock.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def rank(job: dict[str, Any]) -> None:
    """One rank: trains, and the first one prints the median step and the share of communication."""
    clock = Clock()
    import torch

    from step37_lit.batch import PackedBatch, Sample
    from step37_lit.config import Step37Config
    from step37_lit.megatron import data_parallel, process, schedule
    from step37_lit.megatron.build import build_model
    from step37_lit.megatron.layout import ParallelLayout
    from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer

    torch.set_num_threads(1)
    layout, ranks = ParallelLayout(**job["layout"]), job["ranks"]
    process.initialize(layout)
    config = Step37Config.preset("tiny_moe", **TEXT)
    (ddp,) = data_parallel.wrap(build_model(config, layout))
    optimizer = ForwardingOptimizer([ddp], AdamWSettings(1e-4), 1.0, torch.float32)
    generator = torch.Generator().manual_seed(0)
    packs = []
    for number in range(PACKS * ranks // layout.data_parallel_size(ranks)):
        rows = torch.randint(10, 512, (4, TOKENS // 4), generator=generator)
        packs.append(
            PackedBatch.from_samples(
                [Sample(f"{number}.{i}", row, torch.ones(len(row)), []) for i, row in enumerate(rows)]
            )
        )
    steps = []
    for step in range(job["steps"] + 2):
        if step == 2:  # the first two allocate
            clock.seconds = 0.0
        start = time.perf_counter()
        ddp.zero_grad_buffer()
        optimizer.clear_gradients()
        schedule.train_step([ddp], packs)
        optimizer.step()
        steps.append(time.perf_counter() - start)
    if os.environ.get("RANK", "0") == "0":
        timed = steps[2:]
        print(json.dumps({"seconds": statistics.median(timed), "communication": clock.seconds / sum(timed)}))


def run(layout: dict[str, Any], ranks: int, steps: int) -> dict[str, float]:
    """Starts the ranks and gives what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = json.dumps({"layout": layout, "ranks": ranks, "steps": steps})
    processes = []
    for number in range(ranks):
        group = {"RANK": str(number), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **group}
        command = [sys.executable, "-W", "ignore", __file__, "--rank", job]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{layout}: a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(json.loads(options.rank))
        return
    one: list[float] = []
    two: dict[str, list[dict[str, float]]] = {name: [] for name in options.layouts}
    for _ in range(options.rounds):
        one.append(run({}, 1, options.steps)["seconds"])
        for name in options.layouts:
            two[name].append(run(LAYOUTS[name], 2, options.steps))
    base = statistics.median(one)
    print(f"one rank, {PACKS} packs of {TOKENS} tokens: {base:.3f} s a step")
    for name, rows in two.items():
        ratios = [row["seconds"] / base for row in rows]
        share = statistics.median(row["communication"] for row in rows)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:20s} {statistics.median(ratios):.2f} x one rank's step ({spread}), {share:.0%} communication")


if __name__ == "__main__":
    main()
