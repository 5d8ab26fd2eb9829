"""Time from the command to the first optimizer step of the tiny recipe, against importing what it stands on.

    python benchmarks/startup.py [--rounds 3]

Both are fresh processes that take turns: the recipe with `--trainer.max_steps=1` (until the end of the first step is
logged, not until the process ends), and a process that imports lightning and megatron.core's training parts only.
The ratio of the medians counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
IMPORTS = """
import lightning.pytorch, lightning.pytorch.cli
import megatron.core.distributed, megatron.core.optimizer, megatron.core.pipeline_parallel
import megatron.core.transformer.transformer_block
"""
# Stops the clock where the optimizer has stepped once.
FIRST_STEP = """
import sys, time
from step37_lit.megatron.optimizer import ForwardingOptimizer
step = ForwardingOptimizer.step
def timed(self, closure=None):
    result = step(self, closure)
    print("first step", time.time(), flush=True)
    return result
ForwardingOptimizer.step = timed
from step37_lit.cli import run
sys.exit(run(sys.argv[1:]))
"""


def seconds_to_import() -> float:
    start = time.time()
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], check=True, capture_output=True)
    return time.time() - start


def seconds_to_first_step(folder: Path, recipe: Path) -> float:
    arguments = ["fit", f"--config={recipe}", "--trainer.max_steps=1", "--model.warmup_steps=0"]
    arguments += ["--trainer.limit_val_batches=0", "--resume=never", f"--trainer.default_root_dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_STEP, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("first step"))
    return float(line.split()[-1]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "scenes_tiny.yaml")
    options = parser.parse_args()
    imports, first_steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds + 1):
            imports.append(seconds_to_import())
            first_steps.append(seconds_to_first_step(Path(folder), options.recipe))
    # The first round fills the file cache.
    importing, stepping = statistics.median(imports[1:]), statistics.median(first_steps[1:])
    print(f"importing lightning and megatron.core {importing:6.2f} s (median of {options.rounds})")
    print(f"command to first optimizer step       {stepping:6.2f} s")
    print(f"ratio {stepping / importing:.2f} (target <= 1.5)")


if __name__ == "__main__":
    main()
