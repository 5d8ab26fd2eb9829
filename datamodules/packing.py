"""Packing: which samples share a row of `max_length` tokens, from their lengths alone.

Samples come in order. The window holds the oldest ones that are not packed yet; the oldest of all goes next, and the
rest of its row is filled as exactly as the window allows: a subset sum kept as the bits of an integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from step37_lit.errors import require

WINDOW = 64


def pack(lengths: Iterable[int], max_length: int, window: int = WINDOW) -> list[list[int]]:
    """Packs samples into rows; see `iterate_packs`.

    Returns:
        For each row the indices of its samples, ascending; every sample is in one row.
    """
    return list(iterate_packs(lengths, max_length, window))


def iterate_packs(lengths: Iterable[int], max_length: int, window: int = WINDOW) -> Iterator[list[int]]:
    """Rows in the order in which they are filled.

    Args:
        lengths: Tokens of each sample, 1 to `max_length`.
        max_length: Tokens of a row.
        window: Samples that are looked at for one row; a sample waits for at most as many rows.

    Raises:
        ConfigError: a length that does not fit; the message names the index.
    """
    require(max_length > 0, "max_length", "a positive number", max_length)
    require(window > 0, "window", "a positive number", window)
    coming = _checked(lengths, max_length)
    waiting: list[tuple[int, int]] = []  # (index, length), oldest first
    while True:
        for sample in coming:
            waiting.append(sample)
            if len(waiting) >= window:
                break
        if not waiting:
            return
        chosen = _fill(waiting, max_length)
        yield [waiting[place][0] for place in chosen]
        for place in reversed(chosen):
            del waiting[place]


def lower_bound(lengths: Sequence[int] | np.ndarray, max_length: int) -> int:
    """Rows that any packing of `lengths` needs at least.

    The best of the bounds by dual feasible functions u(k) of Fekete and Schepers (Mathematical Programming 91, 2001),
    k = 1..64, and of the tokens alone. u(k) sees that samples a little longer than 1/(k+1) of a row fit only k times.
    """
    samples = np.asarray(lengths, dtype=np.int64)
    best = -(-int(samples.sum()) // max_length)
    for k in range(1, 65):
        whole, rest = np.divmod((k + 1) * samples, max_length)
        # In units of 1 / (k x max_length), so that the sum is exact.
        weights = np.where(rest == 0, k * samples, whole * max_length)
        best = max(best, -(-int(weights.sum()) // (k * max_length)))
    return best


def _checked(lengths: Iterable[int], max_length: int) -> Iterator[tuple[int, int]]:
    for index, length in enumerate(lengths):
        if not 0 < length <= max_length:
            require(False, f"lengths[{index}]", f"in 1..{max_length} (max_length)", length)
        yield index, length


def _fill(waiting: list[tuple[int, int]], max_length: int) -> list[int]:
    """Places in `waiting` of the oldest sample and of those that fill the rest of its row best."""
    room = max_length - waiting[0][1]
    # Bit r: some of the samples seen so far leave r tokens of the room free. Adding a sample shifts to the right, and
    # what would not fit falls off the end.
    free = 1 << room
    steps: list[tuple[int, int, int]] = []  # place, length, `free` without it
    useless: set[int] = set()  # lengths that change nothing now
    for place in range(1, len(waiting)):
        length = waiting[place][1]
        if length > room or length in useless:
            continue
        with_it = free | free >> length
        if with_it == free:
            useless.add(length)
            continue
        steps.append((place, length, free))
        free = with_it
        if free & 1:
            break
        useless.clear()
    chosen = []
    left = (free & -free).bit_length() - 1  # the least that can be left free
    for place, length, without_it in reversed(steps):
        if not without_it >> left & 1:
            chosen.append(place)
            left += length
    return [0, *reversed(chosen)]
