"""Decoder layers of each pipeline chunk, so that no stage needs much more memory, or time, than others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from step37_lit.config import Step37Config
from step37_lit.errors import require
from step37_lit.flops import decoder_flops
from step37_lit.planner.activations import ActivationTable
from step37_lit.planner.estimate import chunk_operations
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.memory import peak_in_flight
from step37_lit.planner.weights import FP32_BYTES, ITEM_BYTES, rank_weights
from step37_lit.planner.work import Recompute, Training

Objective = Literal["memory", "time"]
Counts = tuple[int, ...]


def balanced_split(
    config: Step37Config, layout: PlannedLayout, training: Training, objective: Objective = "memory"
) -> Counts:
    """Decoder layers of each chunk, in the model's order (chunk c is on stage c % pipeline).

    "memory" minimises the largest stage's peak memory (state, activations of the micro-batches in flight, working
    space), "time" the longest chunk's operations; then the second largest, and so on. Virtual stages run by turns, and
    uneven ones would wait for each other: with them "memory" moves a chunk by a layer at most from what "time" gives
    it. Embedding and vision tower stay in front, head and MTP layers behind. Single layers are moved while that helps;
    tests/test_planner_balance.py compares with all splits of small models.

    Args:
        config: The model.
        layout: How it is split; its `stage_layers` are not looked at.
        training: What runs.
        objective: What no stage is to have much of.

    Raises:
        ConfigError: more chunks than decoder layers.
    """
    total, chunks = config.text.num_layers, layout.chunks
    require(chunks <= total, "pipeline x virtual_pipeline", f"at most {total} (text.num_layers)", chunks)
    equal = tuple(total // chunks + (chunk < total % chunks) for chunk in range(chunks))
    costs = _Costs(config, dataclasses.replace(layout, stage_layers=equal), training)
    by_time = _descend(equal, costs.times, reach=total)
    if objective == "time":
        return by_time
    return _descend(by_time, costs.memories, reach=total if layout.virtual_pipeline == 1 else 1)


def _descend(start: Counts, cost: Callable[[Counts], list[float]], reach: int) -> Counts:
    """Moves single layers while the costs, largest first, get smaller; no chunk by more than `reach` in all."""
    counts, best = start, cost(start)
    while True:
        moves = (m for m in _moves(counts) if all(abs(a - b) <= reach for a, b in zip(m, start, strict=True)))
        better = next((moved for moved in moves if cost(moved) < best), None)
        if better is None:
            return counts
        counts, best = better, cost(better)


def _moves(counts: Counts) -> Iterator[Counts]:
    """One layer from any chunk to any other; no chunk is left empty."""
    for source in range(len(counts)):
        for target in range(len(counts)):
            if source != target and counts[source] > 1:
                changed = list(counts)
                changed[source] -= 1
                changed[target] += 1
                yield tuple(changed)


class _Costs:
    """What stages and chunks have to bear under a split: sums of what single layers cost, without padding."""

    def __init__(self, config: Step37Config, layout: PlannedLayout, training: Training):
        self.layout, self.training = layout, training
        table, layers = ActivationTable(config, layout, training), range(config.text.num_layers)
        spans = layout.layers(config.text)
        # Both of a layer that the training's recomputation reaches, and of one behind it.
        modes: tuple[Recompute, Recompute] = (training.recompute, "none")
        self.kept = [[table.layer_bytes(layer, mode) for layer in layers] for mode in modes]
        self.kept_beside = [
            table.chunk_bytes(chunk) - self._sum(self.kept, slice(span.start, span.stop))
            for chunk, span in enumerate(spans)
        ]
        self.working = [table.working_bytes(chunk) for chunk in range(layout.chunks)]
        self.state = [0.0 for _ in range(len(layers) + 2)]  # [-1] in front of the decoder, [-2] behind it
        per_element = ITEM_BYTES[training.dtype] + FP32_BYTES
        moments = 2 * FP32_BYTES + (FP32_BYTES if training.dtype == "bf16" else 0)
        for weight in rank_weights(config, layout.tensor, layout.expert, layout.expert_tensor):
            shards = layout.expert_shards if weight.expert else layout.dense_shards
            trained = per_element + moments / shards
            self.state[weight.unit] += weight.numel * (
                ITEM_BYTES[training.dtype] if weight.part in training.frozen else trained
            )
        forward = [decoder_flops(config.text, training.pack.lengths, [layer]) for layer in layers]
        plain = dataclasses.replace(training, recompute="none").passes
        self.operations = [[passes.dot(flops) for flops in forward] for passes in (training.passes, plain)]
        self.operations_beside = [
            chunk_operations(config, layout, training, chunk) - self._sum(self.operations, slice(span.start, span.stop))
            for chunk, span in enumerate(spans)
        ]

    def _sum(self, costs: list[list[float]], span: slice) -> float:
        """Of a chunk's layers, the first of which are recomputed."""
        reach = self.training.recompute_layers
        border = span.stop if reach is None else min(span.stop, span.start + reach)
        return sum(costs[0][span.start : border]) + sum(costs[1][border : span.stop])

    def memories(self, counts: Counts) -> list[float]:
        """Peak bytes of each stage, largest first."""
        spans = _spans(counts)
        return sorted((self._memory(stage, spans) for stage in range(self.layout.pipeline)), reverse=True)

    def times(self, counts: Counts) -> list[float]:
        """Operations of each chunk for a micro-batch, largest first."""
        spans = _spans(counts)
        own = [self._sum(self.operations, span) + self.operations_beside[chunk] for chunk, span in enumerate(spans)]
        return sorted(own, reverse=True)

    def _memory(self, stage: int, spans: list[slice]) -> float:
        chunks = self.layout.chunks_of_stage(stage)
        kept = [self._sum(self.kept, spans[chunk]) + self.kept_beside[chunk] for chunk in chunks]
        state = sum(sum(self.state[spans[chunk]]) for chunk in chunks)
        state += self.state[-1] * (0 in chunks) + self.state[-2] * (self.layout.chunks - 1 in chunks)
        activations, _ = peak_in_flight(kept, self.layout, self.training, stage)
        return state + activations + max(self.working[chunk] for chunk in chunks)


def _spans(counts: Counts) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
