"""Steps of packs from sets of shards: a plan is read entry by entry."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.bad_samples import BadRecord, BadSample
from datamodules.epoch_plan import EpochPlan, Planner
from datamodules.shard_sets import ShardSet
from datamodules.steps import DataShare, Step, StepDataset, check_ranks, check_same
from step37_lit.batch import PackedBatch, Sample


class PackedSteps(StepDataset):
    """The steps of a plan.

    Args:
        plan: Which samples are in which pack.
        sets: The sets that the plan's entries name.
        max_length: Tokens of every pack.
        share: The packs of this process.
    """

    def __init__(self, plan: EpochPlan, sets: Sequence[ShardSet], max_length: int, share: DataShare):
        check_ranks(plan.packs_per_step, share.ranks)
        self.plan, self.sets, self.max_length, self.share = plan, sets, max_length, share
        self.num_samples = int(np.diff(plan.borders)[share.rank :: share.ranks].sum())

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> Step:
        bad: list[BadRecord] = []
        first = step * self.plan.packs_per_step
        numbers = self.share.numbers(self.plan.packs_per_step)
        return Step([self._pack(first + number, bad) for number in numbers], bad)

    def _pack(self, number: int, bad: list[BadRecord]) -> PackedBatch:
        samples: list[Sample] = []
        for set_number, i, variant in self.plan.pack(number):
            shards = self.sets[set_number]
            try:
                samples.append(shards.sample(i, variant))
            except BadSample as error:
                bad.append(BadRecord.of(shards.name, error))
        pad_token = self.sets[0].reading.processor.config.tokens.eos[0]
        if not samples:  # all of them bad, or a pack that fills up the last step of an evaluation
            return PackedBatch.padding(self.max_length, pad_token)
        return PackedBatch.from_samples(samples, pad_to=self.max_length, pad_token=pad_token)


class PackedEpochs:
    """A `StepSource`: the planner's epochs, read from the sets.

    Args:
        planner: Plans the epochs.
        sets: The sets that it plans.
        share: The packs of this process.
    """

    def __init__(self, planner: Planner, sets: Sequence[ShardSet], share: DataShare):
        self.planner, self.sets, self.share = planner, sets, share

    def epoch(self, number: int) -> PackedSteps:
        return PackedSteps(self.planner.plan(number), self.sets, self.planner.max_length, self.share)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same samples."""
        planner = self.planner
        digests = "".join(shards.digest() for shards in self.sets)
        sizes = f"{[len(planned.lengths) for planned in planner.sets]} {planner.samples_per_epoch}"
        return {
            "seed": planner.seed,
            "max_length": planner.max_length,
            "window": planner.window,
            "microbatches": planner.packs_per_step,
            "sets": hashlib.sha256(f"{digests} {sizes}".encode()).hexdigest()[:16],
        }

    def position(self, epoch: int) -> dict[str, Any]:
        return {"carried": self.planner.carried(epoch), **self.identity()}

    def check_position(self, state: dict[str, Any]) -> None:
        check_same(state, self.identity())
        self.planner.resume(state["epoch"], state["carried"])
