"""Every ordered pair of layouts on up to four ranks: what one wrote, the other loads, to the last bit."""

from __future__ import annotations

from pathlib import Path

from tests.layouts.resharding import MODELS, check_pairs
from tests.reliability.figure import Figure

SHORT = [("dense", ["DP2", "PP2"], ["TP2"]), ("moe", ["EP2"], ["PP2xVPP2"])]


def measure(full: bool, seed: int, folder: Path) -> Figure:
    every = [(model, list(layouts), list(layouts)) for model, (layouts, _) in MODELS.items()]
    good = tried = 0
    for model, makers, takers in every if full else SHORT:
        tried += sum(maker != taker for maker in makers for taker in takers)
        (folder / model).mkdir()
        good += check_pairs(folder / model, model, makers, takers)
    layouts = "; ".join(f"{model}: {', '.join(own)}" for model, (own, _) in MODELS.items())
    return Figure(good, tried, f"weights, both moments and step counts bit-equal; {layouts}")
