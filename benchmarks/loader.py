"""Packs per second of the loader, with one worker, against webdataset with the same transforms.

    python benchmarks/loader.py [--shards FOLDER] [--samples 320] [--rounds 5] [--multicrop]

Both sides decode the same JPEGs into the model's 728-pixel views, tokenise the same captions and make packs of 4096
tokens in one worker process, and take turns. webdataset reads its shards from front to back and packs greedily; the
loader reads by a shuffled plan. FOLDER is a set of captioned pictures; without it pictures like photographs are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from shard_read import write_shards

from datamodules.conversations import parse_text
from datamodules.epoch_plan import Planner
from datamodules.packed_steps import PackedEpochs
from datamodules.shard_sets import Reading, ShardSet
from datamodules.shards.index_build import build_index
from datamodules.shards.lengths import add_lengths
from datamodules.steps import EVERYTHING, StepLoader
from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import Step37Config
from step37_lit.images import DEFAULT_MAX_PIXELS, open_image
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

MAX_LENGTH = 4096


def make_processor(multicrop: bool) -> Step37Processor:
    """Of the real model's picture sizes, with a small tokenizer."""
    tiny = Step37Config.preset("tiny")
    config = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, image_size=728, crop_size=504))
    tokenizer = Step37Tokenizer.train(["A dog runs over the grass behind a red ball ."], 300)
    return Step37Processor(tokenizer, config, multicrop=multicrop, resize="fast")


class GreedyPacks(torch.utils.data.IterableDataset):
    """webdataset's samples in their order, the first caption of each, packed one after the other."""

    def __init__(self, paths: list[str], processor: Step37Processor):
        self.pipeline, self.processor = webdataset.WebDataset(paths, shardshuffle=False), processor

    def __iter__(self) -> Iterator[PackedBatch]:
        return self.packs(self.sample(fields) for fields in self.pipeline)

    def sample(self, fields: dict[str, Any]) -> Sample:
        messages = parse_text("json", fields["json"]).variants(DEFAULT_PROMPT, 1)[0]
        return self.processor(messages, [open_image(fields["jpg"])], key=fields["__key__"])

    def packs(self, samples: Iterable[Sample]) -> Iterator[PackedBatch]:
        row: list[Sample] = []
        for sample in samples:
            if sum(map(len, row)) + len(sample) > MAX_LENGTH:
                yield PackedBatch.from_samples(row, MAX_LENGTH)
                row = []
            row.append(sample)
        yield PackedBatch.from_samples(row, MAX_LENGTH)


def seconds(loader: Iterable[Any]) -> tuple[float, int]:
    """Of one pass, and its packs."""
    start, number = time.perf_counter(), 0
    for _ in loader:
        number += 1
    return time.perf_counter() - start, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--multicrop", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = make_processor(options.multicrop)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.shards or Path(scratch) / "shards"
        if options.shards is None:
            write_shards(folder, options.samples)
        index = add_lengths(build_index(folder), processor, DEFAULT_PROMPT)
        reading = Reading(processor, DEFAULT_PROMPT, MAX_LENGTH, "raise", DEFAULT_MAX_PIXELS)
        sets = [ShardSet(str(folder), "set", reading)]
        planner = Planner([sets[0].planned("train", 0.0)], 0, MAX_LENGTH, 64, packs_per_step=1)
        paths = [index.shard_path(number) for number in range(len(index.shards))]
        loader = StepLoader(PackedEpochs(planner, sets, EVERYTHING), num_workers=1)
        greedy = torch.utils.data.DataLoader(
            GreedyPacks(paths, processor), batch_size=None, num_workers=1, prefetch_factor=4
        )
        pairs = [(seconds(loader), seconds(greedy)) for _ in range(options.rounds)]
    ours, theirs = ([packs / took for took, packs in side] for side in zip(*pairs, strict=True))
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    packs = [side[1] for side in pairs[-1]]
    print(f"{len(index)} samples, packs of {MAX_LENGTH} tokens: {packs[0]} planned, {packs[1]} greedy")
    print(f"loader     {statistics.median(ours):6.2f} packs/s (median of {options.rounds})")
    print(f"webdataset {statistics.median(theirs):6.2f} packs/s")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
