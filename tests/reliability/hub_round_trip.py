"""Hub folder -> checkpoint -> hub folder -> checkpoint, to the last bit; killed, the target is absent or complete."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import torch

from step37_lit.checkpoint.manifest import MANIFEST, verify
from step37_lit.hub.config_writer import LAYOUTS
from step37_lit.hub.exporting import ExportOptions, export_hub
from step37_lit.hub.importing import import_hub
from tests import forks
from tests.hub_folders import assert_same_tensors, every_feature, file_bytes, read_hub, write_hub
from tests.reliability.figure import Figure

SMALL_SHARDS = "20KB"  # so that an export is of many files
RANKS = ("tensor", "expert", "pipeline")


def measure(full: bool, seed: int, folder: Path) -> Figure:
    draw = random.Random(seed)
    kinds = list(itertools.product(LAYOUTS, (1, 3), (torch.bfloat16, torch.float32), (True, False)))
    for number, kind in enumerate(kinds if full else kinds[:1]):
        _round_trip(folder / f"trip{number}", *kind)
    trips = len(kinds) if full else 1
    ranks = [_on_two_ranks(folder / name, name) for name in RANKS] if full else []
    kills = 50 if full else 2
    hits, good = _kills(folder / "kills", kills, draw)
    where = ", ".join(f"{number} {name}" for name, number in sorted(hits.items()))
    detail = f"{trips} round trips bit-equal (layouts, shards, dtypes, MTP), {len(ranks)} through TP2, EP2, PP2; "
    return Figure(trips + len(ranks) + good, trips + len(ranks) + kills, detail + f"{kills} kills: {where}")


def _round_trip(folder: Path, layout: str, shards: int, dtype: torch.dtype, mtp: bool) -> None:
    """Fails where a tensor, a text or a file of the second checkpoint differs."""
    tensors = write_hub(folder / "hub", every_feature(), layout, dtype, shards=shards, mtp=mtp)  # type: ignore[arg-type]
    import_hub(folder / "hub", folder / "ckpt")
    size = 10**9 if shards == 1 else 100_000
    export_hub(folder / "ckpt", folder / "again", ExportOptions(shard_size=size, layout=layout))  # type: ignore[arg-type]
    assert_same_tensors(read_hub(folder / "again"), tensors)
    import_hub(folder / "again", folder / "ckpt2")
    _check_same_files(folder / "ckpt", folder / "ckpt2")
    shutil.rmtree(folder)


def _check_same_files(one: Path, other: Path) -> None:
    verify(other)
    first, second = file_bytes(one), file_bytes(other)
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differing <= {MANIFEST}, differing  # which has the time


def _on_two_ranks(folder: Path, name: str) -> None:
    """Loaded by two ranks in a layout, saved by them, exported."""
    from tests.layouts.test_hub_layouts import LAYOUTS as SPLITS
    from tests.layouts.test_hub_layouts import on_ranks

    tensors = write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    on_ranks(folder / "two", [folder / "hub"] * 2, folder / "ckpt", **SPLITS[name])
    export_hub(folder / "two" / "saved", folder / "again")
    assert_same_tensors(read_hub(folder / "again"), tensors)


def _kills(folder: Path, times: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Imports and exports in turns; where the kills hit, and behind how many all was well."""
    tensors = write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    hits: Counter[str] = Counter()
    good, seconds = 0, {}
    for number in range(times):
        importing = number % 2 == 0
        target = folder / f"target{number}"
        given = ["import", "--hub", "../hub"] if importing else ["export", "--checkpoint", "../ckpt"]
        arguments = ["convert", *given, "--output", str(target), *([] if importing else ["--shard-size", SMALL_SHARDS])]
        work = folder / f"work{number}"
        work.mkdir()
        if importing not in seconds:
            seconds[importing] = _timed(arguments, work, target)
        child = forks.Child(forks.command, (arguments,), work, work / "killed")
        at_random, part = draw.random() < 0.2, draw.random()
        while not at_random and child.running and not list(folder.glob(f".{target.name}*")):
            time.sleep(0.0005)
        time.sleep(part * seconds[importing] if at_random else part**2 * seconds[importing] / 3)
        child.kill()
        staged = list(folder.glob(f".{target.name}*"))
        hits["behind its end" if target.exists() else "in the writing" if staged else "before it"] += 1
        if not target.exists():
            done = forks.call(forks.command, arguments, cwd=work, log=work / "again")
            assert done.code == 0, done.err
        if importing:
            _check_same_files(folder / "ckpt", target)
        else:
            assert_same_tensors(read_hub(target), tensors)
        good += not list(folder.glob(f".{target.name}*"))
        shutil.rmtree(target)
    return hits, good


def _timed(arguments: list[str], work: Path, target: Path) -> float:
    """Seconds of an undisturbed run."""
    forks.call(forks.command, ["-h"], cwd=work, log=work / "first")  # the server has started then
    begun = time.perf_counter()
    done = forks.call(forks.command, arguments, cwd=work, log=work / "whole")
    assert done.code == 0, done.err
    shutil.rmtree(target)
    return time.perf_counter() - begun
