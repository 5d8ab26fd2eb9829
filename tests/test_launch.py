"""Before process groups are made: real processes that differ, are missing, or look for a master that is not there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from step37_lit.megatron import launch

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "layouts" / "launch_worker.py"
RECIPE = ROOT / "recipes" / "scenes_tiny.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(fields: dict[int, dict[str, Any]], world: int, timeout: float, **where: Any) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of one process for each rank in `fields`."""
    port, processes = free_port(), []
    for rank, own in fields.items():
        job = {"address": "127.0.0.1", "port": port, "rank": rank, "ranks": world, "timeout": timeout, "fields": own}
        command = [sys.executable, str(WORKER), json.dumps(job | where)]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=ENVIRONMENT, **streams))
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_equal_ranks_go_on_to_their_process_group() -> None:
    same = {"model": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    assert [(code, out) for code, out, _ in ranks({0: same, 1: same}, 2, 60)] == [(0, "1.0\n")] * 2


def test_the_rank_that_differs_is_named_on_all_ranks() -> None:
    same, other = {"model": {"lr": 1e-3}, "seed": 1}, {"model": {"lr": 2e-3}, "seed": 1, "more": True}
    ended = ranks({0: same, 1: same, 2: other}, 3, 60)
    expected = (
        f"launch: expected the same recipe and code on all 3 ranks, rank 2 on {socket.gethostname()} has "
        "recipe.model.lr 0.002 (others 0.001), recipe.more true (others absent)\n"
    )
    assert [(code, err) for code, _, err in ended] == [(2, expected)] * 3


def test_a_missing_rank_is_named() -> None:
    ended = ranks({0: {}, 2: {}}, 4, 20)
    expected = "launch: expected all 4 ranks within 20 s, nothing from ranks 1, 3\n"
    assert [(code, err) for code, _, err in ended] == [(2, expected)] * 2


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_master_that_is_not_there_is_named(address: str) -> None:
    ((code, _, err),) = ranks({1: {}}, 2, 2, address=address)
    assert code == 2 and err.count("\n") == 1
    for text in ("rank 1 on ", f"cannot reach rank 0 at {address}:", "MASTER_ADDR", "within 2 s"):
        assert text in err


def test_rank_0_on_another_host_than_its_address() -> None:
    """An address of this machine at which nobody listens: rank 0 does not find its own store."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ((code, _, err),) = ranks({0: {}}, 2, 2, port=taken.getsockname()[1])
    assert code == 2 and err.splitlines()[-1].startswith("launch: rank 0 has no store at 127.0.0.1:")


def test_verdict_names_what_most_ranks_do_not_have() -> None:
    right, wrong = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    hosts = {rank: (f"node{rank}", right) for rank in range(16)}
    assert launch._verdict(hosts, 16, 5) == ""
    odd = launch._verdict(hosts | {0: ("node0", wrong)}, 16, 5)
    assert "rank 0 on node0 has b 3 (others 2)" in odd
    odd = launch._verdict(hosts | {rank: (f"node{rank}", wrong) for rank in range(4, 7)}, 16, 5)
    assert "rank 4 on node4 has b 3 (others 2); ranks 5, 6 differ, too" in odd
    assert "nothing from rank 3" in launch._verdict({r: h for r, h in hosts.items() if r != 3}, 16, 5)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 504 more" in launch._verdict({}, 512, 5)


def test_the_source_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    digest = launch.source_digest()
    probe = "from step37_lit.megatron.launch import source_digest; print(source_digest())"
    copied = tmp_path / "copy"
    for package in launch.PROJECT_PACKAGES:
        shutil.copytree(ROOT / package, copied / package, ignore=shutil.ignore_patterns("*.pyc"))

    def of_copy() -> str:
        environment = ENVIRONMENT | {"PYTHONPATH": str(copied)}
        found = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], env=environment, cwd=tmp_path, text=True,
                               capture_output=True, check=True)  # fmt: skip
        return found.stdout.strip()

    assert of_copy() == digest
    with (copied / "callbacks" / "progress.py").open("a") as file:
        file.write("# changed\n")
    assert of_copy() != digest


def test_two_configs_in_one_run_are_refused_within_the_time_out(tmp_path: Path) -> None:
    """Two processes as Lightning's environment variables start them, one with another learning rate."""
    port, processes = free_port(), []
    common = ["fit", f"--config={RECIPE}", "--trainer.devices=2", "--data.microbatches=2"]
    for rank in range(2):
        own = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "step37_lit", *common, f"--model.lr={rank + 1}e-3"]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT | own, **streams))
    started = time.monotonic()
    try:
        outputs = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(f"ended after {time.monotonic() - started:.0f} s")
    for process, err in zip(processes, outputs, strict=True):
        assert process.returncode == 2, err
        assert err.count("\n") == 1 and "rank 1 on " in err, err
        assert "recipe.model.lr 0.002 (others 0.001)" in err
    assert not list(tmp_path.rglob("*.csv"))
