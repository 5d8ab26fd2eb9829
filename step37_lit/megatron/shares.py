"""Which part of a pack is whose: chunks of the row over context ranks, images over tensor and context ranks.

Plain arithmetic, so that a planner can ask without process groups.
"""

from __future__ import annotations

from collections.abc import Sequence


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """Numbers of a context rank's two chunks among 2 x ranks: an early one, that sees little, and a late one."""
    return rank, 2 * ranks - 1 - rank


def chunk_borders(borders: Sequence[int], start: int, end: int) -> tuple[list[int], list[int]]:
    """Borders of a chunk's sub-sequences.

    Args:
        borders: Of the row's sub-sequences, 0 to its length.
        start: First token of the chunk.
        end: One past its last token.

    Returns:
        Borders of the queries, from `start` on, and of the keys that they see, from the start of the first one's
        sub-sequence on; both in places of the row.
    """
    first_key = max(border for border in borders if border <= start)
    inner = [border for border in borders if start < border < end]
    return [start, *inner, end], [first_key, *inner, end]


def balanced(costs: Sequence[int], ranks: int) -> list[int]:
    """Owner of each image: the dearest first, each to the rank that has least so far."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for image in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[image] = loads.index(min(loads))
        loads[owners[image]] += costs[image]
    return owners
