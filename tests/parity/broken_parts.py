"""Parts of the model with one thing wrong each, for `mutations.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step37_lit.hub import conversions
from step37_lit.hub.conversions import Shape
from step37_lit.megatron import norm
from step37_lit.model import step37_model, vision_tower

original_rotary_2d = vision_tower.rotary_2d
original_normalise = vision_tower.normalise
original_interpolate = F.interpolate
original_borders = step37_model.pack_borders
original_table = step37_model.rotary_table


def clamp_before_activation(gate_and_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up


def clamp_gate_only(gate_and_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=limit) * up if limit is not None else F.silu(gate) * up


def normalised(scores: Tensor, chosen: Tensor) -> Tensor:
    kept = scores * chosen
    return 3.0 * kept / kept.sum(-1, keepdim=True)


def rows_and_columns_swapped(config, rows, columns, device):
    table = original_rotary_2d(config, rows, columns, device)
    first, second = table.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def half_split_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2), rest), -1)


def one_sequence(input_ids, cu_seqlens, max_seq_len, packed_seq_params):
    return original_borders(input_ids, None, None, None)


def reversed_normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return original_normalise(pixels.flip(0), dtype)


class OpenGate(nn.Module):
    """A gate that lets everything through; its weight stays a parameter."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.weight = gate.weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return 0 * F.linear(x, self.weight) + 30.0, None


def plain_norm(self: norm.ZeroCentredRMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def resampled_with_align_corners(table: Tensor, **options: object) -> Tensor:
    return original_interpolate(table, **(options | {"align_corners": True}))


def cut(table: Tensor, size: tuple[int, int], **options: object) -> Tensor:
    return table[..., : size[0], : size[1]]


def positions_at_zero(text, position_ids: Tensor) -> Tensor:
    return original_table(text, torch.zeros_like(position_ids))


def not_causal(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=self.softmax_scale)[0]


def one_behind_the_other(self: conversions.FuseQKV, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    return list(fused.split([shape[0] for shape in shapes]))


def up_and_gate(self: conversions.GateUp, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    return list(fused.chunk(2, dim=-2))[::-1]
