"""Each fault of `context_mutations.py` shows in one step's loss, gradient norm or number of encoded images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import spawn
from context_mutations import CONTEXT, NOTHING, TENSOR, one_step
from test_context_layouts import TOLERANCE

from step37_lit.megatron.layout import ParallelLayout

LAYOUTS: dict[str, tuple[dict[str, Any], dict]] = {
    "context": ({"context": 2}, CONTEXT),
    "tensor": ({"tensor": 2, "sequence_parallel": True}, TENSOR),
}


def differs(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    limits = {"loss": TOLERANCE, "norm": TOLERANCE, "images": 0}
    return [name for name, limit in limits.items() if abs(found[name] / expected[name] - 1) > limit]


@pytest.mark.parametrize("name", ["context", pytest.param("tensor", marks=pytest.mark.slow)])
def test_faults_are_noticed(name: str, one_rank: None, tmp_path: Path) -> None:
    layout, faults = LAYOUTS[name]
    expected, out = one_step(ParallelLayout()), tmp_path / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = json.dumps({"layout": layout, "out": str(out)})
    done = spawn.run([*torchrun, str(Path(__file__).with_name("context_mutations.py")), job], timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(done.stdout)
    found = json.loads(out.read_text())
    assert not differs(found.pop(NOTHING), expected)
    assert set(found) == set(faults)
    for fault, values in found.items():
        assert differs(values, expected), fault
