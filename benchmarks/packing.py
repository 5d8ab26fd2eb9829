"""Rows against the lower bound and samples per second of packing, for five kinds of lengths.

    python benchmarks/packing.py [--samples 20000] [--captions captions.txt]

Not a comparison: what the data plane promises is at most 1.002 of the bound and at least 200,000 samples/s.
CAPTIONS is Flickr8k's file; without it that row is left out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import numpy as np

from datamodules.packing import lower_bound, pack

PICTURE = 171  # tokens of one picture
PROMPT = 14
ROUNDS = 5


def lengths(samples: int, captions: Path | None) -> dict[str, tuple[int, list[int]]]:
    """Tokens of a row, and of each sample, by name."""
    random = np.random.default_rng(20)
    words = np.minimum(np.exp(random.normal(3.0, 0.7, samples)).astype(int), 1000)
    made = {
        "constant": (4096, np.full(samples, 187)),
        "uniform": (4096, random.integers(16, 2048, samples)),
        "log-normal captions": (4096, PICTURE + PROMPT + words),
        "one picture or eight": (
            4096,
            np.where(random.random(samples) < 0.7, PICTURE + words, np.minimum(8 * PICTURE + 4 * words, 4096)),
        ),
    }
    if captions is not None:
        with captions.open(newline="") as file:
            counted = [len(row["caption"].split()) for row in csv.DictReader(file)]
        made["Flickr8k"] = (2048, PICTURE + PROMPT + np.resize(counted, samples))
    return {name: (row, values.tolist()) for name, (row, values) in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--captions", type=Path)
    options = parser.parse_args()
    for name, (row, values) in lengths(options.samples, options.captions).items():
        speeds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            rows = pack(values, row)
            speeds.append(len(values) / (time.perf_counter() - start))
        ratio = len(rows) / lower_bound(values, row)
        print(f"{name:22} {ratio:.4f} of the bound, {statistics.median(speeds):9,.0f} samples/s (median of {ROUNDS})")


if __name__ == "__main__":
    main()
