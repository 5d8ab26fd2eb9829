"""What the inspector's page shows, read from indexed sets and the first packs of a recipe's plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from datamodules.bad_samples import BadRecord
from datamodules.epoch_plan import EpochPlan
from datamodules.inspector.packs import Card, InspectedPack, cards_of, inspect_pack
from datamodules.packed import PackedDataModule
from datamodules.packed_steps import PackedSteps
from datamodules.packing import lower_bound
from datamodules.shard_sets import ShardSet
from datamodules.steps import EVERYTHING


@dataclass(frozen=True)
class EpochSummary:
    """An epoch of the plan.

    Args:
        texts: Entries of the plan; each is one text of one sample.
        tokens: Of all its texts.
        packs: Rows that they take.
        lower_bound: Rows that any packing needs at least (`datamodules.packing.lower_bound`).
        steps: Global steps.
        packs_per_step: Packs of one global step, over all ranks.
        max_length: Tokens of a pack.
    """

    texts: int
    tokens: int
    packs: int
    lower_bound: int
    steps: int
    packs_per_step: int
    max_length: int

    @property
    def padding(self) -> float:
        """Share of positions that hold no sample."""
        return 1 - self.tokens / (self.packs * self.max_length)


@dataclass(frozen=True)
class Inspection:
    """What the page shows.

    Args:
        names: Of the sets.
        paths: Their folders.
        fingerprint: What the token lengths are for.
        num_shards: Shards of all sets.
        num_samples: Samples of the indexes, bad ones included.
        num_bytes: Size of the shards.
        settings: Names and values of what shaped the plan.
        lengths: [texts] int32, tokens of every text, in the indexes' order.
        image_sizes: [pictures, 2] int32, width and height of every picture.
        view_side: Side in pixels of the picture that a model sees.
        epoch: The first epoch's plan.
        packs: Its first packs.
        cards: Their first samples.
        bad: What indexing found, then what reading the packs found.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    fingerprint: str
    num_shards: int
    num_samples: int
    num_bytes: int
    settings: dict[str, str]
    lengths: np.ndarray
    image_sizes: np.ndarray
    view_side: int
    epoch: EpochSummary
    packs: tuple[InspectedPack, ...]
    cards: tuple[Card, ...]
    bad: tuple[BadRecord, ...]

    @property
    def name(self) -> str:
        """Of all sets together."""
        return ", ".join(self.names)


def collect(module: PackedDataModule, max_packs: int, max_thumbnails: int) -> Inspection:
    """Reads what the page shows; arguments and errors as for `inspect.inspect_set`."""
    sets, plan = module.sets("train"), module.planner.plan(0)
    packs, cards, met = _read_packs(module, plan, max_packs, max_thumbnails)
    return Inspection(
        names=tuple(shards.name for shards in sets),
        paths=tuple(shards.path for shards in sets),
        fingerprint=sets[0].fingerprint,  # one processor and prompt for all
        num_shards=sum(len(shards.index.shards) for shards in sets),
        num_samples=sum(len(shards.index) for shards in sets),
        num_bytes=sum(shard.size for shards in sets for shard in shards.index.shards),
        settings=_settings(module),
        lengths=np.concatenate([shards.lengths.values for shards in sets]),
        image_sizes=np.concatenate([_image_sizes(shards) for shards in sets]),
        view_side=module.config.vision.image_size,
        epoch=_summary(plan, module.max_length),
        packs=packs,
        cards=cards,
        bad=(*(record for shards in sets for record in shards.known_bad()), *met),
    )


def _read_packs(
    module: PackedDataModule, plan: EpochPlan, max_packs: int, max_thumbnails: int
) -> tuple[tuple[InspectedPack, ...], tuple[Card, ...], list[BadRecord]]:
    """The first packs as training gets them, one after the other: their pixels are many times the page."""
    first = replace(plan.part(0, min(max_packs, plan.num_packs)), packs_per_step=1)
    steps = PackedSteps(first, module.sets("train"), module.max_length, EVERYTHING)
    packs: list[InspectedPack] = []
    cards: list[Card] = []
    met: list[BadRecord] = []
    for number in range(len(steps)):
        step = steps[number]
        left = max_thumbnails - sum(max(1, len(card.pictures)) for card in cards)
        packs.append(inspect_pack(step.packs[0], number, module.config.tokens))
        cards += cards_of(step.packs[0], number, module.processor, left)
        met += step.bad
    return tuple(packs), tuple(cards), met


def _summary(plan: EpochPlan, max_length: int) -> EpochSummary:
    lengths = plan.entries.lengths
    return EpochSummary(
        texts=len(lengths),
        tokens=int(lengths.sum(dtype="int64")),
        packs=plan.num_packs,
        lower_bound=lower_bound(lengths, max_length),
        steps=plan.num_steps,
        packs_per_step=plan.packs_per_step,
        max_length=max_length,
    )


def _image_sizes(shards: ShardSet) -> np.ndarray:
    """[pictures, 2] int32."""
    sizes = shards.index.table.column("image_sizes").chunk(0).flatten()
    return np.stack([sizes.field(side).to_numpy() for side in ("width", "height")], axis=1)


def _settings(module: PackedDataModule) -> dict[str, str]:
    return {
        "Tokens of a pack": f"{module.max_length:,}",
        "Packs of a step": f"{module.microbatches:,}",
        "Window": f"{module.window:,} samples",
        "Seed": f"{module.seed}",
        "For validation": f"{100 * module.val_share:g} %",
        "Multicrop": "on" if module.multicrop else "off",
        "Longer texts": module.too_long,
        "Bad samples": module.bad,
        "Prompt of captions": module.prompt,
    }
