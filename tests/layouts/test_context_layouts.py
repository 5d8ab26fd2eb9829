"""Packs shared by context ranks, pictures spread over the ranks that share a pack: one rank's numbers in every layout.

A small MoE with MTP layers; sub-sequences of uneven lengths, whose texts and pictures the seams cut. Layouts of four
ranks and the long list are slow: `make test-slow ARGS=tests/layouts/test_context_layouts.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import spawn
from context_packs import DENSE as DENSE_MODULE
from context_packs import PACKS, pack

WORKER = Path(__file__).with_name("context_worker.py")
STEPS = 20
# Relative, of losses and gradient norm; measured 9e-8 (loss) and 2e-7 (norm) over the layouts that docs/parallelism.md
# lists.
TOLERANCE = 1e-5
# Absolute, of parameters after the steps at a learning rate of 2e-4; measured 2e-6.
PARAMETER_TOLERANCE = 1e-5
QUICK: dict[str, tuple[int, dict[str, Any]]] = {
    "context 2": (2, {"context": 2}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "context 2, expert 2": (2, {"context": 2, "expert": 2}),
    "context 4": (4, {"context": 4}),
    "context 2, data 2": (4, {"context": 2}),
    "context 2, data 2, expert 4": (4, {"context": 2, "expert": 4}),
    "context 2, pipeline 2": (4, {"context": 2, "pipeline": 2}),
    "context 2, pipeline 2, expert 2": (4, {"context": 2, "pipeline": 2, "expert": 2}),
    "tensor 2 with sequence parallelism, context 2": (4, {"tensor": 2, "sequence_parallel": True, "context": 2}),
    "the same, expert 4": (4, {"tensor": 2, "sequence_parallel": True, "context": 2, "expert": 4}),
    "tensor 2 with sequence parallelism": (2, {"tensor": 2, "sequence_parallel": True}),
}
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, context 2": (4, {"tensor": 2, "context": 2}),
    "tensor 2, data 2": (4, {"tensor": 2}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
}


def train(
    folder: Path,
    devices: int = 1,
    strategy: dict[str, Any] | None = None,
    steps: int = STEPS,
    module: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Each rank's rows, metrics, counts of images and shares of the parameters."""
    folder.mkdir(exist_ok=True)
    job = {"folder": str(folder), "devices": devices, "strategy": strategy or {}, "steps": steps}
    job["module"] = module or {}
    done = spawn.run([sys.executable, str(WORKER), json.dumps(job)], timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [
        json.loads((folder / f"rank{rank}.json").read_text())
        | {"parameters": torch.load(folder / f"rank{rank}.pt", weights_only=True)}
        for rank in range(devices)
    ]


def dense(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    return train(folder, *arguments, module=DENSE_MODULE)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def one_dense_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dense(tmp_path_factory.mktemp("one"))[0]


def differences(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences of what is logged, and the largest of a parameter."""
    pairs = list(zip(ranks[0]["rows"], alone["rows"], strict=True))
    found = {
        name: max(abs(row[i] / expected[i] - 1) for row, expected in pairs) for i, name in enumerate(("loss", "norm"))
    }
    for metric in ("train/mtp_loss_1", "train/mtp_loss_2", "val/loss"):
        found[metric] = max(abs(rank["metrics"][metric] / alone["metrics"][metric] - 1) for rank in ranks)
    whole = {name: share["value"] for name, share in alone["parameters"].items()}
    found["parameter"] = max(
        float((share["value"] - part_of(whole[name], share)).abs().max())
        for rank in ranks
        for name, share in rank["parameters"].items()
    )
    assert set().union(*(rank["parameters"] for rank in ranks)) == set(whole)
    return found


def part_of(whole: Tensor, share: dict[str, Any]) -> Tensor:
    if "rows" in share:
        return whole[share["rows"]]
    if share["split"] is None:
        return whole
    dim, stride, ranks = share["split"]
    return torch.cat([block.chunk(ranks, dim)[share["rank"]] for block in whole.chunk(stride, dim)], dim)


def assert_equals_one_rank(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    found = differences(ranks, alone)
    print(", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    assert found.pop("parameter") <= PARAMETER_TOLERANCE
    assert max(found.values()) <= TOLERANCE, found
    for rank in ranks:
        assert rank["rows"] == ranks[0]["rows"]  # to the last bit on every rank
    # Nobody encodes what another does: together the ranks encode the images of the global batch, step by step.
    images = [sum(pack(step * PACKS + number).num_images for number in range(PACKS)) for step in range(STEPS)]
    assert [sum(counts) for counts in zip(*(rank["encoded"] for rank in ranks), strict=True)] == images
    assert alone["encoded"] == images


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_equals_one_rank(name: str, one_rank: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_one_rank(train(tmp_path, *(QUICK | SLOW)[name]), one_rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_dense_equals_one_rank(name: str, one_dense_rank: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_one_rank(dense(tmp_path, *DENSE[name]), one_dense_rank)


@pytest.mark.slow
def test_a_frozen_tower_has_no_backward_pass(tmp_path: Path) -> None:
    frozen = {"freeze_vision_model": True}
    alone, *ranks = (
        *train(tmp_path / "one", module=frozen),
        *train(tmp_path / "two", 2, {"context": 2}, module=frozen),
    )
    assert_equals_one_rank(ranks, alone)  # the projector still trains
    for rank in (alone, *ranks):
        assert set(rank["backwards"]) == {0}
