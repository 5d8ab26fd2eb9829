"""Core attention behind one slot: PyTorch's SDPA (any device), flash-attn's varlen kernels (CUDA).

T = tokens of the pack, N = query heads, G = key/value heads, D = head_dim.

Both take q [T, N, D], k and v [T, G, D] of one pack and mask by its borders: a token sees the tokens of its own
sub-sequence up to itself, on sliding layers the last `window` of them.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from step37_lit.config import require

AttentionBackend = Literal["auto", "sdpa", "flash"]


class CoreAttention(nn.Module):
    """What both back ends share: the step of decoding, where every row has one query.

    Args:
        softmax_scale: Factor on the logits.
    """

    def __init__(self, softmax_scale: float):
        super().__init__()
        self.softmax_scale = softmax_scale

    def attend_rows(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """One query for each of R rows over C cached positions.

        Args:
            query: [R, N, D].
            keys, values: [R, C, G, D].
            seen: [R, C] bool, which positions count.

        Returns:
            [R, N, D].
        """
        # The queries of a group stand where a kernel expects positions, so that no key is copied for them.
        grouped = query.view(query.shape[0], keys.shape[2], -1, query.shape[2])
        keys, values, mask = keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None, :]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.softmax_scale)
        return out.reshape(query.shape)


class SDPACoreAttention(CoreAttention):
    """One `scaled_dot_product_attention` a sub-sequence; long sliding ones in blocks of one window.

    Args:
        softmax_scale: Factor on the logits.
        window: Keys that a query sees, itself included; None for all before it.
        cp_comm_type: megatron's name for the communication of context parallelism; not used by one context rank.
        pg_collection: megatron's process groups; not used by one context rank.
    """

    def __init__(
        self,
        softmax_scale: float,
        window: int | None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(softmax_scale)
        self.window = window

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams) -> Tensor:
        """[T, N, D]."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        repeats = query.shape[1] // key.shape[1]
        # [N, T, D]; the kernel for CPUs has no grouped heads
        q = query.transpose(0, 1)
        k = key.transpose(0, 1).repeat_interleave(repeats, dim=0)
        v = value.transpose(0, 1).repeat_interleave(repeats, dim=0)
        pieces = [
            self._attend(q_i, k_i, v_i)
            for q_i, k_i, v_i in zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
            if q_i.shape[1] > 0
        ]
        return torch.cat(pieces, dim=1).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sub-sequence, [N, L, D]."""
        length = q.shape[1]
        if self.window is None or length <= self.window:
            return self._sdpa(q, k, v, mask=None)
        blocks = []
        for start in range(0, length, self.window):
            end = min(start + self.window, length)
            first = max(0, start - self.window + 1)
            queries = torch.arange(start, end, device=q.device)[:, None]
            keys = torch.arange(first, end, device=q.device)[None]
            mask = (keys <= queries) & (keys > queries - self.window)
            blocks.append(self._sdpa(q[:, start:end], k[:, first:end], v[:, first:end], mask))
        return torch.cat(blocks, dim=1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # A batch dimension of 1: the fused kernels for CPUs only take four dimensions.
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return out[0]


class FlashCoreAttention(CoreAttention):
    """flash-attn's `flash_attn_varlen_func` over the whole pack; arguments as `SDPACoreAttention`."""

    def __init__(
        self,
        softmax_scale: float,
        window: int | None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(softmax_scale)
        # flash-attn counts the keys to the left of the query, without the query itself; -1 is no limit
        self.window_size = (-1, 0) if window is None else (window - 1, 0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams) -> Tensor:
        """[T, N, D]."""
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=packed_seq_params.cu_seqlens_q,
            cu_seqlens_k=packed_seq_params.cu_seqlens_kv,
            max_seqlen_q=packed_seq_params.max_seqlen_q,
            max_seqlen_k=packed_seq_params.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=self.window_size,
        )


def core_attention_of(backend: AttentionBackend) -> type[nn.Module]:
    """The class for the slot: `auto` is flash-attn on CUDA and SDPA elsewhere.

    Raises:
        ConfigError: flash-attn is wanted (or CUDA is there) and the package is not installed.
    """
    if backend == "sdpa" or (backend == "auto" and not torch.cuda.is_available()):
        return SDPACoreAttention
    installed = importlib.util.find_spec("flash_attn") is not None
    require(installed, "attention_backend", "sdpa, or the package flash-attn (extra `flash`)", backend)
    return FlashCoreAttention
