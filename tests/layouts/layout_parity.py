"""Layouts against one rank: which there are, and what they are measured with.

One model (experts, pictures, MTP layers), one set of weights (drawn by their names), one global batch a step, whose
packs differ in length. Every layout takes the same steps; losses, gradient norms and the weights at the end are
compared with those of one rank.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import spawn

WORKER = Path(__file__).with_name("parity_worker.py")
STEPS, FAULT_STEPS = 20, 5
LAYERS = 4  # of the decoder; the last two have experts
# At a rate of 1e-4 the weights move by up to 2e-3 in these steps. Largest differences measured over the whole table in
# docs/layouts.md: see its last line.
LOSS_TOLERANCE = NORM_TOLERANCE = WEIGHTS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layout:
    """Ranks, and the arguments of `ParallelLayout` and of `Recompute` that are not their defaults.

    Args:
        overlap: Of the exchange with data-parallel ranks.
        dense: Without experts.
        broken: A fault of `broken_layouts.py`.
    """

    ranks: int
    split: dict[str, Any] = field(default_factory=dict)
    recompute: dict[str, Any] = field(default_factory=dict)
    overlap: bool = False
    dense: bool = False
    broken: str | None = None

    @property
    def name(self) -> str:
        """Such as `TP2+SP PP2xVPP2 EP2 DP1`."""
        split = self.split
        tensor, pipeline = split.get("tensor", 1), split.get("pipeline", 1)
        context = split.get("context", 1)
        parts = [f"TP{tensor}{'+SP' if split.get('sequence_parallel') else ''}"] if tensor > 1 else []
        if pipeline > 1:
            parts.append(f"PP{pipeline}" + (f"xVPP{split['virtual_pipeline']}" if "virtual_pipeline" in split else ""))
        if "pipeline_layout" in split:
            parts.append(str(split["pipeline_layout"]))
        parts += [f"CP{context}"] if context > 1 else []
        parts += [f"{name}{split[key]}" for name, key in (("EP", "expert"), ("ETP", "expert_tensor")) if key in split]
        data = self.ranks // (tensor * pipeline * context)
        parts += [f"DP{data}"] if data > 1 else []
        parts += ["overlap"] if self.overlap else []
        parts += ["dense"] if self.dense else []
        parts += ["recompute: " + ", ".join(self._recomputed)] if self.recompute else []
        return " ".join(parts) or "one rank"

    @property
    def _recomputed(self) -> list[str]:
        mode, layers = self.recompute.get("mode", "none"), self.recompute.get("layers")
        found = [mode] if mode != "none" else []
        found += [f"{layers} layer of a stage"] if layers else []
        return found + (["vision"] if self.recompute.get("vision") else [])


# The short list of the default tests: each kind of parallelism, and the pairs that have gone wrong before.
SHORT = [
    Layout(2, {"tensor": 2}),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    Layout(2, {"pipeline": 2, "pipeline_layout": [1, 3]}, {"mode": "full", "layers": 1}),
    Layout(2, {"expert": 2}, {"mode": "selective"}, overlap=True),
    Layout(2, {"tensor": 2, "sequence_parallel": True, "expert": 2}, {"mode": "full", "vision": True}),
]


def combinations() -> list[Layout]:
    """Every one on up to four ranks that the model can be split by."""
    layouts = []
    for ranks, tensor, sequence, (pipeline, virtual), context, expert, expert_tensor in itertools.product(
        (1, 2, 4), (1, 2), (False, True), ((1, None), (2, None), (2, 2), (4, None)), (1, 2, 4), (1, 2, 4), (1, 2)
    ):
        used, of_experts = tensor * pipeline * context, expert * expert_tensor
        if ranks % used or (ranks // pipeline) % of_experts:
            continue
        if tensor == 1 and (sequence or expert_tensor > 1):
            continue
        split: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "context": context}
        split |= {"expert": expert, "expert_tensor": expert_tensor}
        split = {name: size for name, size in split.items() if size > 1}
        split |= {"sequence_parallel": True} if sequence else {}
        split |= {"virtual_pipeline": virtual} if virtual else {}
        layouts.append(Layout(ranks, split))
    return layouts


def all_layouts() -> list[Layout]:
    """Every combination, uneven pieces, recomputation, overlap, and context ranks of the model without experts."""
    layouts = combinations()
    dense = [replace(each, dense=True) for each in layouts if "context" in each.split and "expert" not in each.split]
    layouts += [each for each in dense if "expert_tensor" not in each.split]
    uneven = [
        Layout(2, {"pipeline": 2, "pipeline_layout": [1, 3]}),
        Layout(2, {"pipeline": 2, "pipeline_layout": [3, 1]}),
        Layout(4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "pipeline_layout": [1, 3], "expert": 2}),
    ]
    modes = [{"mode": "selective"}, {"mode": "full"}, {"mode": "full", "layers": 1}, {"mode": "none", "vision": True}]
    splits: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
        (4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    ]
    overlapping = [
        Layout(2, overlap=True),
        Layout(2, {"expert": 2}, overlap=True),
        Layout(4, {"pipeline": 2, "virtual_pipeline": 2}, overlap=True),
        Layout(4, {"context": 2}, overlap=True),
        Layout(4, {"tensor": 2, "sequence_parallel": True, "expert": 2}, overlap=True),
    ]
    recomputing = [Layout(ranks, split, mode) for ranks, split in splits for mode in modes]
    return layouts + uneven + overlapping + recomputing


@dataclass(frozen=True)
class Difference:
    """Largest differences from one rank over all steps and ranks.

    Args:
        loss: Relative, of the main loss and the MTP layers' losses.
        norm: Relative, of the gradient norm before clipping.
        weights: Absolute, of a weight after the last step.
        bias: Absolute, of a router's bias after the last step, which moves in steps of 1e-3.
    """

    loss: float
    norm: float
    weights: float
    bias: float

    def within(self) -> bool:
        figures = (self.loss, self.norm, self.weights)
        limits = (LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHTS_TOLERANCE)
        return all(figure <= limit for figure, limit in zip(figures, limits, strict=True)) and self.bias <= 1e-6


def reference(folder: Path, steps: int = STEPS, models: Sequence[bool] = (False,)) -> None:
    """Trains on one rank and leaves its figures and weights in the folder.

    Args:
        folder: For `measure`.
        steps: Of its layouts; the weights after the faults' steps are left too.
        models: Which are trained: with experts (False), dense (True).
    """
    alone = [Layout(1, dense=dense) for dense in models]
    (found,) = _run(folder, alone, steps, keep=[min(steps, FAULT_STEPS), steps])
    for layout, figures in zip(alone, found, strict=True):
        _reference_file(folder, layout).write_text(json.dumps(figures))


def measure(folder: Path, layouts: Sequence[Layout], steps: int = STEPS) -> list[Difference]:
    """Trains in each layout (all with the same number of ranks) and compares with the folder's `reference`."""
    found = _run(folder, layouts, steps)
    differences = []
    for number, layout in enumerate(layouts):
        alone = json.loads(_reference_file(folder, layout).read_text())
        differences.append(_difference([rank[number] for rank in found], alone))
    return differences


