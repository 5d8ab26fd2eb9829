"""A training state of any layout loads into any other: weights, moments and their step counts, to the last bit.

The rows of the reliability table that measure it are in `tests/reliability/reshard.py`. Each layout trains three steps
of its own, so that a state that was left from before shows.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from step37_lit.megatron.checkpointing import read_training_state
from tests.reliability.runs import digests

WORKER = Path(__file__).with_name("reshard_worker.py")
STEPS, TIMEOUT = 3, 500
# Ranks and the strategy's arguments.
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP4": (4, {}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 DP2": (4, {"tensor": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
}
MOE: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP2 EP2": (2, {"context": 2, "expert": 2}),
    "TP2+SP ETP2": (2, {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2}),
    "TP2+SP EP2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "EP4": (4, {"expert": 4}),
    "EP2 DP2": (4, {"expert": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
    "TP2+SP PP2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "TP2+SP EP2 ETP2": (4, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2}),
}
MODELS: dict[str, tuple[dict, dict[str, Any]]] = {"dense": (DENSE, {}), "moe": (MOE, {"preset": "tiny_moe"})}


def run(root: Path, model: str, sources: dict[str, list[str]]) -> None:
    """One case for each layout that `sources` names, those of as many ranks in the same processes."""
    layouts, module = MODELS[model]
    for devices in sorted({layouts[name][0] for name in sources}):
        cases = []
        for name in (name for name in sources if layouts[name][0] == devices):
            (root / name).mkdir(parents=True)
            case = {"folder": str(root / name), "strategy": layouts[name][1], "module": module, "steps": STEPS}
            cases.append(case | {"sources": sources[name]})
        start(root, devices, json.dumps(cases))


def start(root: Path, devices: int, cases: str, worker: Path = WORKER) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks, logs = [], [root / f"{devices} ranks, {rank}.log" for rank in range(devices)]
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        with log.open("w") as output:
            command = [sys.executable, str(worker), cases]
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for code, log in zip(codes, logs, strict=True):
        assert code == 0, f"{log.name}: exit code {code}\n{log.read_text()[-4000:]}"


def check_pairs(root: Path, model: str, makers: list[str], takers: list[str]) -> int:
    """Every checkpoint of `makers` through each of `takers`; gives the number of pairs."""
    run(root / "makers", model, {name: [] for name in makers})
    made = {name: root / "makers" / name / "made" for name in makers}
    expected = {name: digests(folder) for name, folder in made.items()}
    steps = {name: steps_of(folder) for name, folder in made.items()}
    for counted in steps.values():
        assert set(counted.values()) == {STEPS} and len(counted) > 20
    assert len([name for name in expected[makers[0]] if "/exp_avg." in name]) > 20
    # The makers have trained on the same data: their states are close, but not those of one another.
    assert len({each["model/embedding.word_embeddings.weight"] for each in expected.values()}) > 1 or len(makers) == 1
    run(root / "takers", model, {name: [str(folder) for folder in made.values()] for name in takers})
    pairs = 0
    for taker in takers:
        for maker in makers:
            again = root / "takers" / taker / f"from {maker}"
            assert digests(again) == expected[maker], f"{maker} -> {taker}"
            assert steps_of(again) == steps[maker], f"{maker} -> {taker}"
            pairs += maker != taker
    print(f"{model}: {pairs} ordered pairs, {len(makers)} layouts into {len(takers)}, bit-equal")
    return pairs


def steps_of(checkpoint: Path) -> dict[str, int]:
    return read_training_state(checkpoint)["optimizer_states"][0]["steps"]
