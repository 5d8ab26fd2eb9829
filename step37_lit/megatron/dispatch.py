"""From tokens to the experts that their router chose, where one rank has all experts and all of its tokens.

megatron's all-to-all dispatcher does the same for any number of ranks: an all-to-all over the experts' ranks, an
all-gather over the expert-tensor ranks that share an expert's matrices, and back by reduce-scatter and all-to-all.
Between no ranks it still sorts, splits and exchanges, which costs more than the experts of a step of decoding.

T = tokens, H = hidden, E = experts, n = tokens x experts that each was sent to.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class MixtureOfExperts(MoELayer):
    """megatron's layer, whose tokens stay where they are if no other rank shares the experts.

    Without sequence parallelism all tensor ranks send the same tokens to the experts (and expert-tensor ranks gather
    each as often): the result is right, and the experts' gradients are this many times too large (`data_parallel.wrap`
    divides them).
    """

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules, pg_collection: ProcessGroupCollection):
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection)
        if not config.sequence_parallel:
            # Only its size is read, where megatron refuses to train so for the sake of speed.
            self.attn_tp_group = _OneRank()
        if pg_collection.tp_ep.size() == 1:
            self.token_dispatcher = LocalTokenDispatcher(config, pg_collection)


class _OneRank:
    """Stands in for a process group."""

    def size(self) -> int:
        return 1


class LocalTokenDispatcher(MoETokenDispatcher):
    """Gathers each expert's tokens and adds up what comes back; nothing is dropped or sent."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 1, H], [T, E] bool, [T, E] -> [n, H] sorted by expert, [n] routing weights."""
        self._shape = tokens.shape
        by_expert = routing_map.T.contiguous()
        self._counts = by_expert.sum(dim=1)
        experts, self._places = by_expert.nonzero(as_tuple=True)
        return tokens.view(-1, tokens.shape[-1]).index_select(0, self._places), probs[self._places, experts]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden_states, self._counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[n, H] -> [T, 1, H]."""
        out = hidden_states.new_zeros(self._shape[:-1].numel(), self._shape[-1])
        return out.index_add_(0, self._places, hidden_states).view(self._shape)
