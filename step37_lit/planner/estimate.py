"""`Plan`: memory, traffic and estimated time of a layout."""

from __future__ import annotations

from dataclasses import dataclass

from step37_lit.config import Step37Config
from step37_lit.flops import Flops, decoder_flops, head_flops, mtp_flops, vision_flops
from step37_lit.planner.communication import Traffic, data_traffic, microbatch_traffic, optimizer_seconds, seconds
from step37_lit.planner.hardware import Hardware
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.memory import StageMemory, stage_memory
from step37_lit.planner.work import Pack, Training


@dataclass(frozen=True)
class Plan:
    """What a layout needs and how long its step is estimated to take.

    Args:
        layout: The layout.
        training: What runs in it.
        memory: Of each pipeline stage.
        traffic: Bytes sent in a step by the rank that sends most.
        traffic_seconds: Time of that stage's traffic in a step.
        compute_seconds: Forward and backward of a step on the busiest stage, recomputation included.
        step_seconds: Of the whole step.
        bubble: Share of the step in which the busiest stage waits for the pipeline to fill and drain.
        imbalance: Share of the busiest stage's time that the average stage does not need.
        model_tflops: Model operations (forward and backward, nothing twice) a second and GPU, in TFLOP/s.
        tokens_per_second: Over all ranks.
    """

    layout: PlannedLayout
    training: Training
    memory: tuple[StageMemory, ...]
    traffic: Traffic
    traffic_seconds: Traffic
    compute_seconds: float
    step_seconds: float
    bubble: float
    imbalance: float
    model_tflops: float
    tokens_per_second: float

    @property
    def peak_bytes(self) -> float:
        return max(stage.peak for stage in self.memory)

    def fits(self, hardware: Hardware) -> bool:
        return self.peak_bytes <= hardware.usable_bytes


def plan(
    config: Step37Config,
    layout: PlannedLayout,
    training: Training,
    hardware: Hardware,
    memory: tuple[StageMemory, ...] | None = None,
) -> Plan:
    """Estimates a valid layout. Communication is taken not to overlap with anything; `memory` is computed if None.

    A step takes the busiest stage's time for every micro-batch, the other stages' once to fill and drain the pipeline
    (divided by the chunks of a stage), the exchange of gradients and weights, and the optimizer.
    """
    stages = range(layout.pipeline)
    memory = memory or tuple(stage_memory(config, layout, training, stage) for stage in stages)
    traffic = [_stage_traffic(config, layout, training, stage) for stage in stages]
    data = [data_traffic(config, layout, training, stage) for stage in stages]
    times = [seconds(layout, hardware, traffic[stage], data[stage]) for stage in stages]
    compute = [_stage_compute(config, layout, training, hardware, stage) for stage in stages]
    busy = [compute[stage] + times[stage].total - times[stage].data for stage in stages]
    longest = max(busy)
    waiting = (sum(busy) - longest) / layout.virtual_pipeline
    pipeline_seconds = training.microbatches * longest + waiting
    ends = max(times[stage].data + optimizer_seconds(memory[stage].state, hardware) for stage in stages)
    step = pipeline_seconds + ends
    slowest = busy.index(longest)
    packs = training.microbatches * layout.data
    operations = 3 * training.pack.flops(config).total * packs
    per_step = [
        times[s] * training.microbatches + Traffic(data=times[s].data * (1 - training.microbatches)) for s in stages
    ]
    sent = [traffic[s] * training.microbatches + Traffic(data=sum(data[s])) for s in stages]
    return Plan(
        layout=layout,
        training=training,
        memory=memory,
        traffic=max(sent, key=lambda bytes_sent: bytes_sent.total),
        traffic_seconds=per_step[slowest],
        compute_seconds=compute[slowest] * training.microbatches,
        step_seconds=step,
        bubble=waiting / pipeline_seconds,
        imbalance=1 - sum(busy) / len(busy) / longest,
        model_tflops=operations / step / layout.ranks / 1e12,
        tokens_per_second=training.pack.tokens * packs / step,
    )


def chunk_flops(config: Step37Config, layout: PlannedLayout, pack: Pack, chunk: int) -> Flops:
    """Forward operations of a chunk for one pack, on all its ranks together: the busiest one's, times the ranks."""
    text, ranks = config.text, layout.tensor * layout.context
    beside = Flops()
    if chunk == 0:  # the decoder's work is divided evenly, images are not
        beside += Flops(vision=ranks * vision_flops(config, pack.busiest_images(ranks)))
    if chunk == layout.chunks - 1:
        learnt = [pack.learnt] * text.num_built_mtp_layers
        beside += Flops(head=head_flops(text, pack.learnt), mtp=mtp_flops(text, pack.lengths, learnt))
    return decoder_flops(text, pack.lengths, layout.layers(text)[chunk]) + beside


def chunk_operations(config: Step37Config, layout: PlannedLayout, training: Training, chunk: int) -> float:
    """Forward and backward, and what is computed again, as `chunk_flops`."""
    text, lengths = config.text, training.pack.lengths
    total = training.passes.dot(chunk_flops(config, layout, training.pack, chunk))
    layers = layout.layers(text)[chunk]
    kept = [layer for number, layer in enumerate(layers) if training.layer_mode(number) != training.recompute]
    total -= training.again.dot(decoder_flops(text, lengths, kept))
    if chunk == layout.chunks - 1:
        mtp = range(text.num_layers, text.num_layers + text.num_built_mtp_layers)
        total += training.again.dot(decoder_flops(text, lengths, mtp))
    return total


def _stage_traffic(config: Step37Config, layout: PlannedLayout, training: Training, stage: int) -> Traffic:
    total = Traffic()
    for chunk in layout.chunks_of_stage(stage):
        total += microbatch_traffic(config, layout, training, chunk)
    return total


def _stage_compute(
    config: Step37Config, layout: PlannedLayout, training: Training, hardware: Hardware, stage: int
) -> float:
    """Seconds of a micro-batch on a rank of the stage."""
    operations = sum(chunk_operations(config, layout, training, chunk) for chunk in layout.chunks_of_stage(stage))
    return operations / (layout.tensor * layout.context) / hardware.flops_per_second
