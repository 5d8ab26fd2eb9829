"""Peak memory of the ranks of each pipeline stage: state, activations of the micro-batches in flight, working space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

from step37_lit.config import Step37Config
from step37_lit.planner.activations import ActivationTable
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.weights import StateBytes, state_bytes
from step37_lit.planner.work import Training


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage.

    Args:
        stage: Pipeline stage.
        layers: Decoder layers, over its chunks.
        state: Weights, gradients and optimizer.
        in_flight: Micro-batches (times chunks) whose activations are kept at the peak.
        activations: Of those.
        working: Largest thing that is there for a moment: a layer that is computed again, gradients of logits.
    """

    stage: int
    layers: int
    state: StateBytes
    in_flight: int
    activations: float
    working: float

    @property
    def peak(self) -> float:
        return self.state.total + self.activations + self.working


def stage_memory(config: Step37Config, layout: PlannedLayout, training: Training, stage: int) -> StageMemory:
    """Memory of pipeline stage `stage`, on its rank with the most optimizer state."""
    table = ActivationTable(config, layout, training)
    chunks = layout.chunks_of_stage(stage)
    activations, in_flight = peak_in_flight([table.chunk_bytes(chunk) for chunk in chunks], layout, training, stage)
    return StageMemory(
        stage=stage,
        layers=sum(len(layout.layers(config.text)[chunk]) for chunk in chunks),
        state=state_bytes(config, layout, stage, training.dtype, training.frozen),
        in_flight=in_flight,
        activations=activations,
        working=max(table.working_bytes(chunk) for chunk in chunks),
    )


def peak_in_flight(
    chunk_bytes: Sequence[float], layout: PlannedLayout, training: Training, stage: int
) -> tuple[float, int]:
    """Most bytes that are kept at once by megatron's schedule, and how many forward passes that are.

    Args:
        chunk_bytes: Kept of one micro-batch by each chunk of the stage.
        layout: The layout.
        training: Its number of micro-batches.
        stage: Pipeline stage.
    """
    # The order repeats itself every `pipeline` micro-batches: two rounds show the peak.
    microbatches = min(training.microbatches, 2 * layout.pipeline)
    moments = _counts_in_flight(layout.pipeline, layout.virtual_pipeline, microbatches, stage)
    peak, count = max((sum(map(mul, counts, chunk_bytes)), sum(counts)) for counts in moments)
    return peak, count


@lru_cache(maxsize=4096)
def _counts_in_flight(stages: int, chunks: int, microbatches: int, stage: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches that each chunk of the stage keeps, at every moment when it is more than at others."""
    counts, seen = [0] * chunks, set()
    for forward, chunk in _order(stages, chunks, microbatches, stage):
        counts[chunk] += 1 if forward else -1
        seen.add(tuple(counts))
    return tuple(c for c in seen if not any(c != o and all(a <= b for a, b in zip(c, o, strict=True)) for o in seen))


def _order(stages: int, chunks: int, microbatches: int, stage: int) -> Iterator[tuple[bool, int]]:
    """Forward (True) and backward passes of a stage in megatron's order, with the number of the chunk: one forward,
    one backward after a warm-up (PipeDream-flush, arXiv:2104.04473)."""
    passes = microbatches * chunks
    interleaved = 2 * (stages - stage - 1) + (chunks - 1) * stages
    warmup = min(stages - stage - 1 if chunks == 1 else interleaved, passes)
    for done in range(warmup):
        yield True, (done // stages) % chunks
    for done in range(passes):
        if warmup + done < passes:
            yield True, ((warmup + done) // stages) % chunks
        yield False, chunks - 1 - (done // stages) % chunks
