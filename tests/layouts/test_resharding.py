"""A training state of any layout loads into any other: weights, moments and their step counts, to the last bit.

`make test-slow ARGS=tests/layouts/test_resharding.py` tries every ordered pair; the default run some of them. Each layout
trains three steps of its own, so that a state that was left from before, or taken from a neighbour, shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import spawn
from reshard_worker import digests

from step37_lit.megatron.checkpointing import read_training_state

WORKER = Path(__file__).with_name("reshard_worker.py")
STEPS = 3
# Ranks and the strategy's arguments. All with the same model: 4 layers, 4 of them MoE where experts are split.
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP4": (4, {}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 DP2": (4, {"tensor": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
}
MOE: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "TP2+SP EP2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "EP4": (4, {"expert": 4}),
    "EP2 DP2": (4, {"expert": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
    "TP2+SP PP2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}
MODELS: dict[str, tuple[dict, dict[str, Any]]] = {"dense": (DENSE, {}), "moe": (MOE, {"preset": "tiny_moe"})}


def run(folder: Path, model: str, name: str, sources: list[str]) -> None:
    layouts, module = MODELS[model]
    devices, strategy = layouts[name]
    folder.mkdir(parents=True)
    job = {"folder": str(folder), "devices": devices, "strategy": strategy, "module": module}
    job |= {"sources": sources, "steps": STEPS}
    done = spawn.run([sys.executable, str(WORKER), json.dumps(job)], timeout=300)
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"


def check_pairs(root: Path, model: str, makers: list[str], takers: list[str]) -> int:
    """Every checkpoint of `makers` through each of `takers`; gives the number of pairs."""
    made = {name: root / "makers" / name for name in makers}
    for name, folder in made.items():
        run(folder, model, name, [])
    expected = {name: digests(folder / "made") for name, folder in made.items()}
    steps = {name: read_training_state(f / "made")["optimizer_states"][0]["steps"] for name, f in made.items()}
    pairs = 0
    for taker in takers:
        folder = root / "takers" / taker
        run(folder, model, taker, [str(f / "made") for f in made.values()])
        for maker in makers:
            again = folder / maker
            assert digests(again) == expected[maker], f"{maker} -> {taker}"
            assert read_training_state(again)["optimizer_states"][0]["steps"] == steps[maker], f"{maker} -> {taker}"
            assert set(steps[maker].values()) == {STEPS}
            pairs += maker != taker
    moments = [name for name in expected[makers[0]] if "/exp_avg." in name]
    assert len(moments) > 20
    print(f"{model}: {pairs} ordered pairs among {len(makers)} and {len(takers)} layouts, bit-equal")
    return pairs


@pytest.mark.parametrize(("model", "makers", "takers"), [("dense", ["DP2", "PP2"], ["TP2"]), ("moe", ["EP2"], ["PP2"])])
def test_some_pairs(model: str, makers: list[str], takers: list[str], tmp_path: Path) -> None:
    assert check_pairs(tmp_path, model, makers, takers) == len(makers) * len(takers)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_ordered_pair(model: str, tmp_path: Path) -> None:
    layouts = list(MODELS[model][0])
    assert check_pairs(tmp_path, model, layouts, layouts) == len(layouts) * (len(layouts) - 1) >= 56
