"""The caption metrics over two gloo processes: what one process gives, however the items are spread."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from step37_lit.metrics import CIDErD, CocoBLEU, CocoROUGEL

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = 1e-12  # measured 0
WORDS = "A man, a dog and the children don't run on grass (slowly) near water. \u00e9t\u00e9".split()  # noqa: SIM905


def batch(keys: list[int], given: bool = True) -> dict[str, Any]:
    """The items of these keys: captions of different lengths, 1 to 4 references."""
    preds, target = [], []
    for key in keys:
        generator = random.Random(key)
        sentences = [" ".join(generator.choices(WORDS, k=generator.randint(1, 15))) for _ in range(2 + key % 4)]
        preds.append(sentences[0])
        target.append(sentences[1:])
    return {"preds": preds, "target": target, "keys": keys if given else None}


# For each rank its batches.
CASES = {
    "uneven": [[batch([0, 1, 2]), batch([3]), batch([4, 5, 6, 7])], [batch([8, 9])]],
    "without keys": [[batch([0, 1, 2, 3, 4], given=False)], [batch([5, 6, 7, 8, 9], given=False)]],
    "empty rank": [[], [batch(list(range(10)))]],
    "rank with an empty update": [[batch(list(range(10)))], [batch([])]],
    "padded": [[batch([0, 2, 4, 6, 8]), batch([0])], [batch([1, 3, 5, 7, 9]), batch([1, 9])]],
    "both hold all": [[batch(list(range(10)))], [batch(list(range(5))), batch(list(range(5, 10)))]],
}
CONFLICT = [[batch([0, 1])], [batch([2]), {**batch([1]), "preds": ["Another caption."]}]]
NOTHING: list[list] = [[], []]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of both ranks; each runs all cases one after the other with the same metrics."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {"conflict": CONFLICT, "nothing": NOTHING, **CASES}
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests" / "caption_rank.py")]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"rank{rank}of2.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    results = {}
    for metric in (CocoBLEU(), CocoROUGEL(), CIDErD()):
        metric.update(**batch(list(range(10))))
        results[type(metric).__name__] = (metric.compute(), metric.per_item()[1])
    return results


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, ranks: list[dict], one_process: dict) -> None:
    assert ranks[0][case] == ranks[1][case]
    result, worst = ranks[0][case], 0.0
    keys = list(range(10)) if case == "without keys" else result["keys"]
    assert sorted(keys) == list(range(10))
    for name, (corpus, each) in one_process.items():
        found = torch.tensor(result["values"][name], dtype=torch.float64)
        found_each = torch.tensor(result["each"][name], dtype=torch.float64)
        worst = max(worst, (found - corpus).abs().max().item(), (found_each - each[keys]).abs().max().item())
    print(f"{case}: largest difference {worst:.1e} (at most {TOLERANCE})")
    assert worst <= TOLERANCE


def test_refusals_come_on_every_rank(ranks: list[dict]) -> None:
    """And the metrics work again after a reset: these cases ran first."""
    assert ranks[0]["conflict"] == ranks[1]["conflict"] and "item 1: expected the same" in ranks[0]["conflict"]["error"]
    assert ranks[0]["nothing"] == ranks[1]["nothing"] and "found 0" in ranks[0]["nothing"]["error"]
