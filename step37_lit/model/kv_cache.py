"""Keys and values of sequences that are being continued, for megatron's `inference_context` slot.

R = rows (sequences), m = tokens that a pass adds to a row at most, C = positions that a layer keeps, T = tokens of a
pack, N = query heads, G = KV groups, D = head_dim.

The first pass stores what a pack of prompts leaves behind, a sub-sequence a row. Every further pass adds a
sub-sequence of one or a few tokens to each row; `take_back` undoes the last ones. A sliding layer keeps its window and
what one pass may add: position p lies at p modulo C, and the softmax does not mind the order.
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
        pass_tokens: Tokens that a pass behind the first one adds to a row at most.

    Attributes:
        lengths: [R] int64 on the CPU, tokens of each row so far; None before the first pass.
        positions: [1, T] int64, position of each token of the open pass in its row.
        mtp_inputs: Hidden states and embeddings [T, 1, H] of the last pass and its borders, where the model was asked
            for them.
    """

    def __init__(self, capacity: int, pass_tokens: int = 1):
        self.capacity, self.pass_tokens = capacity, pass_tokens
        self.lengths: Tensor | None = None
        self.positions = torch.empty(1, 0, dtype=torch.int64)
        self.mtp_inputs: tuple[Tensor, Tensor, PackedSeqParams] | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [R, C, G, D]
        self._furthest = torch.empty(0, dtype=torch.int64)  # [R], length of each row before anything was taken back
        self._pass: _Pass | None = None  # the open one, or the last

    @property
    def num_rows(self) -> int:
        return 0 if self.lengths is None else len(self.lengths)

    @property
    def num_answers(self) -> int:
        """Tokens of the last pass whose logits are asked for: each prompt's last one, all of further passes."""
        assert self._pass is not None, "no pass yet"
        return self.num_rows if self._pass.prompts else len(self._pass.rows)

    def begin(self, packed: PackedSeqParams) -> None:
        """Opens a pass over a pack.

        Raises:
            ValueError: rows longer than the capacity, or a later pass that has not a few tokens for each row.
        """
        borders = packed.cu_seqlens_q.long().cpu()
        counts = borders.diff()
        prompts = self.lengths is None
        if self.lengths is None:
            self.lengths = self._furthest = torch.zeros_like(counts)
        elif len(counts) != self.num_rows or not 1 <= int(counts.min()) <= packed.max_seqlen_q <= self.pass_tokens:
            expected = f"1 to {self.pass_tokens} tokens for each of the {self.num_rows} rows"
            found = f"{len(counts)} sub-sequences of {int(counts.min())} to {packed.max_seqlen_q} tokens"
            raise ValueError(f"cu_seqlens: expected {expected}, found {found}")
        longest = int((self.lengths + counts).max())
        if longest > self.capacity:
            raise ValueError(f"rows of {longest} tokens, capacity {self.capacity}")
        self._pass = _Pass(prompts, borders, self.lengths, packed.cu_seqlens_q.device)
        self.positions = self._pass.positions[None]

    def end(self) -> None:
        """Closes the pass: its tokens now count."""
        assert self._pass is not None, "end before begin"
        self.lengths = self._pass.ends
        self._furthest = torch.maximum(self._furthest, self.lengths)

    def answered(self, hidden: Tensor) -> Tensor:
        """[T, 1, H] of the last pass -> [answers, 1, H]."""
        assert self._pass is not None, "answered before begin"
        return hidden.index_select(0, self._pass.last) if self._pass.prompts else hidden

    def take_back(self, counts: Tensor) -> None:
        """Forgets the last tokens of each row, [R] int64 on the CPU.

        Raises:
            ValueError: more than the sliding layers can undo, `pass_tokens` of the longest that a row ever was.
        """
        assert self.lengths is not None, "nothing is cached yet"
        lengths = self.lengths - counts
        least = (self._furthest - self.pass_tokens).clamp(min=0)
        if bool(((counts < 0) | (lengths < least)).any()):
            most = (self.lengths - least).tolist()
            raise ValueError(f"take_back: expected at most {most} tokens, found {counts.tolist()}")
        self.lengths = lengths

    def select(self, rows: Tensor) -> None:
        """Keeps the rows of these numbers, in their order; a number may come several times.

        Args:
            rows: [any] int64.
        """
        assert self.lengths is not None, "nothing is cached yet"
        self.lengths, self._furthest = self.lengths[rows.cpu()], self._furthest[rows.cpu()]
        self._layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._layers.items()}

    def kept(self, window: int | None) -> int:
        """Positions that a layer keeps: its window, and what a pass may write over before a token sees the rest."""
        return self.capacity if window is None else min(window + self.pass_tokens - 1, self.capacity)

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
            query: [T, N, D].
            key, value: [T, G, D].
            packed: Borders of the pack.

        Returns:
            [T, N, D].
        """
        assert self._pass is not None, "attend before begin"
        kept = self.kept(window)
        if self._pass.prompts:
            self._layers[layer] = self._pass.stored(key, kept), self._pass.stored(value, kept)
            return core_attention(query, key, value, packed)
        keys, values = self._layers[layer]
        slots, mask = self._pass.slots_and_mask(window, kept, query.dtype)
        for stored, new in ((keys, key), (values, value)):
            stored.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
        used = mask.shape[-1]
        by_row = self._pass.by_row(query)
        return self._pass.packed(core_attention.attend_rows(by_row, keys[:, :used], values[:, :used], mask))


class _Pass:
    """Where the tokens of one pass stand.

    Args:
        prompts: Whether it is the first one.
        borders: [R + 1] int64 on the CPU.
        lengths: [R] int64 on the CPU, tokens of each row before.
        device: Of the tokens.
    """

    def __init__(self, prompts: bool, borders: Tensor, lengths: Tensor, device: torch.device):
        counts = borders.diff()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        positions = torch.arange(len(rows)) - borders[:-1][rows] + lengths[rows]
        self.prompts, self.device = prompts, device
        self.ends = lengths + counts
        self._lengths, self._most = lengths, int(counts.max())
        self._even = int(counts.min()) == self._most
        self.last = (borders[1:] - 1).to(device)
        self.rows, self.positions = rows.to(device), positions.to(device)
        self._padded = (rows * self._most + positions - lengths[rows]).to(device)  # [T] in the [R x m] of all rows
        self._places: dict[int | None, tuple[Tensor, Tensor]] = {}  # by the window, which layers share

    def stored(self, part: Tensor, kept: int) -> Tensor:
        """[T, G, D] -> [R, kept, G, D] with each row's last `kept` positions."""
        last = self.positions >= (self.ends.to(self.device) - kept)[self.rows]
        stored = part.new_zeros(len(self.ends), kept, *part.shape[1:])
        stored[self.rows[last], self.positions[last] % kept] = part[last]
        return stored

    def slots_and_mask(self, window: int | None, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where each token goes, [T] in the [R x C] slots of all rows, and what is added to the logits of the slots,
        [R, m, used]: 0 for those that a token sees, else -inf."""
        if window not in self._places:
            # The newest position of each slot; the slots of positions that are not there yet come out below 0.
            newest = (self.ends - 1)[:, None]
            held = newest - (newest - torch.arange(min(int(self.ends.max()), kept))) % kept
            seeing = (self._lengths[:, None] + torch.arange(self._most))[..., None]
            seen = (held[:, None] >= 0) & (held[:, None] <= seeing)
            if window is not None:
                seen &= held[:, None] > seeing - window
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._places[window] = self.rows * kept + self.positions % kept, mask.to(self.device)
        return self._places[window]

    def by_row(self, values: Tensor) -> Tensor:
        """[T, ...] -> [R, m, ...], zeros where a row has fewer tokens."""
        shape = (len(self.ends), self._most, *values.shape[1:])
        if self._even:
            return values.view(shape)
        return values.new_zeros(shape).view(-1, *values.shape[1:]).index_copy_(0, self._padded, values).view(shape)

    def packed(self, values: Tensor) -> Tensor:
        """The reverse of `by_row`."""
        flat = values.flatten(0, 1)
        return flat if self._even else flat[self._padded]
