"""Several processes, as a cluster has them: torchrun over two nodes, layouts of the recipes, SLURM's script."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_recipes
from tests.layouts import nodes

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
PORT = "29537"
TOLERANCE = 1e-5  # relative; measured: losses 8.1e-8, gradient norms 2.0e-7


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.make_shards(tmp_path_factory.mktemp("nodes") / "set")


def figures(run: Path) -> list[float]:
    """Loss and gradient norm of each step."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [float(row[f"train/{name}"]) for row in rows for name in ("loss", "grad_norm")]


def fit(*commands: list[str], folder: Path, timeout: float = 400) -> None:
    """Runs the commands side by side; all must end well."""
    processes = []
    for number, command in enumerate(commands):
        with (folder / f"out{number}.txt").open("w") as out:
            processes.append(
                subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(deadline - time.monotonic(), 0)) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its ranks
            process.wait(30)
    texts = "\n".join((folder / f"out{number}.txt").read_text() for number in range(len(commands)))
    assert codes == [0] * len(commands), texts


def one_process(recipe: Path, folder: Path, shards: Path) -> list[float]:
    folder.mkdir()
    file = tiny_recipes.tiny(recipe, folder, shards)
    fit([sys.executable, "-m", "step37_lit", "fit", f"--config={file}"], folder=folder)
    return figures(folder / "run")


def assert_same(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) == 4
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    print(f"losses and norms {found}, of one process {expected}: {worst:.1e} apart")
    assert worst < TOLERANCE


@pytest.mark.slow
def test_two_nodes_by_torchrun_train_as_one_process(tmp_path: Path, shards: Path) -> None:
    reason = nodes.missing()
    if reason is not None:
        pytest.skip(reason)
    recipe = RECIPES / "flash_smoke_4gpu.yaml"
    file = tiny_recipes.tiny(recipe, tmp_path, shards, ranks=2, nodes=2, pipeline=2, expert=2)
    with nodes.two_nodes() as on_node:
        where = ["--nnodes=2", "--nproc-per-node=2", f"--master-addr={nodes.ADDRESSES[0]}", f"--master-port={PORT}"]
        job = ["-m", "step37_lit", "fit", f"--config={file}"]
        fit(
            *([*front, *TORCHRUN, *where, f"--node-rank={i}", *job] for i, front in enumerate(on_node)), folder=tmp_path
        )
    assert_same(figures(tmp_path / "run"), one_process(recipe, tmp_path / "one", shards))


SCALED = {
    "flash_sft_64gpu": {"ranks": 4, "pipeline": 2, "expert": 2, "pipeline_layout": [3, 1]},
    "flash_pretrain_512gpu": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": [1, 1, 1, 1]},
    "flash_projector_32gpu": {"ranks": 2, "pipeline": 2, "pipeline_layout": [2, 2]},
    "flash_long_context_cp": {"ranks": 2, "context": 2, "expert": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_recipes_over_their_kinds_of_groups(name: str, tmp_path: Path, shards: Path) -> None:
    """The recipe's kinds of groups at size 2, started by Lightning's launcher, against one process."""
    file = tiny_recipes.tiny(RECIPES / f"{name}.yaml", tmp_path, shards, **SCALED[name])
    fit([sys.executable, "-m", "step37_lit", "fit", f"--config={file}"], folder=tmp_path)
    assert_same(figures(tmp_path / "run"), one_process(RECIPES / f"{name}.yaml", tmp_path / "one", shards))


SRUN = """#!/bin/bash
# Stands in for SLURM's: two tasks on this machine.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    echo $! > task$task.pid
done
code=0
for job in $(jobs -p); do wait $job || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.txt; fi
"""

PYTHON = f"""#!/bin/sh
exec {sys.executable} "$@"
"""


@pytest.mark.slow
def test_slurm_script_requeues_on_sigusr1_and_goes_on(tmp_path: Path) -> None:
    """The script as it is; `srun` and `scontrol` stand in for a cluster that is not here."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **ENVIRONMENT, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": str(40_000 + os.getpid() % 10_000),
        "SLURM_JOB_NODELIST": "node[1-1]", "SLURM_JOB_NAME": "step37", "CHECKPOINT": "run/checkpoints/last.ckpt",
    }  # fmt: skip
    script = ["bash", str(RECIPES / "launch" / "slurm_8nodes.sbatch"), str(RECIPES / "scenes_tiny.yaml")]
    script += [
        "--trainer.devices=2", "--trainer.default_root_dir=run", "--data.microbatches=2", "--data.samples_per_pack=2",
        "--data.val_samples=4", "--data.num_workers=0", "--data.num_steps=100000", "--model.warmup_steps=1",
        "--model.decay_steps=100000", "--trainer.val_check_interval=100000",
    ]  # fmt: skip
    out = tmp_path / "out.txt"

    def start(*options: str) -> subprocess.Popen:
        with out.open("w") as file:
            return subprocess.Popen(
                [*script, *options], cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    process = start("--trainer.max_steps=100000")
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.csv").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert process.poll() is None, out.read_text()
    for task in range(2):  # as SLURM does with --signal: to every task
        os.kill(int((tmp_path / f"task{task}.pid").read_text()), signal.SIGUSR1)
    assert process.wait(200) == 75, out.read_text()
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    reached = int(re.search(r"reached     step (\d+)", out.read_text())[1])
    assert reached > 0 and (tmp_path / environment["CHECKPOINT"]).is_file()

    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        earlier = [row for row in csv.DictReader(file) if row.get("train/loss")]
    again = start(f"--trainer.max_steps={reached + 3}")
    assert again.wait(300) == 0, out.read_text()
    assert f"reached     step {reached + 3}" in out.read_text()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert (
        reached < 2 or rows[0]["train/tokens_per_second"] == earlier[0]["train/tokens_per_second"]
    )  # not trained again
