"""A small checkpoint, and what damages it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from step37_lit.checkpoint import folder
from step37_lit.checkpoint.manifest import MANIFEST
from step37_lit.checkpoint.tensors import Part, Sharded, write_tensors
from step37_lit.megatron.checkpointing import TRAINING_FILE

WEIGHT = torch.arange(60, dtype=torch.float32).view(10, 6)
SMALL = torch.ones(3, dtype=torch.bfloat16)


def write(target: Path, step: int = 1) -> Path:
    """A small checkpoint of two tensors in two files and a training state."""
    with folder.staging(target) as staged:
        halves = (Part.of(WEIGHT[:4], (0, 0)), Part(lambda: WEIGHT[4:], (4, 0), (6, 6), torch.float32))
        tensors = {"weight": Sharded((10, 6), halves), "bias": Sharded((3,), (Part.of(SMALL, (0,)),))}
        write_tensors(staged / "model", tensors)
        write_tensors(staged / "optimizer", {"exp_avg.weight": Sharded((10, 6), (Part.of(WEIGHT, (0, 0)),))})
        torch.save({"step": step}, staged / TRAINING_FILE)
        folder.commit(target, "training", step)
        folder.point_to(target)
    return target


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def swap(checkpoint: Path) -> Path:
    one, other = checkpoint / "model" / "__0_0.distcp", checkpoint / "optimizer" / "__0_0.distcp"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return one


def damage() -> dict[str, tuple[Callable[[Path], object], str]]:
    """Kind of damage -> what does it, and what the line says."""

    def truncate(c: Path) -> None:
        os.truncate(c / "model" / "__0_0.distcp", 100)

    def grow(c: Path) -> None:
        with (c / TRAINING_FILE).open("ab") as file:
            file.write(b"more")

    def outside(c: Path) -> None:
        text = (c / MANIFEST).read_text()
        (c / MANIFEST).write_text(text.replace('"training.pt"', '"../../training.pt"'))

    def absolute(c: Path) -> None:
        text = (c / MANIFEST).read_text()
        (c / MANIFEST).write_text(text.replace('"training.pt"', '"/etc/passwd"'))

    def link(c: Path) -> None:
        (c / TRAINING_FILE).rename(c.parent / "elsewhere")
        (c / TRAINING_FILE).symlink_to(c.parent / "elsewhere")

    def version(c: Path) -> None:
        (c / MANIFEST).write_text((c / MANIFEST).read_text().replace('"format": 2', '"format": 7'))

    def another_epoch(c: Path) -> None:
        (c / MANIFEST).write_text((c / MANIFEST).read_text().replace('"epoch": 0', '"epoch": 1'))

    def flipped(c: Path) -> None:
        flip(c / "model" / "__0_0.distcp", 0.5)

    return {
        "flipped": (flipped, "__0_0.distcp: checkpoint: expected SHA-256"),
        "truncated": (truncate, "model/__0_0.distcp: checkpoint: expected"),
        "grown": (grow, "training.pt: checkpoint: expected"),
        "swapped": (swap, "__0_0.distcp: checkpoint: expected"),
        "missing": (lambda c: (c / "model" / ".metadata").unlink(), "model/.metadata: checkpoint: expected a file of"),
        "extra": (lambda c: (c / "model" / "more.bin").touch(), "model/more.bin: checkpoint: expected no file"),
        "half-written": (lambda c: (c / MANIFEST).unlink(), "manifest.json: checkpoint: expected a file"),
        "a manifest of nothing": (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json: format: expected 2"),
        "a manifest that is no text": (lambda c: (c / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json: checkpoint:"),
        "a deep manifest": (
            lambda c: (c / MANIFEST).write_text("[" * 10**5),
            "manifest.json: checkpoint: expected JSON",
        ),
        "another version": (version, "manifest.json: format: expected 2, found 7"),
        "another epoch": (another_epoch, "manifest.json: checkpoint: expected a manifest as it was written"),
        "a path outside": (outside, "files: expected paths inside the checkpoint, found '../../training.pt'"),
        "an absolute path": (absolute, "files: expected paths inside the checkpoint, found '/etc/passwd'"),
        "a link": (link, "training.pt: checkpoint: expected a plain file"),
    }
