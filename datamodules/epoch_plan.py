"""The plan of an epoch: which texts of which samples are seen, in which pack, before anything is read.

A plan is a pure function of (seed, epoch, sets with their lengths and weights, max_length, window, packs of a step). It
does not depend on the number of ranks, workers or nodes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.packing import iterate_packs
from step37_lit.errors import require

Mixture = Literal["samples", "tokens"]
Entry = tuple[int, int, int]  # set, sample, variant


@dataclass(frozen=True)
class PlannedSet:
    """What planning needs of a set: the usable variants (texts) of its usable samples.

    Args:
        name: Of the set; its order depends on it.
        samples: [n] int32, indices of the samples.
        borders: [n + 1] int64, where each sample's variants begin; each has at least one.
        variants: [m] int16, number of each variant within its sample.
        lengths: [m] int32, tokens of each variant.
        weight: Share of the epoch relative to the other sets; None where every sample is seen once an epoch.
    """

    name: str
    samples: np.ndarray
    borders: np.ndarray
    variants: np.ndarray
    lengths: np.ndarray
    weight: float | None = None

    @property
    def mean_tokens(self) -> float:
        """Of a sample: the mean over its variants, averaged over the samples."""
        sums = np.add.reduceat(self.lengths, self.borders[:-1], dtype=np.int64)
        return float(np.mean(sums / np.diff(self.borders)))


@dataclass(frozen=True)
class Entries:
    """Texts to be seen, in an order: columns of one length.

    Args:
        sets: int16, number of the set.
        samples: int32, index of the sample in its set.
        variants: int16, which of the sample's texts.
        lengths: int32, its tokens.
    """

    sets: np.ndarray
    samples: np.ndarray
    variants: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, places: np.ndarray | slice) -> Entries:
        """The entries at `places`, in their order."""
        return Entries(self.sets[places], self.samples[places], self.variants[places], self.lengths[places])

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        columns = zip(*((part.sets, part.samples, part.variants, part.lengths) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class EpochPlan:
    """Packs in the order in which they are used.

    Args:
        epoch: Its number.
        entries: The texts, pack by pack.
        borders: [packs + 1] int64, first entry of each pack.
        packs_per_step: Packs of one global step, over all ranks.
        carried: Packs at the front that were left over from the epoch before.
    """

    epoch: int
    entries: Entries
    borders: np.ndarray
    packs_per_step: int
    carried: int = 0

    @property
    def num_packs(self) -> int:
        return len(self.borders) - 1

    @property
    def num_steps(self) -> int:
        """Global steps, the same on every rank; the last one of an evaluation may lack packs."""
        return -(-self.num_packs // self.packs_per_step)

    def pack(self, number: int) -> list[Entry]:
        """Entries of a pack; none behind the last pack of an evaluation."""
        if number >= self.num_packs:
            return []
        own = self.entries.take(slice(self.borders[number], self.borders[number + 1]))
        return list(zip(own.sets.tolist(), own.samples.tolist(), own.variants.tolist(), strict=True))

    def part(self, first: int, last: int) -> EpochPlan:
        """The packs `first` to `last` - 1."""
        begin, end = self.borders[first], self.borders[last]
        borders = self.borders[first : last + 1] - begin
        return EpochPlan(self.epoch, self.entries.take(slice(begin, end)), borders, self.packs_per_step)


class Planner:
    """Plans training epochs. Packs that do not fill a whole step come first in the next epoch.

    Args:
        sets: At least one, none of them empty.
        seed: Of the order.
        max_length: Tokens of a pack.
        window: See `packing.pack`.
        packs_per_step: Packs of one global step, over all ranks.
        mixture: Whether weights are shares of the samples or of the tokens. With weights an epoch ends where the first
            set is used up; the others go on from there in the next one.
    """

    def __init__(
        self,
        sets: Sequence[PlannedSet],
        seed: int,
        max_length: int,
        window: int,
        packs_per_step: int,
        mixture: Mixture = "samples",
    ):
        self.sets, self.seed, self.max_length, self.window = sets, seed, max_length, window
        self.packs_per_step = packs_per_step
        self.samples_per_epoch = samples_per_epoch(sets, mixture)
        self._latest: dict[int, EpochPlan] = {}  # own packs of the last two epochs
        self._carried = {0: 0}  # packs that an epoch takes over

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch.

        Raises:
            ConfigError: the packs of the epoch do not fill one step.
        """
        carried, own = self.carried(epoch), self._own(epoch)
        total = carried + own.num_packs
        left = total % self.packs_per_step
        require(total > left, "data.microbatches", f"at most the {total} packs of epoch {epoch}", self.packs_per_step)
        parts = [own.part(0, own.num_packs - left)]
        if carried:
            before = self._own(epoch - 1)
            parts.insert(0, before.part(before.num_packs - carried, before.num_packs))
        return _joined(parts, epoch, carried)

    def carried(self, epoch: int) -> int:
        """Packs left over from the epoch before. Kept in a checkpoint, so that resuming need not plan every epoch."""
        known = max(e for e in self._carried if e <= epoch)
        for e in range(known, epoch):
            self._carried[e + 1] = (self._carried[e] + self._own(e).num_packs) % self.packs_per_step
        return self._carried[epoch]

    def resume(self, epoch: int, carried: int) -> None:
        """Takes over what `carried(epoch)` was when a checkpoint was written."""
        self._carried[epoch] = carried

    def _own(self, epoch: int) -> EpochPlan:
        """The epoch's own samples in packs, whether they fill whole steps or not."""
        if epoch not in self._latest:
            self._latest = {e: plan for e, plan in self._latest.items() if abs(e - epoch) == 1}
            self._latest[epoch] = self._packed(epoch)
        return self._latest[epoch]

    def _packed(self, epoch: int) -> EpochPlan:
        entries = Entries.joined([self._draw(number, epoch) for number in range(len(self.sets))])
        entries = entries.take(permutation(len(entries), self.seed, "order", epoch))
        return _in_packs(epoch, entries, self.max_length, self.window, self.packs_per_step)

    def _draw(self, number: int, epoch: int) -> Entries:
        """What an epoch sees of a set: its stretch of an endless row of passes, each in an order of its own."""
        planned, count = self.sets[number], self.samples_per_epoch[number]
        size, choices = len(planned.samples), np.diff(planned.borders)
        first_choice = (_random(size, self.seed, "variant", planned.name) % choices.astype(np.uint64)).astype(np.int64)
        places, rows = [], []
        position, end = epoch * count, (epoch + 1) * count
        while position < end:
            number_of_pass, first = divmod(position, size)
            last = min(size, first + end - position)
            drawn = permutation(size, self.seed, "pass", planned.name, number_of_pass)[first:last]
            places.append(drawn)
            # Each pass shows a sample's next text.
            rows.append(planned.borders[drawn] + (first_choice[drawn] + number_of_pass) % choices[drawn])
            position += last - first
        row = np.concatenate(rows)
        sets = np.full(count, number, dtype=np.int16)
        return Entries(sets, planned.samples[np.concatenate(places)], planned.variants[row], planned.lengths[row])


