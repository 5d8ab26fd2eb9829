"""Layouts that fit a number of GPUs, ranked by the estimated time of a step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from step37_lit.config import Step37Config
from step37_lit.errors import ConfigError
from step37_lit.planner.activations import RECOMPUTED
from step37_lit.planner.balance import Objective, balanced_split
from step37_lit.planner.estimate import Plan, plan
from step37_lit.planner.hardware import Hardware
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.memory import stage_memory
from step37_lit.planner.weights import FP32_BYTES, ITEM_BYTES, rank_weights
from step37_lit.planner.work import Training

MOST_STAGES = 16
MOST_CHUNKS_OF_STAGE = 3
LEAST_TOKENS_OF_CONTEXT_RANK = 8192


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        tried: Layouts that divide the model and the GPUs.
        plans: The fastest plan of each layout that fits, fastest first.
    """

    tried: int
    plans: list[Plan]


def search(config: Step37Config, ranks: int, global_batch: int, training: Training, hardware: Hardware) -> Search:
    """Tries every layout over `ranks` GPUs, each with the recomputation that adds fewest operations where it fits.

    Stages are split by time, and by memory where that does not fit.

    Args:
        config: The model.
        ranks: GPUs.
        global_batch: Packs of a step, over all ranks.
        training: Its pack, dtype and frozen parts; micro-batches and recomputation are the search's.
        hardware: What has to fit and how fast it is.
    """
    tried = 0
    plans: list[Plan] = []
    for layout in layouts(config, ranks, training.pack.tokens, hardware.gpus_per_node):
        microbatches = global_batch // layout.data
        if microbatches * layout.data != global_batch:
            continue
        if layout.virtual_pipeline > 1 and microbatches % layout.pipeline != 0:
            continue  # megatron's interleaved schedule takes whole rounds
        tried += 1
        if _least_state(config, layout, training) > hardware.usable_bytes:
            continue
        modes = _modes(config, dataclasses.replace(training, microbatches=microbatches))
        found = (fit for mode in modes if (fit := _fitting(config, layout, mode, hardware)) is not None)
        plans += itertools.islice(found, 1)
    return Search(tried, sorted(plans, key=lambda found: found.step_seconds))


def layouts(config: Step37Config, ranks: int, tokens: int, gpus_per_node: int) -> Iterator[PlannedLayout]:
    """Layouts that divide the model and the ranks, their stages not split yet.

    Tensor ranks stay on a node; context ranks are tried where packs are long.
    """
    text = config.text
    for tensor in _divisors(min(ranks, gpus_per_node)):
        for pipeline in (p for p in _divisors(ranks // tensor) if p <= min(MOST_STAGES, text.num_layers)):
            for context in _divisors(ranks // tensor // pipeline):
                if context > 1 and (tokens % (2 * context) or tokens // context < LEAST_TOKENS_OF_CONTEXT_RANK):
                    continue
                splits = itertools.product(_divisors(text.num_experts), {1, tensor}) if text.moe_layers else [(1, 1)]
                for expert, expert_tensor in splits:
                    for chunks in range(1, MOST_CHUNKS_OF_STAGE + 1 if pipeline > 1 else 2):
                        sizes = (ranks, tensor, pipeline, chunks, expert, expert_tensor, context)
                        layout = PlannedLayout(*sizes, sequence_parallel=tensor > 1)
                        if chunks * pipeline <= text.num_layers and _divides(config, layout):
                            yield layout


def _divides(config: Step37Config, layout: PlannedLayout) -> bool:
    try:
        layout.validate_sizes(config)
    except ConfigError:
        return False
    return True


def _least_state(config: Step37Config, layout: PlannedLayout, training: Training) -> float:
    """Bytes of weights, gradients and optimizer if they were spread evenly over the stages."""
    item, moments = ITEM_BYTES[training.dtype], 2 * FP32_BYTES + (FP32_BYTES if training.dtype == "bf16" else 0)
    total = 0.0
    for weight in rank_weights(config, layout.tensor, layout.expert, layout.expert_tensor):
        trained = FP32_BYTES + moments / (layout.expert_shards if weight.expert else layout.dense_shards)
        total += weight.numel * (item + trained * (weight.part not in training.frozen))
    return total / layout.pipeline


def _modes(config: Step37Config, training: Training) -> list[Training]:
    """Every recomputation, from the one that adds fewest operations on."""
    forward = training.pack.flops(config)
    modes = [
        dataclasses.replace(training, recompute=recompute, recompute_layers=None, vision_recompute=vision)
        for recompute in RECOMPUTED
        for vision in ((False, True) if training.pack.images and "vision" not in training.frozen else (False,))
    ]
    return sorted(modes, key=lambda mode: mode.passes.dot(forward))


def _fitting(config: Step37Config, layout: PlannedLayout, training: Training, hardware: Hardware) -> Plan | None:
    objectives: tuple[Objective, ...] = ("time", "memory") if layout.pipeline > 1 else ("time",)
    for objective in objectives:
        split = dataclasses.replace(layout, stage_layers=balanced_split(config, layout, training, objective))
        memory = tuple(stage_memory(config, split, training, stage) for stage in range(layout.pipeline))
        peaks = [stage.peak for stage in memory]
        if max(peaks) <= hardware.usable_bytes:
            return plan(config, split, training, hardware, memory)
        if sum(peaks) / len(peaks) > hardware.usable_bytes:
            return None  # moving layers to other stages cannot help
    return None


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
