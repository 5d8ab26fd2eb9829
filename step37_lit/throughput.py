"""How fast training is: tokens and images per second, padding, and the share of this process's own GEMM peak."""

from __future__ import annotations

import time

import torch


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the best large matrix product that this process reaches with its threads, by trying.

    Args:
        device: Where the product runs.
        dtype: Of both factors.
        seconds: How long to try; the best of all runs counts, so that a busy neighbour does not lower the peak.
    """
    # Large enough to reach the peak, small enough for several runs in the time given.
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    with torch.no_grad():
        while True:
            start = time.perf_counter()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - start))
            if now > end:
                return best


class StepTimer:
    """Seconds from the end of one step to the end of the next, and how many of them went by waiting for data.

    Both methods take the seconds that the loader has waited since it was made; a new loader begins at 0.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # time, seconds waited

    def pause(self) -> None:
        """Forgets the last end: what happens until the next one (validation, saving) is not training time."""
        self._last = None

    def start(self, waited: float) -> None:
        """Begins where there is no end of a step to count from."""
        if self._last is None:
            self._last = time.perf_counter(), waited

    def lap(self, waited: float) -> tuple[float, float]:
        """Ends a step and gives its seconds and those of them that it waited."""
        assert self._last is not None, "lap before start"
        now, (before, waited_before) = time.perf_counter(), self._last
        self._last = now, waited
        return now - before, waited - waited_before if waited >= waited_before else waited
