"""A run that goes on in another layout trains as one rank would have: losses, gradient norms, the last weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from step37_lit.checkpoint.tensors import TensorFolder
from tests.layouts.resharding import MOE, start

WORKER = Path(__file__).with_name("resume_worker.py")
HALF, STEPS = 10, 20
PAIRS = [("TP2+SP EP2", "PP2"), ("DP2", "TP2+SP ETP2"), ("CP2", "EP2"), ("PP2xVPP2", "CP2 EP2"), ("TP2+SP ETP2", "DP2")]
TOLERANCE = 1e-5  # relative, of losses and gradient norms
WEIGHTS_TOLERANCE = 1e-5  # absolute, at a learning rate of 2e-4


def train(folder: Path, cases: dict[str, tuple[str, int, Path | None]]) -> None:
    """Each case (layout, steps, source) in a folder of its name below `folder`; all of as many ranks."""
    jobs = []
    for name, (layout, steps, source) in cases.items():
        (folder / name).mkdir(parents=True)
        job: dict[str, Any] = {"folder": str(folder / name), "strategy": MOE[layout][1], "steps": steps}
        jobs.append(job | {"source": None if source is None else str(source)})
    (ranks,) = {MOE[layout][0] for layout, _, _ in cases.values()}
    start(folder, ranks, json.dumps(jobs), WORKER)


def rows(folder: Path) -> list[list[float]]:
    return json.loads((folder / "rows.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = TensorFolder(folder / "end" / "model")
    return {name: tensors.tensor(name) for name in sorted(tensors.names())}


@pytest.mark.slow
def test_goes_on_as_one_rank_would(tmp_path: Path) -> None:
    train(tmp_path / "one", {"straight": ("1", STEPS, None)})
    train(tmp_path / "first", {maker: (maker, HALF, None) for maker, _ in PAIRS})
    takers = {f"{maker} to {taker}": (taker, STEPS, tmp_path / "first" / maker / "end") for maker, taker in PAIRS}
    train(tmp_path / "second", takers)
    straight, expected = rows(tmp_path / "one" / "straight"), weights(tmp_path / "one" / "straight")
    assert len(straight) == STEPS
    for maker, taker in PAIRS:
        resumed = tmp_path / "second" / f"{maker} to {taker}"
        found = rows(tmp_path / "first" / maker) + rows(resumed)
        assert len(found) == STEPS
        loss, norm, rate = (
            max(abs(row[i] / alone[i] - 1) for row, alone in zip(found, straight, strict=True)) for i in range(3)
        )
        end = weights(resumed)
        assert end.keys() == expected.keys()
        weight = max(float((end[name] - expected[name]).abs().max()) for name in expected)
        print(f"{resumed.name}: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weight:.1e}")
        assert rate == 0
        assert max(loss, norm) <= TOLERANCE and weight <= WEIGHTS_TOLERANCE
