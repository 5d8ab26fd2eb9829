"""Damage to each file of a checkpoint: it is refused and the file is named; a run goes on from the one before."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from step37_lit.checkpoint.folder import LATEST
from step37_lit.checkpoint.manifest import MANIFEST, read_manifest, verify
from step37_lit.errors import ConfigError
from tests.reliability.figure import Figure
from tests.reliability.runs import Place, compare, make_set

STEPS, EVERY = 6, 3
NEWEST = "step_000006"


def measure(full: bool, seed: int, folder: Path) -> Figure:
    draw = random.Random(seed)
    data = make_set(folder)
    straight = Place.make(folder / "straight", data, STEPS, every=EVERY)
    straight.finish()
    checkpoint = straight.checkpoints / NEWEST
    problems = [*_verified(checkpoint, draw, 50 if full else 3), *_manifest_bits(checkpoint, 1 if full else 97)]
    refused = len(problems)
    cases = [(name, kind) for name in _names(checkpoint) for kind in KINDS] + [(LATEST, kind) for kind in POINTERS]
    if not full:
        cases = [("optimizer/__0_0.distcp", "flip"), ("training.pt", "delete")]
    for number, (name, kind) in enumerate(cases):
        problems.append(_passed_over(straight, data, folder / f"case{number}", name, kind, draw))
    wrong = [problem for problem in problems if problem]
    print("\n".join(wrong[:10]), end="")
    kinds = f"{refused} damages (a bit, truncated, deleted, grown, swapped; every bit of the manifest) refused by name"
    return Figure(len(problems) - len(wrong), len(problems), f"{kinds}; {len(cases)} runs went on from the one before")


def _names(checkpoint: Path) -> list[str]:
    return [*read_manifest(checkpoint).files, MANIFEST]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def _swap(path: Path) -> None:
    """With the checkpoint's file that is of the same name, or nearest in size."""
    checkpoint = next(folder for folder in path.parents if folder.name == NEWEST)
    others = [other for other in checkpoint.rglob("*") if other.is_file() and other != path]
    other = min(others, key=lambda each: (each.name != path.name, abs(each.stat().st_size - path.stat().st_size)))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": lambda path, draw: flip(path, draw.randrange(path.stat().st_size * 8)),
    "truncate": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "delete": lambda path, draw: path.unlink(),
    "swap": lambda path, draw: _swap(path),
}
# Of the pointer, whose loss costs nothing: the newest good one is found without it.
POINTERS: dict[str, Callable[[Path, random.Random], None]] = {
    "delete": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_text("") and None,
    "nonsense": lambda path, draw: path.write_bytes(b"\xff\0../..\n") and None,
    "gone": lambda path, draw: path.write_text("step_000099\n") and None,
}


def _verified(checkpoint: Path, draw: random.Random, flips: int) -> list[str | None]:
    """Every kind of damage to each file; what is not refused, or names another file."""
    outcomes: list[str | None] = []
    for name in _names(checkpoint):
        path = checkpoint / name
        content = path.read_bytes()
        kinds = ["flip"] * flips + ["truncate", "delete", "grow"]
        for kind in kinds:
            _grow(path) if kind == "grow" else KINDS[kind](path, draw)
            outcomes.append(_refusal(checkpoint, name, kind))
            path.write_bytes(content)
    verify(checkpoint)
    return outcomes


def _manifest_bits(checkpoint: Path, step: int) -> list[str | None]:
    """Each bit of the manifest (or one in `step`): nothing else says what it should be."""
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    outcomes = []
    for bit in range(0, len(content) * 8, step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        outcomes.append(_refusal(checkpoint, MANIFEST, f"bit {bit}"))
    path.write_bytes(content)
    return outcomes


def _refusal(checkpoint: Path, name: str, kind: str) -> str | None:
    try:
        verify(checkpoint)
    except ConfigError as error:
        told = str(error)
        named = told.startswith(f"{checkpoint / name}: ") and "\n" not in told
        return None if named else f"{name}, {kind}: the line is {told}"
    return f"{name}, {kind}: not refused"


def _passed_over(straight: Place, data: Path, folder: Path, name: str, kind: str, draw: random.Random) -> str | None:
    """A run whose newest checkpoint is damaged goes on from the one before and ends as the straight one."""
    place = Place.make(folder, data, STEPS, every=EVERY)
    shutil.copytree(straight.run, place.run)
    shutil.copy(straight.ledger, place.ledger)
    pointer = name == LATEST
    path = place.checkpoints / (LATEST if pointer else f"{NEWEST}/{name}")
    (POINTERS if pointer else KINDS)[kind](path, draw)
    done = place.finish()
    goes_on = f"resume      step {STEPS if pointer else EVERY}, epoch" in done.out
    file = place.checkpoints / NEWEST if kind == "swap" else f"{path}: "  # which damages two
    named = pointer or any("passed over: " in line and str(file) in line for line in done.out.splitlines())
    wrong = compare(straight, place, STEPS)
    if named and goes_on and not wrong:
        shutil.rmtree(folder)
        return None
    return f"{name}, {kind}: {wrong}\n{done.out}"
