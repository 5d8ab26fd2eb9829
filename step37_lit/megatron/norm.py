"""Zero-centred RMSNorm for megatron's norm slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ZeroCentredRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` over the last dimension, computed in fp32 and returned in x's dtype.

    The stored weight is gain - 1 (zeros at the start), as in the hub's checkpoints.

    Args:
        config: megatron's configuration; only `sequence_parallel` and `params_dtype` are read.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank norms other tokens: megatron sums gradients so marked.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)
