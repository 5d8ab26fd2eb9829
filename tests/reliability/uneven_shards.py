"""Shards of any sizes: every rank has as many steps as the others, and each sample comes once; no rank waits."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import webdataset

from tests import shard_sets
from tests.packed_loaders import loader
from tests.reliability.figure import Figure
from tests.reliability.runs import Place, read_ledger

LARGEST = 40  # samples of a shard
RANKS = (1, 2, 4)


def measure(full: bool, seed: int, folder: Path) -> Figure:
    draw = random.Random(seed)
    tokenizer = shard_sets.tokenizer_file(folder)
    sets, steps, good = 100 if full else 4, 0, 0
    for number in range(sets):
        sizes = [draw.randint(1, LARGEST) for _ in range(draw.randint(1, 8))]
        sizes[0] += max(0, 30 - sum(sizes))  # four packs at least
        _write(folder / f"set{number}", sizes)
        shard_sets.index(folder / f"set{number}", tokenizer)
        steps += (of_set := _steps(folder, f"set{number}", sum(sizes)))
        good += of_set > 0
    trained = 3 if full else 0
    for number in range(trained):
        good += _trained(folder, number)
    detail = (
        f"{sets} sets of 1 to 8 shards of 1 to {LARGEST} samples, {steps} steps, the same on each of 1, 2 and 4 ranks"
    )
    detail += f"; {trained} sets trained for two epochs on 4 ranks" if trained else ""
    return Figure(good, sets + trained, detail)


def _write(folder: Path, sizes: list[int]) -> None:
    folder.mkdir()
    number = 0
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"s-{shard}.tar")) as writer:
            for _ in range(size):
                writer.write(shard_sets.sample(number))
                number += 1


def _steps(folder: Path, name: str, samples: int) -> int:
    """Steps of an epoch, the same for all ranks; 0 where they are not, or a sample is lost or repeated."""
    found = {}
    for ranks in RANKS:
        of_ranks = [list(loader(folder, rank, ranks, name=name)) for rank in range(ranks)]
        if len({len(steps) for steps in of_ranks}) != 1:
            return 0
        packs = [own[i] for step in zip(*of_ranks, strict=True) for i in range(len(step[0])) for own in step]
        found[ranks] = [pack.sample_keys for pack in packs]
    keys = Counter(key.partition("#")[0] for pack in found[1] for key in pack)
    train = loader(folder, name=name)
    left = train.source.planner.plan(1).part(0, carried).entries if (carried := train.source.planner.carried(1)) else []
    whole = set(keys.values()) == {1} and len(keys) + len(left) == samples
    return len(found[1]) // 4 if whole and found[1] == found[2] == found[4] else 0


def _trained(folder: Path, number: int) -> bool:
    """Two epochs on four real ranks come to their end, with as many steps on each."""
    (folder / f"data{number}").mkdir()
    (folder / f"data{number}" / "set").symlink_to(folder / f"set{number}")
    (folder / f"data{number}" / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    steps = 2 * (len(loader(folder, name=f"set{number}")) or 1)
    place = Place.make(folder / f"run{number}", folder / f"data{number}", steps, every=100, validation=100)
    place.finish("--data.val_share=0", "--trainer.limit_val_batches=0", ranks=4)
    lines = [[line["step"] for line in read_ledger(place.ledger_of(rank))] for rank in range(4)]
    return all(own == list(range(1, steps + 1)) for own in lines)
