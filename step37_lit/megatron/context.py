"""Context parallelism: each rank of a context group has its share of a pack's row.

T = tokens of the row, C = context ranks, G = key/value heads, D = head_dim. The row is cut into 2C chunks of T / 2C
tokens; rank r has chunks r and 2C - 1 - r, behind each other. A causal token sees what is in front of it, so an early
chunk goes with a late one, and on a row that is one sequence all ranks have the same work.

Only attention looks beyond a rank's tokens. It gathers all keys and values, and each chunk attends to what is in front
of it in its own sub-sequences: a part of a sub-sequence is attention whose queries are the last of its keys.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from step37_lit.errors import require
from step37_lit.megatron.shares import chunk_borders, chunks_of


@dataclass(frozen=True)
class Chunk:
    """A chunk of this rank and the keys that it may see.

    Args:
        first_key: Place in the row where the chunk's first sub-sequence begins.
        end: One past the chunk's last token.
        borders: Borders of the sub-sequences, of queries from the chunk's start, of keys from `first_key`. The queries
            of a sub-sequence are the last of its keys.
    """

    first_key: int
    end: int
    borders: PackedSeqParams


@dataclass
class ContextSeqParams(PackedSeqParams):
    """Borders of a whole pack of which this rank has two chunks."""

    chunks: tuple[Chunk, ...] = ()


def context_borders(packed: PackedSeqParams) -> PackedSeqParams:
    """`packed` with this rank's chunks; unchanged where no rank shares the row."""
    group = parallel_state.get_context_parallel_group()
    if dist.get_world_size(group) == 1:
        return packed
    return with_chunks(packed, dist.get_rank(group), dist.get_world_size(group))


def with_chunks(packed: PackedSeqParams, rank: int, ranks: int) -> ContextSeqParams:
    """`packed` with the chunks of context rank `rank` of `ranks`."""
    borders = packed.cu_seqlens_q.tolist()
    length = borders[-1] // (2 * ranks)
    chunks = tuple(
        _chunk(borders, number * length, (number + 1) * length, packed.cu_seqlens_q.device)
        for number in chunks_of(rank, ranks)
    )
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    return ContextSeqParams(**fields, chunks=chunks)


def _chunk(borders: list[int], start: int, end: int, device: torch.device) -> Chunk:
    queries, keys = chunk_borders(borders, start, end)

    def from_zero(places: list[int]) -> tuple[Tensor, int]:
        tensor = torch.tensor([place - places[0] for place in places], dtype=torch.int32, device=device)
        return tensor, max(b - a for a, b in itertools.pairwise(places))

    (cu_q, longest_q), (cu_kv, longest_kv) = from_zero(queries), from_zero(keys)
    lengths = {"max_seqlen_q": longest_q, "max_seqlen_kv": longest_kv}
    return Chunk(keys[0], end, PackedSeqParams("thd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, **lengths))


def split_row(row: Tensor, dim: int = 0) -> Tensor:
    """This rank's share [.., T / C, ..] of a row [.., T, ..] that every context rank has.

    The gradient is of this rank's share only, zeros elsewhere.

    Raises:
        ConfigError: T is no multiple of 2C.
    """
    group = parallel_state.get_context_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1:
        return row
    advice = f"a multiple of {2 * ranks} (2 x strategy.context: each rank has two chunks); pad the packs"
    require(row.shape[dim] % (2 * ranks) == 0, "tokens of a pack", advice, row.shape[dim])
    chunks = row.chunk(2 * ranks, dim)
    return torch.cat([chunks[number] for number in chunks_of(rank, ranks)], dim)


def gather_row(part: Tensor) -> Tensor:
    """The reverse of `split_row`: [T / C, ..] -> [T, ..] on every context rank.

    Each rank may use the whole row in its own way: what they do with a token adds up in its gradient.
    """
    group = parallel_state.get_context_parallel_group()
    return part if dist.get_world_size(group) == 1 else _GatherRow.apply(part, group)


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        gathered = part.new_empty((ranks * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        parts = gathered.view(ranks, 2, -1, *part.shape[1:])
        return torch.cat((parts[:, 0].flatten(0, 1), parts[:, 1].flip(0).flatten(0, 1)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (row,) = gradients
        ranks = dist.get_world_size(ctx.group)
        early, late = row.view(2, ranks, -1, *row.shape[1:])
        parts = torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)  # from [C, 2, T / 2C, ..]
        part = row.new_empty((row.shape[0] // ranks, *row.shape[1:]))
        dist.reduce_scatter_tensor(part, parts, group=ctx.group)
        return part, None
