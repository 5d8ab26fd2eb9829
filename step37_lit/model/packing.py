"""Borders of the sub-sequences of a pack, in megatron's form.

T = tokens of the pack, n = sub-sequences.
"""

from __future__ import annotations

import itertools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def pack_borders(
    input_ids: Tensor, cu_seqlens: Tensor | None, max_seq_len: int | None, packed_seq_params: PackedSeqParams | None
) -> PackedSeqParams:
    """The pack's borders from whichever form is given; one sequence where none is.

    Raises:
        ValueError: more than one row, borders that do not run from 0 to T in ascending order, or two forms that
            differ.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected [1, T], found {list(input_ids.shape)}")
    if packed_seq_params is not None:
        given = packed_seq_params.cu_seqlens_q
        if cu_seqlens is not None and not torch.equal(cu_seqlens.to(given), given):
            raise ValueError(
                f"cu_seqlens and packed_seq_params differ: {cu_seqlens.tolist()} and {given.tolist()}; give one of them"
            )
        cu_seqlens = given
    length = input_ids.shape[1]
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
    borders = cu_seqlens.tolist()
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != length:
        raise ValueError(f"cu_seqlens: expected to run from 0 to T = {length}, found {borders}")
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    if min(lengths) < 0:
        raise ValueError(f"cu_seqlens: expected ascending borders, found {borders}")
    longest = max(lengths)
    if max_seq_len is not None and max_seq_len < longest:
        raise ValueError(f"max_seq_len: expected at least {longest} (the longest sub-sequence), found {max_seq_len}")
    return _borders(cu_seqlens.to(torch.int32), longest)


def borders_of(counts: Tensor, device: torch.device) -> PackedSeqParams:
    """Borders of sub-sequences of these lengths, int64 [n] on the CPU."""
    cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(device, torch.int32)
    return _borders(cu_seqlens, int(counts.max()))


def _borders(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def following(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Values of the following position of the same sub-sequence, zeros where there is none.

    Args:
        values: [T, ...].
        cu_seqlens: [n + 1] borders, 0 to T.

    Returns:
        [T, ...]; k times over, the value k positions ahead.
    """
    is_last = torch.zeros(len(values) + 1, dtype=torch.bool, device=values.device)
    is_last[cu_seqlens.long()] = True  # position t is its sub-sequence's last where t + 1 is a border
    is_last = is_last[1:].view(-1, *[1] * (values.dim() - 1))
    return torch.cat((values[1:], values[:1])).masked_fill(is_last, 0)


def restarting_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, T] int64: positions that restart at 0 at each border."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return (torch.arange(length, device=cu_seqlens.device) - starts).unsqueeze(0)
