"""Rotary position embedding of the text decoder: one table a pack, for both kinds of attention.

T = tokens of the pack, R = rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from step37_lit.config import ATTENTION_KINDS, AttentionKind, Llama3Scaling, TextConfig


def inverse_frequencies(text: TextConfig, kind: AttentionKind, device: torch.device | None = None) -> Tensor:
    """fp32 [R / 2]: radians per position of each rotated pair, theta^(-2i / R); llama3-scaled if the config says so."""
    rope, rotary_dim = text.rope_of(kind), text.rotary_dim(kind)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = 1.0 / rope.theta**exponents
    return frequencies if rope.scaling is None else _llama3(frequencies, rope.scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slows low frequencies by `factor`, leaves high ones, blends between (Llama 3.1's published rule)."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # over the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotary_table(text: TextConfig, position_ids: Tensor) -> Tensor:
    """Cosines and sines of every position for both kinds of attention.

    One tensor for all layers: megatron's block hands a single `rotary_pos_emb` to each of them, and a layer takes
    the row of its own kind.

    Args:
        text: The text decoder.
        position_ids: [1, T] int64; restart at 0 in each sub-sequence.

    Returns:
        fp32 [2 kinds (order of `ATTENTION_KINDS`), 2 (cos, sin), T, widest R / 2]; columns beyond a kind's own R / 2
        are never read.
    """
    positions = position_ids[0].float()
    width = max(text.rotary_dim(kind) for kind in ATTENTION_KINDS) // 2
    table = torch.zeros(len(ATTENTION_KINDS), 2, positions.numel(), width, device=positions.device)
    for row, kind in enumerate(ATTENTION_KINDS):
        angles = torch.outer(positions, inverse_frequencies(text, kind, positions.device))
        table[row, 0, :, : angles.shape[1]] = angles.cos()
        table[row, 1, :, : angles.shape[1]] = angles.sin()
    return table


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first R channels of each head, half-split layout: channel i turns with channel i + R / 2.

    Args:
        x: [T, heads, head_dim].
        cos: [T, R / 2]; R may be less than head_dim, the channels behind are left alone.
        sin: [T, R / 2].
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
