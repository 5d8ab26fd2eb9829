"""The balanced split against every split of small models, by the planner's own accounting of peak memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.lit_module import with_overrides
from step37_lit.planner.balance import balanced_split
from step37_lit.planner.estimate import chunk_operations
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.memory import stage_memory
from step37_lit.planner.work import Pack, Training


def model(layers: int, mtp: int = 0, moe: int = 0) -> Step37Config:
    """`tiny` with more layers, the last `moe` of them with experts."""
    kinds = ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(layers)]
    text = {
        "num_layers": layers,
        "num_mtp_layers": mtp,
        "mtp": mtp > 0,
        "layer_types": kinds + ["sliding_attention"] * mtp,
        "swiglu_limits": [None] * (layers + mtp),
        "swiglu_limits_shared": [None] * (layers + mtp),
        "moe_layers": list(range(layers - moe, layers)),
        "num_experts": 8,
        "top_k": 2,
        "expert_ffn_size": 64,
        "shared_expert_ffn_size": 64,
    }
    return with_overrides(Step37Config.preset("tiny"), text=text)


def splits(layers: int, chunks: int) -> Iterator[tuple[int, ...]]:
    for borders in itertools.combinations(range(1, layers), chunks - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *borders, layers)))


def largest_stage(config: Step37Config, layout: PlannedLayout, training: Training, counts: tuple[int, ...]) -> float:
    split = dataclasses.replace(layout, stage_layers=counts)
    return max(stage_memory(config, split, training, stage).peak for stage in range(layout.pipeline))


@pytest.mark.parametrize(("layers", "stages", "mtp", "moe"), [(8, 2, 0, 4), (9, 3, 2, 6), (10, 4, 0, 0), (7, 3, 1, 5)])
@pytest.mark.parametrize("pack", [(600, 2), (3000, 0)])
def test_no_split_has_a_smaller_largest_stage(
    layers: int, stages: int, mtp: int, moe: int, pack: tuple[int, int]
) -> None:
    config = model(layers, mtp, moe)
    layout = PlannedLayout(ranks=2 * stages, pipeline=stages, expert=2 if moe else 1)
    training = Training(Pack.uniform(config, pack[0], 150, pack[1]), microbatches=8)
    best = min(largest_stage(config, layout, training, counts) for counts in splits(layers, stages))
    found = largest_stage(config, layout, training, balanced_split(config, layout, training))
    # Moving single layers need not end in the best split of all, and padding is not in its sums. Measured: 1.0000.
    assert found <= 1.001 * best


def test_time_has_no_longer_chunk_than_any_split() -> None:
    config = model(9, mtp=2)
    layout = PlannedLayout(ranks=3, pipeline=3)
    training = Training(Pack.uniform(config, 600, 150, 4), microbatches=6)

    def longest(counts: tuple[int, ...]) -> float:
        split = dataclasses.replace(layout, stage_layers=counts)
        return max(chunk_operations(config, split, training, chunk) for chunk in range(3))

    assert longest(balanced_split(config, layout, training, "time")) == pytest.approx(
        min(longest(c) for c in splits(9, 3))
    )


def test_the_published_model_over_eight_stages() -> None:
    config = Step37Config.preset("flash", mtp=True)
    layout = PlannedLayout(ranks=64, pipeline=8, expert=8)
    training = Training(Pack.uniform(config, 4096, 1024, 4), 32, recompute="full", vision_recompute=True)
    counts = balanced_split(config, layout, training)
    assert sum(counts) == 45 and len(counts) == 8
    evenly = largest_stage(config, layout, training, (6, 6, 6, 6, 6, 5, 5, 5))
    assert largest_stage(config, layout, training, counts) < evenly


def test_virtual_stages_stay_even() -> None:
    config = Step37Config.preset("flash")
    layout = PlannedLayout(ranks=64, pipeline=4, virtual_pipeline=3, expert=16)
    training = Training(Pack.uniform(config, 4096, 1024, 1), 32, recompute="full", vision_recompute=True)
    by_time, by_memory = (balanced_split(config, layout, training, objective) for objective in ("time", "memory"))
    assert sum(by_memory) == sum(by_time) == 45
    assert max(abs(a - b) for a, b in zip(by_memory, by_time, strict=True)) <= 1
    assert largest_stage(config, layout, training, by_memory) <= largest_stage(config, layout, training, by_time)


def test_more_chunks_than_layers() -> None:
    config = model(3)
    training = Training(Pack.uniform(config, 64, 64, 0))
    with pytest.raises(ConfigError, match="at most 3"):
        balanced_split(config, PlannedLayout(ranks=4, pipeline=4), training)
