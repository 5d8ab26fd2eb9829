"""Core attention: SDPA against the definition, flash-attn against SDPA where CUDA is there."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from step37_lit.errors import ConfigError
from step37_lit.megatron.core_attention import FlashCoreAttention, SDPACoreAttention, core_attention_of

HEADS, GROUPS, HEAD_DIM = 6, 2, 32
LENGTHS = (1, 40, 7, 16, 17, 64)


def borders(lengths: tuple[int, ...], device: str = "cpu") -> PackedSeqParams:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams("thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """softmax(q k^T scale + mask) v over the whole pack with one dense mask."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(q.shape[0])
    seen = (sequence[:, None] == sequence[None]) & (place[None] <= place[:, None])
    if window is not None:
        seen &= place[None] > place[:, None] - window
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    logits = torch.einsum("inh,jnh->nij", q, k) * scale
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nij,jnh->inh", weights, v)


def random_qkv(total: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(total, HEADS, HEAD_DIM), (total, GROUPS, HEAD_DIM), (total, GROUPS, HEAD_DIM)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in sizes]


@pytest.mark.parametrize("window", [None, 1, 16, 1000])
def test_sdpa_is_the_definition(window: int | None) -> None:
    """Outputs and gradients; sub-sequences shorter than, equal to and longer than the window. Measured 4e-7."""
    scale = HEAD_DIM**-0.5
    inputs, reference_inputs = (random_qkv(sum(LENGTHS), seed=3) for _ in range(2))
    out = SDPACoreAttention(scale, window)(*inputs, borders(LENGTHS))
    expected = by_definition(*reference_inputs, LENGTHS, window, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, reference in zip(inputs, reference_inputs, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=2e-5)


def test_empty_sub_sequences_change_nothing() -> None:
    q, k, v = random_qkv(12, seed=5)
    attention = SDPACoreAttention(0.2, 4)
    torch.testing.assert_close(attention(q, k, v, borders((0, 5, 0, 7, 0))), attention(q, k, v, borders((5, 7))))


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="flash-attn's kernels need CUDA and the package flash-attn",
)
@pytest.mark.parametrize("window", [None, 16])
def test_flash_equals_sdpa(window: int | None) -> None:
    q, k, v = random_qkv(sum(LENGTHS), seed=6, dtype=torch.bfloat16, device="cuda")
    scale, packed = HEAD_DIM**-0.5, borders(LENGTHS, "cuda")
    flash = FlashCoreAttention(scale, window)(q, k, v, packed)
    torch.testing.assert_close(flash, SDPACoreAttention(scale, window)(q, k, v, packed), rtol=0, atol=2e-2)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_without_the_package_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="attention_backend: expected sdpa, or the package flash-attn"):
        core_attention_of("flash")
