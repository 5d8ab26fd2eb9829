"""From the bytes of a photograph to the pixels of the global view, against the reference's way.

    python benchmarks/image_path.py [--photographs ../shared/flickr8k-mini/images] [--rounds 7] [--threads 1]

Ours checks the header, decodes and resizes uint8 with torch; normalising is left to the model's device. The reference
opens, converts and resizes with Pillow, makes float32 of it and normalises. Both, and decoding alone, take turns in one
process on the same photographs; the ratio of each round counts.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from step37_lit.images import open_image
from step37_lit.model.vision_tower import CLIP_MEAN, CLIP_STD
from step37_lit.multicrop import pixels_of, resize_pixels

SIDE = 728
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))


def ours(data: bytes) -> Tensor:
    return resize_pixels(pixels_of(open_image(data)), SIDE, SIDE, "fast")[0]


def reference(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32) / 255
    return (pixels - MEAN) / STD


def decoding(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def milliseconds(function: Callable[[bytes], object], files: list[bytes]) -> float:
    start = time.perf_counter()
    for data in files:
        function(data)
    return (time.perf_counter() - start) / len(files) * 1e3


def levels_apart(data: bytes) -> tuple[int, float]:
    """(largest, mean) difference to the reference's levels before it normalises."""
    levels = ((reference(data) * STD + MEAN) * 255).round().int()
    apart = (ours(data).int() - levels).abs()
    return int(apart.max()), apart.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "flickr8k-mini" / "images"
    parser.add_argument("--photographs", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="a loader's worker has one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = [path.read_bytes() for path in sorted(options.photographs.glob("*.jpg"))]
    if not files:
        raise SystemExit(f"no photographs (*.jpg) in {options.photographs}")

    differences = [levels_apart(data) for data in files]
    times: dict[Callable, list[float]] = {reference: [], ours: [], decoding: []}
    for _ in range(options.rounds):
        for function, measured in times.items():
            measured.append(milliseconds(function, files))
    ratios = sorted(theirs / own for theirs, own in zip(times[reference], times[ours], strict=True))
    medians = {function.__name__: statistics.median(measured) for function, measured in times.items()}
    print(f"{len(files)} photographs to {SIDE} x {SIDE}, {options.rounds} rounds, {options.threads} torch threads")
    for name, median in medians.items():
        print(f"{name:10} {median:6.2f} ms a photograph (median)")
    print(f"ours differs by at most {max(d for d, _ in differences)} levels (allowed: 2), "
          f"{statistics.mean(m for _, m in differences):.4f} on average")  # fmt: skip
    print(f"ours takes {medians['ours'] / medians['decoding']:.2f} x the time of decoding alone")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; target >= 3.0)")


if __name__ == "__main__":
    main()
