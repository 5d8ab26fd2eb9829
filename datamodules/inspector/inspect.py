"""`python -m step37_lit shard --inspect SHARDS`: one HTML page about shards and the packs that a recipe trains on."""

from __future__ import annotations

import os
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from step37_lit.config import ConfigError

if TYPE_CHECKING:  # the help must not wait for torch
    import numpy as np

    from datamodules.bad_samples import BadRecord
    from datamodules.epoch_plan import EpochPlan
    from datamodules.inspector.packs import Card, InspectedPack
    from datamodules.packed import PackedDataModule
    from datamodules.shard_sets import ShardSet

PAGE_FILE = "inspector.html"
MAX_PACKS = 24
MAX_THUMBNAILS = 48

DESCRIPTION = """\
Writes one HTML page about indexed shards: the packs of the first epoch that a recipe would train on, token lengths,
sizes of the pictures, samples as the model sees them, and bad samples. The page needs no network and has no scripts.

SHARDS takes the place of the recipe's sets. It needs the recipe's token lengths, which `python -m step37_lit index`
adds.
"""
EXAMPLES = """\
examples:
  python -m step37_lit shard --inspect data/flickr8k --config recipes/flickr8k_tiny.yaml
  python -m step37_lit shard --inspect data/flickr8k --config recipes/flickr8k_tiny.yaml --output page.html --packs 100
"""


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


def main(args: list[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0.

    Raises:
        ConfigError, jsonargparse.ArgumentError: a mistake of the user's.
    """
    options = _parser().parse_args(args)
    module = _data_module(options)
    folder = Path(options.inspect) if Path(options.inspect).is_dir() else Path(options.inspect).parent
    output = Path(options.output) if options.output is not None else folder / PAGE_FILE
    try:
        inspect_set(module, output, options.packs, options.thumbnails)
    except OSError as error:
        raise ConfigError("--output", "a file that can be written", error.strerror, file=output) from error
    print(f"page       {output.stat().st_size / 1e6:.1f} MB: {output}")
    return 0


def inspect_set(
    module: PackedDataModule, output: Path, max_packs: int = MAX_PACKS, max_thumbnails: int = MAX_THUMBNAILS
) -> Path:
    """Writes the page; the file is whole or absent.

    Args:
        module: Its `sets` are inspected.
        output: Where to.
        max_packs: Packs that are read and shown.
        max_thumbnails: Pictures that are shown; a sample without any counts as one.

    Returns:
        `output`.

    Raises:
        ConfigError: an index is missing or stale, or no epoch can be planned.
        OSError: the page cannot be written.
    """
    from datamodules.inspector.page import page

    html = page(collect(module, max_packs, max_thumbnails))
    staged = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        staged.write_text(html, encoding="utf-8")
        staged.replace(output)
    finally:
        staged.unlink(missing_ok=True)
    return output


def collect(module: PackedDataModule, max_packs: int, max_thumbnails: int) -> Inspection:
    """Reads what the page shows; arguments and errors as for `inspect_set`."""
    import numpy as np

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
    from datamodules.inspector.packs import cards_of, inspect_pack
    from datamodules.packed_steps import PackedSteps
    from datamodules.steps import EVERYTHING

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
    from datamodules.packing import lower_bound

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
    import numpy as np

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


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m step37_lit shard --inspect",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--inspect", metavar="SHARDS", type=str, required=True, help="folder of the shards and their index")
    add("--config", metavar="RECIPE", type=str, required=True, help="recipe whose data section plans the packs")
    add("--output", metavar="PAGE", type=str, help=f"where to (default: {PAGE_FILE} beside the index)")
    add("--packs", type=PositiveInt, default=MAX_PACKS, help="packs that are read and shown")
    add("--thumbnails", type=PositiveInt, default=MAX_THUMBNAILS, help="pictures that are shown")
    return parser


def _data_module(options: Namespace) -> PackedDataModule:
    """The recipe's data module with SHARDS in place of its sets.

    Without a tokenizer in the recipe it is the one beside the recipe's first set where SHARDS is one of its sets, as in
    training, and otherwise the one beside SHARDS.
    """
    from datamodules.commands.recipe import packed_data_module, recipe_data

    init_args = recipe_data(options.config)
    data = packed_data_module(init_args)
    shards = Path(options.inspect).resolve()
    tokenizer = init_args.get("tokenizer")
    if tokenizer is None and shards in [Path(config.path).resolve() for config in data.train_configs]:
        tokenizer = str(data.tokenizer_path)
    return packed_data_module({**init_args, "sets": options.inspect, "val_sets": None, "tokenizer": tokenizer})
