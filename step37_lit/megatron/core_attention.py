"""Core attention behind one slot: PyTorch's SDPA (any device), flash-attn's varlen kernels (CUDA).

T = tokens of the pack, N = query heads, G = key/value heads, D = head_dim.

Both take q [T, N, D], k and v [T, G, D] of one pack and mask by its borders: a token sees the tokens of its own
sub-sequence up to itself, on sliding layers the last `window` of them. Of a pack that is shared by context ranks they
take this rank's tokens, and gather the keys and values of the others.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from step37_lit import determinism
from step37_lit.errors import require
from step37_lit.megatron.context import ContextSeqParams, gather_row

AttentionBackend = Literal["auto", "sdpa", "flash"]


class CoreAttention(nn.Module):
    """What both back ends share: context parallelism, and the step of decoding, where every row has a few queries.

    Args:
        softmax_scale: Factor on the logits.
    """

    def __init__(self, softmax_scale: float):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams) -> Tensor:
        """[T, N, D] of q [T, N, D], k and v [T, G, D]; T is this rank's share of the pack."""
        if not isinstance(packed_seq_params, ContextSeqParams):
            return self.attend(query, key, value, packed_seq_params)
        keys, values = gather_row(torch.stack((key, value), dim=1)).unbind(1)
        chunks = packed_seq_params.chunks
        return torch.cat(
            [
                self.attend(q, keys[chunk.first_key : chunk.end], values[chunk.first_key : chunk.end], chunk.borders)
                for q, chunk in zip(query.chunk(len(chunks)), chunks, strict=True)
            ]
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        """Attention of sub-sequences, each of whose queries are the last of its keys.

        Args:
            query: [queries, N, D].
            key, value: [keys, G, D].
            borders: Of queries (`cu_seqlens_q`) and keys (`cu_seqlens_kv`).

        Returns:
            [queries, N, D].
        """
        raise NotImplementedError

    def attend_rows(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """One or a few queries for each of R rows over C cached positions.

        Args:
            query: [R, m, N, D].
            keys, values: [R, C, G, D].
            mask: [R, m, C], added to the logits.

        Returns:
            [R, m, N, D].
        """
        # The queries of a group stand where a kernel expects positions, so that no key is copied for them.
        rows, tokens, heads, _ = query.shape
        groups = keys.shape[2]
        grouped = query.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [R, G, N / G, m, D]
        each = mask[:, None].expand(rows, heads // groups, *mask.shape[1:]).flatten(1, 2)  # no copy where m = 1
        out = F.scaled_dot_product_attention(
            grouped.flatten(2, 3),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=each[:, None],
            scale=self.softmax_scale,
        )
        return out.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class SDPACoreAttention(CoreAttention):
    """One `scaled_dot_product_attention` a sub-sequence; long sliding ones in blocks of one window.

    Args:
        softmax_scale: Factor on the logits.
        window: Keys that a query sees, itself included; None for all before it.
        cp_comm_type: megatron's name for ways of context parallelism, of which there is one here; not used.
        pg_collection: megatron's process groups; not used.
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        lengths_q, lengths_k = borders.cu_seqlens_q.diff().tolist(), borders.cu_seqlens_kv.diff().tolist()
        repeats = query.shape[1] // key.shape[1]
        # [N, tokens, D]; the kernel for CPUs has no grouped heads
        q = query.transpose(0, 1).split(lengths_q, 1)
        k = key.transpose(0, 1).repeat_interleave(repeats, dim=0).split(lengths_k, 1)
        v = value.transpose(0, 1).repeat_interleave(repeats, dim=0).split(lengths_k, 1)
        pieces = [self._attend(q_i, k_i, v_i) for q_i, k_i, v_i in zip(q, k, v, strict=True) if q_i.shape[1] > 0]
        return torch.cat(pieces, dim=1).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sub-sequence: q [N, L, D] are the last of k and v [N, before + L, D]."""
        length, before = q.shape[1], k.shape[1] - q.shape[1]
        window = k.shape[1] if self.window is None else self.window
        if before == 0 and length <= window:
            return self._sdpa(q, k, v, mask=None)
        blocks = []
        for start in range(before, before + length, window):
            end = min(start + window, before + length)
            first = max(0, start - window + 1)
            queries = torch.arange(start, end, device=q.device)[:, None]
            keys = torch.arange(first, end, device=q.device)[None]
            mask = (keys <= queries) & (keys > queries - window)
            blocks.append(self._sdpa(q[:, start - before : end - before], k[:, first:end], v[:, first:end], mask))
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, borders: PackedSeqParams) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=borders.cu_seqlens_q,
            cu_seqlens_k=borders.cu_seqlens_kv,
            max_seqlen_q=borders.max_seqlen_q,
            max_seqlen_k=borders.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=True,  # as here, with fewer queries than keys: the last query sees the last key
            window_size=self.window_size,
            deterministic=determinism.enabled(),
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
