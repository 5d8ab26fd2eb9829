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


def largest_difference(rows: list, reference: list, column: int, steps: int = STEPS) -> float:
    assert len(rows) == len(reference) == steps
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


# Through Lightning: evaluation, uneven pieces and overlap, beside the steps that test_parity_of_layouts.py compares.
MOE_LAYOUTS = {
    "data parallel 2": {"overlap_data_parallel": True},
    "pipeline 2 with virtual stages": {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"},
    "pipeline 2, uneven": {"pipeline": 2, "pipeline_layout": [3, 1], "recompute_vision": True},
}
MOE_STEPS = 8


def train_moe(folder: Path, devices: int, strategy: dict[str, Any]) -> list[dict[str, Any]]:
    return spawn.train(
        folder, devices, strategy, {"max_steps": MOE_STEPS}, {"preset": "tiny_moe"}, {"steps": MOE_STEPS}
    )


@pytest.fixture(scope="module")
def moe_on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_moe(tmp_path_factory.mktemp("moe"), 1, {})[0]


@pytest.mark.parametrize("name", MOE_LAYOUTS)
def test_moe_equals_one_rank(name: str, moe_on_one_rank: dict, tmp_path: Path) -> None:
    ranks = train_moe(tmp_path, 2, MOE_LAYOUTS[name])
    assert ranks[0]["rows"] == ranks[1]["rows"]
    assert largest_difference(ranks[0]["rows"], moe_on_one_rank["rows"], 0, MOE_STEPS) <= LOSS_TOLERANCE
    assert largest_difference(ranks[0]["rows"], moe_on_one_rank["rows"], 1, MOE_STEPS) <= NORM_TOLERANCE
    for metric in ("val/loss", "val/attribute_accuracy"):
        for rank in ranks:
            assert rank["metrics"][metric] == pytest.approx(moe_on_one_rank["metrics"][metric], rel=1e-5), metric
