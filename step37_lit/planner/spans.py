"""Which queries see which keys of a pack, counted: what decides the size of repeated keys and of masks on CPUs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from step37_lit.megatron.shares import chunk_borders


@dataclass(frozen=True)
class Spans:
    """What the mean context rank's queries see, as PyTorch's attention on CPUs takes it.

    Args:
        lengths: Of the row's sub-sequences.
        ranks: Context ranks.
    """

    lengths: tuple[int, ...]
    ranks: int

    @cached_property
    def _chunks(self) -> list[tuple[list[int], list[int]]]:
        """Borders of queries and keys of every chunk of the row."""
        borders = [0, *itertools.accumulate(self.lengths)]
        if self.ranks == 1:
            return [(borders, borders)]
        size = borders[-1] / (2 * self.ranks)
        seams = [round(number * size) for number in range(2 * self.ranks + 1)]
        return [chunk_borders(borders, start, end) for start, end in itertools.pairwise(seams)]

    @property
    def keys(self) -> float:
        """Keys, once for each chunk that sees them."""
        return sum(keys[-1] - keys[0] for _, keys in self._chunks) / self.ranks

    def mask_elements(self, window: int | None) -> float:
        """Of the blocks of one window that sub-sequences are cut into which are longer, or begin in another chunk."""
        total = 0
        for queries, keys in self._chunks:
            for (start, end), (first_key, last) in zip(
                itertools.pairwise(queries), itertools.pairwise(keys), strict=True
            ):
                before, whole = start - first_key, last - first_key
                reach = whole if window is None else window
                if before == 0 and end - start <= reach:
                    continue
                for place in range(before, whole, reach):
                    stop = min(place + reach, whole)
                    total += (stop - place) * (stop - max(0, place - reach + 1))
        return total / self.ranks