def _reference_file(folder: Path, layout: Layout) -> Path:
    return folder / f"reference_{'dense' if layout.dense else 'experts'}.json"


def _difference(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> Difference:
    expected = alone["rows"][: len(ranks[0]["rows"])]
    pairs = [pair for rank in ranks for pair in zip(rank["rows"], expected, strict=True)]
    losses = [a / b - 1 for row, expected in pairs for a, b in zip(row["losses"], expected["losses"], strict=True)]
    norms = [row["norm"] / expected["norm"] - 1 for row, expected in pairs]
    names = set().union(*(rank["names"] for rank in ranks))
    assert names == set(alone["names"]), f"not held by any rank: {set(alone['names']) - names}"
    weights, biases = ([rank[kind] for rank in ranks] for kind in ("weights", "bias"))
    return Difference(*(_largest(values) for values in (losses, norms, weights, biases)))


def _largest(values: list[float]) -> float:
    """Infinity where any is not a number, which `max` may pass over."""
    return math.inf if any(math.isnan(value) for value in values) else max(abs(value) for value in values)


def _steps(layout: Layout, steps: int) -> int:
    """A fault shows at once."""
    return steps if layout.broken is None else min(steps, FAULT_STEPS)


def _run(folder: Path, layouts: Sequence[Layout], steps: int, keep: Sequence[int] = ()) -> list[list[dict[str, Any]]]:
    (ranks,) = {layout.ranks for layout in layouts}
    plain = [asdict(layout) for layout in layouts]
    job = {"folder": str(folder), "layouts": plain, "steps": [_steps(layout, steps) for layout in layouts]}
    job["keep"] = list(keep)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = spawn.run([*torchrun, str(WORKER), json.dumps(job)], timeout=60.0 + 60.0 * len(layouts))
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
