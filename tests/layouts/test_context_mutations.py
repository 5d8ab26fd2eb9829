"""One step in every layout gives one rank's numbers, and each fault of `context_mutations.py` shows in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import spawn
from context_mutations import CONTEXT, NOTHING, TENSOR
from context_step_worker import one_step
from test_context_layouts import DENSE, SLOW, TOLERANCE

from step37_lit.megatron.layout import ParallelLayout

LAYOUTS: dict[str, tuple[dict[str, Any], dict]] = {
    "context": ({"context": 2}, CONTEXT),
    "tensor": ({"tensor": 2, "sequence_parallel": True}, TENSOR),
}


def differs(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    limits = {"loss": TOLERANCE, "norm": TOLERANCE, "images": 0}
    return [name for name, limit in limits.items() if abs(found[name] / expected[name] - 1) > limit]


def run_worker(script: str, ranks: int, job: dict[str, Any], out: Path) -> dict[str, dict[str, float]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, str(Path(__file__).with_name(script)), json.dumps(job | {"out": str(out)})]
    done = spawn.run(command, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(done.stdout)
    return json.loads(out.read_text())


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["experts", "dense"])
def test_a_step_on_four_ranks_equals_one_rank(dense: bool, one_rank: None, tmp_path: Path) -> None:
    layouts = {name: sizes for name, (ranks, sizes) in (DENSE if dense else SLOW).items() if ranks == 4}
    job = {"layouts": layouts, "dense": dense}
    found = run_worker("context_step_worker.py", 4, job, tmp_path / "found.json")
    expected = one_step(ParallelLayout(), dense)
    for name, values in found.items():
        print(name, ", ".join(f"{key} {values[key] / expected[key] - 1:.1e}" for key in expected))
        assert not differs(values, expected), name
    assert set(found) == set(layouts)


@pytest.mark.parametrize("name", ["context", pytest.param("tensor", marks=pytest.mark.slow)])
def test_faults_are_noticed(name: str, one_rank: None, tmp_path: Path) -> None:
    layout, faults = LAYOUTS[name]
    expected = one_step(ParallelLayout())
    found = run_worker("context_mutations.py", 2, {"layout": layout}, tmp_path / "found.json")
    assert not differs(found.pop(NOTHING), expected)
    assert set(found) == set(faults)
    for fault, values in found.items():
        assert differs(values, expected), fault
