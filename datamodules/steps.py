"""Global steps: what every data module of this project hands to the Trainer, one after the other.

Item s of a loader is global step s of its epoch, as this data-parallel rank's list of packs. The order is fixed before
an epoch starts, so a position is a few numbers, and neither ranks nor workers change what a step holds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.bad_samples import BadRecord, BadSampleLedger
from step37_lit.batch import PackedBatch
from step37_lit.errors import require


@dataclass(frozen=True)
class DataShare:
    """What of each global step is this process's.

    Args:
        rank: Data-parallel rank.
        ranks: Data-parallel ranks; rank r has the packs r, r + ranks, ... of a step.
        reads: Whether this process makes the packs; false where another rank of its model-parallel group does, from
            which the strategy hands them on.
    """

    rank: int = 0
    ranks: int = 1
    reads: bool = True

    @classmethod
    def of(cls, trainer: pl.Trainer | None) -> DataShare:
        """The share of a process under `MegatronStrategy`; everything without a Trainer."""
        if trainer is None:
            return cls()
        strategy: Any = trainer.strategy
        share = strategy.distributed_sampler_kwargs
        return cls(share["rank"], share["num_replicas"], strategy.reads_data)

    def numbers(self, packs_per_step: int) -> range:
        """Numbers, within a step, of the packs that this process makes."""
        return range(self.rank, packs_per_step, self.ranks) if self.reads else range(0)


EVERYTHING = DataShare()


def check_ranks(packs_per_step: int, ranks: int) -> None:
    """Raises `ConfigError` unless `ranks` data-parallel ranks get equally many of a step's packs."""
    advice = f"a multiple of {ranks} data-parallel ranks"
    require(packs_per_step % ranks == 0, "data.microbatches", advice, packs_per_step)


@dataclass
class Step:
    """What a loader process made of one step: its packs, and the samples that could not be read."""

    packs: list[PackedBatch]
    bad: list[BadRecord] = field(default_factory=list)


class StepDataset(Dataset, ABC):
    """Steps of one epoch by number."""

    num_samples: int  # of the whole epoch, read by this process

    @abstractmethod
    def __len__(self) -> int:
        """Steps of the epoch."""

    @abstractmethod
    def __getitem__(self, step: int) -> Step:
        """This process's part of a step."""


class StepSource(Protocol):
    """Epochs of steps."""

    def epoch(self, number: int) -> StepDataset:
        """The steps of an epoch."""

    def position(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint needs beside epoch and step: small, and the same on every rank."""

    def check_position(self, state: dict[str, Any]) -> None:
        """Takes over a saved `position`. Raises `ConfigError` where its steps would be others than this source's."""


class StepLoader:
    """The steps of an epoch in order, made by worker processes; knows its position.

    Lightning saves and loads the state of a loader that has `state_dict` and `load_state_dict`. It is not a subclass of
    DataLoader, so that Lightning leaves the order alone.

    Args:
        source: Where epochs come from.
        num_workers: Processes that make steps; 0 makes them in this process.
        prefetch: Steps that each worker makes ahead.
        epoch: The epoch to begin with; iterating again goes on with the next one.
        ledger: Takes the bad samples; None where a source has none.
    """

    def __init__(
        self,
        source: StepSource,
        num_workers: int = 0,
        prefetch: int = 4,
        epoch: int = 0,
        ledger: BadSampleLedger | None = None,
    ):
        self.source, self.num_workers, self.prefetch, self.ledger = source, num_workers, prefetch, ledger
        self.epoch, self.position = epoch, 0  # of the next step
        self.seconds_waited = 0.0  # for steps, since the loader was made
        self._steps: tuple[int, StepDataset] | None = None  # epoch and its steps, made when asked for

    @property
    def steps(self) -> StepDataset:
        """The steps of the epoch that `epoch` names."""
        if self._steps is None or self._steps[0] != self.epoch:
            self._steps = self.epoch, self.source.epoch(self.epoch)
        return self._steps[1]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        steps, epoch = self.steps, self.epoch
        if self.ledger is not None:
            self.ledger.start_epoch()
        items = iter(_in_order(steps, range(self.position, len(steps)), self.num_workers, self.prefetch))
        while True:
            asked = time.perf_counter()
            step = next(items, None)
            self.seconds_waited += time.perf_counter() - asked
            if step is None:
                return
            if self.ledger is not None:
                self.ledger.add(step.bad, epoch, self.position, steps.num_samples)
            # Moved on before the packs are handed out: who takes the last ones need not ask for more.
            self.position += 1
            if self.position == len(steps):
                self.epoch, self.position = epoch + 1, 0
            yield step.packs

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, the same on every rank."""
        return {"epoch": self.epoch, "position": self.position, **self.source.position(self.epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the saved step. Raises `ConfigError` where the saved steps were of other data."""
        self.source.check_position(state_dict)
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]


class EvaluationLoader:
    """The same steps at each evaluation; arguments as `StepLoader`."""

    def __init__(
        self, steps: StepDataset, num_workers: int = 0, prefetch: int = 4, ledger: BadSampleLedger | None = None
    ):
        self.steps, self.num_workers, self.prefetch, self.ledger = steps, num_workers, prefetch, ledger

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        if self.ledger is not None:
            self.ledger.start_epoch()
        for number, step in enumerate(_in_order(self.steps, range(len(self)), self.num_workers, self.prefetch)):
            if self.ledger is not None:
                self.ledger.add(step.bad, 0, number, self.steps.num_samples)
            yield step.packs


def first_epoch(trainer: pl.Trainer | None) -> int:
    """The epoch that a new training loader begins with; Lightning's `overfit_batches` repeats the first one."""
    if trainer is None or trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        return 0
    return trainer.current_epoch


def check_same(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises `ConfigError` for the first field of `own` that a checkpoint has otherwise."""
    for name, value in own.items():
        require(saved[name] == value, f"data.{name}", f"{saved[name]} (in the checkpoint)", value)


def _in_order(steps: StepDataset, numbers: Sequence[int], num_workers: int, prefetch: int) -> DataLoader:
    return DataLoader(
        steps,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        generator=torch.Generator(),  # so that a loader draws nothing from the global random numbers
    )
