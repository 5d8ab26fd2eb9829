"""Generation over two ranks: the same tokens as on one, on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import spawn

WORKER = Path(__file__).with_name("generate_worker.py")
PROMPTS = 5
SETTINGS = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 6, "num_beams": 3},
    {"max_new_tokens": 8, "temperature": 1.0, "num_samples": 4},  # 8 rows: experts matrix by matrix
    {"max_new_tokens": 12, "speculate": 2},
    {"max_new_tokens": 8, "temperature": 1.0, "num_samples": 2, "speculate": 1},
]


def generate(folder: Path, ranks: int, preset: str = "tiny", **layout: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    job = {"folder": str(folder), "layout": layout, "preset": preset, "prompts": PROMPTS, "settings": SETTINGS}
    job["shared_out"] = layout.get("tensor", 1) * layout.get("pipeline", 1) < ranks
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = spawn.run([*torchrun, str(WORKER), json.dumps(job)])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    (rank,) = generate(tmp_path_factory.mktemp("alone") / request.param, 1, request.param)
    assert len(rank["found"]) == PROMPTS * len(SETTINGS)
    assert rank["steps"][3] > 1.2  # drafts are taken, and not all: 1.9 and 1.5
    for key, drafted in rank["found"].items():
        if str(SETTINGS[3]) in key:
            assert drafted[0][0] == rank["found"][key.replace(str(SETTINGS[3]), str(SETTINGS[0]))][0][0]
    return request.param, rank["found"]


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tensor and sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline": {"pipeline": 2},
    "virtual stages": {"pipeline": 2, "virtual_pipeline": 2},
    "tensor, of experts too": {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2},
    "data": {},
    "expert": {"expert": 2},  # ranks with 3 and 2 prompts, whose rows end at different steps
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_generate_what_one_does(alone: tuple[str, dict[str, Any]], name: str, tmp_path: Path) -> None:
    preset, expected = alone
    if name in ("expert", "tensor, of experts too", "virtual stages") and preset == "tiny":
        pytest.skip("no experts, and two layers only")
    ranks = generate(tmp_path / "two", 2, preset, **LAYOUTS[name])
    for rank in ranks:
        assert rank["state"] == [True, "sequence_parallel" in LAYOUTS[name]]  # left as it was
    shared_out = name in ("data", "expert")
    prompts = (3, 2) if shared_out else (PROMPTS, PROMPTS)
    assert [len(rank["found"]) for rank in ranks] == [number * len(SETTINGS) for number in prompts]
    for key in expected:
        held = [rank["found"][key] for rank in ranks if key in rank["found"]]
        assert len(held) == (1 if shared_out else 2)
        for found in held:
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected[key]]
            for (_, logprob), (_, other) in zip(found, expected[key], strict=True):
                assert logprob == pytest.approx(other, abs=1e-4)
