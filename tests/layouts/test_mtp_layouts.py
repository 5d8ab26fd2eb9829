"""A model with MTP layers trains as on one rank in every layout: both losses and the gradient norm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import spawn
from training import MTP_TEXT

TOLERANCE = 1e-5  # relative, of losses and gradient norm; measured 2e-7
STEPS = 8
LAYOUTS = {
    "data parallel 2": {},
    "tensor parallel 2": {"tensor": 2},
    "tensor parallel 2 with sequence parallelism": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
}


def train(folder: Path, devices: int, strategy: dict[str, Any]) -> list[dict[str, Any]]:
    module = {"text": MTP_TEXT | {"mtp_loss_weight": 1.0}}  # so that the MTP layers weigh as much as the main head
    return spawn.train(folder, devices, strategy, {"max_steps": STEPS}, module, {"steps": STEPS})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("one"), 1, {})[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_one(name: str, one_rank: dict, tmp_path: Path) -> None:
    ranks = train(tmp_path, 2, LAYOUTS[name])
    assert ranks[0]["rows"] == ranks[1]["rows"]
    pairs = list(zip(ranks[0]["rows"], one_rank["rows"], strict=True))
    loss, norm = (max(abs(row[i] / expected[i] - 1) for row, expected in pairs) for i in (0, 1))
    print(f"{name}: largest relative difference of the loss {loss:.1e}, of the gradient norm {norm:.1e}")
    assert len(pairs) == STEPS and loss <= TOLERANCE and norm <= TOLERANCE
    for layer in (1, 2):
        metric = f"train/mtp_loss_{layer}"
        for rank in ranks:
            assert rank["metrics"][metric] == pytest.approx(one_rank["metrics"][metric], rel=TOLERANCE), metric
