"""Freezing schedules over several ranks: bits of what is frozen, layouts against one rank, exact resume.

Parameters of the tests' model are spread over both ranks of the distributed optimizer, and some are cut by the border
between them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import spawn

WORKER = Path(__file__).with_name("freeze_worker.py")
TEXT = ("embedding.", "decoder.", "output_layer.")
LATE = ("decoder.layers.1.", "decoder.final_layernorm.", "output_layer.")
STAGES: list[dict[str, Any]] = [
    {"name": "projector", "until": {"step": 20}, "train": {"projector": 1.0}},
    {
        "name": "text",
        "until": {
            "plateau": {"metric": "val/loss", "patience": 1, "min_delta": 100.0}
        },  # the second validation ends it
        "train": {"text_decoder": {"factor": 0.5, "gradual": {"every_steps": 2}}},
        "warmup_steps": 2,
    },
    {"name": "vision", "train": {"vision_tower": 0.1, "text_decoder": 0.5}},
]
VALIDATIONS = 8  # steps between them: at 24 and 32 in the second stage
STEPS = 36
# What trains from step to step: (first, behind the last, name prefixes).
TRAINED = [(0, 20, ("align_projector.",)), (20, 22, LATE), (22, 32, TEXT), (32, 36, ("vision_model.", *TEXT))]
# Measured: 7e-8 (loss) and 3e-7 (norm) over these steps.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


def train(
    folder: Path,
    devices: int,
    strategy: dict[str, Any] | None = None,
    save: int = 0,
    ckpt_path: Path | None = None,
    stages: list[dict[str, Any]] | None = None,
    **trainer: Any,
) -> list[dict[str, Any]]:
    trainer = {"max_steps": STEPS, "val_check_interval": VALIDATIONS, "limit_val_batches": 1} | trainer
    job = {"folder": str(folder), "devices": devices, "strategy": strategy or {}, "trainer": trainer, "save": save}
    job |= {"stages": stages or STAGES, "ckpt_path": None if ckpt_path is None else str(ckpt_path)}
    done = spawn.run([sys.executable, str(WORKER), json.dumps(job)])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("data")
    return folder, train(folder, 2, save=7)


def assert_freezes_as_planned(rank: dict[str, Any]) -> None:
    for first, last, prefixes in TRAINED:
        before, after = rank["digests"][first], rank["digests"][last]
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if name.startswith(prefixes)}, (first, last)
    assert rank["schedule"]["starts"] == [0, 20, 32]


def assert_equals_one_rank(ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["rows"] == ranks[0]["rows"]  # to the last bit on every rank
        assert rank["schedule"] == ranks[0]["schedule"]
    pairs = list(zip(ranks[0]["rows"], one_rank["rows"], strict=True))
    for column, name, tolerance in ((0, "loss", LOSS_TOLERANCE), (1, "norm", NORM_TOLERANCE)):
        largest = max(abs(found[column] - expected[column]) / expected[column] for found, expected in pairs)
        print(f"largest relative difference of the {name}: {largest:.1e}")
        assert largest <= tolerance
    assert [row[2] for row in ranks[0]["rows"]] == [row[2] for row in one_rank["rows"]]  # rates


def test_one_rank(one_rank: dict[str, Any]) -> None:
    assert_freezes_as_planned(one_rank)
    assert len(one_rank["rows"]) == STEPS


def test_data_parallel(data_parallel: tuple, one_rank: dict[str, Any]) -> None:
    _, ranks = data_parallel
    for rank in ranks:
        assert_freezes_as_planned(rank)
        assert rank["digests"] == ranks[0]["digests"]
        assert set(rank["moments"]) <= {4.0, 14.0, 16.0}  # vision tower, first and last layer of the decoder
    # Each parameter's moments are on one rank, or on both where the border cuts it; the projector has none.
    assert len(ranks[0]["moments"]) + len(ranks[1]["moments"]) >= len(ranks[0]["digests"][0]) - 1
    assert min(len(rank["moments"]) for rank in ranks) > 0
    assert_equals_one_rank(ranks, one_rank)


@pytest.mark.parametrize(
    "strategy",
    [{"tensor": 2}, {"pipeline": 2}, pytest.param({"tensor": 2, "sequence_parallel": True}, marks=pytest.mark.slow)],
    ids=["tensor", "pipeline", "tensor and sequence"],
)
def test_model_parallel(strategy: dict[str, Any], one_rank: dict[str, Any], tmp_path: Path) -> None:
    ranks = train(tmp_path, 2, strategy)
    for rank in ranks:
        assert_freezes_as_planned(rank)
    assert set().union(*(rank["digests"][0] for rank in ranks)) == set(one_rank["digests"][0])
    assert_equals_one_rank(ranks, one_rank)


# In every stage; 21 before a layer begins, 28 between the validations of a plateau.
@pytest.mark.parametrize("stop", [7, pytest.param(21, marks=pytest.mark.slow), 28, 35])
def test_resume_is_exact(data_parallel: tuple, tmp_path: Path, stop: int) -> None:
    folder, straight = data_parallel
    ranks = train(tmp_path, 2, ckpt_path=folder / f"at{stop}.ckpt")
    for rank, expected in zip(ranks, straight, strict=True):
        assert rank["rows"] == expected["rows"][stop:]
        assert rank["digests"] == expected["digests"][stop:]
        assert rank["schedule"] == expected["schedule"]
        assert rank["moments"] == expected["moments"]


def test_bf16(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "until": {"step": 2}, "train": {"text_decoder": 1.0}},
        {"name": "b", "until": {"step": 4}, "train": {"vision_tower": 1.0}},
        {"name": "c", "train": {"text_decoder": 1.0}},
    ]
    ranks = train(tmp_path, 2, stages=stages, max_steps=6, precision="bf16-true", limit_val_batches=0)
    for rank in ranks:
        for first, last, prefixes in ((0, 2, TEXT), (2, 4, ("vision_model.",)), (4, 6, TEXT)):
            before, after = rank["digests"][first], rank["digests"][last]
            changed = {name for name in before if before[name] != after[name]}
            assert changed and all(name.startswith(prefixes) for name in changed)
            assert len(changed) > 8  # a step may be too small for a bf16 weight of 1
        assert set(rank["moments"]) == {2.0}
