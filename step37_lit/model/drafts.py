"""Tokens that the MTP layers draft for rows that are being continued.

R = rows, H = hidden, V = vocabulary, d = tokens that are drafted for a row, T = tokens of a pack.

Layer k at the last position p of a row reads the hidden state of layer k - 1 there and the embedding of token
p + k + 1: the token that the main head chose, then what the layers before drafted. So d layers draft d tokens at p.

What a layer kept of a position is only right if the tokens up to k + 1 ahead came true. Of the positions that a row
goes on by, and of the d before them, that is not known: every round runs the layers over the last d + 1 positions anew.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from step37_lit.config import Step37Config
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.mtp import MTPBlock
from step37_lit.model.packing import borders_of, following
from step37_lit.model.rotary import rotary_table


class Drafts:
    """The MTP layers' part of the rows; on the last pipeline stage.

        keep(...)                          behind each pass of the decoder
        take_back(counts), select(rows)    as `KVCache`'s
        begin(), next(layer, embeddings) once for each layer, end()    a round

    Args:
        mtp: The layers.
        config: The model's.
        depth: Layers that draft, d; from the first on.
        capacity: See `KVCache`.
    """

    def __init__(self, mtp: MTPBlock, config: Step37Config, depth: int, capacity: int):
        self.layers, self.config, self.depth = mtp.layers[:depth], config, depth
        self.cache = KVCache(capacity, pass_tokens=depth + 1)
        self._ends = torch.empty(0, dtype=torch.int64)  # [R] on the CPU, tokens of each row behind the decoder
        self._inputs = torch.empty(0)  # [R, d + 1 or more, 2, H] of each row's last positions: hidden, embedding

    def keep(self, hidden: Tensor, embeddings: Tensor, borders: PackedSeqParams) -> None:
        """Takes in a pass of the decoder: [T, 1, H] each, behind its final norm and what went into it."""
        inputs = torch.cat((hidden, embeddings), dim=1)
        if self.cache.lengths is not None:
            self._inputs = torch.cat((self._inputs, inputs.view(len(self._ends), -1, *inputs.shape[1:])), dim=1)
            self._ends = self._ends + borders.max_seqlen_q
            return
        # In front of a prompt of less than d + 1 tokens stands something else, which is never read.
        window = torch.arange(-self.depth - 1, 0, device=inputs.device)
        self._inputs = inputs[(borders.cu_seqlens_q[1:, None] + window).clamp(min=0)]
        self._ends = borders.cu_seqlens_q.long().diff().cpu()
        self._open(inputs, borders)
        for layer in self.layers:
            self._advance(layer, None)
        self.cache.end()

    def take_back(self, counts: Tensor) -> None:
        """See `KVCache.take_back`; once behind each pass that `keep` took in after the prompts."""
        first = self._inputs.shape[1] - counts - self.depth - 1
        index = (first[:, None] + torch.arange(self.depth + 1)).to(self._inputs.device)
        self._inputs = self._inputs.gather(1, index[..., None, None].expand(-1, -1, *self._inputs.shape[2:]))
        self._ends = self._ends - counts

    def select(self, rows: Tensor) -> None:
        """See `KVCache.select`."""
        self.cache.select(rows)
        self._ends, self._inputs = self._ends[rows.cpu()], self._inputs[rows]

    def begin(self) -> None:
        """Opens a round: the last positions of each row, of which a short one has fewer."""
        counts = self._ends.clamp(max=self.depth + 1)
        there = torch.arange(self.depth, -1, -1) < counts[:, None]
        assert self.cache.lengths is not None, "no prompts yet"
        self.cache.take_back(self.cache.lengths - (self._ends - counts))
        self._open(self._inputs[there.to(self._inputs.device)], borders_of(counts, self._inputs.device))

    def next(self, layer: int, embeddings: Tensor) -> Tensor:
        """The token that a layer drafts for each row, int64 [R]; the layers take their turns.

        Args:
            layer: Its number, from 0.
            embeddings: [R, 1, H] of the token that came last: the main head's, then the layer's before.
        """
        own: Any = self.layers[layer]
        self._advance(own, embeddings)
        last = self._hidden.index_select(0, self._last)
        logits = own.output_layer(last, runtime_gather_output=True)[0][:, 0].float()
        pictures = torch.tensor(self.config.tokens.of_pictures, device=logits.device)
        return logits.index_fill(1, pictures, -torch.inf).argmax(dim=-1)

    def end(self) -> None:
        """Closes the round."""
        self.cache.end()

    def _open(self, inputs: Tensor, borders: PackedSeqParams) -> None:
        self.cache.begin(borders)
        self._hidden, self._row = inputs.split(1, dim=1)
        self._borders, self._last = borders, borders.cu_seqlens_q[1:].long() - 1
        self._table = rotary_table(self.config.text, self.cache.positions)

    def _advance(self, layer: nn.Module, embeddings: Tensor | None) -> None:
        """One layer over the open pack; `embeddings` [R, 1, H] of each row's newest token, if it is known."""
        self._row = following(self._row, self._borders.cu_seqlens_q)
        if embeddings is not None:
            self._row.index_copy_(0, self._last, embeddings)
        self._hidden = layer(self._row, self._hidden, self._table, self._borders, self.cache)
