"""Speed and memory of `convert import` and `convert export` against a plain copy that hashes what it copies.

    python benchmarks/hub_convert.py [--gigabytes 2] [--rounds 3]

A synthetic hub folder is made in a temporary folder (`TMPDIR` says where) and removed. In each round the copy, the
import and the export run behind each other, each into a new folder that is synced to the disk. Ratios are of the sums,
by the wall and by the process's CPU seconds (which other work on the machine changes less); an export also hashes what
it reads.
Memory is that of a process of its own for each conversion: VmHWM at its end less VmRSS before it starts, when all that
it imports is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from step37_lit.config import Step37Config, VisionConfig
from step37_lit.hub.exporting import ExportOptions, export_hub
from step37_lit.hub.importing import import_hub
from tests.hub_folders import write_hub

CHUNK = 2**22
SHARD = 500_000_000

MEASURE = """
import sys
from pathlib import Path
from step37_lit.hub.exporting import ExportOptions, export_hub
from step37_lit.hub.importing import import_hub
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
before = status("VmRSS")
kind, source, target, shard_size = sys.argv[1:]
options = ExportOptions(shard_size=int(shard_size))
import_hub(source, target) if kind == "import" else export_hub(source, target, options)
print(status("VmHWM") - before)
"""


def config_of(gigabytes: float) -> Step37Config:
    """A model with MoE and MTP layers whose bf16 tensors take about that much."""
    vision = VisionConfig(width=256, num_layers=4, num_heads=4, ffn_hidden_size=1024)
    base = Step37Config.preset("flash")
    layers, mtp = 6, 1
    text = dataclasses.replace(
        base.text,
        vocab_size=131072,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_layers=layers,
        num_mtp_layers=mtp,
        layer_types=base.text.layer_types[: layers + mtp],
        num_heads=16,
        num_sliding_heads=24,
        moe_layers=tuple(range(2, layers)),
        num_experts=32,
        expert_ffn_size=max(64, int(gigabytes * 820) // 64 * 64),
        swiglu_limits=(None,) * (layers + mtp),
        swiglu_limits_shared=(None,) * (layers + mtp),
    )
    return dataclasses.replace(base, vision=vision, text=text)


def copy_with_hash(source: Path, target: Path) -> None:
    """Every file, hashed while it is copied, synced to the disk."""
    target.mkdir()
    buffer = bytearray(CHUNK)
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as reading, (target / path.name).open("wb", buffering=0) as writing:
            while count := reading.readinto(buffer):
                piece = memoryview(buffer)[:count]
                digest.update(piece)
                writing.write(piece)
            os.fsync(writing.fileno())


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall and of the CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def peak_memory(kind: str, source: Path, target: Path) -> int:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, kind, str(source), str(target), str(SHARD)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hub, ckpt = folder / "hub", folder / "ckpt"
        tensors = write_hub(hub, config_of(options.gigabytes), shards=4, texts=False)
        size = sum(tensor.nbytes for tensor in tensors.values())
        largest = max(tensor.nbytes for tensor in tensors.values())
        print(f"hub folder  {size / 1e9:.2f} GB in 4 files, {len(tensors)} tensors, the largest {largest / 1e9:.2f} GB")
        del tensors
        memory = {"import": peak_memory("import", hub, ckpt), "export": peak_memory("export", ckpt, folder / "out")}
        for kind, peak in memory.items():
            print(f"memory      {kind}: {peak / 1e9:.2f} GB above the process before it (VmHWM - VmRSS)")
        shutil.rmtree(folder / "out")
        options_of_export = ExportOptions(shard_size=SHARD)
        runs: dict[str, Callable[[Path], object]] = {
            "copy": lambda target: copy_with_hash(hub, target),
            "import": lambda target: import_hub(hub, target),
            "export": lambda target: export_hub(ckpt, target, options_of_export),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for number in range(options.rounds):
            for name, run in runs.items():
                os.sync()
                target = folder / "target"
                seconds[name].append(timed(lambda run=run, target=target: run(target)))
                shutil.rmtree(target)
            latest = (f"{name} {times[-1][0]:.2f} s (CPU {times[-1][1]:.2f})" for name, times in seconds.items())
            print(f"round {number}     " + ", ".join(latest), flush=True)
        sums = {name: [sum(column) for column in zip(*times, strict=True)] for name, times in seconds.items()}
        for name, (wall, cpu) in sums.items():
            speed = size * options.rounds / wall / 1e9
            ratios = f"{sums['copy'][0] / wall:.2f} x by the wall, {sums['copy'][1] / cpu:.2f} x by CPU seconds"
            print(f"{name:11} {speed:.2f} GB/s, the copy's speed {ratios}")


if __name__ == "__main__":
    main()
