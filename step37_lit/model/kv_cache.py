"""Keys and values of sequences that are being continued, for megatron's `inference_context` slot.

R = rows (sequences), C = positions that a layer keeps, T = tokens of a pack, N = query heads, G = KV groups,
D = head_dim.

The first pass stores what a pack of prompts leaves behind, a sub-sequence a row. Every further pass adds one token to
each row. A sliding layer keeps its window only: position p lies at p modulo C, and the softmax does not mind the order.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from step37_lit.megatron.core_attention import CoreAttention


class KVCache:
    """The cache of one rank's layers.

    Args:
        capacity: Positions of the longest row, prompt and continuation together.

    Attributes:
        lengths: [R] int64, tokens of each row so far; None before the first pass.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.lengths: Tensor | None = None
        self._longest = 0  # of `lengths`, known without asking the device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [R, C, G, D]
        self._decoding = False
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # of the open pass, by the positions that a layer keeps

    @property
    def num_rows(self) -> int:
        return 0 if self.lengths is None else len(self.lengths)

    def begin(self, packed: PackedSeqParams) -> None:
        """Opens a pass over a pack.

        Raises:
            ValueError: rows longer than the capacity, or a later pass that has not one token for each row.
        """
        borders = packed.cu_seqlens_q
        self._decoding = self.lengths is not None
        self._places = {}
        if self.lengths is None:
            self.lengths = torch.zeros(len(borders) - 1, dtype=torch.int64, device=borders.device)
        elif packed.max_seqlen_q != 1 or len(borders) - 1 != self.num_rows:
            found = f"{len(borders) - 1} sub-sequences of up to {packed.max_seqlen_q} tokens"
            raise ValueError(f"cu_seqlens: expected one token for each of the {self.num_rows} rows, found {found}")
        if self._longest + packed.max_seqlen_q > self.capacity:
            raise ValueError(f"rows of {self._longest + packed.max_seqlen_q} tokens, capacity {self.capacity}")

    def offsets(self, packed: PackedSeqParams) -> Tensor:
        """[1, T] int64: tokens of its row that came before the open pass, for each token of the pack."""
        assert self.lengths is not None, "offsets before begin"
        return self.lengths.repeat_interleave(packed.cu_seqlens_q.diff())[None]

    def end(self, packed: PackedSeqParams) -> None:
        """Closes the pass: its tokens now count."""
        assert self.lengths is not None, "end before begin"
        self.lengths = self.lengths + packed.cu_seqlens_q.diff()
        self._longest += packed.max_seqlen_q

    def attend(
        self,
        layer: int,
        window: int | None,
        core_attention: CoreAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams,
    ) -> Tensor:
        """Attention of one layer in the open pass; what comes in is kept.

        Args:
            layer: Number of the layer.
            window: Keys that a query sees, itself included; None for all before it.
            core_attention: The layer's own.
            query: [T, N, D]; T = R from the second pass on.
            key, value: [T, G, D].
            packed: Borders of the pack.

        Returns:
            [T, N, D].
        """
        kept = self.capacity if window is None else min(window, self.capacity)
        if not self._decoding:
            self._layers[layer] = tuple(self._stored(part, kept, packed) for part in (key, value))  # type: ignore[assignment]
            return core_attention(query, key, value, packed)
        keys, values = self._layers[layer]
        slots, seen = self._slots_and_seen(kept)
        for stored, new in ((keys, key), (values, value)):
            stored.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
        used = seen.shape[1]
        return core_attention.attend_rows(query, keys[:, :used], values[:, :used], seen)

    def _slots_and_seen(self, kept: int) -> tuple[Tensor, Tensor]:
        """Where the open pass' token of each row goes, [R] in the [R x C] slots of all rows, and which slots it sees,
        [R, used] bool: the same for all layers that keep as many positions."""
        if kept not in self._places:
            assert self.lengths is not None
            rows = torch.arange(self.num_rows, device=self.lengths.device)
            positions = torch.arange(min(self._longest + 1, kept), device=rows.device)
            self._places[kept] = rows * kept + self.lengths % kept, positions <= self.lengths[:, None]
        return self._places[kept]

    def select(self, rows: Tensor) -> None:
        """Keeps the rows of these numbers, in their order; a number may come several times.

        Args:
            rows: [any] int64.
        """
        assert self.lengths is not None, "nothing is cached yet"
        self.lengths = self.lengths[rows]
        self._layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._layers.items()}

    def _stored(self, part: Tensor, kept: int, packed: PackedSeqParams) -> Tensor:
        """[T, G, D] of a pack -> [R, kept, G, D] with each row's last `kept` positions."""
        borders = packed.cu_seqlens_q.long()
        lengths = borders.diff()
        row_of = torch.arange(len(lengths), device=part.device).repeat_interleave(lengths)
        positions = torch.arange(len(part), device=part.device) - borders[:-1][row_of]
        last = positions >= (lengths - kept)[row_of]
        stored = part.new_zeros(len(lengths), kept, *part.shape[1:])
        stored[row_of[last], positions[last] % kept] = part[last]
        return stored
