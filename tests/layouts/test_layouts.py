"""Every layout trains as one rank does: same weights by name, same global batch, loss and gradient norm equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import spawn

# Summing over ranks changes the order of fp32 additions: measured differences are below 3e-7 (loss) and 3e-6 (norm)
# over these 20 steps.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
STEPS = 20


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawn.train(tmp_path_factory.mktemp("one"), devices=1)[0]


LAYOUTS = {
    "data parallel 2": {},
    "tensor parallel 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "tensor parallel 2 with sequence parallelism": {"tensor": 2, "sequence_parallel": True},
}


def largest_difference(rows: list, reference: list, column: int) -> float:
    assert len(rows) == len(reference) == STEPS
    pairs = zip(rows, reference, strict=True)
    return max(abs(row[column] - expected[column]) / abs(expected[column]) for row, expected in pairs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_one(name: str, one_rank: dict, tmp_path: Path) -> None:
    ranks = spawn.train(tmp_path, devices=2, strategy=LAYOUTS[name])
    loss = largest_difference(ranks[0]["rows"], one_rank["rows"], 0)
    norm = largest_difference(ranks[0]["rows"], one_rank["rows"], 1)
    print(f"{name}: largest relative difference of the loss {loss:.1e}, of the gradient norm {norm:.1e}")
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE
    for metric in ("val/loss", "val/loss_seen", "val/attribute_accuracy", "val/attribute_accuracy_seen/shape"):
        assert ranks[0]["metrics"][metric] == pytest.approx(one_rank["metrics"][metric], rel=1e-5), metric
    for rank in ranks:
        assert rank["world_size"] == 2
        assert rank["global_step"] == STEPS  # optimizer steps, not microbatches
        assert rank["rows"] == ranks[0]["rows"]  # the same numbers to the last bit on every rank
        assert rank["metrics"]["val/loss"] == ranks[0]["metrics"]["val/loss"]


def test_torchrun_equals_lightnings_launcher(one_rank: dict, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ranks = spawn.train(tmp_path, devices=2, strategy={"tensor": 2}, launcher=torchrun)
    assert largest_difference(ranks[1]["rows"], one_rank["rows"], 0) <= LOSS_TOLERANCE


def test_moe_data_parallel_equals_one_rank(tmp_path: Path) -> None:
    rows = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        rows.append(spawn.train(folder, devices=devices, module={"preset": "tiny_moe"})[0]["rows"])
    assert largest_difference(rows[1], rows[0], 0) <= LOSS_TOLERANCE
