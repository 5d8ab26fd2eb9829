"""Initial weights by name: the same seed gives the same model in every layout.

Each parameter is drawn from a generator of its own, seeded by (seed, name of the weight in the whole model), at its
full size; a rank keeps its share. So weights do not depend on how many ranks there are, nor on the order of building.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn

from step37_lit.errors import require
from step37_lit.model.experts import GroupedExperts
from step37_lit.model.mtp import EmbeddingHiddenProjection
from step37_lit.model.step37_model import Step37Model


def mark_tensor_parallel_weights(model: nn.Module) -> None:
    """Sets megatron's attributes on split weights: clipping counts them on every rank, others on the first only.

    megatron sets them while it initialises weights, which this project does itself; newer versions in any case.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            if not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
            require(module.weight.partition_dim == dim, "megatron's partition_dim", dim, module.weight.partition_dim)
    for module in model.modules():
        if isinstance(module, MLP):  # linear_fc1 holds [gate; up], and a rank its rows of both
            module.linear_fc1.weight.partition_stride = 2


def initialize_weights(model: Step37Model, seed: int) -> None:
    """Draws every weight: normal(0, init_std) for matrices of the decoder, with 1 / sqrt(2 layers) on those that
    write to the residual stream (GPT-2's rule, as megatron does); fan-in scaled normal in the vision tower and the
    projector. Norms, biases and LayerScale keep their start values."""
    text = model.step37.text
    residual_std = text.init_std / math.sqrt(2 * text.num_layers)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            name = global_name(model, module_name)
            if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
                std = residual_std if isinstance(module, RowParallelLinear) else text.init_std
                _draw_split(module, f"{name}.weight", std, seed)
            elif isinstance(module, GroupedExperts):
                _draw_experts(module, name, text.init_std, residual_std, seed)
            else:
                for weight_name, weight in module.named_parameters(recurse=False):
                    if weight.dim() >= 2:
                        of_decoder = isinstance(module, TopKRouter | EmbeddingHiddenProjection)
                        std = text.init_std if of_decoder else 1 / math.sqrt(weight[0].numel())
                        _draw(weight, f"{name}.{weight_name}", std, seed)
                if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                    module.bias.zero_()


def global_name(model: Step37Model, name: str) -> str:
    """A module's or parameter's name with the layer's number in the whole decoder, whatever stage holds it."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local, _, rest = name.removeprefix(prefix).partition(".")
    assert model.decoder is not None
    number = model.decoder.layers[int(local)].layer_number - 1
    return f"{prefix}{number}.{rest}" if rest else f"{prefix}{number}"


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def _normal(shape: Sequence[int], name: str, std: float, seed: int, device: torch.device) -> Tensor:
    drawn = torch.empty(shape, dtype=torch.float32, device=device)
    return drawn.normal_(0.0, std, generator=_generator(name, seed, device))


def _draw(weight: Tensor, name: str, std: float, seed: int) -> None:
    weight.copy_(_normal(weight.shape, name, std, seed, weight.device))


def _draw_split(module: nn.Module, name: str, std: float, seed: int) -> None:
    weight, ranks, rank = module.weight, get_pg_size(module.tp_group), get_pg_rank(module.tp_group)
    shape = list(weight.shape)
    shape[weight.partition_dim] *= ranks
    weight.copy_(tensor_share(weight, _normal(shape, name, std, seed, weight.device), ranks, rank))


def tensor_share(weight: nn.Parameter, full: Tensor, ranks: int, rank: int) -> Tensor:
    """What one of the tensor ranks (of experts: expert-tensor ranks) has of a split weight; `weight` carries how it is
    split."""
    blocks = full.chunk(weight.partition_stride, dim=weight.partition_dim)
    shares = [block.chunk(ranks, dim=weight.partition_dim)[rank] for block in blocks]
    return torch.cat(shares, dim=weight.partition_dim)


def _draw_experts(module: GroupedExperts, name: str, std: float, residual_std: float, seed: int) -> None:
    ranks, rank = get_pg_size(module.tp_group), get_pg_rank(module.tp_group)
    for weight, suffix, own_std in ((module.weight1, "weight1", std), (module.weight2, "weight2", residual_std)):
        shape = [1, *weight.shape[1:]]
        shape[weight.partition_dim] *= ranks
        for local, expert in enumerate(module.expert_indices):
            full = _normal(shape, f"{name}.{suffix}.{expert}", own_std, seed, weight.device)
            weight[local].copy_(tensor_share(weight, full, ranks, rank)[0])