def evaluation_plan(sets: Sequence[PlannedSet], max_length: int, window: int, packs_per_step: int) -> EpochPlan:
    """Every text of every sample once, in the order of the sets; the last step may lack packs."""
    entries = Entries(
        np.repeat(np.arange(len(sets), dtype=np.int16), [len(planned.variants) for planned in sets]),
        np.concatenate([np.repeat(planned.samples, np.diff(planned.borders)) for planned in sets]),
        np.concatenate([planned.variants for planned in sets]),
        np.concatenate([planned.lengths for planned in sets]),
    )
    return _in_packs(0, entries, max_length, window, packs_per_step)


def samples_per_epoch(sets: Sequence[PlannedSet], mixture: Mixture) -> list[int]:
    """Samples that an epoch has of each set.

    Raises:
        ConfigError: an empty set, or weights for some sets only.
    """
    for planned in sets:
        require(len(planned.samples) > 0, f"data.sets: {planned.name}", "at least one usable sample", 0)
    weights = [planned.weight for planned in sets]
    sizes = [len(planned.samples) for planned in sets]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return sizes
    require(len(given) == len(sets), "data.sets: weight", "one for every set or for none", weights)
    require(min(given) > 0, "data.sets: weight", "positive numbers", weights)
    costs = [planned.mean_tokens if mixture == "tokens" else 1.0 for planned in sets]
    # Of the first set that is used up every sample is seen once.
    scale = min(size * cost / weight for size, cost, weight in zip(sizes, costs, given, strict=True))
    counts = [round(scale * weight / cost) for cost, weight in zip(costs, given, strict=True)]
    for planned, count in zip(sets, counts, strict=True):
        require(count > 0, f"data.sets: weight of {planned.name}", "enough for one sample an epoch", planned.weight)
    return counts


def permutation(size: int, *seeds: int | str) -> np.ndarray:
    """A random order of 0..size-1, the same on every machine and for every version of numpy."""
    return np.argsort(_random(size, *seeds), kind="stable")


def _random(size: int, *seeds: int | str) -> np.ndarray:
    """[size] uint64. Raw bits of the generator: what numpy derives from them may change between its versions."""
    entropy = [number for seed in seeds for number in ([seed] if isinstance(seed, int) else seed.encode())]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size)


def _in_packs(epoch: int, entries: Entries, max_length: int, window: int, packs_per_step: int) -> EpochPlan:
    order, borders = array("q"), array("q", [0])
    for pack in iterate_packs(entries.lengths.tolist(), max_length, window):
        order.extend(pack)
        borders.append(len(order))
    return EpochPlan(epoch, entries.take(_as_numpy(order)), _as_numpy(borders), packs_per_step)


def _as_numpy(numbers: array[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _joined(parts: Sequence[EpochPlan], epoch: int, carried: int) -> EpochPlan:
    sizes = np.concatenate([np.diff(part.borders) for part in parts])
    borders = np.concatenate([[0], np.cumsum(sizes)])
    entries = Entries.joined([part.entries for part in parts])
    return EpochPlan(epoch, entries, borders, parts[0].packs_per_step, carried)
