"""Feed-forward parts of a decoder layer: dense SwiGLU, router, routed experts, shared expert.

n = tokens (of all local experts where routed), H = hidden, F = inner width (of a rank, where ranks share an expert's
matrices), E = experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from step37_lit.megatron.matmul import grouped_matmul
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.model import recompute


def swiglu(gate_and_up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up of `[gate, up]` in the last dimension; `limit` clamps *after* the activation:
    min(silu(gate), limit) * clamp(up, -limit, limit)."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    gate = F.silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return gate * up


class DenseMLP(MLP):
    """SwiGLU of a dense layer: megatron's MLP with the model's clamp.

    Args:
        limit: Clamp of `swiglu`, or None.
        tp_group: Ranks that share the matrices.
        recompute: Compute `swiglu` again in the backward pass.
    """

    def __init__(
        self,
        config: Step37TransformerConfig,
        submodules: MLPSubmodules,
        limit: float | None,
        tp_group: ProcessGroup,
        recompute: bool = False,
    ):
        super().__init__(
            config=config, submodules=submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group
        )
        self.limit, self.recompute = limit, recompute

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(recompute.run(self.recompute, swiglu, gate_and_up, self.limit))


class SharedExpert(SharedExpertMLP):
    """The expert that every token of a MoE layer passes; its output is added to the routed ones'.

    Args:
        limit: Clamp of `swiglu`, or None.
        recompute: Compute `swiglu` again in the backward pass.
    """

    def __init__(
        self,
        config: Step37TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        limit: float | None,
        pg_collection: ProcessGroupCollection,
        recompute: bool = False,
    ):
        super().__init__(config=config, submodules=submodules, gate=gate, pg_collection=pg_collection)
        self.limit, self.recompute = limit, recompute

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(recompute.run(self.recompute, swiglu, gate_and_up, self.limit))[0]


class Router(TopKRouter):
    """Sigmoid scores in fp32; top-k of score + `expert_bias`; weights are the scores alone, normalised, scaled.

    The arithmetic is megatron's. `expert_bias` is a buffer: it gets no gradient, and moves by
    `router_bias_update_rate * sign(mean load - load)` when the gradients of a step are finalised.
    """

    def gating(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # megatron compiles this counter with torch.compile, which costs more than it saves on small models.
        if torch.is_grad_enabled() and not recompute.is_recomputing():
            with torch.no_grad():
                counted = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
                self.local_tokens_per_expert += counted.sum(dim=0)


class GroupedExperts(MegatronModule):
    """The routed experts of this rank as two stacked matrices and one grouped matmul each.

    Where expert-tensor ranks share the matrices, each has its rows of gate and of up and its columns of the second one:
    what comes out is a part of a sum, which the dispatcher completes.

    Args:
        num_local_experts: Experts of this rank.
        config: megatron's configuration.
        limit: Clamp of `swiglu`, or None.
        pg_collection: megatron's process groups.
        recompute: Compute `swiglu` again in the backward pass.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Step37TransformerConfig,
        limit: float | None,
        pg_collection: ProcessGroupCollection,
        recompute: bool = False,
    ):
        super().__init__(config=config)
        first = get_pg_rank(pg_collection.ep) * num_local_experts
        self.expert_indices = range(first, first + num_local_experts)  # over the whole layer
        self.tp_group = pg_collection.expt_tp
        hidden, dtype = config.hidden_size, config.params_dtype
        inner = config.moe_ffn_hidden_size // get_pg_size(self.tp_group)
        self.limit, self.recompute = limit, recompute
        self.weight1 = nn.Parameter(torch.empty(num_local_experts, 2 * inner, hidden, dtype=dtype))
        self.weight2 = nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=dtype))
        for weight, dim, blocks in ((self.weight1, 1, 2), (self.weight2, 2, 1)):  # weight1 holds [gate; up]
            marks: Any = weight  # attributes that megatron reads off a parameter
            marks.allreduce = False  # reduced over the expert data-parallel group
            marks.tensor_model_parallel = True  # every rank's share counts in the clipped norm
            marks.partition_dim, marks.partition_stride = dim, blocks  # over the expert-tensor ranks

    grouped_matmul = staticmethod(grouped_matmul)  # `inference_mode` puts a faster one in its place

    def forward(self, hidden_states: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Each token through its expert, times its routing weight.

        Args:
            hidden_states: [n, H], sorted by expert.
            tokens_per_expert: [E] int, sums to n.
            probs: [n] routing weights.

        Returns:
            [n, H] and no bias.
        """
        gate_and_up = self.grouped_matmul(hidden_states, self.weight1, tokens_per_expert)
        inner = recompute.run(self.recompute, self._weighted_swiglu, gate_and_up, probs)
        return self.grouped_matmul(inner, self.weight2, tokens_per_expert), None

    def _weighted_swiglu(self, gate_and_up: Tensor, probs: Tensor) -> Tensor:
        return (swiglu(gate_and_up, self.limit) * probs.unsqueeze(-1)).to(gate_and_up.dtype)
