"""A hub folder in every layout: each rank reads its share and no more, and what is saved exports bit-equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import spawn

from step37_lit.hub.exporting import export_hub
from step37_lit.hub.importing import import_hub
from tests.hub_folders import assert_same_tensors, every_feature, read_hub, write_hub

WORKER = Path(__file__).with_name("hub_worker.py")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2, "expert_tensor": 2},
    "expert": {"expert": 2},
    "pipeline": {"pipeline": 2},
}


def on_ranks(folder: Path, hubs: list[Path], checkpoint: Path, **layout: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    ranks = len(hubs)
    job = {"folder": str(folder), "hubs": list(map(str, hubs)), "checkpoint": str(checkpoint), "layout": layout}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = spawn.run([*torchrun, str(WORKER), json.dumps(job)])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("imported")
    tensors = write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    return folder, tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_through_a_layout(imported: tuple[Path, dict], name: str, tmp_path: Path) -> None:
    folder, tensors = imported
    ranks = on_ranks(tmp_path / "two", [folder / "hub"] * 2, folder / "ckpt", **LAYOUTS[name])
    whole = sum(tensor.nbytes for tensor in tensors.values())
    for rank in ranks:
        assert rank["differing"] == [] and rank["weights"] > 40
        # What a rank reads is what it holds: bf16 in the files and in memory.
        assert rank["read"] == rank["held"] < whole
    print({"layout": name, "read by rank": [rank["read"] for rank in ranks], "whole": whole})
    if name == "pipeline":
        assert sum(rank["read"] for rank in ranks) == whole
    export_hub(tmp_path / "two" / "saved", tmp_path / "hub")
    assert_same_tensors(read_hub(tmp_path / "hub"), tensors)


@pytest.mark.slow
def test_all_ranks_end_where_one_cannot_read(imported: tuple[Path, dict], tmp_path: Path) -> None:
    """The second rank's copy of the folder is cut short; the first one's is whole."""
    folder, _ = imported
    broken = tmp_path / "hub"
    write_hub(broken, every_feature())
    file = broken / "model-00002-of-00003.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    first, second = on_ranks(tmp_path / "two", [folder / "hub", broken], folder / "ckpt", pipeline=2)
    assert first["error"] == "weights: expected all ranks to read theirs, found '1 that could not'"
    assert f"{file}: the file: expected" in second["error"]
