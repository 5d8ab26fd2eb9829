"""How many tokens each routed expert got in a global step: megatron's own counters, read before it resets them.

megatron's routers count while a step runs forward. As the gradients are finalised, megatron moves the router's bias by
the counts and sets them to zero, so that nothing is left of them when the step is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.model.experts import Router
from step37_lit.model.step37_model import Step37Model


@dataclass(frozen=True)
class LayerLoad:
    """One layer's experts in one global step.

    Args:
        layer: Number of the layer in the whole decoder, from 0.
        tokens: Tokens that each expert got, over all ranks; a token counts for each of its `top_k` experts. The padded
            tail of a pack counts too: it is routed as everything else, and the bias moves by it.
        bias: The router's bias after the step.
    """

    layer: int
    tokens: list[int]
    bias: list[float]


class ExpertLoadRecording:
    """Records the next `train_step` of a model that is trained; all ranks of the model make one for the same step.

    Args:
        model: This rank's part.
    """

    def __init__(self, model: Step37Model | ModelChunks):
        self._model, self._text = model, model.config.step37.text
        self._counts: dict[int, Tensor] = {}  # by layer, of this rank
        self._finalize = model.config.finalize_model_grads_func
        model.config.finalize_model_grads_func = self._read_and_finalize

    def _read_and_finalize(self, *args: Any, **kwargs: Any) -> None:
        self._model.config.finalize_model_grads_func = self._finalize
        self._counts = {layer: router.local_tokens_per_expert.clone() for layer, router in self._routers().items()}
        self._finalize(*args, **kwargs)

    def _routers(self) -> dict[int, Router]:
        """This stage's routers by the number of their layer."""
        decoders: list[Any] = [chunk.decoder for chunk in chunks_of(self._model)]
        layers = [layer for decoder in decoders for layer in decoder.layers if isinstance(layer.mlp, MoELayer)]
        return {layer.layer_number - 1: layer.mlp.router for layer in layers}

    def gather(self) -> list[LayerLoad]:
        """Every layer's load after the step, the same on every rank; all ranks must call it."""
        layers = self._text.moe_layers
        device = next(self._model.parameters()).device
        # Ranks see different tokens (data, experts, parts of a sequence) or hold different layers: a sum is right. But
        # without sequence parallelism tensor ranks see the same, and one of them counts. A bias is the same on all
        # ranks of a stage, and one of them gives it.
        table = torch.zeros(2, len(layers), self._text.num_experts, dtype=torch.float64, device=device)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counts = first or self._model.config.sequence_parallel
        gives_bias = first and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        for layer, router in self._routers().items():
            row = layers.index(layer)
            if counts:
                table[0, row] = self._counts[layer]
            if gives_bias:
                table[1, row] = router.expert_bias
        dist.all_reduce(table)
        tokens, bias = table.cpu()
        return [LayerLoad(n, tokens[i].long().tolist(), bias[i].tolist()) for i, n in enumerate(layers)]
